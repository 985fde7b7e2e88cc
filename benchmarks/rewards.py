"""Scoring many prompts of words on a few texts, as RLPrompt's reward does: the usual loop, and what reading less saves.

Knows no result: every row is written by the command that is noted in it.

    python benchmarks/rewards.py run     # results/rewards.jsonl
    python benchmarks/rewards.py table   # results -> the table of benchmarks/README.md

The usual loop is written by hand: prompt by prompt it pastes the words behind each text, tokenises, pads, runs the
model and looks the label words up among the logits of the last token. Every step scores prompts that were not seen
before. The clock is as in speed.py.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import shapes
from cells import RESULTS, Cell, Loop, Target, command_line, read
from promptuary import registry
from promptuary.building import build_method, shape_of
from promptuary.tasks.classify import Classify, ClassifyConfig
from promptuary.testing import tiny
from promptuary.tuned import Tuned
from promptuary.wording import Wording

ROWS = RESULTS / "rewards.jsonl"
USUAL, ALONE, READ, KEPT = "usual loop", "ours, switches off", "ours, label words alone", "ours, texts kept"


class Setting:
    """Texts, label words and never-ending new prompts for one model."""

    def __init__(self, cell: Cell, model: Any, prompts: int, **backbone: Any) -> None:
        """Random ones."""
        self.backbone = shapes.hold(cell.kind, shapes.twin(model), **backbone)
        self.rows = shapes.examples(cell.kind, cell.lengths)
        self.count, self.length = prompts, cell.length
        task = Classify(ClassifyConfig(labels=shapes.LABELS, template="{text} {prompt} {mask}"))
        config = registry.load("methods", "rlprompt").Config(num_tokens=cell.length)
        tuned = Tuned(self.backbone, task, build_method(config, shape_of(self.backbone, task)), max_length=1024)
        self.words = Wording(tuned, self.rows, batch_size=prompts * cell.texts)
        self.drawn = self.draw()

    def draw(self) -> Iterator[list[str]]:
        """New prompts for each step; the same ones for everybody."""
        pick = random.Random(0)
        while True:
            yield [" ".join(pick.choices(tiny.WORDS, k=self.length)) for _ in range(self.count)]

    @torch.no_grad()
    def by_hand(self) -> Tensor:
        """Mean reward of each prompt, [k]."""
        tokenizer, model, found = self.backbone.tokenizer, self.backbone.model, list[float]()
        words = torch.tensor([tokenizer(word).input_ids[-1] for word in shapes.LABELS.values()])
        for prompt in next(self.drawn):
            rewards = []
            pasted = [f"{row['text']} {prompt}" for row in self.rows]
            batch = tokenizer(pasted, return_tensors="pt", padding=True, padding_side="right")
            last = batch.attention_mask.sum(1) - 1
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            chances = torch.softmax(logits[torch.arange(len(last)), last][:, words].double(), dim=1)
            for chance, row in zip(chances, self.rows, strict=True):
                right = list(shapes.LABELS).index(row["label"])
                gap = float(chance[right] - chance[1 - right])
                rewards.append(200 * gap if gap > 0 else 180 * gap)
            found.append(sum(rewards) / len(rewards))
        return torch.tensor(found, dtype=torch.float64)

    def ours(self) -> Tensor:
        """The same by what a policy is given."""
        return self.words.tried(next(self.drawn), self.rows).reward.mean(1)


WAYS: Mapping[str, Mapping[str, Any]] = {
    ALONE: {"share_prefix": False, "narrow_head": False, "kept_mib": 0},
    READ: {"share_prefix": False, "kept_mib": 0},
    KEPT: {},
}


def ways(prompts: int, cell: Cell, model: Any, folder: Path) -> dict[str, Loop]:
    """Every way to score."""
    hand = Setting(cell, model, prompts)
    made = {USUAL: Loop(hand.backbone.model, hand.by_hand)}
    for name, switches in WAYS.items():
        own = Setting(cell, model, prompts, **switches)
        made[name] = Loop(own.backbone.model, own.ours)
    return made


def apart(prompts: int, cell: Cell, model: Any, folder: Path) -> dict[str, Any]:
    """How far the rewards are from those of the usual loop, which lie between -180 and 200."""
    wanted = Setting(cell, model, prompts).by_hand()
    return {
        f"difference, {name}": float((Setting(cell, model, prompts, **switches).ours() - wanted).abs().max())
        for name, switches in WAYS.items()
    }


CELLS = [
    Cell(f"{shapes.TITLE[kind]}, {prompts} prompts, {texts} texts", kind, texts, 32, 5,
         functools.partial(ways, prompts), (Target(KEPT, USUAL, 1 / 10),), extra=functools.partial(apart, prompts))
    for kind, prompts, texts in (("gpt2", 8, 16), ("gpt2", 16, 32))
]  # fmt: skip


def table() -> str:
    """Rows as a table."""
    lines = [
        "| cell | way | time of the usual loop's | prompts per second, times | rewards off by |",
        "|---|---|---|---|---|",
    ]
    for row in read(ROWS):
        cell, way = row["cell"]
        middle, least, most = row["time_ratio"], row["time_ratio_min"], row["time_ratio_max"]
        off = row.get(f"difference, {way}")
        lines.append(
            f"| {cell} | {way} | {middle:.3f} ({least:.3f} to {most:.3f}) | {1 / middle:.1f}x "
            f"| {'-' if off is None else f'{off:.0e}'} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    command_line(__doc__, "rewards.py", CELLS, ROWS, table)
