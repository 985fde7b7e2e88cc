"""Tidy rows of finished runs, one for each tested run, and the scores of their single examples.

Knows no training and no method by name.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from promptuary import files, metrics
from promptuary.comparing.job import repeat_command
from promptuary.comparing.ledger import Ledger, Unit
from promptuary.errors import FileFormatError

ROWS, SUMMARY, SCORES = "rows.jsonl", "summary.json", "scores"
"""Files of a comparison, and the folder with the scores of single examples."""

MEANS = ("accuracy", "exact_match", "token_f1", "mean_squared_error")
"""Metrics that are means over examples, so that examples can be drawn again."""

COPIED = (
    "steps", "best_step", "seconds_per_step_median", "train_seconds", "trainable_parameters", "added_tokens",
    "peak_memory_bytes", "forward_calls", "split_hash",
)  # fmt: skip
"""What a row takes from result.json as it is."""


def row(ledger: Ledger, unit: Unit, facts: Mapping[str, Any]) -> dict[str, Any]:
    """One tidy row.

    Args:
        ledger: of the comparison.
        unit: a tested run.
        facts: its result.json.
    """
    run, chosen = ledger.run(unit), ledger.chosen(unit.group)
    assert run is not None
    assert chosen is not None
    folder, primary, group = Path(run.out), facts["primary_metric"], unit.group
    how = ledger.job.config.tuning
    learnt = next((one for name in ("prompt", "weights") if (one := folder / name).is_dir()), None)
    return {
        "backbone": group.backbone,
        "task": group.task,
        "method": group.method,
        "budget": group.budget,
        "seed": unit.seed,
        "metric": primary,
        "higher_is_better": metrics.METRICS[primary].higher_is_better,
        "score": facts["metrics"][primary],
        "validation": facts["validation"][primary],
        "metrics": facts["metrics"],
        "test_examples": facts["examples"]["test"],
        **{name: facts.get(name) for name in COPIED},
        "prompt_bytes": sum(one.stat().st_size for one in learnt.glob("*.safetensors")) if learnt else None,
        "settings": chosen["settings"],
        "trials": group.trials,
        "tuning_runs": group.trials * len(how.seeds) if how is not None else 0,
        "run_hash": facts["run_hash"],
        "folder": str(folder.relative_to(ledger.path)),
        "command": repeat_command(folder),
    }


def remember(out: Path, run: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The score of each test example of a run, kept so that a table need not read every prediction again.

    Args:
        out: folder of the comparison.
        run: folder of the run.
        facts: its result.json.

    Returns:
        `run_hash`, `examples` (a digest of the right answers, so that runs on other examples are told apart) and
        `scores`, one for each example; none where the metric is no mean over examples.

    Raises:
        FileFormatError: the predictions cannot be read.
    """
    kept = out / SCORES / f"{run.name}.json"
    with contextlib.suppress(FileFormatError):
        found = files.read_json(kept)
        if found.get("run_hash") == facts["run_hash"]:
            return found
    said = [json.loads(line) for line in files.read_bytes(run / "predictions.jsonl").splitlines()]
    primary = facts["primary_metric"]
    score = metrics.METRICS[primary].function
    scores = [float(score([one["gold"]], [one["answer"]])) for one in said] if primary in MEANS else []
    content = {
        "run_hash": facts["run_hash"],
        "examples": files.digest(files.canonical([one["gold"] for one in said]))[:16],
        "scores": scores,
    }
    files.write_json(kept, content)
    return content


def collect(ledger: Ledger) -> list[dict[str, Any]]:
    """Rows of all finished runs, in the order of the comparison."""
    units = [unit for unit in ledger.units if unit.seed is not None]
    return [row(ledger, unit, facts) for unit in units if (facts := ledger.result(unit)) is not None]


def write(ledger: Ledger, rows: list[dict[str, Any]]) -> None:
    """Write rows.jsonl."""
    files.write_file(ledger.path / ROWS, "".join(map(files.to_line, rows)).encode())
