"""How prompts start: rows of the vocabulary, of a text, or random at the vocabulary's scale.

Knows no method.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import tiny
from promptuary.errors import ConfigError
from promptuary.prompts.init import COMMON_TOKENS, Starting, starting_rows

KINDS = ("t5", "llama", "bert", "minilm")


def source(kind: str = "t5", seed: int = 0) -> Starting:
    return Starting(tiny.backbone(kind).vocabulary, torch.Generator().manual_seed(seed))


def table(kind: str) -> Tensor:
    """The embedding table, read off the model without the library."""
    return tiny.model(kind).get_input_embeddings().weight.detach()


@dataclass
class Wide:
    """A vocabulary of `size` tokens whose embedding is their own number, in d = 2."""

    size: int

    def common(self, limit: int) -> Tensor:
        return torch.arange(self.size)[:limit]

    def ids(self, text: str) -> Tensor:
        return torch.tensor([int(word) for word in text.split()], dtype=torch.long)

    def embed(self, ids: Tensor) -> Tensor:
        return torch.stack([ids, ids], dim=1).float()

    def keys_values(self, ids: Tensor) -> Tensor:
        raise NotImplementedError("rows need none")

    def rms(self) -> float:
        return 3.0


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_rows_are_rows_of_ordinary_tokens(kind: str) -> None:
    rows, weight = starting_rows("vocabulary", 12, source(kind)), table(kind)
    for row in rows:
        places = (weight == row).all(1).nonzero().flatten()
        assert len(places) == 1
        assert int(places) >= len(tiny.SPECIAL), "a special token"
    assert rows.dtype == torch.float32
    assert not rows.requires_grad


def test_sampled_rows_do_not_repeat_while_the_vocabulary_lasts() -> None:
    common = len(tiny.WORDS)
    assert len(starting_rows("vocabulary", common, source()).unique(dim=0)) == common
    more = starting_rows("vocabulary", 2 * common + 3, source())
    _, times = more.unique(dim=0, return_counts=True)
    assert set(times.tolist()) == {2, 3}
    assert int((times == 3).sum()) == 3


def test_only_the_most_common_tokens_are_sampled() -> None:
    rows = starting_rows("vocabulary", COMMON_TOKENS, Starting(Wide(20_000), torch.Generator().manual_seed(0)))
    assert float(rows.max()) == COMMON_TOKENS - 1
    assert len(rows.unique(dim=0)) == COMMON_TOKENS


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_a_text_is_tiled_or_cut_to_length(count: int) -> None:
    words = ["red", "sky", "was"]
    ids = tiny.tokenizer().convert_tokens_to_ids([words[place % 3] for place in range(count)])
    assert torch.equal(starting_rows("text", count, source("t5"), text="red sky was"), table("t5")[ids])


def test_a_text_brings_no_special_tokens() -> None:
    for kind in KINDS:
        rows = starting_rows("text", 1, source(kind), text="good")
        assert torch.equal(rows, table(kind)[tiny.tokenizer().convert_tokens_to_ids(["good"])])


@pytest.mark.parametrize("text", [None, "", "   "])
def test_an_empty_text_is_refused_by_name_of_the_field(text: str | None) -> None:
    with pytest.raises(ConfigError, match="init_text"):
        starting_rows("text", 3, source(), text=text)


@pytest.mark.parametrize("kind", KINDS)
def test_random_rows_have_the_scale_of_the_vocabulary_and_never_one(kind: str) -> None:
    scale = table(kind)[len(tiny.SPECIAL) :].pow(2).mean().sqrt()
    rows = starting_rows("random", 400, source(kind))
    assert float(rows.pow(2).mean().sqrt() / scale) == pytest.approx(1, rel=0.05)
    assert abs(float(rows.mean() / scale)) < 0.05
    assert abs(float(rows.std()) - 1) > 0.5, "the tiny tables are far from unit scale, so N(0, 1) would show"


def test_random_rows_follow_the_given_scale_exactly() -> None:
    generator = torch.Generator().manual_seed(4)
    expected = torch.randn(5, 2, generator=torch.Generator().manual_seed(4)) * 3.0
    assert torch.equal(starting_rows("random", 5, Starting(Wide(10), generator)), expected)


@pytest.mark.parametrize("start", ["vocabulary", "text", "random"])
def test_no_rows_keep_the_width(start: str) -> None:
    assert starting_rows(start, 0, source(), text="red").shape == (0, tiny.WIDTH)  # type: ignore[arg-type]


@pytest.mark.parametrize("start", ["vocabulary", "random"])
def test_same_generator_state_gives_same_bytes_and_another_seed_others(start: str) -> None:
    def draw(seed: int) -> bytes:
        return starting_rows(start, 7, source(seed=seed)).numpy().tobytes()  # type: ignore[arg-type]

    assert draw(3) == draw(3) != draw(4)


@pytest.mark.parametrize("start", ["vocabulary", "text", "random"])
def test_the_global_random_state_is_neither_read_nor_moved(start: str) -> None:
    torch.manual_seed(11)
    before, one = torch.get_rng_state(), starting_rows(start, 5, source(), text="red sky")  # type: ignore[arg-type]
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(12)
    assert torch.equal(one, starting_rows(start, 5, source(), text="red sky"))  # type: ignore[arg-type]


def test_rows_are_copies_of_the_frozen_table() -> None:
    backbone = tiny.backbone("t5")
    starting_rows("text", 2, Starting(backbone.vocabulary, torch.Generator()), text="red sky").zero_()
    assert torch.equal(backbone.table.weight, table("t5"))


def test_a_half_precision_table_gives_single_precision_rows() -> None:
    vocabulary = tiny.backbone("llama", dtype="bfloat16").vocabulary
    rows = starting_rows("text", 1, Starting(vocabulary, torch.Generator()), text="red")
    assert rows.dtype == torch.float32
    expected = table("llama")[tiny.tokenizer().convert_tokens_to_ids(["red"])].bfloat16().float()
    assert torch.equal(rows, expected)
