"""The part of a model behind its body: what it expects at chosen positions, and only for the words that are asked for.

Knows no method and no family. The model's own forward pass computes it, around a body that answers with states which
are there already; so the transform, scale, cap and bias of a head stay the model's own.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from promptuary.backbones.inject import Bank, Cut, Read, Wiring

LOGITS = 2**24
"""Logits that exist at once where only probabilities of a few are wanted: 64 MiB in float32; our choice."""


class Expected(abc.ABC):
    """What a model expects at n positions of each of b rows."""

    @abc.abstractmethod
    def words(self, words: Int[Tensor, " w"] | None = None) -> Float[Tensor, "b n w"]:
        """Logits of these words, or of all."""

    @abc.abstractmethod
    def log_probabilities(self, targets: Int[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        """Of one word at each position, under the whole vocabulary, in float32."""


@dataclass(frozen=True)
class Whole(Expected):
    """Logits of all words, [b, n, V], that the model has computed."""

    logits: Float[Tensor, "b n v"]

    def words(self, words: Int[Tensor, " w"] | None = None) -> Float[Tensor, "b n w"]:
        """Picked out of all."""
        return self.logits if words is None else self.logits[..., words]

    def log_probabilities(self, targets: Int[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        """Of one word at each position."""
        return _chosen(self.logits, targets)


@dataclass(frozen=True)
class Narrow(Expected):
    """States [b, n, h] below the part of the model that has yet to run."""

    states: Float[Tensor, "b n h"]
    tail: Tail

    def words(self, words: Int[Tensor, " w"] | None = None) -> Float[Tensor, "b n w"]:
        """No other word is computed."""
        return self.tail.logits(self.states.flatten(0, 1), words).unflatten(0, self.states.shape[:2])

    def log_probabilities(self, targets: Int[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        """The vocabulary is computed for a few positions at a time, unless the head itself is trained."""
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.tail.wiring.model.parameters()):
            return _chosen(self.words(), targets)
        found: Tensor = _InChunks.apply(self.states.flatten(0, 1), targets.flatten(), self.tail)
        return found.view(targets.shape)


class Tail:
    """A model behind its body."""

    def __init__(self, wiring: Wiring, arguments: Callable[[Tensor], dict[str, Any]], *, words_at_head: bool) -> None:
        """Of a wired model.

        Args:
            wiring: of a model with an output head.
            arguments: what the model's forward pass takes besides, for ids [1, n], to get to its body.
            words_at_head: whether the head's rows may be picked before it runs.
        """
        self.wiring, self.arguments, self.words_at_head = wiring, arguments, words_at_head
        self._body: Any = None
        self._kind: Any = None
        self._exact: bool | None = None

    def logits(self, hidden: Float[Tensor, "n h"], words: Int[Tensor, " w"] | None = None) -> Float[Tensor, "n w"]:
        """Logits of these words (of all without) behind states."""
        return self._behind(hidden, words)

    def states(
        self, inputs: dict[str, Any], bank: Bank | None = None, mask: Int[Tensor, "b q"] | None = None
    ) -> Float[Tensor, "b q h"]:
        """States at every position of a forward pass that ends with the body."""
        cut = Cut(self._body)
        with self.wiring.active(bank, Read(None, None), mask, cut=cut):
            self.wiring.model(**inputs)
        states: Tensor = cut.answer.last_hidden_state
        return states

    @torch.no_grad()
    def exact(self, inputs: dict[str, Any]) -> bool:
        """Whether body and tail together are the model: tried once, on the given pass.

        False for a model without a body of its own, one that does something else between the two, and one whose head
        is not a module that runs.
        """
        if self._exact is None:
            model = self.wiring.model
            named = [body for body in (model.base_model, model.get_decoder()) if body is not model]
            # Llama 4 calls its body otherwise than it says
            self._exact = any(self._tried(body, inputs) for body in named or model.children())
        return self._exact

    def _behind(self, hidden: Tensor, words: Tensor | None) -> Tensor:
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        early = words if self.words_at_head else None
        cut = Cut(self._body, self._kind(last_hidden_state=hidden[None]))
        with self.wiring.active(None, Read(None, early), cut=cut):
            found: Tensor = self.wiring.model(**self.arguments(ids)).logits[0]
        return found if words is None or self.words_at_head else found[:, words]

    def _tried(self, body: Any, inputs: dict[str, Any]) -> bool:
        model = self.wiring.model
        if not isinstance(body, PreTrainedModel):
            return False
        self.wiring.cuts(body)
        with self.wiring.active():
            whole = model(**inputs).logits[0, -2:]
        cut = Cut(body)
        with self.wiring.active(None, cut=cut):
            model(**inputs)
        if cut.answer is None:  # OPT names a body around the one that it runs
            return False
        self._body, self._kind = body, type(cut.answer)
        # the last two only: what comes behind the body must not depend on the others
        states, words = cut.answer.last_hidden_state[0, -2:], torch.arange(2, 7, device=whole.device)
        for found, wanted in ((self._behind(states, None), whole), (self._behind(states, words), whole[:, words])):
            # half precision rounds a product of other sizes in another way
            bound = 1e-4 if found.dtype == torch.float32 else 0.05
            if found.shape != wanted.shape or float((found - wanted).norm()) > bound * float(wanted.norm()):
                return False
        return True


class _InChunks(torch.autograd.Function):
    """Log-probabilities whose gradient is computed on the way: the head is frozen, so that nothing else is needed."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, tail: Tail) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        size = max(1, LOGITS // tail.wiring.vocabulary)
        values, gradients = list[Tensor](), list[Tensor]()
        for part, chosen in zip(hidden.split(size), targets.split(size), strict=True):
            with torch.set_grad_enabled(wanted):
                part = part.detach().requires_grad_(wanted)
                found = _chosen(tail.logits(part), chosen)
                if wanted:
                    gradients.append(torch.autograd.grad(found.sum(), part)[0])
            values.append(found.detach())
        if wanted:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * outer[0][:, None]).to(gradient.dtype), None, None


def _chosen(logits: Float[Tensor, "*b v"], targets: Int[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    logits = logits.float()
    return logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)
