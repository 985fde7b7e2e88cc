"""A tiny voice to speak with and words that are rewarded by a function, for tests of what writes prompts.

Knows no solver.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from promptuary.solvers.base import Tried


class TinyVoice(nn.Module):
    """A frozen random causal transformer of two layers; its tokens are the words w0, w1, ... and "broken" ones.

    A broken token has a text that is read as another; `ran` counts sequences that went through it.
    """

    def __init__(self, size: int = 200, width: int = 32, broken: Sequence[int] = (), seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.table = nn.Embedding(size, width)
            self.places = nn.Embedding(16, width)
            layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False, norm=nn.LayerNorm(width))
            # states of trained models are large
            self.body.norm.weight.data.mul_(5)
        self.requires_grad_(False).eval()
        self.width, self.vocabulary, self.device = width, size, torch.device("cpu")
        self.broken, self.ran = set(broken), 0
        self.name, self.identity = "tiny voice", {"architecture": "tiny"}

    def ids(self, text: str) -> list[int]:
        return [int(word[1:]) % self.vocabulary if word[1:].isdigit() else 7 for word in text.split()]

    def text(self, ids: Sequence[int]) -> str:
        return " ".join("\ufffd" if one in self.broken else f"w{one}" for one in ids)

    @torch.no_grad()
    def states(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        self.ran += len(sequences)
        length = max(map(len, sequences))
        ids = torch.tensor([[*sequence, *[0] * (length - len(sequence))] for sequence in sequences])
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        found = self.body(self.table(ids) + self.places.weight[:length], mask=mask)
        return found[torch.arange(len(ids)), [len(sequence) - 1 for sequence in sequences]]

    def logits(self, states: Tensor) -> Tensor:
        return F.linear(states, self.table.weight)


class Rewarded:
    """Words whose reward is a function of the text and the example; `asked` holds every call's texts."""

    def __init__(self, reward: Callable[[str, Mapping[str, Any]], float], examples: int = 3) -> None:
        self.reward, self.text = reward, "as it was"
        self.examples = [{"text": f"x{place}", "place": place} for place in range(examples)]
        self.held_out = self.examples[:1]
        self.fields = ("text",)
        self.asked: list[list[str]] = []
        self.rows: list[list[int]] = []

    def written_by(self, policy: Any) -> None:
        self.policy = policy

    def tried(
        self,
        texts: Sequence[str],
        examples: Sequence[Mapping[str, Any]],
        check: Callable[[], None] | None = None,
        draw: int = 0,
    ) -> Tried:
        if check is not None:
            check()
        self.asked.append(list(texts))
        self.rows.append([example["place"] for example in examples])
        rewards = torch.tensor([[float(self.reward(text, one)) for one in examples] for text in texts])
        return Tried(rewards, (rewards > 0).float())
