"""`promptuary schema`: the JSON schema of a run file, for editors.

Knows no setting.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from promptuary.cli import console


def schema(
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it there.")] = None,
    as_json: console.Json = False,
) -> None:
    """Print the JSON schema of a run file."""
    from promptuary import config, files

    content = config.schema()
    if out is None:
        console.emit(content) if as_json else print(json.dumps(content, indent=2))
        return
    console.check_file("--out", out)
    with console.writing("--out", out):
        files.write_json(out, content)
    console.say(f"written to {out}")
    if as_json:
        console.emit({"out": str(out)})
