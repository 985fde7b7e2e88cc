"""`promptuary report`: one page about all runs below a folder.

Knows no method, model or data set, and never imports torch.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Annotated

import typer

from promptuary.cli import console
from promptuary.errors import ConfigError


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder with run folders in it, at any depth.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Where the page goes; default: report.html in DIR.")
    ] = None,
    as_json: console.Json = False,
) -> None:
    """Compare all runs below a folder on one page: scores, costs, curves, words, settings."""
    from promptuary.report import board, found

    if not folder.exists():
        raise ConfigError(f"{folder} does not exist; give a folder with runs in it")
    if not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give a folder with runs in it")
    file = folder / "report.html" if out is None else out
    console.check_file("--out", file)
    try:
        seen = found.look(folder)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be read: {error.strerror}; choose another folder") from None
    for note in seen.notes:
        console.say(f"note: {note}")
    if not seen.runs:
        raise ConfigError(f"{folder} holds no run that can be read; give a folder with runs of promptuary train")
    content = board.render(folder.resolve().name or "runs", seen)
    with console.writing("--out", file):
        _write(file, content)
    finished = sum(run.finished for run in seen.runs)
    console.table(
        ("", ""),
        [
            ("runs", f"{finished:,} finished, {len(seen.runs) - finished:,} not"),
            ("page", f"{file} ({len(content) / 1000:,.0f} KB)"),
        ],
    )
    if as_json:
        told = {"runs": len(seen.runs), "finished": finished, "notes": list(seen.notes)}
        console.emit({"dir": str(folder), "out": str(file), "bytes": len(content), **told})


def _write(file: Path, content: bytes) -> None:
    """Under another name first, so that a reader finds the old page or the new one; `files` would load torch."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".tmp-{file.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(content)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
