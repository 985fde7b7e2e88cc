"""`promptuary export`: a saved prompt in another tool's format.

Knows no format; the folder of formats does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from promptuary.cli import console


def export(
    prompt: console.Prompt,
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="The tool: vllm, and what else is listed.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new or empty folder.")],
    texts: console.Texts = None,
    data: console.Data = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an older export in that folder.")] = False,
    model: console.Model = None,
    device: console.Device = None,
    as_json: console.Json = False,
) -> None:
    """Write a prompt for another tool, with requests where texts are given and the tool takes them."""
    from promptuary import checkpoint, exports

    exports.check(to, out, examples=bool(texts) or data is not None, overwrite=overwrite)
    examples = console.examples(texts, data)
    tuned = checkpoint.load_prompt(prompt, model=model, device=device)
    exports.write(to, tuned, out, examples, overwrite=overwrite)
    sizes = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    rows = [(name, f"{size / 1024:,.1f} KiB") for name, size in sizes.items()]
    console.table(("file", "size"), rows, title=f"{prompt} for {to}, in {out}")
    if as_json:
        console.emit({"prompt": str(prompt), "to": to, "out": str(out), "files": sizes, "examples": len(examples)})
