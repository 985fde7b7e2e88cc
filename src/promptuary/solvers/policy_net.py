"""A policy over tokens: a frozen voice with a small trained network between its last state and its head.

Knows no reward, no loss and no prompt of a task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from promptuary.errors import ConfigError
from promptuary.solvers.base import Voice
from promptuary.solvers.soft_q import likeliest, nucleus

GAIN, BIAS = 1e-4, -1e-4
"""Of the first weights and biases (RLPrompt's code): all logits begin near 0, and the policy near uniform."""

LONGEST = 256
"""Most tokens of an input that a policy is conditioned on; our choice."""

Weights = Sequence[Tensor]
"""Of the two layers: [m, h], [m], [h, m], [h]."""


@dataclass(frozen=True)
class Speech:
    """How tokens are drawn.

    `length`: tokens of a prompt. `top_k`, `top_p`: only such tokens are drawn, while the policy itself stays whole.
    `fluent`: every token that is not among so many of the likeliest of the voice alone has probability 0. `no_repeat`:
    and one that the prompt has already. `bias` is added to every logit.
    """

    length: int
    top_k: int | None = None
    top_p: float | None = None
    fluent: int | None = None
    no_repeat: bool = False
    bias: float = 0.0


@dataclass(frozen=True)
class Spoken:
    """Prompts, the states of the voice before each of their tokens, and the policy's logits there.

    A token that may not be said at all has logit minus infinity.
    """

    ids: Int[Tensor, "k t"]
    states: Float[Tensor, "k t h"]
    logits: Float[Tensor, "k t v"]


class Policy:
    """pi(token | context and tokens so far) = softmax(head(W2 relu(W1 state + b1) + b2)), without a residual.

    RLPrompt (Deng et al. 2022, arXiv 2205.12548), section 3.2, as its code has it. Only `weights` learn; states and
    head are the voice's.
    """

    def __init__(
        self, voice: Voice, hidden: int, speech: Speech, generator: torch.Generator, sayable: bool = False
    ) -> None:
        """With fresh weights.

        Args:
            voice: states come from it, and its head makes logits.
            hidden: m, width between the layers.
            speech: how tokens are drawn.
            generator: of the first weights.
            sayable: tokens that do not come back when their text is read again are never said.
        """
        self.voice, self.speech, self.sayable = voice, speech, sayable
        first, second = torch.empty(hidden, voice.width), torch.empty(voice.width, hidden)
        for weight in (first, second):
            nn.init.xavier_uniform_(weight, gain=GAIN, generator=generator)
        drawn = (first, torch.full((hidden,), BIAS), second, torch.full((voice.width,), BIAS))
        self.weights: list[nn.Parameter] = [nn.Parameter(one.to(voice.device)) for one in drawn]
        self._allowed: Tensor | None = None

    @property
    def allowed(self) -> Bool[Tensor, " v"]:
        """Which tokens are ever said; found out once.

        Raises:
            ConfigError: too few for one prompt.
        """
        if self._allowed is None:
            found = torch.ones(self.voice.vocabulary, dtype=torch.bool)
            if self.sayable:
                found = torch.tensor([_comes_back(self.voice, one) for one in range(self.voice.vocabulary)])
            least = self.speech.length if self.speech.no_repeat else 1
            if int(found.sum()) < least:
                raise ConfigError(
                    f"the policy's model has {int(found.sum())} tokens that may be said, and a prompt needs {least}; "
                    "set solver.sayable: false, or take another solver.model"
                )
            self._allowed = found.to(self.voice.device)
        return self._allowed

    def logits(self, states: Float[Tensor, "n h"], weights: Weights | None = None) -> Float[Tensor, "n v"]:
        """Q of every token after such states, nothing forbidden; of other weights of the same sizes, if given."""
        w1, b1, w2, b2 = self.weights if weights is None else weights
        # in float32 whatever the voice has, and whatever the training settings say of mixed precision
        with torch.autocast(states.device.type, enabled=False):
            adapted = F.linear(F.relu(F.linear(states.float(), w1, b1)), w2, b2)
            return self.voice.logits(adapted.to(states.dtype)).float() + self.speech.bias

    def likewise(self, spoken: Spoken, weights: Weights) -> Float[Tensor, "k t v"]:
        """Logits of other weights along the same prompts, with the same tokens forbidden; no state runs again."""
        found = self.logits(spoken.states.flatten(0, 1), weights).view_as(spoken.logits)
        return found.masked_fill(spoken.logits.detach() == -torch.inf, -torch.inf)

    def speak(
        self, contexts: Sequence[Sequence[int]], generator: torch.Generator | None = None, greedy: int = 0
    ) -> Spoken:
        """Prompts token by token; ids go straight back into the voice, never by way of their text.

        Args:
            contexts: token ids that each prompt is conditioned on, at least one id: the same for all, or an input each.
            generator: what tokens are drawn from; without it the likeliest is taken everywhere.
            greedy: so many of the last prompts take the likeliest token instead.
        """
        sequences = [list(context) for context in contexts]
        spoken = torch.zeros(len(sequences), 0, dtype=torch.long, device=self.voice.device)
        states, logits = list[Tensor](), list[Tensor]()
        for _ in range(self.speech.length):
            states.append(self.voice.states(sequences))
            found = self.logits(states[-1])
            logits.append(found.masked_fill(~self._may(states[-1], spoken), -torch.inf))
            chosen = self._chosen(logits[-1].detach(), generator, greedy)
            spoken = torch.cat([spoken, chosen[:, None]], 1)
            for sequence, one in zip(sequences, chosen.tolist(), strict=True):
                sequence.append(one)
        return Spoken(spoken, torch.stack(states, 1), torch.stack(logits, 1))

    def context(self, text: str) -> list[int]:
        """Token ids of what prompts are conditioned on; of a long input the beginning.

        Raises:
            ConfigError: there are none.
        """
        ids = list(self.voice.ids(text))[:LONGEST]
        if not ids:
            raise ConfigError(f'solver.placeholder "{text[:80]}" has no tokens; give one or more words')
        return ids

    def text(self, ids: Sequence[int]) -> str:
        """The text of a prompt, with single spaces between words."""
        return " ".join(self.voice.text(ids).split())

    @torch.no_grad()
    def _may(self, states: Float[Tensor, "k h"], spoken: Int[Tensor, "k t"]) -> Bool[Tensor, "k v"]:
        """Which tokens may be said next; at least one each."""
        may = self.allowed.expand(len(spoken), -1)
        if self.speech.no_repeat:
            may = may.clone().scatter_(1, spoken, False)
        if self.speech.fluent is None:
            return may
        plain = self.voice.logits(states).float()
        return likeliest(plain.masked_fill(~may, -torch.inf), self.speech.fluent)

    def _chosen(
        self, logits: Float[Tensor, "k v"], generator: torch.Generator | None, greedy: int
    ) -> Int[Tensor, " k"]:
        best = logits.argmax(1)
        drawn = len(logits) - greedy
        if generator is None or not drawn:
            return best
        rows = logits[:drawn]
        if self.speech.top_k is not None:
            rows = rows.masked_fill(~likeliest(rows, self.speech.top_k), -torch.inf)
        if self.speech.top_p is not None:
            rows = rows.masked_fill(~nucleus(rows, self.speech.top_p), -torch.inf)
        mass = rows.double().softmax(1).cumsum(1)
        # drawn on the CPU: the same numbers on every device; in float32, so that a point stays below the whole mass
        point = torch.rand(drawn, 1, generator=generator).to(mass) * mass[:, -1:]
        # the first token whose mass, with that of all before it, is above the point: never one of probability 0
        taken = torch.searchsorted(mass, point, right=True)[:, 0]
        return torch.cat([taken, best[drawn:]])


def _comes_back(voice: Voice, token: int) -> bool:
    """Whether a token's text is more than blanks and is read as this token again."""
    text = voice.text([token])
    return bool(text.strip()) and list(voice.ids(text)) == [token]
