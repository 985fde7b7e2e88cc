"""One step of a context for the classes of CLIP (CoOp and its kin): the usual loop, and what caching and sharing save.

Knows no result: every row is written by the command that is noted in it.

    python benchmarks/classes.py run     # results/classes.jsonl
    python benchmarks/classes.py table   # results -> the table of benchmarks/README.md

The model has the shape of CLIP with ViT-B/16 and random weights; class words are four tokens and a full stop. The
usual loop is written by hand: every step encodes the images, without gradients, and the text of every class in 77
tokens. Then one thing more is saved from way to way: the images' features are known, sequences are cut to what is
needed, and what stands in front of every class is run once. The clock is as in speed.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

from cells import RESULTS, Cell, Loop, Target, command_line, read
from promptuary.backbones.tower import tower_of
from promptuary.testing import tiny_pairs

ROWS = RESULTS / "classes.jsonl"
USUAL, CACHED = "usual loop", "usual loop, image features known"
CUT, SHARED = "ours, cut", "ours, cut and shared"
WORDS = 5
Texts = Callable[[], Tensor]


class Setting:
    """Images, classes and a context for one model."""

    def __init__(self, cell: Cell, model: Any, classes: int) -> None:
        """Random ones."""
        self.model, self.text = model, model.text_model
        drawn = torch.Generator().manual_seed(0)
        side, width = model.config.vision_config.image_size, model.config.text_config.hidden_size
        self.ids = torch.randint(5, 100, (classes, WORDS), generator=drawn)
        self.mask = torch.ones_like(self.ids, dtype=torch.bool)
        self.context = (torch.randn(cell.length, width, generator=drawn) * 0.02).requires_grad_()
        self.pixels = torch.randn(cell.texts, 3, side, side, generator=drawn)
        self.target = torch.randint(0, classes, (cell.texts,), generator=drawn)
        self.known = self.images()
        self.tokenizer = tiny_pairs.tokenizer("clip")

    @torch.no_grad()
    def images(self) -> Tensor:
        """Features of the images [b, h]."""
        return self.model.get_image_features(self.pixels).pooler_output

    def by_hand(self) -> Tensor:
        """Features of the classes [c, h] from sequences of 77 tokens, through the model's own layers."""
        count, rows = len(self.ids), len(self.context)
        table, end = self.text.get_input_embeddings(), 1 + rows + WORDS
        first, last = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        padding = torch.zeros(count, 77 - end - 1, dtype=torch.long)
        behind = torch.cat([self.ids, torch.full((count, 1), last), padding], dim=1)
        parts = (table(torch.full((count, 1), first)), self.context.expand(count, -1, -1), table(behind))
        states = self.text.embeddings(inputs_embeds=torch.cat(parts, dim=1))
        mask = create_causal_mask(
            config=self.text.config, inputs_embeds=states, attention_mask=None, past_key_values=None
        )
        states = self.text.encoder(inputs_embeds=states, attention_mask=mask, is_causal=True).last_hidden_state
        return self.model.text_projection(self.text.final_layer_norm(states)[:, end])

    def ours(self, *, share: bool) -> Texts:
        """The same by the text tower."""
        tower = tower_of(self.model, self.tokenizer, share=share)
        return lambda: tower.features(self.ids, self.mask, self.context[None, None, None])[0]

    def step(self, texts: Texts, *, encode: bool = False) -> tuple[Tensor, Tensor]:
        """Loss and gradient of the context [m, d]."""
        images = nn.functional.normalize(self.images() if encode else self.known, dim=-1)
        scores = 100 * images @ nn.functional.normalize(texts(), dim=-1).T
        loss = nn.functional.cross_entropy(scores, self.target)
        return loss.detach(), torch.autograd.grad(loss, self.context)[0]


def ways(classes: int, cell: Cell, model: Any, folder: Path) -> dict[str, Loop]:
    """Every way to take the step."""
    made = Setting(cell, model, classes)
    return {
        USUAL: Loop(model, functools.partial(made.step, made.by_hand, encode=True)),
        CACHED: Loop(model, functools.partial(made.step, made.by_hand)),
        CUT: Loop(model, functools.partial(made.step, made.ours(share=False))),
        SHARED: Loop(model, functools.partial(made.step, made.ours(share=True))),
    }


def apart(classes: int, cell: Cell, model: Any, folder: Path) -> dict[str, Any]:
    """How far the fast ways are from the usual one: the loss, and the gradient relative to its own size."""
    made = Setting(cell, model, classes)
    loss, gradient = made.step(made.by_hand)
    found: dict[str, Any] = {"classes": classes}
    for name, share in ((CUT, False), (SHARED, True)):
        other, slope = made.step(made.ours(share=share))
        found[f"loss difference, {name}"] = float((loss - other).abs())
        found[f"gradient difference, {name}"] = float((gradient - slope).norm() / gradient.norm())
    return found


CELLS = [
    Cell(f"CLIP, {classes} classes, {rows} rows, {images} images", "clip", images, 77, rows,
         functools.partial(ways, classes),
         (Target(SHARED, USUAL, 1 / bound), Target(SHARED, USUAL, 0.15, "saved_bytes")),
         extra=functools.partial(apart, classes))
    for classes, rows, images, bound in ((20, 16, 8, 15), (50, 4, 4, 12))
]  # fmt: skip


def table() -> str:
    """Rows as a table."""
    lines = ["| cell | way | time of the usual loop's | kept for backward | gradient off by |", "|---|---|---|---|---|"]
    base = {row["cell"][0]: row for row in read(ROWS) if row["cell"][1] == USUAL}
    for row in read(ROWS):
        cell, way = row["cell"]
        middle, least, most = row["time_ratio"], row["time_ratio_min"], row["time_ratio_max"]
        part = row["saved_bytes"] / base[cell]["saved_bytes"]
        off = row.get(f"gradient difference, {way}")
        lines.append(
            f"| {cell} | {way} | {middle:.3f} ({least:.3f} to {most:.3f}) | {row['saved_bytes'] / 2**20:.0f} MiB "
            f"({part:.3f}) | {'-' if off is None else f'{off:.0e}'} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    command_line(__doc__, "classes.py", CELLS, ROWS, table)
