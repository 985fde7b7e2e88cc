"""What our training loop costs on top of a minimal hand-written one.

Knows no result: every row is written by the command that is noted in it.

    python benchmarks/overhead.py loop --family causal     # fixed cost of a step, on a model without arithmetic

The clock is CPU seconds of this process, with one thread. Both run in turn, and the figure is the median of their
differences.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import promptuary
from cells import RESULTS, replace_rows
from promptuary import runs
from promptuary.backbones.base import Backbone
from promptuary.data.collate import Row
from promptuary.run import Run
from promptuary.testing import tiny
from promptuary.training import Listener, Training

ROWS = RESULTS / "overhead.jsonl"
EXAMPLES, BATCH, PROMPT = 64, 4, 4
LABELS = {"positive": "good", "negative": "bad"}


def data(folder: Path, words: int, seed: int = 0) -> Path:
    """A data set of texts of so many words."""
    pick = random.Random(seed)
    for split, count in {"train": EXAMPLES, "validation": 4, "test": 4}.items():
        lines = [
            {"text": " ".join(pick.choices(tiny.WORDS, k=words)), "label": pick.choice(list(LABELS))}
            for _ in range(count)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


def settings(folder: Path, backbone: Backbone, out: str, method: Mapping[str, Any], **train: Any) -> Run:
    """A run on it, without a validation or a checkpoint between its first and its last step."""
    return promptuary.load_run(
        {
            "task": {"name": "classify", "template": "{text} it is {mask}", "labels": LABELS},
            "data": {"source": str(folder), "max_length": 64},
            "backbone": backbone.config.model_dump(),
            "method": dict(method),
            "train": {"batch_size": BATCH, "evaluate_every": 10**6, **train},
            "out": str(folder / out),
        }
    )


# ---- the loop -------------------------------------------------------------------------------------------------------


def minimal(training: Training) -> Callable[[], None]:
    """A step as a person writes it for one task: embed, put the prompt in front, read two words, step.

    No clipping, schedule, log, guard or resume. The frozen model, the encoded rows and the kind of loss are ours.
    """
    model: Any = training.backbone.model
    embed, words = model.get_input_embeddings(), training.tuned.asking.words.ids[:, 0]
    prompt = nn.Parameter(training.tuned.state()["method.rows"])
    optimizer = torch.optim.AdamW([prompt], lr=1e-3)
    rows, order = training.feed.rows["train"], random.Random(0)
    family = training.backbone.name
    extra = {"use_cache": False} if family == "causal" else {}
    prototypes = torch.randn(len(words), training.backbone.shape.width)

    def batch(chosen: list[Row]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        width = max(len(row.encoded.ids) for row in chosen)
        ids = torch.tensor([row.encoded.ids + [0] * (width - len(row.encoded.ids)) for row in chosen])
        mask = torch.tensor(
            [[1] * (PROMPT + len(row.encoded.ids)) + [0] * (width - len(row.encoded.ids)) for row in chosen]
        )
        at = torch.tensor([PROMPT + row.encoded.slots.get("mask", 0) for row in chosen])
        return ids, mask, at, torch.tensor([row.target for row in chosen])

    def step() -> None:
        ids, mask, at, target = batch(order.sample(rows, BATCH))
        inputs = {
            "inputs_embeds": torch.cat([prompt.expand(len(ids), -1, -1), embed(ids)], 1), "attention_mask": mask
        }  # fmt: skip
        if family == "seq2seq":
            start = torch.zeros(len(ids), 1, dtype=torch.long)
            logits = model(**inputs, decoder_input_ids=start, use_cache=False).logits[:, 0, words]
        elif family == "encoder":
            states, real = model(**inputs).last_hidden_state[:, PROMPT:], mask[:, PROMPT:, None]
            mean = nn.functional.normalize((states * real).sum(1) / real.sum(1), dim=-1)
            logits = mean @ prototypes.T / 0.05
        else:
            logits = model(**inputs, **extra).logits[torch.arange(len(ids)), at][:, words]
        nn.functional.cross_entropy(logits, target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class Turns(Listener):
    """Lets the minimal loop run after every `size` steps of the run, and takes the time of both."""

    def __init__(self, size: int) -> None:
        """Of so many steps each."""
        self.size, self.ours, self.theirs = size, list[float](), list[float]()

    def begun(self, training: Training) -> None:
        """Make the other loop."""
        self.step = minimal(training)

    def stepped(self, row: Mapping[str, Any]) -> None:
        """Its turn, if it is."""
        if row["step"] == self.size:  # a warm-up of both
            for _ in range(self.size):
                self.step()
            self.began = time.process_time()
        elif row["step"] % self.size == 0:
            now = time.process_time()
            self.ours.append((now - self.began) / self.size)
            for _ in range(self.size):
                self.step()
            self.began = time.process_time()
            self.theirs.append((self.began - now) / self.size)


def loop(family: str, rounds: int, size: int, command: str) -> dict[str, Any]:
    """The fixed cost of a step of `Training` over the minimal loop, in milliseconds."""
    backbone, turns = tiny.backbone(family), Turns(size)
    with tempfile.TemporaryDirectory() as folder:
        method = {"name": "prompt_tuning", "num_virtual_tokens": PROMPT}
        run = settings(data(Path(folder), 8), backbone, "run", method, steps=(rounds + 1) * size)
        promptuary.train(run, listener=turns, backbone=backbone)
    more = [1e3 * (ours - theirs) for ours, theirs in zip(turns.ours, turns.theirs, strict=True)]
    return {
        "cell": [family, "loop"],
        "fixed_cost_ms": round(statistics.median(more), 3),
        "fixed_cost_ms_min": round(min(more), 3),
        "fixed_cost_ms_max": round(max(more), 3),
        "ours_ms": round(1e3 * statistics.median(turns.ours), 3),
        "minimal_ms": round(1e3 * statistics.median(turns.theirs), 3),
        "rounds": len(more),
        "steps_per_round": size,
        "seeds": [run.seed],
        **meta(f"tiny {family}", command),
    }


# ---- rows -----------------------------------------------------------------------------------------------------------


def meta(backbone: str, command: str) -> dict[str, Any]:
    """Where a row comes from."""
    return {
        "backbone": backbone,
        "machine": f"{runs.processor()}, {torch.get_num_threads()} thread(s)",
        "clock": "CPU seconds of the process",
        "versions": runs.versions(),
        "command": command,
    }


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["loop"])
    parser.add_argument("--family", choices=list(tiny.FAMILIES), default="causal", help="of the loop's tiny model")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--dry", action="store_true", help="show the row, do not keep it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    command = f"python benchmarks/overhead.py {' '.join(sys.argv[1:])}"
    row = loop(arguments.family, arguments.rounds, 20, command)
    print(json.dumps(row), flush=True)
    if not arguments.dry:
        replace_rows(ROWS, [row], list(tiny.FAMILIES))


if __name__ == "__main__":
    main()
