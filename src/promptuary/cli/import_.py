"""`promptuary import`: a prompt that PEFT saved, as a prompt folder.

Knows no format but by the reader that it calls.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from promptuary.cli import console


def import_(
    folder: Annotated[Path, typer.Argument(metavar="PEFT_DIR", help="A folder with adapter_config.json.")],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where the prompt goes; must be new.")],
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The base model; default: the one that the folder names.")
    ] = None,
    task: Annotated[
        int | None,
        typer.Option(min=0, help="Which task of several, from 0; default: all, in FOLDER/task-0, FOLDER/task-1, ..."),
    ] = None,
    device: console.Device = None,
    as_json: console.Json = False,
) -> None:
    """Turn a prompt that PEFT saved into a prompt folder."""
    from promptuary import checkpoint
    from promptuary.errors import ConfigError
    from promptuary.exports import peft

    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"--out {out} exists; choose a new folder")
    adapter = peft.load(folder)
    backbone = peft.base_of(adapter, model, device)
    tasks = list(range(len(adapter.rows))) if task is None else [task]
    made = {(out / f"task-{one}" if len(tasks) > 1 else out): adapter.onto(backbone, one) for one in tasks}
    for path, tuned in made.items():
        checkpoint.save_prompt(tuned, path)
    for note in adapter.notes:
        console.say(f"note: {note}")
    rows, width = adapter.rows[0].shape
    console.table(
        ("", ""),
        [("kind", adapter.kind), ("base", backbone.config.model), ("rows", rows), ("width", width)]
        + [("wrote", path) for path in made],
    )
    if as_json:
        console.emit(
            {
                "kind": adapter.kind,
                "base": backbone.config.model,
                "rows": rows,
                "width": width,
                "notes": adapter.notes,
                "prompts": [str(path) for path in made],
            }
        )
