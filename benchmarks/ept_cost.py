"""What EPT and a longer prompt cost: steps on T5-base and GPT-2 against prompt length, spaces and batch; the picture.

Knows no result: every row is written by the command that is noted in it.

    python benchmarks/ept_cost.py run     # results/ept_cost.jsonl and docs/images/cost.svg
    python benchmarks/ept_cost.py draw    # the picture alone, from the rows

T5 has the widths of T5-base and two layers of each stack: layers are the same, so ratios of whole steps carry over,
and EPT's own modules, which do not grow with layers, take a larger part than with all twelve. GPT-2 is whole.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import loops
import shapes
from cells import RESULTS, Cell, Loop, Target, measure, meta, quiet, read, replace_rows, show
from clock import ratio
from drawing import picture
from promptuary.types import View
from speed import NARROW, ours

ROWS = RESULTS / "ept_cost.jsonl"
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "cost.svg"
LENGTHS = (20, 60, 100, 200)
LONG, SHORT, EPT = "prompt tuning l=100", "prompt tuning l=60", "EPT s=60"
OFF = ", share_prefix: false"
SPACES, BATCHES = (1, 2, 4, 8), (2, 8, 16)


def ept(cell: Cell, **settings: Any) -> dict[str, Any]:
    """EPT with its own defaults: s=60, rank 30, a table of 256 positions."""
    small = {"num_virtual_tokens": 2, "reference_length": 8, "rank": 2, "max_tokens": 24} if cell.small else {}
    return {"name": "ept", "num_virtual_tokens": 60, **small, **settings}


def tuning(cell: Cell, length: int) -> dict[str, Any]:
    """Prompt tuning of so many rows."""
    return {"name": "prompt_tuning", "num_virtual_tokens": max(1, length // 20) if cell.small else length}


def lengths_of_t5(cell: Cell, model: Any, folder: Path) -> dict[str, Loop]:
    """EPT, prompt tuning of several lengths, and LoRA on the text alone."""
    steps: dict[str, Loop] = {}
    for length in sorted(LENGTHS, key=lambda length: length != 100):
        steps[f"prompt tuning l={length}"] = ours(cell, model, folder, f"l{length}", method=tuning(cell, length)).loop
    steps[EPT] = ours(cell, model, folder, "ept", method=ept(cell)).loop
    return {**steps, NARROW: lora(cell, model, folder)}


def lengths_of_gpt2(cell: Cell, model: Any, folder: Path) -> dict[str, Loop]:
    """Prompt tuning of several lengths, run once per batch and in every row, and LoRA on the text alone."""
    steps: dict[str, Loop] = {}
    for name, switches in (("", {}), (OFF, {"share_prefix": False})):
        for length in sorted(LENGTHS, key=lambda length: length != 100):
            made = ours(cell, model, folder, f"l{length}{bool(switches)}", method=tuning(cell, length), **switches)
            steps[f"prompt tuning l={length}{name}"] = made.loop
    return {**steps, NARROW: lora(cell, model, folder)}


def lora(cell: Cell, model: Any, folder: Path) -> Loop:
    """PEFT's LoRA in a plain loop over the same texts, with as little of the head as ours."""
    made = ours(cell, model, folder, "texts")
    return loops.peft(cell.kind, shapes.twin(model), [made.batch()], made.tuned.asking.words.ids[:, 0], None, narrow=True)


def spaces(cell: Cell, model: Any, folder: Path) -> dict[str, Loop]:
    """Steps with so many spaces, and what EPT's own modules take of them."""
    steps: dict[str, Loop] = {}
    for count in SPACES:
        made = ours(cell, model, folder, f"m{count}", method=ept(cell, spaces=count))
        steps |= {
            f"step, {count} spaces": made.loop,
            f"own modules, {count} spaces": Loop(made.loop.model, Own(made).step),
        }
    return steps


def batches(cell: Cell, model: Any, folder: Path) -> dict[str, Loop]:
    """Steps of several sizes with EPT and with prompt tuning, and what EPT's own modules take of them."""
    steps: dict[str, Loop] = {}
    for size in BATCHES:
        lengths = [cell.tokens] * size
        made = ours(cell, model, folder, f"e{size}", lengths, method=ept(cell))
        steps[f"EPT, batch {size}"] = made.loop
        steps[f"own modules, batch {size}"] = Loop(made.loop.model, Own(made).step)
        plain = ours(cell, model, folder, f"p{size}", lengths, method=tuning(cell, 100))
        steps[f"prompt tuning l=100, batch {size}"] = plain.loop
    return steps


class Own:
    """EPT's own work in a step: from its tensors to the prompt and the table of offsets, and back."""

    def __init__(self, made: loops.Ours) -> None:
        """Of a run with EPT."""
        self.method = made.tuned.method
        with torch.no_grad():
            rows, table = self.parts()
        self.back = [torch.randn_like(rows), torch.randn_like(table)]

    def parts(self) -> list[torch.Tensor]:
        """Prompt rows [1, s, d] and offsets [m, d]."""
        found = self.method.prompt(View())
        return [found.rows, found.offset.table()]

    def step(self) -> None:
        """There and back."""
        torch.autograd.grad(self.parts(), list(self.method.parameters()), self.back)


CELLS = [
    *(
        Cell(f"T5, texts of {tokens}", "t5", 8, tokens, 100, lengths_of_t5,
             (Target(EPT, LONG, bound), *((Target(EPT, LONG, 0.885, "flops"),) if tokens == 256 else ())), layers=2)
        for tokens, bound in ((256, 0.92), (64, 0.85))
    ),
    Cell("EPT's spaces", "t5", 8, 64, 60, spaces,
         tuple(Target(f"own modules, {count} spaces", f"step, {count} spaces", 0.02) for count in SPACES), layers=2),
    Cell("EPT's batch", "t5", max(BATCHES), 64, 60, batches,
         tuple(Target(f"own modules, batch {size}", f"EPT, batch {size}", 0.02) for size in BATCHES[1:]), layers=2),
    Cell("GPT-2, texts of 64", "gpt2", 4, 64, 100, lengths_of_gpt2),
]  # fmt: skip


def draw(rows: Sequence[dict[str, Any]]) -> str:
    """The picture of operations and time against prompt length, in units of LoRA on the same texts."""
    by_name = {(row["cell"][0], row["cell"][1]): row for row in rows}
    series = {}
    for title, cell, suffix in (
        ("T5-base, texts of 64", "T5, texts of 64", ""),
        ("T5-base, texts of 256", "T5, texts of 256", ""),
        ("GPT-2, texts of 64" + OFF, "GPT-2, texts of 64", OFF),
        ("GPT-2, texts of 64, default", "GPT-2, texts of 64", ""),
    ):
        base = by_name[cell, NARROW]
        series[title] = [
            (length, *over(by_name[cell, f"prompt tuning l={length}{suffix}"], base)) for length in LENGTHS
        ]
    points = {
        f"EPT s=60, texts of {tokens}": (60, *over(by_name[f"T5, texts of {tokens}", EPT],
                                                   by_name[f"T5, texts of {tokens}", NARROW]))
        for tokens in (64, 256)
    }  # fmt: skip
    return picture(series, points)


def over(row: dict[str, Any], base: dict[str, Any]) -> tuple[float, float]:
    """Operations and median time, as parts of another row's."""
    return row["flops"] / base["flops"], ratio(row["seconds"], base["seconds"])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "draw"])
    parser.add_argument("--cells", nargs="+", choices=[cell.name for cell in CELLS], metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="toy models; nothing is written")
    arguments = parser.parse_args()
    quiet()
    for cell in [cell for cell in CELLS if not arguments.cells or cell.name in arguments.cells]:
        if arguments.what == "run":
            made = measure(cell.shrunk() if arguments.small else cell, arguments.rounds)
            command = f'python benchmarks/ept_cost.py run --rounds {arguments.rounds} --cells "{cell.name}"'
            made = [{**row, **meta(command)} for row in made]
            show(cell, made)
            if not arguments.small:
                replace_rows(ROWS, made, [one.name for one in CELLS])
    if not arguments.small and {cell.name for cell in CELLS} <= {row["cell"][0] for row in read(ROWS)}:
        PICTURE.write_text(draw(read(ROWS)), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
