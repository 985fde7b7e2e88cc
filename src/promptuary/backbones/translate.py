"""Arguments and outputs of transformers, between positions of the text and positions of a text with prompts in it.

Knows no model and no prompt; refuses by name what cannot be translated.
"""

from __future__ import annotations

import copy
import threading
import weakref
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.loss.loss_utils import ForQuestionAnsweringLoss

from promptuary.errors import SiteError
from promptuary.types import Batch

REFUSED = ("assistant_model", "custom_generate", "negative_prompt_ids", "guidance_scale", "cu_seq_lens_q")
"""Arguments of `forward` or `generate` that cannot be right with a prompt."""


def refuse(given: dict[str, Any]) -> None:
    """Refuse arguments that cannot be right.

    Raises:
        SiteError: names them.
    """
    named = [name for name in REFUSED if given.get(name) is not None]
    if named:
        raise SiteError(f"with a prompt attached, {', '.join(named)} cannot be right; leave it out")


def start_again(positions: Tensor, mask: Tensor | None) -> bool:
    """Whether positions start again within a row of real tokens."""
    if mask is not None and not bool(mask.bool().all()):
        return False
    return bool((positions[:, 1:] == 0).any())


def check_positions(positions: Tensor, text: Tensor, new: int) -> None:
    """Positions that count the text are what we count ourselves; others would tear it apart."""
    counted = (text.cumsum(1) - 1)[:, -new:]
    if not bool(((positions == counted) | ~text[:, -new:].bool()).all()):
        raise SiteError(
            "position_ids do not count the tokens of the text from 0; leave them out, or start them again at 0 "
            "for each of several packed texts"
        )


def without(output: Any, columns: int) -> Any:
    """Sequences without their first columns."""
    if isinstance(output, Tensor):
        return output[:, columns:]
    output.sequences = output.sequences[:, columns:]
    return output


def lengthen(given: dict[str, Any], longer: int) -> None:
    """Lengths that count the text count the prompt too."""
    for name in ("max_length", "min_length"):
        if given.get(name):
            given[name] += longer
    config = given.get("generation_config")
    if config is not None and (config.max_length or config.min_length):
        config = copy.deepcopy(config)
        config.max_length = config.max_length and config.max_length + longer
        config.min_length = config.min_length and config.min_length + longer
        given["generation_config"] = config


def strip(output: Any, columns: Tensor, width: int, is_read: bool) -> None:
    """Take prompt positions out of everything that has one vector or one number per position."""

    def strip(states: Tensor) -> Tensor:
        if states.dim() < 2 or states.shape[1] != width or len(states) != len(columns):
            return states
        index = columns if states.dim() == 2 else columns[..., None].expand(-1, -1, states.shape[-1])
        return states.gather(1, index)

    for name in ("last_hidden_state", "start_logits", "end_logits", *(() if is_read else ("logits",))):
        value = output.get(name)
        if value is not None and (name != "logits" or value.dim() == 3):
            output[name] = strip(value)
    if output.get("hidden_states") is not None:
        output["hidden_states"] = tuple(strip(states) for states in output["hidden_states"])


def finish_spans(output: Any, text: Tensor, spans: dict[str, Tensor]) -> Any:
    """Answers to questions lie in the text: padding and prompt take no part in the softmax over positions."""
    if output.get("start_logits") is None:
        return output
    for name in ("start_logits", "end_logits"):
        output[name] = output[name].masked_fill(~text.bool(), torch.finfo(output[name].dtype).min)
    if spans:
        output["loss"] = ForQuestionAnsweringLoss(output["start_logits"], output["end_logits"], **spans)
        output.move_to_end("loss", last=False)
    return output


@dataclass(eq=False)
class Turns:
    """What a cache remembers of the turns behind it: columns that the model wrote, which never take an offset."""

    written: list[tuple[int, int]] = field(default_factory=list)
    broken: str | None = None

    def check(self) -> None:
        """Refuse to continue a cache whose columns are not where the caller has them."""
        if self.broken is not None:
            raise SiteError(f"this cache cannot be continued: {self.broken}")

    def without_offset(self, batch: Batch) -> Batch:
        """The batch with those columns marked."""
        plain = torch.zeros_like(batch.attention_mask, dtype=torch.bool)
        for begin, end in self.written:
            plain[:, begin:end] = True
        return replace(batch, plain=plain)


_LOCK = threading.Lock()
_TURNS: weakref.WeakKeyDictionary[Any, Turns] = weakref.WeakKeyDictionary()


def turns_of(cache: Any) -> Turns:
    """The memory of a cache, kept as long as the cache."""
    with _LOCK:
        return _TURNS.setdefault(cache, Turns())


class TextStreamer:
    """A streamer that is told the text as it was given, without a prompt."""

    def __init__(self, inner: Any, text: Tensor | None) -> None:
        """Wrap `inner`; `text` [b, t] is what it is told first, if there are ids."""
        self.inner, self.text, self.first = inner, text, True

    def put(self, value: Tensor) -> None:
        """The first call brings the input."""
        if not self.first:
            self.inner.put(value)
        elif self.text is not None:
            self.inner.put(self.text.cpu())
        self.first = False

    def end(self) -> None:
        """Nothing more comes."""
        self.inner.end()
