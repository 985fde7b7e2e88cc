"""`promptuary demo`: prompts of equal size on one small frozen model, beside doing nothing.

Knows no method or model; the packaged run file names them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from promptuary.cli import console
from promptuary.errors import Interrupted


def demo(
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Another frozen model that can score words.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs; an older demo there is replaced.")] = Path("out/demo"),
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps of each method.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of data order and starting values.")] = 0,
    as_json: console.Json = False,
) -> None:
    """Train small prompts on a packaged data set and compare them."""
    import promptuary.demo

    with console.Progress(brief=True) as progress:
        try:
            found = promptuary.demo.run(model=model, out=out, steps=steps, seed=seed, listener=progress)
        except Interrupted as error:
            text = f"interrupted; finished runs stand in {out}, and the demo starts afresh"
            raise Interrupted(text, error.exit_code - 128) from None
    console.table(
        ("", "test accuracy [95 % interval]", "trained numbers", "KiB on disk", "seconds"),
        [
            (
                row.name,
                console.score(row.accuracy, row.interval),
                f"{row.trainable_parameters:,}",
                f"{row.bytes_on_disk / 1024:.1f}",
                f"{row.seconds:.1f}",
            )
            for row in found.rows
        ],
    )
    written = [row for row in found.rows if row.folder is not None]
    console.table(("", ""), [(f"{row.name} prompt", row.folder) for row in written])
    console.table(
        ("answer", "probability", "right answer", "message"),
        [(one.answer, f"{one.probability:.3f}", one.gold, one.text) for one in found.predictions],
        title=f"{written[-1].name} on three test messages" if written else "",
    )
    if as_json:
        console.emit(found.facts())
