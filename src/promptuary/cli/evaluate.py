"""`promptuary evaluate`: scores of a saved prompt on labelled examples.

Knows no method, model or data set.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from promptuary.cli import console
from promptuary.errors import ConfigError

if TYPE_CHECKING:
    from promptuary.data.load import DataConfig
    from promptuary.run import OneTask


def evaluate(
    prompt: console.Prompt,
    data: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="A file, a folder, a hub data set or demo; default: the run's data."),
    ] = None,
    split: Annotated[Literal["test", "validation", "train"], typer.Option(help="Of a single file, all rows.")] = "test",
    model: console.Model = None,
    backbone: console.Other = None,
    device: console.Device = None,
    batch_size: console.BatchSize = 32,
    predictions: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a line of JSON per example.")] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write a page to look at: classes, confusions, samples.")
    ] = None,
    overrides: console.Overrides = None,
    as_json: console.Json = False,
) -> None:
    """Score a prompt, or a baseline, on labelled examples."""
    from promptuary import base_to_new, evaluation, files
    from promptuary.data.load import load
    from promptuary.seeds import seeded
    from promptuary.weights import find_saved, load_saved

    if predictions is not None:
        console.check_file("--predictions", predictions)
    if report is not None:
        console.check_file("--report", report)
        if predictions is not None and report.absolute() == predictions.absolute():
            raise ConfigError(f"--predictions and --report are both {report}; give each a file of its own")
    folder = find_saved(prompt)
    config, seed = _data(folder, data, overrides or [])
    tuned = load_saved(folder, model=model, device=device, other=backbone)
    task, settled = type(tuned.task), tuned.task.settled()
    # of other data than the run's own, the training rows are not what the prompt was trained on
    check = replace(task.check(settled), tell=data is None)
    splits = load(config, task.required(settled), seeded(seed, 1), check)
    examples = {"train": splits.train, "validation": splits.validation, "test": splits.test}[split]
    notes = list(splits.notes)
    for note in notes:
        console.say(f"note: {note}")
    found = evaluation.evaluate(tuned, examples, batch_size=batch_size)
    primary = tuned.task.metrics[0]
    # the run's own test also has scores of the classes that it left out
    run = _run(folder) if data is None and not overrides and split == "test" else None
    if run is not None and (new := base_to_new.new_classes(run, tuned)) is not None:
        other = evaluation.evaluate(new.tuned, new.examples, rows=new.rows, batch_size=batch_size, interval=False)
        found = base_to_new.with_new(found, other, primary)
        notes += new.notes
        console.say(f"note: {new.notes[0]}")
    if predictions is not None:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found.rows())
        with console.writing("--predictions", predictions):
            files.write_file(predictions, lines.encode())
    if report is not None:
        from promptuary.report import page

        about = page.About(str(prompt), str(config.source), split)
        content = page.render(about, found, tuned, examples, notes=notes)
        with console.writing("--report", report):
            files.write_file(report, content)
    rows = [*console.score_rows(found.scores, primary, found.interval), ("examples", f"{len(examples):,} {split}")]
    console.table(("", ""), rows, title=f"{folder} on {config.source}")
    if as_json:
        console.emit(
            {
                "prompt": str(folder),
                "backbone": tuned.backbone.config.model,
                "data": config.source,
                "split": split,
                "examples": len(examples),
                "scores": found.scores,
                "primary_metric": primary,
                "interval_95": found.interval,
                "skipped_rows": splits.skipped,
                "predictions": None if predictions is None else str(predictions),
                "report": None if report is None else str(report),
            }
        )


def _run(folder: Path) -> OneTask | None:
    """The run on the prompt's task, if it stands in a run's folder."""
    from promptuary import config
    from promptuary.building import PROMPTS
    from promptuary.run import JointRun, OneTask

    around = folder.parent.parent if folder.parent.name == PROMPTS else folder.parent
    if not (around / "run.yaml").is_file():
        return None
    run = config.load_run(around / "run.yaml")
    if isinstance(run, JointRun):
        return config.part_of(run, folder.name)
    assert isinstance(run, OneTask)
    return run


def _data(folder: Path, source: str | None, overrides: list[str]) -> tuple[DataConfig, int]:
    """Which examples, and the seed that chose the run's own."""
    from promptuary import config
    from promptuary.data.load import DataConfig

    values: dict[str, Any] = {}
    seed = 0
    if source is not None:
        # of a single file every row counts, so it stands for each split
        whole = {name: Path(source).name for name in ("validation", "test")} if Path(source).is_file() else {}
        values = {"source": source, **whole}
    elif (run := _run(folder)) is not None:
        values, seed = run.data.model_dump(), run.seed
        seed = seed if run.data.split_seed is None else run.data.split_seed
    changes = [config.parse_override(override) for override in overrides]
    for (part, *_), text in zip((path for path, _ in changes), overrides, strict=True):
        if part != "data":
            raise ConfigError(f'--set takes "data.x=value" here, got "{text}"; the rest was settled in training')
    values = config.override({"data": values}, changes)["data"]
    if not isinstance(values, dict):
        raise ConfigError(f"data should be a mapping of settings, got {values!r}")
    if "source" not in values:
        raise ConfigError("which examples? Give --data SOURCE: a file, a folder, a hub data set or demo")
    return DataConfig.read(values, where="data"), seed
