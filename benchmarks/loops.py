"""One training step in each library, on the same weights and the same texts.

Knows no cell and no clock. Every step embeds, runs, goes back and lets AdamW move what is trained. The loops by hand
and those of PEFT find their batches ready; ours makes each from its rows, as it does in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import shapes
from cells import Loop
from promptuary.backbones.base import Backbone
from promptuary.data.collate import Row
from promptuary.listening import Listener
from promptuary.testing.case import padded
from promptuary.training import Training
from promptuary.types import ANSWER, Batch


class Ours:
    """A run of ours that is asked for its steps one by one.

    `prepare` and `step` are what `promptuary.train` calls; nothing is written in between.
    """

    def __init__(self, kind: str, model: Any, folder: Path, rows: Sequence[dict[str, str]],
                 method: dict[str, Any], *, train: dict[str, Any] | None = None, held: Backbone | None = None,
                 **backbone: Any) -> None:  # fmt: skip
        """Load rows and settings; nothing runs yet. `held`: a backbone that another run has already."""
        held = held or shapes.hold(kind, model, **backbone)
        train = {"batch_size": len(rows), **(train or {})}
        self.training = Training(shapes.run(folder, rows, held, method, **train), Listener(), held)
        self.training.prepare(resume=False)
        self.tuned, self.rows = self.training.tuned, self.training.feed.rows["train"]

    @property
    def loop(self) -> Loop:
        """One step over all rows."""
        return Loop(self.tuned.backbone.model, self.step)

    @property
    def passes(self) -> Loop:
        """One pass over the rows in batches."""
        return Loop(self.tuned.backbone.model, self.epoch)

    def step(self, rows: list[Row] | None = None) -> float:
        """One step over all rows, or over those given; its loss."""
        return self.training.step(self.rows if rows is None else rows).loss

    def epoch(self) -> None:
        """All batches of one pass, in the order of the run."""
        for place in range(self.training.feed.steps_per_epoch):
            self.step(self.training.feed.at(place))

    def batch(self) -> Batch:
        """All rows as one batch."""
        return self.tuned.batch(self.rows)

    def gradient(self) -> Tensor:
        """Of all trained tensors, at the values that they have now."""
        self.tuned.train(True)
        tensors = [group.parameter for group in self.tuned.trained()]
        found = torch.autograd.grad(self.tuned.loss(self.batch()).total, tensors)
        return torch.cat([part.flatten().float() for part in found])


def labels_of(kind: str, batch: Batch, words: Tensor, added: int) -> Tensor:
    """Targets as transformers takes them, for a sequence with so many positions in front."""
    assert batch.target is not None
    answer = words[batch.target]
    if kind == "t5":
        return torch.stack([answer, torch.full_like(answer, 2)], dim=1)
    labels = torch.full((len(batch), batch.input_ids.shape[1] + added), -100)
    return labels.scatter(1, batch.slots[ANSWER][:, None] + added, answer[:, None])


def answers_at_end(kind: str, batch: Batch, words: Tensor, filler: int = 0) -> Batch:
    """The batch with a place for the answer's token behind the text, where a causal model has its targets."""
    if shapes.FAMILY[kind] != "causal":
        return batch
    longer = padded(batch, right=1)
    at = batch.attention_mask.sum(1, keepdim=True)
    answer = words[batch.target][:, None] if batch.target is not None else torch.full_like(at, filler)
    slots = {**batch.slots, ANSWER: at[:, 0]}
    longer.input_ids.scatter_(1, at, answer)
    longer.attention_mask.scatter_(1, at, 1)
    return Batch(longer.input_ids, longer.attention_mask, batch.index, slots=slots, target=batch.target)


def by_hand(kind: str, model: Any, batches: Sequence[Batch], words: Tensor, length: int) -> Loop:
    """The loop that a person writes: prompt and embeddings put together, the model's own loss."""
    width = model.get_input_embeddings().weight.shape[1]
    prompt = nn.Parameter(torch.randn(length, width) * 0.1)
    optimizer = torch.optim.AdamW([prompt], lr=1e-3)
    ready = [answers_at_end(kind, batch, words) for batch in batches]
    targets = [labels_of(kind, batch, words, length) for batch in ready]
    cache = {} if kind == "bert" else {"use_cache": False}

    def step() -> None:
        for batch, labels in zip(ready, targets, strict=True):
            vectors = torch.cat([prompt.expand(len(batch), -1, -1), model.get_input_embeddings()(batch.input_ids)], 1)
            mask = nn.functional.pad(batch.attention_mask, (length, 0), value=1)
            model(inputs_embeds=vectors, attention_mask=mask, labels=labels, **cache).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return Loop(model, step)


def peft(
    kind: str, model: Any, batches: Sequence[Batch], words: Tensor, length: int | None, *, narrow: bool = False
) -> Loop:
    """PEFT in a plain loop: PROMPT_TUNING of so many rows, or LoRA of rank 8 with its default places.

    Args:
        kind: of model.
        model: is changed by LoRA.
        batches: of one pass.
        words: ids of the label words.
        length: rows of the prompt; None: LoRA.
        narrow: read logits at the answer alone, as ours does, by the user's own code around PEFT (texts of one length).
    """
    from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model

    task = {"bert": TaskType.FEATURE_EXTRACTION, "t5": TaskType.SEQ_2_SEQ_LM}.get(kind, TaskType.CAUSAL_LM)
    if length is None:
        wrapped: Any = get_peft_model(model, LoraConfig(task_type=task, r=8))
    else:
        wrapped = get_peft_model(model, PromptTuningConfig(task_type=task, num_virtual_tokens=length))
    wrapped.eval()
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-3)
    ready = [answers_at_end(kind, batch, words) for batch in batches]
    start = torch.zeros(len(batches[0]), 1, dtype=torch.long)
    targets = [labels_of(kind, batch, words, length or 0 if kind == "bert" else 0) for batch in ready]

    def step() -> None:
        for batch, labels in zip(batches if narrow else ready, targets, strict=True):
            inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            if narrow:
                read = {"decoder_input_ids": start} if kind == "t5" else {"logits_to_keep": 1}
                loss = nn.functional.cross_entropy(wrapped(**inputs, **read).logits[:, -1][:, words], batch.target)
            elif kind == "bert":  # PEFT has no kind of task for masked models, so the loss is the user's
                logits = wrapped(**inputs).logits
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            else:
                loss = wrapped(**inputs, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return Loop(model, step)
