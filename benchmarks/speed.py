"""One training step: a loop by hand, PEFT and ours, on models of known shapes with random weights.

Knows no result: every row is written by the command that is noted in it.

    python benchmarks/speed.py run                        # all cells -> results/speed.jsonl
    python benchmarks/speed.py run --cells "GPT-2, l=20"  # some of them; rows of the same cell are replaced
    python benchmarks/speed.py list                       # their names and targets
    python benchmarks/speed.py page                       # results -> the tables of docs/performance.md

The clock is CPU seconds of this process on one thread; variants run in turn within each round. Operations are counted
with eager attention, time and kept bytes are taken with the attention that the model runs by default.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import loops
import shapes
from cells import RESULTS, Cell, Loop, Target, measure, meta, quiet, replace_rows, show
from promptuary.data.collate import batches
from promptuary.sweeping import Part, together
from promptuary.testing.case import padded

ROWS = RESULTS / "speed.jsonl"
HAND, PEFT, LORA = "by hand", "PEFT prompt tuning", "PEFT LoRA"
NARROW = "PEFT LoRA, logits at the answer alone"
PLAIN, DEFAULT = "ours, switches off", "ours, default"
OFF = {"share_prefix": False, "narrow_head": False, "kept_mib": 0}
RUNS, TURNS, TOGETHER = 8, "ours, 8 runs in turn", "ours, 8 runs together"
STATIC, PADDED = 256, "by hand, padded to 256"
PROFILES = {"short": (26, 13), "medium": (55, 22), "long": (85, 55)}
"""Mean and standard deviation of lognormal lengths, about those of SST-2, MRPC and RTE in a T5 vocabulary."""


def ours(
    cell: Cell,
    model: Any,
    folder: Path,
    name: str,
    lengths: Sequence[int] | None = None,
    *,
    method: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    **backbone: Any,
) -> loops.Ours:
    """Our training path on a twin of the model, in a folder of its own."""
    rows = shapes.examples(cell.kind, lengths or cell.lengths)
    method = {**cell.method, **(method or {})}
    return loops.Ours(cell.kind, shapes.twin(model), folder / name, rows, method, train=train, **backbone)


# ---- kinds of cells --------------------------------------------------------------------------------------------------


def against(cell: Cell, model: Any, folder: Path) -> dict[str, Loop]:
    """Everybody on one batch."""
    plain, fast = ours(cell, model, folder, "plain", **OFF), ours(cell, model, folder, "fast")
    batch, words = [plain.batch()], plain.tuned.asking.words.ids[:, 0]
    return {
        PEFT: loops.peft(cell.kind, shapes.twin(model), batch, words, cell.length),
        HAND: loops.by_hand(cell.kind, shapes.twin(model), batch, words, cell.length),
        LORA: loops.peft(cell.kind, shapes.twin(model), batch, words, None),
        **(
            {}  # BERT's head has no such argument
            if cell.kind == "bert"
            else {NARROW: loops.peft(cell.kind, shapes.twin(model), batch, words, None, narrow=True)}
        ),
        PLAIN: plain.loop,
        DEFAULT: fast.loop,
    }


def drawn(profile: str, count: int, most: int) -> list[int]:
    """Lengths of texts of a profile, the same in every run."""
    mean, deviation = PROFILES[profile]
    pick = random.Random(0)
    spread = torch.tensor(1 + (deviation / mean) ** 2).log()
    centre = float(torch.tensor(float(mean)).log() - spread / 2)
    return [min(max(round(pick.lognormvariate(centre, float(spread) ** 0.5)), 4), most) for _ in range(count)]


def lengths_apart(cell: Cell, model: Any, folder: Path) -> dict[str, Loop]:
    """One pass over texts of different lengths: by hand and padded to 256; in ours as they come, and in buckets."""
    most, size = (STATIC, 16) if not cell.small else (16, 2)
    lengths = drawn(cell.name.rpartition(" ")[2], 4 * size, most)
    dynamic = ours(cell, model, folder, "dynamic", lengths, train={"batch_size": size, "bucket": False})
    fast = ours(cell, model, folder, "fast", lengths, train={"batch_size": size})
    parts = [fast.tuned.batch(fast.rows[start : start + size]) for start in range(0, len(fast.rows), size)]
    wide = [padded(part, right=most - part.input_ids.shape[1]) for part in parts]
    words = fast.tuned.asking.words.ids[:, 0]
    return {
        PADDED: loops.by_hand(cell.kind, shapes.twin(model), wide, words, cell.length),
        "ours, bucket: false": dynamic.passes,
        DEFAULT: fast.passes,
    }


def waste(cell: Cell, model: Any, folder: Path) -> dict[str, Any]:
    """Padding as a part of all positions that run, prompt included, on 4096 texts of the profile."""
    lengths = drawn(cell.name.rpartition(" ")[2], 4096, STATIC)
    cut = batches(lengths, 16, generator=torch.Generator().manual_seed(0), bucket=True)
    run = sum(len(part) * (max(lengths[place] for place in part) + cell.length) for part in cut)
    return {"padding_waste": 1 - (sum(lengths) + len(lengths) * cell.length) / run}


def modes(cell: Cell, model: Any, folder: Path) -> dict[str, Loop]:
    """The frozen model in eval mode, and with its dropout at work as in a loop that calls `model.train()`."""
    return {
        "ours, dropout: true": ours(cell, model, folder, "drops", dropout=True).loop,
        DEFAULT: ours(cell, model, folder, "fast").loop,
    }


def halved(model: Any) -> Any:
    """A copy in bfloat16, with weights of its own."""
    return copy.deepcopy(model).to(torch.bfloat16)


def precisions(cell: Cell, model: Any, folder: Path) -> dict[str, Loop]:
    """The frozen model in float32 and in bfloat16; the prompt is in float32 both times."""
    half = ours(cell, halved(model), folder, "half", dtype="bfloat16")
    return {DEFAULT: ours(cell, model, folder, "fast").loop, "ours, dtype: bfloat16": half.loop}


def cosine(cell: Cell, model: Any, folder: Path) -> dict[str, Any]:
    """Of the gradients in both precisions at the same prompt."""
    whole = ours(cell, model, folder, "whole")
    half = ours(cell, halved(model), folder, "part", dtype="bfloat16")
    half.tuned.restore(whole.tuned.state())
    found = torch.nn.functional.cosine_similarity(whole.gradient(), half.gradient(), dim=0)
    return {"gradient_cosine": float(found)}


def recomputed(cell: Cell, model: Any, folder: Path) -> dict[str, Loop]:
    """With and without gradient checkpointing."""
    less = ours(cell, model, folder, "less", train={"gradient_checkpointing": True})
    return {DEFAULT: ours(cell, model, folder, "fast").loop, "ours, gradient_checkpointing: true": less.loop}


def behind(cell: Cell, model: Any, folder: Path) -> dict[str, Loop]:
    """The prompt before the texts and behind them, from the second pass over the texts on."""
    first = ours(cell, model, folder, "prefix")
    batch, words = [first.batch()], first.tuned.asking.words.ids[:, 0]
    end = {"placement": "end"}
    return {
        PEFT: loops.peft(cell.kind, shapes.twin(model), batch, words, cell.length),
        "ours, prompt in front, switches off": ours(cell, model, folder, "plain", **OFF).loop,
        "ours, prompt in front": first.loop,
        "ours, prompt behind, kept_mib: 0": ours(cell, model, folder, "anew", method=end, kept_mib=0).loop,
        "ours, prompt behind": ours(cell, model, folder, "kept", method=end).loop,
    }


def swept(cell: Cell, model: Any, folder: Path) -> dict[str, Loop]:
    """A step of each of several runs on one model, one run after the other and all in one batch."""
    held, method = shapes.hold(cell.kind, shapes.twin(model)), cell.method
    rows = [shapes.examples(cell.kind, cell.lengths, seed) for seed in range(RUNS)]
    runs = [
        loops.Ours(cell.kind, model, folder / f"run-{place}", own, method, held=held) for place, own in enumerate(rows)
    ]
    parts = [Part(one.training, one.training.running(resume=False, fresh=False), one.rows) for one in runs]

    def in_turn() -> None:
        for one in runs:
            one.step()

    def at_once() -> None:
        together(parts)

    return {TURNS: Loop(held.model, in_turn), TOGETHER: Loop(held.model, at_once)}


def faster(bound: float, slow: str = PEFT) -> Target:
    """Ours at least so many times as fast as the other."""
    return Target(DEFAULT, slow, 1 / bound)


CELLS = [
    Cell("GPT-2, l=20", "gpt2", 2, 128, 20, against, (faster(1.4),)),
    Cell("SmolLM2, l=20", "smollm2", 2, 128, 20, against, (faster(1.25),)),
    Cell("GPT-2, l=100", "gpt2", 8, 32, 100, against, (faster(4), Target(DEFAULT, PEFT, 0.42, "saved_bytes"))),
    Cell("SmolLM2, l=100", "smollm2", 8, 32, 100, against, (faster(3), Target(DEFAULT, PEFT, 0.42, "saved_bytes"))),
    Cell("BERT, l=20", "bert", 2, 128, 20, against, (faster(1.3, HAND),)),
    Cell("T5, l=20", "t5", 2, 128, 20, against, (faster(1.05),)),
    *(
        Cell(f"T5, l=100, texts {profile}", "t5", 64, STATIC, 100, lengths_apart,
             (Target(DEFAULT, PADDED, 1 / bound),), layers=1, whole_pass=True, extra=waste)
        for profile, bound in (("short", 2.2), ("medium", 1.7), ("long", 1.2))
    ),
    Cell("T5, dropout", "t5", 4, 156, 100, modes, (Target(DEFAULT, "ours, dropout: true", 1 / 1.1),
         Target(DEFAULT, "ours, dropout: true", 0.6, "saved_bytes")), layers=3),
    *(
        Cell(f"{name}, {what}", kind, 4, 156, 100, make, targets, layers=3, extra=extra)
        for what, make, extra, targets in (
            ("bfloat16", precisions, cosine, (Target("ours, dtype: bfloat16", DEFAULT, 0.6),)),
            ("checkpointing", recomputed, None,
             (Target("ours, gradient_checkpointing: true", DEFAULT, 1.45),
              Target("ours, gradient_checkpointing: true", DEFAULT, 0.2, "saved_bytes"))),
        )
        for name, kind in (("GPT-2", "gpt2"), ("T5", "t5"))
    ),
    Cell("GPT-2, prompt behind the text", "gpt2", 4, 128, 20, behind,
         (Target("ours, prompt behind", "ours, prompt in front", 1 / 3),)),
    Cell("T5-small, eight runs", "t5-small", 2, 32, 20, swept, (Target(TOGETHER, TURNS, 0.7),)),
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "list", "page"])
    parser.add_argument("--cells", nargs="+", choices=[cell.name for cell in CELLS], metavar="NAME")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="toy models; nothing is written")
    arguments = parser.parse_args()
    quiet()
    chosen = [cell for cell in CELLS if not arguments.cells or cell.name in arguments.cells]
    if arguments.what == "page":
        from speed_page import write_page

        return write_page()
    for cell in chosen:
        if arguments.what == "list":
            print(cell.name, *(f"| {t.fast}: {t.what} <= {t.bound:.2f} of {t.slow}" for t in cell.targets))
            continue
        made = measure(cell.shrunk() if arguments.small else cell, arguments.rounds)
        command = f'python benchmarks/speed.py run --rounds {arguments.rounds} --cells "{cell.name}"'
        made = [{**row, **meta(command)} for row in made]
        show(cell, made)
        if not arguments.small:
            replace_rows(ROWS, made, [one.name for one in CELLS])
    return None


if __name__ == "__main__":
    sys.exit(main())
