"""Text to token ids: what is cut, where special tokens and slots stand, and how an answer looks behind a text.

Knows no method or task.
"""

from __future__ import annotations

from typing import Any

import handmade as by_hand
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import tiny
from promptuary.backbones.base import Backbone, pick_device
from promptuary.errors import ConfigError, DataError, SiteError
from promptuary.types import ANSWER, Offset, Piece, Prompt

ANSWER_AT = {"causal": "end", "seq2seq": "target", "masked": "mask", "encoder": "none"}
every = pytest.mark.parametrize("kind", by_hand.KINDS)
CORPUS = ["the good and the bad review was great", "a terrible red apple it is not", "</s> <mask> [MASK] 0 1 2 3 4 :"]
SPECIALS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>", "unk_token": "<unk>"}


def byte_level(**settings: Any) -> Any:
    """BPE on bytes as in GPT-2, RoBERTa and Llama 3."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.post_processor = processors.ByteLevel(trim_offsets=False)
    raw.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    special = list(SPECIALS.values())
    raw.train_from_iterator(
        CORPUS * 5, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=letters)
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, sep_token="</s>", cls_token="<s>", **SPECIALS, **settings
    )


def unigram(**settings: Any) -> Any:
    """Pieces with a visible space as in T5, XLM-R and DeBERTa; the special tokens are pieces of the vocabulary."""
    words = sorted({word for line in CORPUS for word in line.split()} - {"</s>", "<mask>", "[MASK]"})
    letters = sorted({letter for line in CORPUS for letter in line if letter != " "})
    scored = [(name, 0.0) for name in SPECIALS.values()] + [("▁", -4.0), ("\n", -4.0)]
    scored += [("▁" + word, -2.0) for word in words] + [(letter, -5.0) for letter in letters]
    known = dict(reversed(scored))
    raw = Tokenizer(models.Unigram([(name, score) for name, score in known.items()][::-1], unk_id=4))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, sep_token="</s>", cls_token="<s>", **SPECIALS, **settings
    )


TOKENIZERS = {"byte_level": byte_level, "unigram": unigram, "words": tiny.tokenizer}


def with_tokenizer(kind: str, words: Any) -> Backbone:
    """A tiny model of a family with another tokenizer."""
    base = tiny.backbone(kind)
    raw = tiny.model(base.config.model.split("-")[1])
    raw.resize_token_embeddings(len(words))
    return type(base)(raw, words, base.config)


@every
def test_special_tokens_stand_where_the_tokenizer_puts_them(kind: str) -> None:
    backbone = tiny.backbone(kind)
    whole = backbone.tokenizer("the sky is blue").input_ids
    encoded = backbone.encode([Piece("field", "the sky"), Piece("fixed", " is "), Piece("field", "blue")], 64)
    # behind a causal text the answer goes, so nothing is closed there
    assert encoded.ids == whole
    assert encoded.cut == 0
    assert encoded.segments == [0] * len(whole)


@every
def test_only_fields_are_cut_the_longest_first(kind: str) -> None:
    backbone = tiny.backbone(kind)
    pieces = [
        Piece("slot", "prompt_a"),
        Piece("field", "one two three four five six"),
        Piece("fixed", " is the "),
        Piece("slot", "prompt_b"),
        Piece("field", "cat dog"),
        Piece("fixed", " ! it was "),
        Piece("slot", ANSWER),
    ]
    words = backbone.tokenizer.convert_tokens_to_ids
    extra = len(backbone.prefix) + len(backbone.suffix) + (backbone.answer_at == "mask")
    for room, first, second in (
        (13, 6, 2),
        (12, 5, 2),
        (10, 3, 2),
        (9, 2, 2),
        (8, 1, 2),
        (7, 1, 1),
        (6, 0, 1),
        (5, 0, 0),
    ):
        encoded = backbone.encode(pieces, room + extra)
        middle = ["is", "the", *("cat", "dog")[:second], "!", "it", "was"]
        expected = [*(["one", "two", "three", "four", "five", "six"])[:first], *middle]
        mask = [backbone.tokenizer.mask_token_id] if backbone.answer_at == "mask" else []
        assert encoded.ids == [*backbone.prefix, *words(expected), *mask, *backbone.suffix]
        assert encoded.cut == 8 - first - second
        start = len(backbone.prefix)
        assert (encoded.slots["prompt_a"], encoded.slots["prompt_b"]) == (start, start + first + 2)
        if backbone.answer_at == "mask":
            assert encoded.ids[encoded.slots[ANSWER]] == backbone.tokenizer.mask_token_id
        elif backbone.answer_at == "end":
            assert encoded.slots[ANSWER] == len(encoded.ids) - 1
        else:
            assert ANSWER not in encoded.slots
    with pytest.raises(DataError, match=f"the template alone has more than {4 + extra} tokens"):
        backbone.encode(pieces, 4 + extra)


@pytest.mark.parametrize("words", list(TOKENIZERS))
@pytest.mark.parametrize("kind", list(tiny.FAMILIES))
def test_special_tokens_in_a_text_are_ordinary_text(words: str, kind: str) -> None:
    backbone = with_tokenizer(kind, TOKENIZERS[words]())
    assert backbone.answer_at == ANSWER_AT[kind]
    text = "the bad </s> <mask> [MASK] <s> <pad> review"
    for role in ("field", "fixed"):
        pieces = [Piece(role, text), Piece("fixed", " it is "), Piece("slot", ANSWER)]
        encoded = backbone.encode(pieces, 200)
        special = set(backbone.tokenizer.all_special_ids) - {backbone.tokenizer.unk_token_id}
        found = [place for place, token in enumerate(encoded.ids) if token in special]
        closing = 0 if kind == "causal" else len(backbone.suffix)
        front, back = len(backbone.prefix), len(encoded.ids) - closing
        mask = [encoded.slots[ANSWER]] if kind == "masked" else []
        assert found == [*range(front), *mask, *range(back, len(encoded.ids))]
        assert set(encoded.segments) == {0}
        if kind == "masked":
            assert encoded.slots[ANSWER] == back - 1


@every
def test_a_separator_starts_the_second_segment(kind: str) -> None:
    backbone = tiny.backbone(kind)
    pieces = [Piece("field", "the </s> sky"), Piece("slot", "sep"), Piece("field", "a cat"), Piece("slot", "prompt")]
    encoded = backbone.encode(pieces, 64)
    at = encoded.ids.index(2, len(backbone.prefix))
    assert encoded.ids[at + 1 : at + 3] == backbone.tokenizer.convert_tokens_to_ids(["a", "cat"])
    ones = len(encoded.ids) - at - 1
    assert encoded.segments == [0] * (at + 1) + [1] * ones
    assert encoded.slots["prompt"] == at + 3


@every
def test_an_empty_text_works(kind: str) -> None:
    backbone = tiny.backbone(kind)
    encoded = backbone.encode([Piece("field", ""), Piece("fixed", " it was "), Piece("slot", ANSWER)], 64)
    batch = by_hand.texts(backbone, ["", "a cat"])
    assert batch.input_ids[0][batch.attention_mask[0].bool()].tolist() == encoded.ids
    assert bool(backbone.score(batch, Prompt(by_hand.rows(2)), by_hand.candidates(backbone)).isfinite().all())


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_an_example_without_any_token_is_refused(kind: str) -> None:
    with pytest.raises(DataError, match="no tokens at all"):
        tiny.backbone(kind).encode([Piece("field", ""), Piece("slot", ANSWER)], 64)


def text_of(backbone: Backbone, ids: list[int]) -> str:
    return backbone.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("words", ["byte_level", "unigram"])
@pytest.mark.parametrize("answer", ["good", "terrible", "not bad", "apple"])
@pytest.mark.parametrize("glue", [" ", "\n"])
def test_an_answer_has_the_tokens_that_it_has_behind_a_text(words: str, answer: str, glue: str) -> None:
    backbone = with_tokenizer("causal", TOKENIZERS[words]())
    text = "the review" + glue.strip(" ")
    whole = backbone.tokenizer(f"the review{glue}{answer}", add_special_tokens=False).input_ids
    alone = backbone.tokenizer(text, add_special_tokens=False).input_ids
    assert whole[: len(alone)] == alone
    assert backbone.answer_ids(answer, glue=glue) == whole[len(alone) :]
    encoded = backbone.encode([Piece("field", "the review"), Piece("fixed", glue), Piece("slot", ANSWER)], 64)
    if glue == "\n":
        assert encoded.ids == [*backbone.prefix, *alone]
    written = [*encoded.ids[len(backbone.prefix) :], *backbone.answer_ids(answer, glue=glue)]
    assert text_of(backbone, written) == f"the review{glue}{answer}"


def test_word_level_answers_and_answers_without_tokens() -> None:
    backbone = tiny.backbone("bert")
    assert backbone.answer_ids("good") == backbone.tokenizer.convert_tokens_to_ids(["good"])
    assert backbone.answer_ids("not bad", glue="\n") == backbone.tokenizer.convert_tokens_to_ids(["not", "bad"])
    with pytest.raises(DataError, match="has no tokens in this vocabulary"):
        backbone.answer_ids("  ")


def test_special_tokens_in_an_answer_are_ordinary_text() -> None:
    for make in TOKENIZERS.values():
        backbone = with_tokenizer("causal", make())
        special = set(backbone.tokenizer.all_special_ids) - {backbone.tokenizer.unk_token_id}
        assert not special & set(backbone.answer_ids("good </s> <mask>"))


def test_a_cut_byte_level_text_keeps_its_template() -> None:
    backbone = with_tokenizer("masked", byte_level())
    pieces = [Piece("field", "the good and the bad " * 20), Piece("fixed", "it was"), Piece("slot", ANSWER)]
    encoded = backbone.encode(pieces, 20)
    assert len(encoded.ids) == 20
    body = encoded.ids[: encoded.slots[ANSWER]]
    assert text_of(backbone, body).endswith("it was")
    assert text_of(backbone, body).startswith("the good")


def test_sites_that_a_family_lacks_are_refused() -> None:
    class NoOffsets(type(tiny.backbone("bert"))):  # type: ignore[misc]
        sites = frozenset({"input"})

    base = tiny.backbone("bert")
    backbone = NoOffsets(tiny.model("bert"), base.tokenizer, base.config)
    table = Offset(torch.ones(4, 1), torch.ones(1, tiny.WIDTH))
    with pytest.raises(SiteError, match="uses offset, for which BertForMaskedLM"):
        backbone.hidden(by_hand.texts(backbone), Prompt(offset=table))


def test_a_slow_tokenizer_and_a_second_table_are_refused() -> None:
    base, raw = tiny.backbone("llama"), tiny.model("llama")

    class Slow:
        is_fast = False

    with pytest.raises(SiteError, match="Slow is not a fast tokenizer"):
        type(base)(raw, Slow(), base.config)
    raw.config.vocab_size_per_layer_input = 10
    with pytest.raises(SiteError, match="a second per-token table"):
        type(base)(raw, base.tokenizer, base.config)


@every
def test_facts_about_the_model(kind: str) -> None:
    backbone = tiny.backbone(kind)
    assert backbone.shape.width == tiny.WIDTH
    assert backbone.layers == (4 if tiny.FAMILY[kind] == "seq2seq" else 2)
    assert backbone.max_positions == 64
    assert backbone.device == torch.device("cpu")
    assert backbone.embeddings(by_hand.texts(backbone)).shape == (
        3,
        by_hand.texts(backbone).input_ids.shape[1],
        tiny.WIDTH,
    )


@every
def test_the_vocabulary_gives_embeddings_as_the_model_sees_them(kind: str) -> None:
    backbone, raw = tiny.backbone(kind), tiny.model(kind)
    common = backbone.vocabulary.common(7)
    assert common.tolist() == list(range(5, 12))
    ids = backbone.vocabulary.ids("the sky")
    assert ids.tolist() == backbone.tokenizer.convert_tokens_to_ids(["the", "sky"])
    seen = raw.get_input_embeddings()(ids)
    torch.testing.assert_close(backbone.vocabulary.embed(ids), seen.detach())
    every_word = raw.get_input_embeddings()(torch.arange(5, tiny.SIZE)).detach()
    assert backbone.vocabulary.rms() == pytest.approx(float(every_word.pow(2).mean().sqrt()))


def test_devices_by_name() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(ConfigError, match=r'backbone\.device: "nonsense" is not available here'):
        pick_device("nonsense")


@pytest.mark.parametrize("dropout", [True, False])
def test_dropout_of_the_frozen_model_is_a_choice(dropout: bool) -> None:
    backbone = tiny.backbone("bert", dropout=dropout)
    given, prompt = by_hand.texts(backbone), Prompt(by_hand.rows(2))
    torch.manual_seed(0)
    with backbone.dropping():
        twice = [backbone.hidden(given, prompt) for _ in range(2)]
    assert torch.equal(*twice) is not dropout
    assert torch.equal(*[backbone.hidden(given, prompt) for _ in range(2)])
