"""Keys and values before the layers of encoders: against the tokens that made them, and against caches filled by hand.

Knows no method or task.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import handmade as by_hand
import pytest
import torch
import transformers
from torch import Tensor

import tiny
from promptuary.backbones.base import Backbone, BackboneConfig
from promptuary.backbones.bidirectional import Bidirectional
from promptuary.backbones.encoder import Encoder
from promptuary.backbones.masked import Masked
from promptuary.errors import SiteError
from promptuary.types import Batch, Prompt

_SIZES = {
    "vocab_size": tiny.SIZE, "hidden_size": tiny.WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 82, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OTHERS = {
    "electra": lambda: transformers.ElectraForMaskedLM(transformers.ElectraConfig(**_SIZES, embedding_size=tiny.WIDTH)),
    "xlm-roberta": lambda: transformers.XLMRobertaForMaskedLM(transformers.XLMRobertaConfig(**_SIZES)),
    "mpnet": lambda: transformers.MPNetForMaskedLM(transformers.MPNetConfig(**_SIZES)),
    "albert": lambda: transformers.AlbertForMaskedLM(transformers.AlbertConfig(**_SIZES, embedding_size=16)),
    "distilbert": lambda: transformers.DistilBertForMaskedLM(
        transformers.DistilBertConfig(
            vocab_size=tiny.SIZE, dim=tiny.WIDTH, n_layers=2, n_heads=4, hidden_dim=64, pad_token_id=0
        )
    ),
}
TAKING = ["bert", "roberta", "minilm", "electra", "xlm-roberta"]
taking = pytest.mark.parametrize("kind", TAKING)


def raw(kind: str) -> Any:
    """A tiny model, its weights large enough that positions and tokens differ."""
    if kind not in OTHERS:
        return tiny.model(kind)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = OTHERS[kind]().eval()
    for parameter in made.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3)
    return made


def opened(kind: str, **settings: Any) -> Backbone:
    """The same, wired."""
    family = Encoder if kind == "minilm" else Masked
    return family(raw(kind), tiny.tokenizer(), BackboneConfig(model="x", family=family.name, device="cpu", **settings))


def some_kv(of: Backbone, length: int = 3, seed: int = 1, many: int = 1) -> Tensor:
    """Random keys and values that can be trained."""
    size = (many, of.shape.layers, 2, of.shape.heads, length, of.shape.head)
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def plain(ids: list[list[int]]) -> Batch:
    """Rows of ids, padded on the right."""
    longest = max(map(len, ids))
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
    return Batch(padded, mask, torch.arange(len(ids)))


def states_by_cache(model: Any, kv: Tensor, ids: list[int]) -> Tensor:
    """The bare model behind a cache of transformers' own, positions counted on from it, [t, h]."""
    cache = transformers.DynamicCache()
    for layer in range(kv.shape[1]):
        cache.update(kv[:, layer, 0], kv[:, layer, 1], layer)
    begin = model.config.pad_token_id + 1 if "roberta" in model.config.model_type else 0
    first = kv.shape[4]
    return model.base_model(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, first + len(ids)),
        position_ids=torch.arange(first, first + len(ids))[None] + begin,
        past_key_values=cache,
    ).last_hidden_state[0]


@pytest.fixture
def silent() -> Iterator[type[Any]]:
    """A model whose head loses a cache without a word."""

    class Silent(transformers.BertForMaskedLM):
        def forward(self, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
            mask, length = kwargs.get("attention_mask"), 0 if past_key_values is None else 3
            kwargs["attention_mask"] = None if mask is None else mask[:, length:]
            return super().forward(*args, **kwargs)

    return Silent


@taking
def test_keys_and_values_of_tokens_are_those_tokens(kind: str) -> None:
    """What the layers computed for the first three of eight tokens stands for them, whatever the padding beside."""
    of, bare = opened(kind), raw(kind)
    rows = [[7, 8, 9, 10, 11, 12, 13, 14], [7, 8, 9, 20, 21]]
    found = dict[str, Tensor]()
    for name, module in bare.named_modules():
        if name.endswith(("attention.self.key", "attention.self.value")):
            module.register_forward_hook(lambda _, __, out, name=name: found.__setitem__(name, out))
    for row in rows:
        with torch.no_grad():
            whole = bare.base_model(torch.tensor([row])).last_hidden_state[0, 3:]
        parts = torch.stack(list(found.values()))[:, 0, :3].view(2, 2, 3, of.shape.heads, of.shape.head)
        prompt = Prompt(kv=parts.permute(0, 1, 3, 2, 4)[None])
        with torch.no_grad():
            states = of.hidden(plain([row[3:], [30] * 7]), prompt)[0, : len(row) - 3]
        torch.testing.assert_close(states, whole, **by_hand.CLOSE)


@taking
def test_those_that_the_backbone_computes_are_the_models_own(kind: str) -> None:
    of, bare, ids = opened(kind), raw(kind), torch.tensor([7, 8, 9, 10])
    found = list[Tensor]()
    for name, module in bare.named_modules():
        if name.endswith(("attention.self.key", "attention.self.value")):
            module.register_forward_hook(lambda _, __, out: found.append(out))
    with torch.no_grad():
        bare.base_model(ids[None])
    wanted = torch.stack(found)[:, 0].view(2, 2, 4, of.shape.heads, of.shape.head).permute(0, 1, 3, 2, 4)
    torch.testing.assert_close(of.vocabulary.keys_values(ids), wanted[None], **by_hand.CLOSE)


@taking
def test_states_and_gradients_equal_a_cache_filled_by_hand(kind: str) -> None:
    of, bare = opened(kind), raw(kind)
    given, kv = by_hand.texts(of), some_kv(of)
    states = of.hidden(given, Prompt(kv=kv))
    wanted = [states_by_cache(bare, kv, by_hand.tokens(given, row)) for row in range(3)]
    weights = [torch.randn(part.shape, generator=torch.Generator().manual_seed(2)) for part in wanted]
    for row, part in enumerate(wanted):
        torch.testing.assert_close(states[row, : len(part)], part, **by_hand.CLOSE)
    mine = torch.autograd.grad(
        sum((states[row, : len(one)] * one).sum() for row, one in enumerate(weights)), kv, retain_graph=True
    )[0]
    theirs = torch.autograd.grad(sum((a * b).sum() for a, b in zip(wanted, weights, strict=True)), kv)[0]
    assert bool((theirs.flatten(2).abs().sum(-1) > 0).all())
    torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=1e-3)


@taking
def test_rows_keep_to_themselves_whatever_stands_beside_them(kind: str) -> None:
    """Prefixes of several lengths, one for each text, rows, and nothing, in one batch; and padding on the left."""
    of = opened(kind)
    given, own = by_hand.texts(of), some_kv(of, 4, seed=5, many=3)
    prompts = [Prompt(kv=some_kv(of, 5)), Prompt(kv=some_kv(of, 2)), Prompt(by_hand.rows(2)), Prompt(), Prompt(kv=own)]
    for which in ([0, 1, 2], [3, 0, 1], [4, 4, 0], [2, 4, 3]):
        mixed = of.pooled(replace(given, prompt_index=torch.tensor(which)), prompts)
        for row, number in enumerate(which):
            prompt = Prompt(kv=own[row : row + 1]) if number == 4 else prompts[number]
            torch.testing.assert_close(mixed[row], of.pooled(by_hand.one(given, row), prompt)[0], **by_hand.CLOSE)
    prompt = prompts[0]
    torch.testing.assert_close(of.pooled(by_hand.left(given), prompt), of.pooled(given, prompt), **by_hand.CLOSE)


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
@pytest.mark.parametrize("narrow", [True, False])
def test_scores_of_words_and_phrases_are_read_behind_them(kind: str, narrow: bool) -> None:
    of, bare = opened(kind, narrow_head=narrow), raw(kind)
    given, kv = by_hand.texts(of), some_kv(of)
    scores = of.score(given, Prompt(kv=kv), by_hand.candidates(of, "good", "bad"))
    phrases = of.score(given, Prompt(kv=kv), by_hand.candidates(of, "good", "very bad"))
    cache = transformers.DynamicCache()
    for layer in range(2):
        cache.update(kv[:, layer, 0], kv[:, layer, 1], layer)
    ids = by_hand.tokens(given, 1)
    begin = 1 if kind == "roberta" else 0
    logits = bare(
        torch.tensor([ids]), attention_mask=torch.ones(1, 3 + len(ids)), past_key_values=cache,
        position_ids=torch.arange(3, 3 + len(ids))[None] + begin,
    ).logits[0, ids.index(3)]  # fmt: skip
    torch.testing.assert_close(scores[1], logits[[of.answer_ids(word)[0] for word in ("good", "bad")]], **by_hand.CLOSE)
    one = torch.log_softmax(logits, -1)[of.answer_ids("good")[0]]
    torch.testing.assert_close(phrases[1, 0], one, **by_hand.CLOSE)


@pytest.mark.parametrize("kind", ["deberta", "modernbert", "mpnet", "albert", "distilbert"])
def test_a_model_that_has_no_place_for_them_says_so_by_name(kind: str) -> None:
    of = opened(kind)
    said = rf"the prompt uses kv, for which {type(of.model).__name__} \(masked\) has no place"
    with pytest.raises(SiteError, match=said):
        of.vocabulary.keys_values(torch.tensor([7, 8]))
    with pytest.raises(SiteError, match=said):
        of.hidden(by_hand.texts(of), Prompt(kv=torch.zeros(1, 2, 2, 4, 3, 8)))
    assert of.missing(frozenset({"input", "offset"})) == frozenset()


def test_a_head_that_loses_them_without_a_word_is_found_out(silent: type[Any]) -> None:
    model = silent(transformers.BertConfig(**_SIZES)).eval()
    of = Masked(model, tiny.tokenizer(), BackboneConfig(model="x", family="masked", device="cpu"))
    with pytest.raises(SiteError, match="for which Silent"):
        of.hidden(by_hand.texts(of), Prompt(kv=torch.zeros(1, 2, 2, 4, 3, 8)))


def test_a_decoder_read_as_an_encoder_has_no_place_for_them() -> None:
    of = Encoder(tiny.model("llama").model, tiny.tokenizer(), BackboneConfig(model="x", family="encoder", device="cpu"))
    with pytest.raises(SiteError, match="for which LlamaModel"):
        of.hidden(by_hand.texts(of), Prompt(kv=torch.zeros(1, 2, 2, 2, 3, 8)))


def test_first_asked_while_dropout_is_at_work_a_model_still_takes_them() -> None:
    of = opened("bert", dropout=True)
    assert isinstance(of, Bidirectional)
    with of.dropping():
        assert of.takes_prefix
        assert of.model.training


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForSequenceClassification", "Model"])
@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_on_the_hosts_own_model_it_runs_and_learns_the_same(kind: str, head: str) -> None:
    import promptuary

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**_SIZES)
        model = getattr(transformers, kind + head)(config).eval()
    tuned = promptuary.adapt(model, tiny.tokenizer(), "prefix", num_virtual_tokens=3)
    coded = tiny.tokenizer()(["a red apple", "the sky is blue and so is the sea"], return_tensors="pt", padding=True)
    given = {"input_ids": coded.input_ids, "attention_mask": coded.attention_mask}
    kv = tuned.method.kv
    with tuned.attach(train=True):
        whole = model(**given, output_hidden_states=True).hidden_states[-1]
    assert whole.shape[1] == coded.input_ids.shape[1]
    for row in range(2):
        ids = coded.input_ids[row][coded.attention_mask[row].bool()].tolist()
        torch.testing.assert_close(whole[row, : len(ids)], states_by_cache(model, kv[None], ids), **by_hand.CLOSE)
    found = torch.autograd.grad(whole[0].pow(2).sum(), kv)[0]
    assert float(found.norm()) > 0
    model.train()
    model.gradient_checkpointing_enable()
    with tuned.attach(train=True), pytest.raises(SiteError, match="gradient checkpointing of transformers drops"):
        model(**given)
