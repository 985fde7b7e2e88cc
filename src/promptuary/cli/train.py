"""`promptuary train`: a run file in, a trained prompt out.

Knows no method, model or data set.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from promptuary.cli import console
from promptuary.errors import ConfigError


def train(
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN.yaml", help="A run file, or a run folder to repeat or continue.")
    ] = None,
    overrides: console.Overrides = None,
    seed: Annotated[int | None, typer.Option(help="Of data order, few-shot sample and starting values.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of this run.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in that folder.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the run in that folder first.")] = False,
    as_json: console.Json = False,
) -> None:
    """Train a prompt."""
    if run is None and not overrides:
        raise ConfigError("which run? Give a run file: promptuary train RUN.yaml (or every setting by --set)")
    if resume and fresh:
        raise ConfigError("--resume continues a run and --fresh deletes it; choose one")
    changes: dict[str, Any] = {}
    if run is not None and run.is_dir():
        changes["out"], run = str(run), run / "run.yaml"
    if out is not None:
        changes["out"] = str(out)
    if seed is not None:
        changes["seed"] = seed

    import promptuary
    from promptuary import training
    from promptuary.listening import Stop

    settings = promptuary.load_run(run if run is not None else {}, overrides or (), **changes)
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
            ("next", f'promptuary predict {result.dir} "your text"'),
        ],
    )
    if as_json:
        console.emit({**facts, "dir": str(result.dir)})
