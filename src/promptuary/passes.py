"""Passes of the frozen model: what it says of a batch whose rows belong to one prompt or to several.

Knows no method, family or task by name, and no solver.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from promptuary.backbones.base import Prompts
from promptuary.backbones.cache import repeat_kv
from promptuary.errors import ConfigError
from promptuary.types import Batch, Outputs, Prompt, View

if TYPE_CHECKING:
    from promptuary.tuned import Tuned

Share = tuple["Tuned", Sequence[int]]
"""A prompt in use, and the rows of a batch that are its own."""

Part = tuple[Batch, View]
"""Those rows, and what the prompt saw of them."""


def outputs(batch: Batch, shares: Sequence[Share]) -> list[Outputs]:
    """What the model says of each prompt's rows, from one pass over all of them.

    Args:
        batch: on the device of the backbone; with candidates where the tasks do not all have the same words.
        shares: of one backbone, with tasks that read in the same way; each row belongs to one of them.
    """
    batch, prompts, parts = placed(batch, shares)
    found = _said(batch, shares, prompts, parts)
    teachers = [tuned.teacher(view) for (tuned, _), (_, view) in zip(shares, parts, strict=True)]
    if all(teacher is None for teacher in teachers):
        return found
    with torch.no_grad():
        taught = _said(batch, shares, _together([one or Prompt() for one in teachers], batch, shares), parts)
    # a head belongs to the prompt that it was trained with, and the teacher's is not here
    taught = [replace(one, scores=None) if tuned.head else one for one, (tuned, _) in zip(taught, shares, strict=True)]
    return [
        one if teacher is None else replace(one, taught=other)
        for one, other, teacher in zip(found, taught, teachers, strict=True)
    ]


def _said(batch: Batch, shares: Sequence[Share], prompts: Prompts, parts: Sequence[Part]) -> list[Outputs]:
    """The same, under given prompts."""
    first = shares[0][0]
    backbone, reading = first.backbone, first.task.reading
    reads = frozenset[str]().union(*(tuned.reads for tuned, _ in shares))
    candidates = batch.candidates if batch.candidates is not None else first.asking.words
    scores = costs = pooled = answer = None
    matched = "texts" in backbone.abilities and reading == "words"
    if "answer" in reads or matched:
        answer = backbone.answer(batch, prompts).float()
    if reading == "text":
        costs = backbone.answer_losses(batch, prompts)
    elif reading == "head":
        pooled = backbone.pooled(batch, prompts).float()
    elif "scores" in reads and not matched:
        if candidates is None:
            raise ConfigError(f"task {first.task.name} has no answers to score")
        scores = backbone.score(batch, prompts, candidates)
    found = []
    for number, ((tuned, rows), (part, view)) in enumerate(zip(shares, parts, strict=True)):
        own = _own(rows, len(batch), batch.input_ids.device)
        mine, seen, texts = own(pooled), own(answer), None
        graded = own(scores) if mine is None or tuned.head is None else tuned.head(mine)
        if matched and seen is not None:
            prompt = prompts if isinstance(prompts, Prompt) else prompts[number]
            if prompt.by_row and len(seen) < len(batch):
                prompt = repeat_kv(prompt, torch.tensor(rows, device=batch.input_ids.device))
            graded, texts = tuned.match(seen, prompt)
        found.append(
            Outputs(
                view,
                scores=graded,
                costs=own(costs),
                answer=seen,
                texts=texts,
                scale=float(backbone.scale) if texts is not None else None,
                words=functools.partial(_words, tuned, part),
                target=part.target,
            )
        )
    return found


def placed(batch: Batch, shares: Sequence[Share]) -> tuple[Batch, Prompts, list[Part]]:
    """The batch with its prompts: which row takes which, all prompts, and for each its rows and what it saw of them."""
    if len(shares) == 1:
        view = shares[0][0].view(batch)
        return batch, shares[0][0].made(view), [(batch, view)]
    which = torch.zeros(len(batch), dtype=torch.long, device=batch.input_ids.device)
    prompts, parts = list[Prompt](), list[Part]()
    for number, (tuned, rows) in enumerate(shares):
        at = torch.tensor(rows, device=which.device)
        part = batch.rows(at)
        view = tuned.view(part)
        prompts.append(tuned.made(view))
        parts.append((part, view))
        which[at] = number
    return replace(batch, prompt_index=which), _together(prompts, batch, shares), parts


def _together(prompts: Sequence[Prompt], batch: Batch, shares: Sequence[Share]) -> Prompts:
    """Prompts of parts of a batch as prompts of the whole batch."""
    if len(shares) == 1:
        return prompts[0]
    device = batch.input_ids.device
    return [
        _spread(prompt, torch.tensor(rows, device=device), len(batch))
        for prompt, (_, rows) in zip(prompts, shares, strict=True)
    ]


def _own(rows: Sequence[int], size: int, device: torch.device) -> Callable[[Tensor | None], Tensor | None]:
    """What picks some rows."""
    if len(rows) == size:
        return lambda value: value
    at = torch.tensor(rows, device=device)
    return lambda value: None if value is None else value[at]


def _spread(prompt: Prompt, at: Tensor, size: int) -> Prompt:
    """A prompt of some rows of a batch; if it depends on the text, with a place for each row of the batch."""
    place = torch.zeros(size, dtype=torch.long, device=at.device)
    return repeat_kv(prompt, place.index_copy(0, at, torch.arange(len(at), device=at.device)))


def _words(tuned: Tuned, batch: Batch, states: Tensor) -> Tensor:
    candidates = batch.candidates if batch.candidates is not None else tuned.asking.words
    assert candidates is not None
    return tuned.backbone.words(states, candidates)
