"""`promptuary inspect`: what a saved prompt holds.

Knows no method, model or data set.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from promptuary.cli import console


def inspect(
    prompt: console.Prompt,
    top: Annotated[int, typer.Option(min=1, help="Nearest tokens of each row.")] = 5,
    picture: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it: .png, .svg or .pdf.")] = None,
    model: console.Model = None,
    device: console.Device = None,
    as_json: console.Json = False,
) -> None:
    """Show a prompt: norms, nearest tokens, and what its method has to tell."""
    from promptuary import checkpoint, look

    if picture is not None:
        look.check_picture(picture)
        console.check_file("--picture", picture)
    tuned = checkpoint.load_prompt(prompt, model=model, device=device)
    found = look.describe(tuned, top)
    found["history"] = look.history(checkpoint.find_prompt(prompt))
    if picture is not None:
        look.picture(tuned, picture)
        found["picture"] = str(picture)
    _show(found)
    if as_json:
        console.emit(found)


def _show(found: dict[str, Any]) -> None:
    console.table(
        ("", ""),
        [
            ("method", found["title"]),
            ("base", found["base"]),
            ("trained numbers", f"{found['trainable_parameters']:,}"),
            ("added tokens", found["added_tokens"]),
            *([] if found["text"] is None else [("text", found["text"] or "(none)")]),
            *([("rows", "depend on the input, so there are none to show")] if found["depends_on_input"] else []),
        ],
    )
    if found["history"]:
        known = ("step", "calls", "text", "changed")
        primary = next((name for name in found["history"][0] if name not in known), None)
        console.table(
            ("step", "tried", primary or "", "text", "changed"),
            [
                (one["step"], one.get("calls", ""), "" if primary is None else f"{one[primary]:.4f}", one["text"],
                 " ".join(one["changed"]))
                for one in found["history"]
            ],
            title="how it came about",
        )  # fmt: skip
    if found["rows"]:
        console.table(
            ("row", "norm", "nearest tokens (cosine)"),
            [
                (row["row"], f"{row['norm']:.3f}", "  ".join(f"{n['token']} {n['cosine']:.2f}" for n in row["nearest"]))
                for row in found["rows"]
            ],
        )
    if found["offset"] is not None:
        offset = found["offset"]
        size = ("offset table", f"{offset['positions']} positions, rank {offset['rank']}")
        norms = ("norms of its first rows", _numbers(offset["norms"]))
        console.table(("", ""), [size, norms, ("largest norm", f"{offset['largest']:.3f}")])
    for name, insight in found["insight"].items():
        if "largest" in insight:
            title = f"{name}: largest of {insight['shape'][-1]}"
            lines = ["  ".join(f"{at['position']}: {at['value']:.3f}" for at in row) for row in insight["largest"]]
        else:
            title, rows = name, insight["values"] if len(insight["shape"]) == 2 else [insight["values"]]
            lines = [_numbers(row) for row in rows]
        console.table(("row", title), list(enumerate(lines)))


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)
