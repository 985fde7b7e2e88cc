"""Prompts of words against each other and against vectors: 16 examples per class, RLPrompt's own splits.

Knows no result: every row is written by the command that is noted in it.

    python benchmarks/discrete.py run --data DIR     # results/discrete.jsonl; rows that exist are not run again
    python benchmarks/discrete.py robust --data DIR  # results/robust.jsonl: BATprompt and its start on perturbed texts
    python benchmarks/discrete.py table              # rows -> the tables of benchmarks/README.md

DIR holds `fewshot16/{sst-2,cr}` as RLPrompt's repository has them: 16 per class for training and again for validation,
one test file, of which 400 rows are taken evenly. The task model is a masked BERT-tiny that was tuned for SPLADE; the
policy speaks with SmolLM2-135M. What searches by scoring prompts may score as many as RLPrompt does; vectors take as
many steps, each on 16 rows, with two rates, the better one chosen on validation rows. The test rows are used once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import promptuary
from claims import TEST_ROWS, trained
from foundation import BACKBONES, meta, read, write
from promptuary.backbones.base import BackboneConfig
from promptuary.building import open_backbone
from promptuary.data.load import DataConfig, load
from promptuary.files import to_json
from promptuary.perturbing.kinds import KINDS
from promptuary.robust import robustness

PATH, ROBUST_PATH = (Path(__file__).parent / "results" / name for name in ("discrete.jsonl", "robust.jsonl"))
MODEL, VOICE = "splade_tiny", BACKBONES["smollm2"]["backbone"]["model"]
SEEDS = (13, 21, 42)
"""Splits of RLPrompt; the run's own seed is the same number."""
SETS = {"sst-2": {"0": "bad", "1": "good"}, "cr": {"0": "bad", "1": "good"}}
STEPS, PROMPTS = 60, 17
SCORED = STEPS * PROMPTS
TEXTS = (
    "it was", "all in all , it was", "this is", "in summary , it is", "the movie is", "the product is", "i think it is",
    "overall ,",
)  # fmt: skip
"""Written by hand, without looking at any score."""
INSTRUCTION = (
    "In this task, you are given sentences from reviews. The task is to say whether a review is great or terrible."
)
LONG = {"train": {"steps": STEPS, "evaluate_every": 10}}

METHODS: dict[str, dict[str, Any]] = {
    "no prompt": {"method": {"name": "manual"}},
    "manual": {"method": {"name": "manual", "texts": TEXTS, "placement": "end"}},
    "instruction": {"method": {"name": "manual", "texts": (INSTRUCTION,)}},
    "demonstrations": {"method": {"name": "demonstrations", "count": 4}},
    "random words": {
        "method": {"name": "rlprompt"}, "solver": {"name": "proposals", "population": PROMPTS, "budget": SCORED}, **LONG
    },
    "rlprompt": {
        "method": {"name": "rlprompt"},
        "solver": {"name": "policy", "model": VOICE, "learning_rate": 1e-4, "budget": SCORED},
        **LONG,
    },
    "grips": {"method": {"name": "grips", "init_text": INSTRUCTION}, "solver": {"name": "edits"}, **LONG},
    "prompt tuning, 5 rows": {"method": {"name": "prompt_tuning", "num_virtual_tokens": 5}, **LONG},
    "prompt tuning, 20 rows": {"method": {"name": "prompt_tuning", "num_virtual_tokens": 20}, **LONG},
}  # fmt: skip
RATES = (0.05, 0.2)
START = "instruction"
ROBUST: dict[str, dict[str, Any]] = {
    START: METHODS[START],
    "batprompt": {
        "method": {"name": "batprompt", "init_text": INSTRUCTION},
        "solver": {
            "name": "rewrite", "model": {"model": VOICE}, "attacker": "rule", "explainer": "rule",
            "perturbations": "all", "clean_weight": 0.5, "max_tokens": 60, "longest": 40,
        },
        "train": {"steps": 5, "evaluate_every": 1},
    },
}  # fmt: skip
"""SmolLM2-135M rewrites and paraphrases; rules attack, and say which kinds did harm."""


def settings(name: str, task: str, seed: int, rate: float | None, data: Path) -> dict[str, Any]:
    """One run as a mapping, without its folder."""
    own = json.loads(json.dumps({**METHODS, **ROBUST}[name]))
    if rate is not None:
        own["method"]["prompt_lr"] = rate
    train = {"steps": 1, "threads": 1, "eval_batch_size": 256, "batch_size": 16, **own.pop("train", {})}
    files = {"train": f"16-{seed}/train.tsv", "validation": f"16-{seed}/dev.tsv", "test": "test.tsv"}
    return {
        "task": {
            "name": "classify", "metrics": ["accuracy"], "template": "{text} {mask} .", "labels": SETS[task],
        },
        "data": {
            "source": str(data / "fewshot16" / task), **files, "rename": {"sentence": "text"}, "on_bad_row": "skip",
            "max_length": 64,
        },
        "backbone": BACKBONES[MODEL]["backbone"],
        **own,
        "train": train,
        "seed": seed,
    }  # fmt: skip


def learnt(folder: Path) -> list[dict[str, Any]]:
    """What the log says of every tenth step: rewards, and the entropy of a policy."""
    kept = ("reward", "reward_max", "reward_mean", "best", "entropy", "score", "score_max")
    found = []
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "parts" in row and (row["step"] % 10 == 0 or row["step"] == 1):
            parts = {name: round(value, 4) for name, value in row["parts"].items() if name in kept}
            found.append({"step": row["step"], **parts})
    return found


def once(
    name: str, task: str, seed: int, rate: float | None, data: Path, backbone: Any, *, tested: bool
) -> dict[str, Any]:
    """One run."""
    with tempfile.TemporaryDirectory() as there:
        folder = Path(there) / "run"
        found = trained(settings(name, task, seed, rate, data), backbone, folder, tested=tested)
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        words = {name: result.get(name) for name in ("text", "texts")}
        return {**found, **words, "learnt": learnt(folder)}


def run(data: Path, methods: list[str], sets: list[str], seeds: list[int]) -> None:
    """Every row that is not there yet."""
    backbone = open_backbone(BackboneConfig(**BACKBONES[MODEL]["backbone"]))
    for task in sets:
        for seed in seeds:
            for name in methods:
                cell = [task, name, seed]
                if any(row["cell"] == cell for row in read(PATH)):
                    continue
                rate, effort = None, {}
                if name.startswith("prompt tuning"):
                    tried = [once(name, task, seed, one, data, backbone, tested=False) for one in RATES]
                    scores = [one["validation"]["accuracy"] for one in tried]
                    rate = RATES[scores.index(max(scores))]
                    effort = {"tuning": {"rates": RATES, "validation": scores, "chosen": rate}}
                found = once(name, task, seed, rate, data, backbone, tested=True)
                command = (
                    f'python benchmarks/discrete.py run --data DIR --methods "{name}" --sets {task} --seeds {seed}'
                )
                body = json.loads(to_json(found).decode().replace(str(data), "DIR"))
                write(PATH, {"cell": cell, **effort, **body, **meta(MODEL, command)})
                print(*cell, found["validation"], found["test"], repr(found["text"]), flush=True)


def robust(data: Path, sets: list[str], seeds: list[int]) -> None:
    """Clean scores and those under every perturbation, of the start and of what rewriting made of it."""
    backbone = open_backbone(BackboneConfig(**BACKBONES[MODEL]["backbone"]))
    for task in sets:
        for seed in seeds:
            for name in ROBUST:
                cell = [task, name, seed]
                if any(row["cell"] == cell for row in read(ROBUST_PATH)):
                    continue
                with tempfile.TemporaryDirectory() as there:
                    folder = Path(there) / "run"
                    found = trained(settings(name, task, seed, None, data), backbone, folder)
                    facts = json.loads((folder / "result.json").read_text(encoding="utf-8"))
                    tuned = promptuary.load_prompt(folder, backbone)
                under = robustness(tuned, tests(task, seed, data), seed=0, batch_size=256)
                words = {one: facts.get(one) for one in ("text", "history", "spending")}
                command = f"python benchmarks/discrete.py robust --data DIR --sets {task} --seeds {seed}"
                body = json.loads(
                    to_json({**found, **words, "robustness": under.summary()}).decode().replace(str(data), "DIR")
                )
                write(ROBUST_PATH, {"cell": cell, **body, **meta(MODEL, command)})
                print(*cell, found["validation"], under.clean.scores, under.mean, repr(facts["text"]), flush=True)


def tests(task: str, seed: int, data: Path) -> list[dict[str, Any]]:
    """The test rows that every run is tested on."""
    values = settings("no prompt", task, seed, None, data)["data"]
    rows = list(load(DataConfig(**values), ("text", "label"), torch.Generator()).test)
    return [dict(rows[place * len(rows) // TEST_ROWS]) for place in range(TEST_ROWS)]


def robust_table() -> str:
    """Clean, each kind, mean and worst, and what the change is to the start of the same split."""
    rows = read(ROBUST_PATH)
    kinds = list(KINDS)
    lines = [f"| data | prompt | clean | {' | '.join(kinds)} | mean | worst |", f"|---|---|{'---|' * (len(kinds) + 3)}"]
    for task in SETS:
        for name in ROBUST:
            own = [row["robustness"] for row in rows if row["cell"][:2] == [task, name]]
            if not own:
                continue
            columns = [[100 * one["clean"]["scores"]["accuracy"] for one in own]]
            columns += [[100 * one["perturbed"][kind]["scores"]["accuracy"] for one in own] for kind in kinds]
            columns += [[100 * one["mean"]["score"] for one in own], [100 * one["worst"]["score"] for one in own]]
            cells = [f"{statistics.mean(column):.1f}" for column in columns]
            lines.append(f"| {task} | {name} ({len(own)}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def table() -> str:
    """Test accuracies, and the words that were found."""
    rows = read(PATH)
    lines = [f"| method | {' | '.join(SETS)} | prompts scored | added tokens |", f"|---|{'---|' * (2 + len(SETS))}"]
    for name in METHODS:
        own = [row for row in rows if row["cell"][1] == name]
        if not own:
            continue
        cells = []
        for task in SETS:
            scores = [100 * row["test"]["accuracy"] for row in own if row["cell"][0] == task]
            spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
            cells.append(f"{statistics.mean(scores):.1f}{spread} ({len(scores)})" if scores else "-")
        calls = own[0].get("forward_calls")
        tokens = sorted({row["added_tokens"] for row in own})
        span = f"{tokens[0]}" if len(tokens) == 1 else f"{tokens[0]} to {tokens[-1]}"
        lines.append(f"| {name} | {' | '.join(cells)} | {f'{calls:,}' if calls else '-'} | {span} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "robust", "table"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="NAME")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    arguments = parser.parse_args()
    if arguments.what == "table":
        return print(table(), robust_table(), sep="\n\n")
    if arguments.data is None:
        parser.error(f"{arguments.what} needs --data DIR")
    if arguments.what == "robust":
        return robust(arguments.data.resolve(), arguments.sets, arguments.seeds)
    run(arguments.data.resolve(), arguments.methods, arguments.sets, arguments.seeds)
    return None


if __name__ == "__main__":
    sys.exit(main())
