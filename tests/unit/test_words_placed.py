"""Prompts of words at their place: the tokens are those of the pasted text, and scores those of the pasted text.

Knows no method but `manual`, and no solver.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import promptuary
import tiny
from promptuary.asking import Asking
from promptuary.backbones.base import Backbone
from promptuary.building import build_method, hold_backbone, shape_of
from promptuary.checkpoint import load_prompt, save_prompt
from promptuary.errors import ConfigError, FingerprintError, NotFoldable, SiteError
from promptuary.methods.manual import ManualConfig
from promptuary.prompts.init import Starting
from promptuary.tasks.classify import Classify, ClassifyConfig
from promptuary.tuned import Tuned
from promptuary.types import Batch, Prompt

LABELS = {"yes": "good", "no": "bad"}
TEXTS = ["a gripping, funny film", "It's dull!", "the dog sleeps; the cat sings"]
SPOKEN = ["Absolutely", "what is the feeling of this review :", "VERY good or bad ?", "x"]


def bpe() -> Any:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([*TEXTS, *SPOKEN] * 3, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<pad>")


def wordpiece() -> Any:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[PAD]"]
    made.train_from_iterator([*TEXTS, *SPOKEN] * 3, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="[PAD]", pad_token="[PAD]")


def unigram() -> Any:
    made = Tokenizer(models.Unigram())
    # as T5 has it
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    trainer = trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", special_tokens=["<unk>", "<pad>"])
    made.train_from_iterator([*TEXTS, *SPOKEN] * 3, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<pad>", pad_token="<pad>")


def causal(tokenizer: Any) -> Backbone:
    config = transformers.GPT2Config(vocab_size=500, n_embd=32, n_layer=2, n_head=4, n_positions=128)
    torch.manual_seed(0)
    return hold_backbone(transformers.GPT2LMHeadModel(config), tokenizer)


def tuned_on(backbone: Backbone, text: str, template: str = "{text} {mask}", **settings: Any) -> Tuned:
    task = Classify(ClassifyConfig(template=template, labels=LABELS))
    method = build_method(ManualConfig(init_text=text, **settings), shape_of(backbone, task))
    method.initialise(Starting(backbone.vocabulary, torch.Generator()))
    return Tuned(backbone, task, method, max_length=100)


def placed_ids(tuned: Tuned, text: str) -> list[int]:
    batch = tuned.batch(tuned.rows([{"text": text}], labelled=False))
    return tuned.backbone.place(batch, tuned.prompt(batch)).input_ids[0].tolist()


@pytest.mark.parametrize("make", [bpe, wordpiece, unigram])
@pytest.mark.parametrize(
    ("template", "placement", "pasted"),
    [
        ("{text} {prompt} {mask}", "front", "{0} {1}"),
        ("{text}\n{prompt} {mask}", "front", "{0}\n{1}"),
        ("{prompt} {text} {mask}", "front", "{1} {0}"),
        ("so: {prompt} {text} {mask}", "front", "so: {1} {0}"),
        ("{text} {mask}", "end", "{0} {1}"),
        ("{text} {mask}", "front", "{1}\n{0}"),
    ],
)
def test_tokens_are_those_of_the_pasted_text(make: Any, template: str, placement: str, pasted: str) -> None:
    tokenizer = make()
    backbone = causal(tokenizer)
    for spoken in SPOKEN:
        tuned = tuned_on(backbone, spoken, template, placement=placement)
        for text in TEXTS:
            whole = pasted.format(text, spoken)
            assert placed_ids(tuned, text) == tokenizer(whole, add_special_tokens=False).input_ids, whole


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("template", ["{text} {prompt} {mask}", "{prompt} {text} so {mask}"])
def test_scores_are_those_of_the_pasted_text(family: str, template: str) -> None:
    backbone = tiny.backbone(family)
    said, examples = tuned_on(backbone, "it was", template), ["red apple was new", "blue sky"]
    pasted = Tuned(
        backbone,
        Classify(ClassifyConfig(template=template.replace("{prompt}", "it was"), labels=LABELS)),
        max_length=100,
    )
    for one, other in zip(said.predict(examples), pasted.predict(examples), strict=True):
        if family == "encoder":  # which pools the text and leaves a prompt out, of words or not
            assert one.answer in LABELS
        else:
            assert one.scores == pytest.approx(other.scores, abs=1e-5)


def test_no_words_are_no_prompt() -> None:
    backbone = tiny.backbone("masked")
    bare = Tuned(backbone, Classify(ClassifyConfig(template="{text} it was {mask}", labels=LABELS)), max_length=40)
    for placement in ("front", "end"):
        said = tuned_on(backbone, " ", "{text} it was {mask}", placement=placement)
        assert said.added_tokens == 0
        assert said.predict(["red apple"])[0].scores == pytest.approx(bare.predict(["red apple"])[0].scores, abs=1e-6)


def test_words_that_the_vocabulary_has_nothing_for_are_no_prompt() -> None:
    backbone = causal(wordpiece())
    for template in ("{text} {prompt} {mask}", "{prompt} {text} {mask}"):
        said = tuned_on(backbone, "\x1a\x1a", template)
        assert said.added_tokens == 0
        assert said.predict([TEXTS[0]])[0].scores == tuned_on(backbone, "", template).predict([TEXTS[0]])[0].scores


def test_words_do_not_count_as_text_that_may_be_cut() -> None:
    backbone = tiny.backbone("causal")
    task = Classify(ClassifyConfig(template="{text} {mask}", labels=LABELS))
    method = build_method(ManualConfig(init_text="it was very good"), shape_of(backbone, task))
    method.initialise(Starting(backbone.vocabulary, torch.Generator()))
    tuned = Tuned(backbone, task, method, max_length=4)
    row = tuned.rows([{"text": "red green blue apple pear plum"}], labelled=False)[0]
    assert (len(row.encoded.ids), row.encoded.cut, tuned.added_tokens) == (4, 3, 4)


def test_what_is_asked_at_the_front_is_behind_the_first_special_token() -> None:
    tuned = tuned_on(tiny.backbone("masked"), "it was", "{text} {mask}")
    ids = placed_ids(tuned, "red apple")
    assert ids[0] == tuned.backbone.prefix[0]
    assert tuned.backbone.tokenizer.decode(ids[1:3]) == "it was"


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_words_and_vectors_answer_in_one_batch(family: str) -> None:
    backbone = tiny.backbone(family)
    said = tuned_on(backbone, "it was", "{text} {prompt} {mask}")
    batch = said.batch(
        said.rows([{"text": "red apple"}, {"text": "blue sky and sea"}, {"text": "old"}], labelled=False)
    )
    rows = Prompt(rows=0.1 * torch.randn(1, 3, tiny.WIDTH, generator=torch.Generator().manual_seed(0)))
    prompts = [said.prompt(batch), rows, Prompt()]
    words = said.asking.words

    def scores(part: Batch, given: Any) -> torch.Tensor:
        return backbone.pooled(part, given) if words is None else backbone.score(part, given, words)

    mixed = scores(replace(batch, prompt_index=torch.tensor([0, 1, 2])), prompts)
    for row, prompt in enumerate(prompts):
        alone = scores(batch.rows(torch.tensor([row])), prompt)[0]
        torch.testing.assert_close(mixed[row], alone, atol=1e-5, rtol=1e-5)


# ---- the artefact ---------------------------------------------------------------------------------------------------


def test_it_is_saved_as_text_and_says_so(tmp_path: Any) -> None:
    tuned = tuned_on(tiny.backbone("causal"), "it was", "{text} {prompt} {mask}")
    save_prompt(tuned, tmp_path / "p")
    facts = promptuary.checkpoint.read_facts(tmp_path / "p")
    assert (facts["text"], facts["trainable_parameters"], facts["added_tokens"]) == ("it was", 0, 2)
    assert "it was" in (tmp_path / "p" / "README.md").read_text()
    again = load_prompt(tmp_path / "p", tuned.backbone)
    assert again.text == "it was"
    assert again.predict(["red apple"]) == tuned.predict(["red apple"])


@pytest.mark.parametrize("family", ["masked", "seq2seq"])
def test_words_are_carried_to_another_base(tmp_path: Any, family: str) -> None:
    tuned = tuned_on(tiny.backbone("causal"), "it was", "{text} {prompt} {mask}")
    save_prompt(tuned, tmp_path / "p")
    other = tiny.backbone(family, seed=3)
    with pytest.raises(FingerprintError, match="was trained on"):
        load_prompt(tmp_path / "p", other)
    carried = load_prompt(tmp_path / "p", other, carry=True)
    fresh = tuned_on(other, "it was", "{text} {prompt} {mask}")
    assert carried.predict(["red apple"])[0].scores == pytest.approx(fresh.predict(["red apple"])[0].scores)


def test_vectors_are_not_carried(tmp_path: Any) -> None:
    from promptuary.testing.case import case_of

    made = case_of(promptuary.registry.load("methods", "prompt_tuning"), "causal", tmp_path).tuned()
    save_prompt(made, tmp_path / "p")
    with pytest.raises(FingerprintError, match="was trained on"):
        load_prompt(tmp_path / "p", tiny.backbone("causal", seed=3), carry=True)


def test_what_only_vectors_can_do_is_refused_in_one_line(tmp_path: Any) -> None:
    tuned = tuned_on(tiny.backbone("causal"), "it was")
    assert tuned.method is not None
    with pytest.raises(NotFoldable, match="this prompt is words"):
        tuned.method.fold().as_rows()
    with pytest.raises(SiteError, match="write them into the text"), tuned.attach():
        pass
    for name, value in (("prompt_lr", 0.1), ("weight_decay", 0.1), ("lr_unit", "absolute")):
        with pytest.raises(ConfigError, match=rf"method.{name}: manual is words and has no tensors"):
            tuned_on(tuned.backbone, "it was", **{name: value})
    head = Classify(ClassifyConfig(template="{text} {mask}", labels=LABELS, reading="head"))
    assert tuned.method is not None
    with pytest.raises(ConfigError, match="nothing would train a head"):
        Tuned(tuned.backbone, head, tuned.method)
    soft = case_prompt(tuned.backbone)
    with pytest.raises(ConfigError, match="only a prompt of words can say something else"):
        soft.saying("red")


def case_prompt(backbone: Backbone) -> Tuned:
    config = promptuary.registry.load("methods", "prompt_tuning").Config(num_virtual_tokens=2)
    return Tuned(backbone, None, build_method(config, backbone.shape))


def test_saying_something_else_leaves_the_prompt_as_it_was() -> None:
    tuned = tuned_on(tiny.backbone("causal"), "it was", "{text} {prompt} {mask}")
    before = tuned.predict(["red apple"])
    other = tuned.saying("very cold")
    assert (tuned.text, other.text) == ("it was", "very cold")
    assert other.predict(["red apple"]) != before
    assert tuned.predict(["red apple"]) == before


def test_words_that_change_in_place_count_at_once() -> None:
    tuned = tuned_on(tiny.backbone("causal"), "it was", "{text} {prompt} {mask}")
    before = tuned.predict(["red apple"])
    tuned.restore(tuned_on(tuned.backbone, "very cold").state())
    assert tuned.text == "very cold"
    assert tuned.predict(["red apple"]) != before


def test_an_encoder_has_words_too() -> None:
    asking = Asking(tiny.backbone("encoder"), Classify(ClassifyConfig(labels=LABELS)), 40, "front")
    assert asking.spelled(Prompt(text="it was")).length == 2
