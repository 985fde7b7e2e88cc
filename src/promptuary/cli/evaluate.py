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
    from promptuary.perturbing.kinds import Kind
    from promptuary.robust import Robustness, Under
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
    perturb: Annotated[
        str | None,
        typer.Option(metavar="KINDS", help="Score perturbed texts too: all, or some of C1-C3, W1-W3, S1-S3 (C1,W2)."),
    ] = None,
    perturb_seed: Annotated[int | None, typer.Option(metavar="N", help="Of the perturbations; default: 0.")] = None,
    overrides: console.Overrides = None,
    as_json: console.Json = False,
) -> None:
    """Score a prompt, or a baseline, on labelled examples."""
    from promptuary import base_to_new, evaluation, files, robust
    from promptuary.data.load import load
    from promptuary.seeds import seeded
    from promptuary.weights import find_saved, load_saved

    if predictions is not None:
        console.check_file("--predictions", predictions)
    if report is not None:
        console.check_file("--report", report)
        if predictions is not None and report.absolute() == predictions.absolute():
            raise ConfigError(f"--predictions and --report are both {report}; give each a file of its own")
    kinds = _kinds(perturb, perturb_seed)
    folder = find_saved(prompt)
    config, seed = _data(folder, data, overrides or [])
    tuned = load_saved(folder, model=model, device=device, other=backbone)
    if kinds:
        robust.check_texts(tuned)
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
    under = None
    if kinds:
        under = robust.robustness(
            tuned, examples, kinds, seed=perturb_seed or 0, clean=found, batch_size=batch_size, told=_say_under
        )
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
        content = page.render(about, found, tuned, examples, notes=notes, under=under)
        with console.writing("--report", report):
            files.write_file(report, content)
    rows = [*console.score_rows(found.scores, primary, found.interval), ("examples", f"{len(examples):,} {split}")]
    console.table(("", ""), rows, title=f"{folder} on {config.source}")
    if under is not None:
        _table(under, len(examples))
    if as_json:
        told = {} if under is None else {"robustness": under.summary()}
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
                **told,
            }
        )


def _kinds(perturb: str | None, seed: int | None) -> tuple[Kind, ...]:
    """Which perturbations are asked for."""
    from promptuary.perturbing.kinds import chosen

    if perturb is None and seed is not None:
        raise ConfigError("--perturb-seed is of perturbations, and none is asked for; add --perturb all")
    return () if perturb is None else chosen(perturb)


def _say_under(one: Under, so_far: Robustness) -> None:
    """That one more is done, since all of them take a while."""
    console.say(f"{one.kind.id} {one.kind.title}: {so_far.metric} {one.evaluation.scores[so_far.metric]:.4f}")


def _table(under: Robustness, count: int) -> None:
    """Scores, drops, and how many examples changed; bars where scores are shares."""
    name, clean = under.metric, under.clean.scores[under.metric]
    shares = all(0 <= one.scores[name] <= 1 for one in (under.clean, *(one.evaluation for one in under.under)))
    shares = shares and under.higher_is_better

    def line(title: str, score: float, interval: Any, drop: float | None, changed: str) -> tuple[str, ...]:
        told = (title, console.score(score), _span(interval), "" if drop is None else f"{drop:.4f}", changed)
        return (*told, console.bar(score)) if shares else told

    rows = [line("clean", clean, under.clean.interval, None, "")]
    for one in under.under:
        found = one.evaluation
        title, changed = f"{one.kind.id} {one.kind.title}", f"{len(one.changed):,} of {count:,}"
        rows.append(line(title, found.scores[name], found.interval, one.drop, changed))
    worst = under.worst
    rows.append(line("mean", under.mean, (), under.mean_drop, ""))
    rows.append(
        line(f"worst: {worst.kind.id}", worst.evaluation.scores[name], worst.evaluation.interval, worst.drop, "")
    )
    columns = ("", name, "95 % interval", "drop", "changed", *([""] if shares else []))
    console.table(columns, rows, title=f"perturbed by {under.by}, seed {under.seed}")


def _span(interval: Any) -> str:
    """An interval; - for a score that has none, and nothing for what is no score of examples."""
    if interval is None:
        return "-"
    return f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else ""


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
