"""Prompt tuning against concatenated `inputs_embeds` on the bare model, and what all methods share.

Knows no other method's settings.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import tiny
from promptuary import registry
from promptuary.backbones.base import Backbone
from promptuary.building import build_method, match_budget
from promptuary.data.collate import Row, collate, pad_candidates
from promptuary.errors import ConfigError
from promptuary.methods.base import Method, MethodConfig
from promptuary.methods.prompt_tuning import PromptTuning, PromptTuningConfig
from promptuary.prompts.init import Starting
from promptuary.types import Batch, Candidates, Piece, Shape, View

TEXTS = ("a red apple was good", "blue sky", "never cold but always very hot", "six birds eat one plum")
ASKS = (Piece("fixed", " it was "), Piece("slot", "mask"))
LABELS = ("good", "bad", "maybe")
METHODS = ("prompt_tuning", "dept", "ept", "lamp")
WORDED = ("t5", "llama", "bert")


def batch_of(backbone: Backbone) -> Batch:
    rows = [Row(backbone.encode([Piece("field", text), *ASKS], 40), i, target=i % 3) for i, text in enumerate(TEXTS)]
    return collate(rows, backbone.pad, segments=backbone.uses_segments)


def candidates(backbone: Backbone) -> Candidates:
    return pad_candidates([backbone.answer_ids(word) for word in LABELS])


def made(backbone: Backbone, seed: int = 0, **settings: object) -> PromptTuning:
    config = PromptTuningConfig(**{"num_virtual_tokens": 4, **settings})
    return PromptTuning(config, backbone.shape).initialise(
        Starting(backbone.vocabulary, torch.Generator().manual_seed(seed))
    )


def bare_scores(kind: str, batch: Batch, rows: Tensor, words: Tensor, *, behind: int = 0) -> Tensor:
    """Logits of `words` with `rows` in front (or behind the first token) by hand, one unpadded example at a time."""
    model, out = tiny.model(kind), []
    for i in range(len(batch)):
        ids = batch.input_ids[i, : int(batch.attention_mask[i].sum())]
        text = model.get_input_embeddings().weight.detach()[ids]
        x = torch.cat([text[:behind], rows, text[behind:]])[None]
        if kind == "t5":
            logits = model(inputs_embeds=x, decoder_input_ids=torch.tensor([[0]])).logits[0, 0]
        else:
            logits = model(inputs_embeds=x).logits[0, len(rows) + int(batch.slots["mask"][i])]
        out.append(logits[words])
    return torch.stack(out)


@pytest.mark.parametrize("kind", WORDED)
def test_scores_and_gradient_equal_rows_concatenated_by_hand(kind: str) -> None:
    backbone = tiny.backbone(kind)
    method, batch, words = made(backbone), batch_of(backbone), candidates(backbone)
    scores = backbone.score(batch, method.prompt(View()), words)
    cross_entropy(scores, batch.target).backward()
    rows = method.rows.detach().clone().requires_grad_()
    expected = bare_scores(kind, batch, rows, words.ids[:, 0])
    cross_entropy(expected, batch.target).backward()
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(method.rows.grad, rows.grad, rtol=1e-3, atol=1e-5)
    assert all(parameter.grad is None for parameter in backbone.model.parameters())


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_rows_may_stand_behind_the_first_special_token(kind: str) -> None:
    backbone = tiny.backbone(kind)
    method, batch, words = made(backbone, placement="after_bos"), batch_of(backbone), candidates(backbone)
    scores = backbone.score(batch, method.prompt(View()), words)
    expected = bare_scores(kind, batch, method.rows.detach(), words.ids[:, 0], behind=1)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    front = backbone.score(batch, made(backbone).prompt(View()), words)
    assert float((scores - front).detach().abs().max()) > 1e-3


def test_an_encoder_pools_its_text_behind_the_rows() -> None:
    backbone = tiny.backbone("minilm")
    method, batch, model = made(backbone), batch_of(backbone), tiny.model("minilm")
    pooled = backbone.pooled(batch, method.prompt(View()))
    for i in range(len(batch)):
        ids = batch.input_ids[i, : int(batch.attention_mask[i].sum())]
        x = torch.cat([method.rows.detach(), model.get_input_embeddings().weight.detach()[ids]])[None]
        expected = model(inputs_embeds=x).last_hidden_state[0, 4:].mean(0)
        torch.testing.assert_close(pooled[i], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("length", "width"), [(1, 8), (4, 32), (20, 768), (100, 768)])
def test_count_is_length_times_width(length: int, width: int) -> None:
    config = PromptTuningConfig(num_virtual_tokens=length)
    assert PromptTuning.count(config, Shape(width)) == length * width
    assert PromptTuning(config, Shape(width)).rows.numel() == length * width


def test_rows_start_as_vocabulary_rows_and_same_generator_gives_same_bytes() -> None:
    backbone = tiny.backbone("t5")
    weight, rows = tiny.model("t5").get_input_embeddings().weight, made(backbone, 3).rows
    assert all(bool((weight == row).all(1).any()) for row in rows)
    assert rows.detach().numpy().tobytes() == made(backbone, 3).rows.detach().numpy().tobytes()
    assert not torch.equal(rows, made(backbone, 4).rows)


def test_rows_may_start_as_a_text() -> None:
    ids = tiny.tokenizer().convert_tokens_to_ids(["red", "sky", "red", "sky"])
    rows = made(tiny.backbone("t5"), init="text", init_text="red sky").rows
    assert torch.equal(rows, tiny.model("t5").get_input_embeddings().weight[ids])


@pytest.mark.parametrize("saved", [1, 3, 4, 9])
def test_rows_may_start_as_a_saved_prompt_tiled_or_cut(saved: int) -> None:
    backbone, old = tiny.backbone("t5"), torch.randn(saved, tiny.WIDTH, generator=torch.Generator().manual_seed(1))
    method = PromptTuning(PromptTuningConfig(num_virtual_tokens=4, init="saved", init_prompt="x"), backbone.shape)
    method.initialise(Starting(backbone.vocabulary, torch.Generator(), old))
    assert torch.equal(method.rows, torch.stack([old[place % saved] for place in range(4)]))
    with torch.no_grad():
        method.rows.zero_()
    assert float(old.abs().min()) > 0, "the saved rows are copied"


def test_a_saved_start_without_rows_or_of_another_width_is_refused() -> None:
    backbone = tiny.backbone("t5")
    method = PromptTuning(PromptTuningConfig(init="saved"), backbone.shape)
    with pytest.raises(ConfigError, match="init_prompt"):
        method.initialise(Starting(backbone.vocabulary, torch.Generator()))
    with pytest.raises(ConfigError, match="width 16, the backbone 32"):
        method.initialise(Starting(backbone.vocabulary, torch.Generator(), torch.zeros(3, 16)))


def test_folding_gives_the_rows_themselves_without_a_graph() -> None:
    method = made(tiny.backbone("t5"))
    folded = method.fold().as_rows()
    assert torch.equal(folded, method.rows)
    assert not folded.requires_grad


@pytest.mark.parametrize("name", METHODS)
def test_what_was_folded_is_constant_while_training_goes_on(name: str) -> None:
    method, backbone = registry.load("methods", name), tiny.backbone("t5")
    live = method(method.Config(**method.tiny), backbone.shape)
    live.initialise(Starting(backbone.vocabulary, torch.Generator().manual_seed(0)))
    prompt = live.fold()
    parts = [prompt.rows, *([] if prompt.offset is None else [prompt.offset.left, prompt.offset.right])]
    before = [part.clone() for part in parts]
    assert not any(part.requires_grad for part in parts)
    with torch.no_grad():
        for parameter in live.parameters():
            parameter.add_(1)
    assert all(torch.equal(part, old) for part, old in zip(parts, before, strict=True))


def test_the_only_group_has_a_rate_in_units_of_the_start() -> None:
    method = made(tiny.backbone("t5"), prompt_lr=0.05, weight_decay=0.01)
    (group,) = method.trained()
    assert (group.name, group.weight_decay) == ("rows", 0.01)
    assert group.parameter is method.rows
    assert group.learning_rate == pytest.approx(0.05 * float(method.rows.detach().pow(2).mean().sqrt()))
    (absolute,) = made(tiny.backbone("t5"), prompt_lr=0.3, lr_unit="absolute").trained()
    assert absolute.learning_rate == 0.3


def test_a_relative_rate_refers_to_the_start_and_not_to_the_present() -> None:
    method = made(tiny.backbone("t5"))
    before = method.trained()[0].learning_rate
    with torch.no_grad():
        method.rows.mul_(100)
    assert method.trained()[0].learning_rate == before


# ---- what all methods share -----------------------------------------------------------------------------------------

GRID = [(6, 32), (8, 32), (10, 64), (20, 384), (50, 768), (100, 768), (100, 1024)]
SMALLER = {  # settings whose smallest form fits into every budget of the grid
    "prompt_tuning": {},
    "dept": {"num_virtual_tokens": 2, "max_tokens": 24},
    "ept": {"num_virtual_tokens": 1, "max_tokens": 24, "spaces": 1, "space_dim": 1},
    "lamp": {"length": 40},
}


def one_more(method: type[Method], config: MethodConfig) -> MethodConfig:
    """The next larger size in the direction that `match_budget` moves."""
    field = "num_virtual_tokens" if method is PromptTuning else "rank"
    return config.model_copy(update={field: getattr(config, field) + 1})


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("length", "width"), GRID)
def test_a_matched_size_never_exceeds_the_budget_and_one_rank_more_would(name: str, length: int, width: int) -> None:
    method, shape = registry.load("methods", name), Shape(width)
    config = method.match_budget(method.Config(**SMALLER[name]), length, shape)
    count = method.count(config, shape)
    assert count == sum(parameter.numel() for parameter in method(config, shape).parameters())
    assert count <= length * width
    if not (name == "lamp" and config.rank == min(config.length, width)):
        assert method.count(one_more(method, config), shape) > length * width


@pytest.mark.parametrize("name", METHODS)
def test_a_matched_config_is_what_a_run_file_with_match_length_builds(name: str) -> None:
    method = registry.load("methods", name)
    asked = method.Config(**SMALLER[name], match_length=8)
    built = build_method(asked, Shape(32))
    assert built.count(built.config, Shape(32)) == sum(parameter.numel() for parameter in built.parameters())
    matched = method.match_budget(method.Config(**SMALLER[name]), 8, Shape(32))
    assert built.config.model_copy(update={"match_length": None}) == matched
    again = build_method(built.config, Shape(32))
    assert again.config == built.config, "a saved config is built again with the same size"


@pytest.mark.parametrize(
    ("name", "settings", "fix"),
    [
        ("dept", {"num_virtual_tokens": 9}, "num_virtual_tokens"),
        ("ept", {"num_virtual_tokens": 9}, "num_virtual_tokens"),
        ("ept", {"num_virtual_tokens": 2, "spaces": 40}, "spaces"),
        ("ept", {"num_virtual_tokens": 2, "use_lowrank": False, "spaces": 40}, "spaces"),
        ("lamp", {"length": 4000}, "length"),
    ],
)
def test_a_budget_that_is_too_small_is_refused_with_a_fix(name: str, settings: dict[str, object], fix: str) -> None:
    method = registry.load("methods", name)
    with pytest.raises(ConfigError, match=rf"match_length 8 gives 256 parameters.*lower .*method\.{fix}"):
        method.match_budget(method.Config(**settings), 8, Shape(32))


@pytest.mark.parametrize("name", METHODS)
def test_the_public_helper_takes_every_setting_of_the_method(name: str) -> None:
    method = registry.load("methods", name)
    expected = method.match_budget(method.Config(**SMALLER[name]), 8, Shape(32))
    assert match_budget(name, 8, 32, **SMALLER[name]) == expected


@pytest.mark.parametrize("name", METHODS)
def test_tensors_and_declared_groups_are_the_same_names(name: str) -> None:
    method = registry.load("methods", name)
    backbone = tiny.backbone("t5")
    live = method(method.Config(**method.tiny), backbone.shape)
    live.initialise(Starting(backbone.vocabulary, torch.Generator().manual_seed(0)))
    assert {group.name for group in live.trained()} <= set(method.groups)
    assert [group.name for group in live.trained()] == [tensor for tensor, _ in live.named_parameters()]
    assert all(hasattr(live.config, f"{group}_lr") for group in method.groups.values())
    assert method.relative <= set(method.groups.values())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("init", ["vocabulary", "text", "random"])
def test_same_generator_gives_same_bytes_and_leaves_the_global_state_alone(name: str, init: str) -> None:
    method, backbone = registry.load("methods", name), tiny.backbone("t5")

    def start(seed: int) -> bytes:
        live = method(method.Config(**method.tiny, init=init, init_text="red sky was very good"), backbone.shape)
        live.initialise(Starting(backbone.vocabulary, torch.Generator().manual_seed(seed)))
        return b"".join(value.detach().numpy().tobytes() for value in live.parameters())

    state = torch.get_rng_state()
    assert start(1) == start(1)
    assert torch.equal(state, torch.get_rng_state())
    if init != "text":
        assert start(1) != start(2)


@pytest.mark.parametrize("name", METHODS)
def test_the_first_prompt_has_the_scale_of_the_vocabulary(name: str) -> None:
    """Never N(0, 1): on tables of very different scale, the rows follow the table."""
    method = registry.load("methods", name)
    for kind in ("t5", "llama", "bert"):
        backbone = tiny.backbone(kind)
        full = {"rank": 8, "pool": 1} if name == "lamp" else {}  # cutting and averaging lose scale by design
        live = method(method.Config(**{**method.tiny, **full, "init": "random"}), backbone.shape)
        live.initialise(Starting(backbone.vocabulary, torch.Generator().manual_seed(0)))
        scale = float(tiny.model(kind).get_input_embeddings().weight.detach().pow(2).mean().sqrt())
        assert 0.4 < float(live.fold().rows.pow(2).mean().sqrt()) / scale < 1.5
