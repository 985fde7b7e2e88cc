"""`promptuary train`: a run file in, a trained prompt out.

Knows no method, model or data set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from promptuary.cli import console
from promptuary.errors import ConfigError

if TYPE_CHECKING:
    from promptuary.run import AnyRun
    from promptuary.training import Result


def train(
    run: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUN.yaml...",
            help="A run file, or a run folder to repeat or continue. Several are trained together on one model.",
        ),
    ] = None,
    overrides: console.Overrides = None,
    seed: Annotated[int | None, typer.Option(help="Of data order, few-shot sample and starting values.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of this run.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in that folder.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the run in that folder first.")] = False,
    as_json: console.Json = False,
) -> None:
    """Train a prompt, or several at once on the same model."""
    if not run and not overrides:
        raise ConfigError("which run? Give a run file: promptuary train RUN.yaml (or every setting by --set)")
    if resume and fresh:
        raise ConfigError("--resume continues a run and --fresh deletes it; choose one")
    files = list(run or ())
    if len(files) > 1 and (out is not None or seed is not None):
        raise ConfigError("--out and --seed belong to a single run; several run files name their own `out` and `seed`")
    changes: dict[str, Any] = {}
    if out is not None:
        changes["out"] = str(out)
    if seed is not None:
        changes["seed"] = seed
    if len(files) > 1:
        results = _several(files, overrides or (), resume=resume, fresh=fresh)
        console.table(("run", "metric", "test", "best step"), [_summary(result) for result in results])
        if as_json:
            console.emit({"runs": [{**result.facts, "dir": str(result.dir)} for result in results]})
        return

    from promptuary import training
    from promptuary.listening import Stop

    settings = _read(files[0] if files else None, overrides or (), changes)
    with console.Progress() as progress:
        result = training.train(settings, resume=resume, fresh=fresh, listener=progress, stop=Stop(hard=True))
    facts = result.facts
    rows = [
        (f"test {name}", text)
        for name, text in console.score_rows(facts["metrics"], facts["primary_metric"], facts["interval_95"])
    ]
    console.table(
        ("", ""),
        [
            *rows,
            ("best step", f"{facts['best_step']} of {facts['steps']}"),
            ("folder", str(result.dir)),
            ("next", f"promptuary predict {_usable(result)} {_asked(settings)}"),
        ],
    )
    if as_json:
        console.emit({**facts, "dir": str(result.dir)})


def _read(file: Path | None, overrides: Sequence[str], changes: Mapping[str, Any]) -> AnyRun:
    """The settings of a run file, or of a run folder, which stays the folder unless another one is given."""
    import promptuary

    if file is not None and file.is_dir():
        changes, file = {"out": str(file), **changes}, file / "run.yaml"
    return promptuary.load_run(file if file is not None else {}, overrides, **changes)


def _several(files: Sequence[Path], overrides: Sequence[str], *, resume: bool, fresh: bool) -> list[Result]:
    """Train them together."""
    from promptuary.listening import Stop
    from promptuary.sweeping import sweep

    return sweep(
        [_read(file, overrides, {}) for file in files],
        resume=resume,
        fresh=fresh,
        listener=lambda run: console.Lines(Path(run.out).name),
        stop=Stop(hard=True),
    )


def _usable(result: Result) -> Path:
    """What `predict` takes: the run, or the first of its prompts where it has several."""
    from promptuary.building import PROMPTS

    return result.dir if len(result.prompts) == 1 else result.dir / PROMPTS / next(iter(result.prompts))


def _asked(settings: AnyRun) -> str:
    """What the next command asks about: an image, or else a text."""
    tasks = getattr(settings, "tasks", None)
    part: Any = settings if tasks is None else next(iter(tasks.values()))
    return '"your text"' if part.task.image is None else "image.jpg"


def _summary(result: Result) -> tuple[str, str, str, str]:
    facts = result.facts
    primary = facts["primary_metric"]
    best = f"{facts['best_step']} of {facts['steps']}"
    return str(result.dir), primary, console.score(facts["metrics"][primary], facts["interval_95"]), best
