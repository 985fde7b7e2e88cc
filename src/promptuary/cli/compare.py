"""`promptuary compare`: methods x tasks x models x data sizes x seeds as one job that can be stopped and continued.

Knows no method, model or data set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from promptuary.cli import console
from promptuary.errors import Interrupted

if TYPE_CHECKING:
    from promptuary.comparing.ledger import Ledger


def compare(
    file: Annotated[Path, typer.Argument(metavar="FILE.yaml", help="A comparison, or the folder of one to continue.")],
    overrides: console.Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the comparison.")] = None,
    workers: Annotated[int, typer.Option(min=1, max=256, help="Processes that work on it at once.")] = 1,
    plan: Annotated[
        bool, typer.Option("--plan", help="Check it, say what is done and what is left, and stop.")
    ] = False,
    retry: Annotated[bool, typer.Option("--retry-failed", help="Try failed runs and trials again.")] = False,
    worker_of: Annotated[int | None, typer.Option(hidden=True)] = None,
    as_json: console.Json = False,
) -> None:
    """Compare methods fairly: the same trials for each, one look at the test split, and what the scores show."""
    from promptuary.comparing.job import load_job
    from promptuary.comparing.ledger import Ledger

    changes: dict[str, Any] = {} if out is None else {"out": str(out)}
    if out is None and file.is_dir():
        changes["out"] = str(file)
    ledger = Ledger(load_job(file, overrides or (), **changes))
    if worker_of is not None:
        _work(ledger, parent=worker_of)
        return
    if not plan:
        ledger.open()
        if retry:
            ledger.forget_failures()
    console.table(("", ""), _plan(ledger))
    if plan:
        if as_json:
            console.emit(dict(_plan(ledger)))
        return
    _all(ledger, workers, as_json=as_json)


def _all(ledger: Ledger, workers: int, *, as_json: bool) -> None:
    """Everything, and the table of what is there at the end, whatever that end is."""
    from promptuary.comparing import several
    from promptuary.comparing.summary import summarise

    try:
        if workers > 1:
            several.work(ledger.path, workers)
        else:
            _work(ledger)
    except Interrupted as stopped:
        content = summarise(ledger)
        raise Interrupted(
            "stopped, and what was under way is saved; "
            f"{content['finished']} of {content['runs']} runs are finished, the same command goes on",
            stopped.exit_code - 128,
        ) from None
    content = summarise(ledger)
    show(content)
    console.say(f"rows, settings and commands: {ledger.path}/rows.jsonl")
    if as_json:
        console.emit({"out": str(ledger.path), **content})
    if content["failed"]:
        first = content["failed"][0]
        many = f"{len(content['failed'])} of {content['runs']} runs failed"
        console.say(f"error: {many}, first {first['unit']}: {first['error']}; mend it and add --retry-failed")
        raise typer.Exit(1)


def _work(ledger: Ledger, parent: int | None = None) -> None:
    """This process alone, or as one of several."""
    from promptuary.comparing.work import Worker

    Worker(ledger, console.say, parent=parent).work()


def _plan(ledger: Ledger) -> list[tuple[str, str]]:
    """What will be run, and how much of it is done."""
    settings, units = ledger.job.config, ledger.units
    tested = [unit for unit in units if unit.seed is not None]
    trials = [unit for unit in units if unit.trial is not None]
    rows = [
        ("methods", ", ".join(settings.methods)),
        ("tasks", ", ".join(settings.tasks)),
        ("models", ", ".join(settings.backbones)),
        ("data sizes", ", ".join(dict.fromkeys(group.budget for group in ledger.job.groups))),
        ("seeds", ", ".join(map(str, settings.seeds))),
        ("tuning", tuning_words(None if settings.tuning is None else {
            **settings.tuning.model_dump(), "trials": max(group.trials for group in ledger.job.groups)
        })),
        ("trials", f"{len(trials)}, {sum(map(ledger.settled, trials))} done"),
        ("runs", f"{len(tested)}, {sum(ledger.result(unit) is not None for unit in tested)} done"),
        ("writes", str(ledger.path)),
    ]  # fmt: skip
    return rows


def tuning_words(how: Mapping[str, Any] | None) -> str:
    """The tuning budget, in words."""
    if how is None:
        return "none: settings as given"
    seeds = len(how["seeds"])
    return (
        f"{how['trials']} trials ({how['sampler']}) of {seeds} seed{'s' * (seeds > 1)} for each method, on validation"
    )


def show(content: Mapping[str, Any]) -> None:
    """The tables of a comparison."""
    for block in content["blocks"]:
        small = f" (small: one example is {100 * block['one_example']:.1f} points)" if block["small"] else ""
        title = f"{block['task']}, {block['backbone']}, {block['budget']}: {block['metric']} on "
        console.table(
            COLUMNS, [_line(one) for one in block["methods"]], f"{title}{block['test_examples']} examples{small}"
        )
        for text in _said(block):
            console.say(text)
    console.say(f"tuning: {tuning_words(content['tuning'])}; *: best, or not shown to be worse than the best")
    ranks = content["ranks"]
    if ranks is not None:
        rows = [(name, f"{rank:.2f}") for name, rank in ranks["average_rank"].items()]
        distance = ranks["critical_difference"]
        known = "" if distance is None else f", critical difference {distance:.2f} (Nemenyi)"
        console.table(("method", "average rank"), rows, f"ranks over {ranks['blocks']} blocks{known}")
        console.say("; ".join(ranks["verdicts"]))


COLUMNS = (
    "method",
    "mean",
    "std",
    "95 % (examples)",
    "seeds",
    "trained",
    "bytes",
    "tokens",
    "step time",
    "memory",
    "trials",
)


def _line(one: Mapping[str, Any]) -> Sequence[str]:
    interval = one["interval_95"]
    return (
        one["method"] + (" *" if one["best"] else ""),
        f"{one['mean']:.4f}",
        "" if one["std"] is None else f"{one['std']:.4f}",
        "" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}",
        str(len(one["seeds"])),
        f"{one['trainable_parameters']:,}",
        "" if one["prompt_bytes"] is None else f"{one['prompt_bytes']:,}",
        str(one["added_tokens"]),
        _ratio(one["step_time_ratio"]),
        _ratio(one["memory_ratio"]),
        str(one["trials"]),
    )


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _said(block: Mapping[str, Any]) -> list[str]:
    """The comparisons in words; what is not shown in one sentence."""
    shown = [
        f"{pair['verdict']} ({pair['difference']:+.4f}, 95 % {pair['interval_95'][0]:+.4f} to "
        f"{pair['interval_95'][1]:+.4f}, corrected p {pair['p_corrected']:.4f})"
        for pair in block["pairs"]
        if pair["shown"]
    ]
    open_ = [f"{pair['one']} and {pair['other']}" for pair in block["pairs"] if not pair["shown"]]
    silent = [f"no difference shown between {'; '.join(open_)}"] if open_ else []
    return [*shown, *silent, *([block["note"]] if block["note"] else [])]
