"""IPT: the invariants of the specification, numbered as there, and what its settings change.

Knows no other method but prompt tuning and prefix tuning, which it reduces to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from promptuary import registry
from promptuary.checkpoint import load_prompt, save_prompt
from promptuary.errors import ConfigError, NotFoldable
from promptuary.methods.ipt import IPT, IPTConfig
from promptuary.prompts.encoders import ENCODERS
from promptuary.testing import case_of
from promptuary.testing.case import padded
from promptuary.tuned import Tuned
from promptuary.types import Batch, Prompt, Shape, View

FAMILIES = ("causal", "seq2seq", "masked", "encoder")
V, N, WIDTH = tiny.SIZE, 4, tiny.WIDTH
LARGE = Shape(1024, layers=24, heads=16, head=64, vocabulary=50_265)
families = pytest.mark.parametrize("family", FAMILIES)
modes = pytest.mark.parametrize("mode", ["prompt", "prefix"])


def tuned(folder: Path, family: str = "masked", *, train: bool = False, **settings: Any) -> Tuned:
    """Three to eight content tokens in a text, and four that are looked up."""
    made = case_of(IPT, family, folder, {"num_virtual_tokens": N, "instance_scale": 1.0, **settings}).tuned()
    made.moment = (0, 1)
    return made.train(train)


def other(folder: Path, name: str, family: str, tensors: Mapping[str, Tensor]) -> Tuned:
    """Another method of as many positions, with the same shared tensors."""
    made = case_of(registry.load("methods", name), family, folder, {"num_virtual_tokens": N}).tuned()
    made.restore({f"method.{key}": value for key, value in tensors.items()})
    return made


def batch_of(made: Tuned, folder: Path) -> Batch:
    return made.batch(case_of(IPT, made.backbone.name, folder).rows(made))


def method_of(made: Tuned) -> IPT:
    assert isinstance(made.method, IPT)
    return made.method


def instance(made: Tuned, batch: Batch) -> Tensor:
    """What stands for the texts in the prompt: rows [b, n, d], or keys and values of layer 0 [b, n, 2 k e]."""
    prompt = made.prompt(batch)
    if prompt.kv is None:
        assert prompt.rows is not None
        return prompt.rows.detach()
    return prompt.kv.detach()[:, 0].permute(0, 3, 1, 2, 4).flatten(2)


def texts(*ids: list[int]) -> Batch:
    """Rows of ordinary tokens."""
    return Batch(torch.tensor(ids), torch.ones(len(ids), len(ids[0]), dtype=torch.long), torch.arange(len(ids)))


# ---- 1: counts ------------------------------------------------------------------------------------------------------


def test_counts_are_those_of_the_release_and_a_row_for_missing_tokens() -> None:
    """Invariant 1, at RoBERTa-large's size: 51.5 and 102.9 million for the tables, 4.9 for the prefix."""
    v, d, n, layers = 50_265, 1024, 100, 24

    def count(**settings: Any) -> int:
        return IPT.count(IPTConfig(**settings), LARGE)

    assert count(preset="release") == (v + 1) * d
    assert count() == (v + 1) * d + n * d
    assert count(mode="prefix", preset="release") == n * 2 * layers * d + (v + 1) * 2 * d
    assert count(mode="prefix", instance_scale=0) == n * 2 * layers * d == 4_915_200
    assert count(instance_scale=0) == n * d
    assert count(preset="release", table_rank=8) == (v + 1) * 8 + 8 * d
    # less the classifier of 13 classes that the published totals hold besides
    assert count(preset="release", encoder="cnn") - (v + 1) * d == 421_943 - (3 * 13 + 13)
    assert count(preset="release", encoder="mlp") - (v + 1) * d == 209_831_949 - (n * d * d + d + 13 * d + 13)
    assert count(preset="release", encoder="rnn") - (v + 1) * d == 657_408 + 13_209_600
    assert count(preset="release", encoder="cnn", train_table=False) == 421_943 - (3 * 13 + 13)


@modes
@pytest.mark.parametrize(
    "settings",
    [
        {}, {"preset": "release"}, {"table_rank": 3}, {"encoder": "cnn"}, {"encoder": "rnn", "table_rank": 2},
        {"encoder": "mlp", "train_table": False}, {"instance_scale": 0.0},
    ],
)  # fmt: skip
def test_the_formula_counts_what_is_trained(mode: str, settings: dict[str, Any]) -> None:
    config, shape = IPTConfig(num_virtual_tokens=5, mode=mode, **settings), Shape(16, 3, 2, 4, vocabulary=30)
    made = IPT(config, shape)
    assert IPT.count(config, shape) == sum(value.numel() for value in made.parameters())


def test_a_budget_gives_the_whole_table_or_the_largest_rank_that_fits() -> None:
    shape, config = Shape(32, vocabulary=113), IPTConfig(num_virtual_tokens=3)
    assert IPT.match_budget(config, 117, shape).table_rank is None
    matched = IPT.match_budget(config, 60, shape)
    assert matched.table_rank is not None
    assert IPT.count(matched, shape) <= 60 * 32
    assert IPT.count(matched.model_copy(update={"table_rank": matched.table_rank + 1}), shape) > 60 * 32
    with pytest.raises(ConfigError, match="a table over the 113 tokens of this model has at least a number for each"):
        IPT.match_budget(config, 5, shape)


# ---- 2: reductions --------------------------------------------------------------------------------------------------


@families
@modes
def test_without_a_scale_it_is_prompt_tuning_or_prefix_tuning_bit_for_bit(
    family: str, mode: str, tmp_path: Path
) -> None:
    """Invariant 2, in training too: scores, and the gradients of what all texts share."""
    made = tuned(tmp_path, family, mode=mode, instance_scale=0.0)
    shared = {name: value.detach().clone() for name, value in method_of(made).named_parameters()}
    assert set(shared) == {"kv" if mode == "prefix" else "rows"}
    plain = other(tmp_path, "prefix" if mode == "prefix" else "prompt_tuning", family, shared)
    batch = batch_of(made, tmp_path)
    assert torch.equal(made.scores(batch), plain.scores(batch))
    gradients = []
    for one in (made, plain):
        one.train(True).loss(batch).total.backward()
        gradients.append([group.parameter.grad for group in one.trained()])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*gradients, strict=True))


@families
@modes
def test_a_table_of_zeros_changes_nothing(family: str, mode: str, tmp_path: Path) -> None:
    """Invariant 2, through the lookup: one prompt for each row that happens to be the same."""
    made = tuned(tmp_path, family, mode=mode)
    method, batch = method_of(made), batch_of(made, tmp_path)
    assert not torch.allclose(*instance(made, batch)[:2])
    with torch.no_grad():
        method.table.zero_()
    shared = {name: value.detach() for name, value in method.named_parameters() if name != "table"}
    plain = other(tmp_path, "prefix" if mode == "prefix" else "prompt_tuning", family, shared)
    prompt = made.prompt(batch)
    both = zip(prompt.tensors, plain.prompt(batch).tensors, strict=True)
    assert all(torch.equal(mine, theirs.expand_as(mine)) for mine, theirs in both)
    torch.testing.assert_close(made.scores(batch), plain.scores(batch), atol=2e-5, rtol=1e-4)


@families
def test_a_table_of_equal_rows_is_a_static_prompt(family: str, tmp_path: Path) -> None:
    """Invariant 2, where the instance's rows replace the shared ones."""
    made = tuned(tmp_path, family, combine="replace")
    method, batch = method_of(made), batch_of(made, tmp_path)
    with torch.no_grad():
        method.table.copy_(method.table[:1].expand_as(method.table))
    plain = other(tmp_path, "prompt_tuning", family, {"rows": method.table[:N].detach()})
    torch.testing.assert_close(made.scores(batch), plain.scores(batch), atol=2e-5, rtol=1e-4)


# ---- 3, 5: which row follows from which token -----------------------------------------------------------------------


@modes
@pytest.mark.parametrize("encoder", [None, *ENCODERS])
def test_a_token_changes_its_own_row_or_all_behind_a_network_and_a_late_one_nothing(
    mode: str, encoder: str | None, tmp_path: Path
) -> None:
    """Invariant 3."""
    made = tuned(tmp_path, mode=mode, encoder=encoder, instance_scale=3.0)
    with torch.no_grad():
        method_of(made).table[40] = 5.0  # so that it is the largest answer of a filter wherever it stands
        for name, value in method_of(made).named_parameters():
            if "filter" in name:
                value.abs_()
    ids = [20, 21, 22, 23, 24, 25]
    before = instance(made, texts(ids))[0]
    for place in range(6):
        changed = instance(made, texts([*ids[:place], 40, *ids[place + 1 :]]))[0]
        differs = [not torch.equal(one, two) for one, two in zip(before, changed, strict=True)]
        if place >= N:
            assert differs == [False] * N
        elif encoder is None:
            assert differs == [row == place for row in range(N)]
        else:
            assert differs == [True] * N


@modes
def test_swapped_tokens_swap_their_rows(mode: str, tmp_path: Path) -> None:
    """Invariant 5, of what the instance adds."""
    made = tuned(tmp_path, mode=mode)
    method = method_of(made)
    with torch.no_grad():
        (method.kv if mode == "prefix" else method.rows).zero_()
    one, two = instance(made, texts([20, 21, 22, 23], [20, 23, 22, 21]))
    assert torch.equal(one[[0, 3, 2, 1]], two)
    assert not torch.equal(one[1], one[3])


def test_only_the_first_layer_knows_the_text(tmp_path: Path) -> None:
    """Invariant 3: layers behind it have the shared prefix; keys come first in a row of the table, then values."""
    made = tuned(tmp_path, mode="prefix", instance_scale=0.5)
    method = method_of(made)
    kv = made.prompt(texts([20, 21, 22, 23], [24, 25, 26, 27])).kv
    assert kv is not None
    assert torch.equal(kv[:, 1:], method.kv[1:].expand(2, -1, -1, -1, -1, -1))
    row = method.table[26].view(2, 4, 8)
    torch.testing.assert_close(kv[1, 0, :, :, 2], method.kv[0, :, :, 2] + 0.5 * row)


# ---- 4: gradients ---------------------------------------------------------------------------------------------------


@modes
def test_only_tokens_of_the_batch_get_a_gradient(mode: str, tmp_path: Path) -> None:
    """Invariant 4."""
    made = tuned(tmp_path, mode=mode, train=True)
    batch, method = batch_of(made, tmp_path), method_of(made)
    made.loss(batch).total.backward()
    seen = set(method.chosen(made.view(batch)).flatten().tolist())
    grad = method.table.grad
    assert grad is not None
    assert set(grad.abs().sum(1).nonzero()[:, 0].tolist()) == seen
    assert 1 < len(seen) <= len(batch) * N


# ---- 6: padding, and which tokens are looked up ---------------------------------------------------------------------


@modes
@pytest.mark.parametrize("tokens", ["content", "ids"])
@pytest.mark.parametrize(("left", "right"), [(0, 5), (5, 0), (1, 2)])
def test_padding_changes_nothing(mode: str, tokens: str, left: int, right: int, tmp_path: Path) -> None:
    """Invariant 6, on either side; a text shorter than n too."""
    made = tuned(tmp_path, mode=mode, tokens=tokens, num_virtual_tokens=12)
    batch = batch_of(made, tmp_path)
    assert bool((method_of(made).chosen(made.view(batch)) == V).any())
    longer = padded(batch, left=left, right=right)
    assert torch.equal(instance(made, longer), instance(made, batch))
    torch.testing.assert_close(made.scores(longer), made.scores(batch), atol=2e-5, rtol=1e-4)


def test_content_leaves_out_special_tokens_and_missing_ones_take_the_last_row(tmp_path: Path) -> None:
    ids, mask = [0, 1, 20, 3, 21, 2], torch.tensor([[0, 1, 1, 1, 1, 1]])
    batch = replace(texts(ids), attention_mask=mask)
    for tokens, wanted in (("content", [20, 21, V, V]), ("ids", [1, 20, 3, 21])):
        made = tuned(tmp_path, tokens=tokens)
        assert method_of(made).chosen(made.view(batch)).tolist() == [wanted]
    made = tuned(tmp_path, tokens="ids", num_virtual_tokens=7)
    assert method_of(made).chosen(made.view(batch)).tolist() == [[1, 20, 3, 21, 2, V, V]]


def test_answers_are_not_looked_up(tmp_path: Path) -> None:
    made = tuned(tmp_path, "causal")
    batch = replace(texts([20, 21, 22, 23]), plain=torch.tensor([[False, False, True, True]]))
    assert method_of(made).chosen(made.view(batch)).tolist() == [[20, 21, V, V]]


# ---- 7: folding -----------------------------------------------------------------------------------------------------


def test_it_folds_to_a_second_lookup_and_to_a_static_prompt_only_without_a_scale(tmp_path: Path) -> None:
    """Invariant 7: the factors of the table multiplied out give the same prompt."""
    made, whole = tuned(tmp_path, table_rank=3), tuned(tmp_path)
    with pytest.raises(NotFoldable, match="depends on the input"):
        method_of(made).fold()
    method, table = method_of(made), method_of(whole)
    with torch.no_grad():
        table.table.copy_(method.left @ method.right)
        table.rows.copy_(method.rows)
    batch = batch_of(made, tmp_path)
    torch.testing.assert_close(instance(made, batch), instance(whole, batch))
    still = method_of(tuned(tmp_path, instance_scale=0.0))
    assert torch.equal(still.fold().as_rows(), still.rows)


# ---- 8: networks ----------------------------------------------------------------------------------------------------


@families
@modes
@pytest.mark.parametrize("encoder", list(ENCODERS))
def test_a_text_behind_a_network_gets_what_it_gets_alone(family: str, mode: str, encoder: str, tmp_path: Path) -> None:
    """Invariant 8, with the noise of training too."""
    made = tuned(tmp_path, family, mode=mode, encoder=encoder)
    batch = batch_of(made, tmp_path)
    for train in (False, True):
        made.train(train)
        whole = instance(made, batch)
        for row in range(len(batch)):
            torch.testing.assert_close(whole[row : row + 1], instance(made, batch.rows(torch.tensor([row]))))
    made.train(False)
    scores = made.scores(batch)
    for row in range(len(batch)):
        alone = made.scores(batch.rows(torch.tensor([row])))
        torch.testing.assert_close(scores[row : row + 1], alone, atol=2e-5, rtol=1e-4)


def test_noise_is_drawn_in_training_only_anew_for_each_step_and_only_by_averaging(tmp_path: Path) -> None:
    for encoder in ENCODERS:
        made = tuned(tmp_path, encoder=encoder, combine="replace", train=True)
        batch = batch_of(made, tmp_path)
        first = instance(made, batch)
        assert torch.equal(instance(made, batch), first)
        made.moment = (0, 2)
        second, exact = instance(made, batch), instance(made.train(False), batch)
        assert torch.equal(first, second) == (encoder != "mlp")
        assert torch.equal(first, exact) == (encoder != "mlp")


# ---- how rows are combined, and the presets -------------------------------------------------------------------------


def test_rows_are_added_replaced_or_put_beside(tmp_path: Path) -> None:
    batch = texts([20, 21, 22, 23])
    for combine in ("add", "replace", "concat"):
        made = tuned(tmp_path, combine=combine, instance_scale=0.5)
        method, found = method_of(made), instance(made, batch)[0]
        own = 0.5 * method.table[20:24]
        wanted = {
            "add": lambda method=method, own=own: method.rows + own,
            "replace": lambda own=own: own,
            "concat": lambda method=method, own=own: torch.cat([method.rows, own]),
        }[combine]()
        torch.testing.assert_close(found, wanted.detach())
        assert made.added_tokens == len(wanted)
        assert ("rows" in dict(method.named_parameters())) == (combine != "replace")


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, ("add", 0.05, False)),
        ({"preset": "release"}, ("replace", 1.0, True)),
        ({"mode": "prefix"}, ("add", 0.05, False)),
        ({"mode": "prefix", "preset": "release"}, ("add", 0.05, True)),
        ({"combine": "concat"}, ("concat", 1.0, False)),
        ({"preset": "release", "tokens": "content", "combine": "add"}, ("add", 0.05, False)),
        ({"preset": "release", "instance_scale": 0.3}, ("replace", 0.3, True)),
    ],
)
def test_a_preset_says_what_is_left_open(settings: dict[str, Any], wanted: tuple[str, float, bool]) -> None:
    config = IPTConfig(**settings)
    assert (config.combined, config.scale, config.all_tokens) == wanted


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"mode": "prefix", "combine": "concat"}, "combine can only be add"),
        ({"preset": "release", "instance_scale": 0}, "leaves no prompt at all"),
        ({"mode": "prefix", "table_init": "vocabulary"}, "a row is keys and values, no embedding"),
        ({"table_init": "saved"}, "name it in sources"),
        ({"sources": ["a"]}, "name it in sources"),
        ({"table_init": "saved", "sources": ["a", "b"]}, "name it in sources"),
        ({"train_table": False}, "needs an encoder over the table"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        IPTConfig.read(settings, where="method")
    assert "\n" not in str(caught.value)


def test_a_rank_above_the_tables_and_a_model_without_tokens_are_refused() -> None:
    with pytest.raises(ConfigError, match="table_rank 17 is above 16, where a table is whole"):
        IPT(IPTConfig(table_rank=17), Shape(16, vocabulary=30))
    with pytest.raises(ConfigError, match="it needs a model of text"):
        IPT(IPTConfig(), Shape(16))


# ---- where the table starts -----------------------------------------------------------------------------------------


def untrained(folder: Path, family: str = "masked", **settings: Any) -> Tuned:
    """As it starts."""
    from promptuary.sources import load_start

    backbone = tiny.backbone(family)
    config = IPTConfig(**{"num_virtual_tokens": N, **settings})
    made = Tuned(backbone, None, IPT(config, backbone.shape))
    return made.initialise(torch.Generator().manual_seed(1), *load_start(config, backbone))


@families
def test_from_the_vocabulary_the_rows_are_the_texts_own_first_tokens(family: str, tmp_path: Path) -> None:
    """In place of the shared rows at scale 1, the model reads its first tokens twice."""
    made = untrained(tmp_path, family, table_init="vocabulary", combine="replace")
    backbone, batch = made.backbone, texts([20, 21, 22, 23, 24, 25])
    twice = texts([20, 21, 22, 23, 20, 21, 22, 23, 24, 25])
    with torch.no_grad():
        found = backbone.hidden(batch, made.prompt(batch))
        wanted = backbone.hidden(twice, Prompt())[:, 4:]
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    assert not method_of(made).table[V].any()


def test_factors_from_the_vocabulary_are_the_nearest_of_their_rank(tmp_path: Path) -> None:
    made = untrained(tmp_path, table_init="vocabulary", table_rank=5)
    method, words = method_of(made), made.backbone.vocabulary.embed(torch.arange(V))
    lost = (method.left @ method.right)[:-1].detach() - words
    dropped = torch.linalg.svdvals(words)[5:]
    torch.testing.assert_close(lost.norm(), dropped.norm(), rtol=1e-4, atol=1e-5)
    whole = method_of(untrained(tmp_path, table_init="vocabulary", table_rank=WIDTH))
    torch.testing.assert_close((whole.left @ whole.right)[:-1].detach(), words, atol=1e-4, rtol=1e-4)


def test_a_random_table_is_as_large_in_factors_as_whole(tmp_path: Path) -> None:
    whole = method_of(untrained(tmp_path)).table
    assert float(whole.detach().abs().max()) <= 0.5
    assert float(whole.detach().std()) == pytest.approx(0.5 / 3**0.5, rel=0.05)
    for rank in (2, 16):
        method = method_of(untrained(tmp_path, table_rank=rank))
        assert float((method.left @ method.right).detach().std()) == pytest.approx(0.5 / 3**0.5, rel=0.2)


@modes
@pytest.mark.parametrize("settings", [{}, {"table_rank": 3}, {"encoder": "rnn"}])
def test_an_earlier_runs_table_and_network_are_taken_over(mode: str, settings: dict[str, Any], tmp_path: Path) -> None:
    earlier = tuned(tmp_path, mode=mode, **settings)
    folder = str(save_prompt(earlier, tmp_path / "earlier"))
    made = method_of(untrained(tmp_path, mode=mode, table_init="saved", sources=[folder], **settings))
    theirs, shared = dict(method_of(earlier).named_parameters()), "kv" if mode == "prefix" else "rows"
    for name, value in made.named_parameters():
        assert torch.equal(value, theirs[name]) == (name != shared), name


def test_a_table_comes_alone_where_the_earlier_run_had_no_network(tmp_path: Path) -> None:
    earlier = tuned(tmp_path)
    folder = str(save_prompt(earlier, tmp_path / "earlier"))
    still = {"encoder": "cnn", "train_table": False}
    made = method_of(untrained(tmp_path, table_init="saved", sources=[folder], **still))
    assert torch.equal(made.table, method_of(earlier).table)
    assert not isinstance(made.table, torch.nn.Parameter)
    fresh = method_of(untrained(tmp_path, **still))
    for name, value in made.named_parameters():
        assert torch.equal(value, dict(fresh.named_parameters())[name])


@pytest.mark.parametrize(
    ("earlier", "settings", "reason"),
    [
        ({"table_rank": 3}, {}, "a table of the same kind .* is expected"),
        ({"table_rank": 3}, {"table_rank": 4}, r"has left of size \[\d+, 3\], \[\d+, 4\] is expected"),
        ({"mode": "prefix"}, {}, r"has table of size \[\d+, 64\], \[\d+, 32\] is expected"),
        ({"encoder": "cnn"}, {"encoder": "cnn", "num_virtual_tokens": 6}, "has encoder_out_weight of size"),
    ],
)
def test_an_earlier_run_of_another_size_is_refused(
    earlier: dict[str, Any], settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = str(save_prompt(tuned(tmp_path, **earlier), tmp_path / "earlier"))
    with pytest.raises(ConfigError, match=reason):
        untrained(tmp_path, table_init="saved", sources=[folder], **settings)


def test_an_earlier_run_of_another_method_is_refused(tmp_path: Path) -> None:
    folder = str(save_prompt(case_of(registry.load("methods", "lamp"), "masked", tmp_path).tuned(), tmp_path / "lamp"))
    with pytest.raises(ConfigError, match=r"a prompt of ipt with a table of the same kind .* \(lamp\) is none"):
        untrained(tmp_path, table_init="saved", sources=[folder])


def test_a_table_that_does_not_learn_gets_no_gradient_and_is_saved(tmp_path: Path) -> None:
    made = tuned(tmp_path, encoder="mlp", train_table=False, train=True)
    made.loss(batch_of(made, tmp_path)).total.backward()
    names = {group.name for group in made.trained()}
    assert names == {"method.rows", "method.encoder_out_weight", "method.encoder_out_bias"}
    assert not method_of(made).table.requires_grad
    again = load_prompt(save_prompt(made.train(False), tmp_path / "p"), made.backbone)
    batch = batch_of(made, tmp_path)
    assert torch.equal(again.scores(batch), made.scores(batch))


def test_a_view_without_chance_is_evaluation(tmp_path: Path) -> None:
    """Nothing is drawn where nothing says what from."""
    made = tuned(tmp_path, encoder="mlp")
    ids = torch.tensor([[20, 21, 22, 23]])
    view = View(mask=torch.ones(1, 4, dtype=torch.bool), content=torch.ones(1, 4, dtype=torch.bool), ids=ids)
    rows = method_of(made).prompt(view).rows
    assert rows is not None
    assert torch.equal(rows.detach(), instance(made, texts([20, 21, 22, 23])))
