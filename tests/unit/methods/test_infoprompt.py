"""InfoPrompt: the invariants of the specification, numbered as there, and what its settings change.

Knows no other method but prompt tuning, which it reduces to. The estimators themselves are tested against distributions
with known answers in test_losses.py (invariant 4); test_infoprompt_equation.py computes the whole loss by hand.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu

import tiny
from promptuary.config import load_run
from promptuary.errors import ConfigError, SiteError
from promptuary.methods.infoprompt import PREDICTION, InfoPrompt, InfoPromptConfig
from promptuary.prompts.init import Starting
from promptuary.seeds import Chance
from promptuary.testing import case_of
from promptuary.testing.case import padded
from promptuary.tuned import Tuned
from promptuary.types import Outputs, Prompt, Shape, View

RELEASE_RUN = load_run(Path(__file__).parent.parent.parent.parent / "runs" / "infoprompt_release.yaml")
RELEASE = RELEASE_RUN.method.model_dump(exclude={"name"})
PLAIN = {"representation": "deterministic", "representation_weight": 0.0, "head_weight": 0.0, "kl_weight": 0.0}
FAMILIES = ("causal", "seq2seq", "masked", "encoder")


def tuned(folder: Path, family: str = "masked", *, train: bool = False, **settings: Any) -> Tuned:
    made = case_of(InfoPrompt, family, folder, {**InfoPrompt.tiny, **settings}).tuned()
    made.moment = (0, 1)
    return made.train(train)


def batch_of(made: Tuned, folder: Path) -> Any:
    return made.batch(case_of(InfoPrompt, made.backbone.name, folder).rows(made))


def method_of(made: Tuned) -> InfoPrompt:
    assert isinstance(made.method, InfoPrompt)
    return made.method


# ---- 1: counts -----------------------------------------------------------------------------------------------------


def test_counts_are_those_of_the_release() -> None:
    """Invariant 1: one slot of the release's arithmetic; its four slots have a generator of four rows."""
    shape = Shape(1024, hidden=1024, classes=2)
    one = InfoPromptConfig(prompt_source="instance", slots=("after_bos",), rank=32)
    assert InfoPrompt.count(one, shape) == 1_217_632
    static = InfoPromptConfig(slots=("after_bos",), rank=32)
    generator = 1024 * 32 + 32 + 32 * 1024 + 1024
    assert InfoPrompt.count(static, shape) == 1_217_632 - generator + 1024
    four = InfoPromptConfig(**RELEASE)
    assert InfoPrompt.count(four, shape) == 1_217_632 + 3 * (32 * 1024 + 1024)


@pytest.mark.parametrize("settings", [{}, RELEASE, PLAIN, {"representation_weight": 0.0}])
def test_the_formula_counts_what_is_trained(settings: dict[str, Any]) -> None:
    config, shape = InfoPromptConfig(**{"rank": 4, **settings}), Shape(16, hidden=16, classes=3)
    made = InfoPrompt(config, shape)
    assert InfoPrompt.count(config, shape) == sum(value.numel() for value in made.parameters())


# ---- 2, 3: reductions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_without_its_losses_it_is_a_prompt_with_a_head_of_label_words(family: str, tmp_path: Path) -> None:
    """Invariant 2: the score of a label is its embedding times the state of the answer, bit for bit."""
    made = tuned(tmp_path, family, train=True, **PLAIN)
    batch, method = batch_of(made, tmp_path), method_of(made)
    assert {name for name, _ in method.named_parameters()} == {"rows", "head"}
    prompt = Prompt(rows=method.rows[None], placement=(("after_bos", 2), ("end", 2)))
    wanted = made.backbone.answer(batch, prompt).float() @ method.head.T
    assert torch.equal(made.scores(batch), wanted)
    loss = made.loss(batch)
    assert torch.equal(loss.total, cross_entropy(wanted, batch.target))
    assert set(loss.parts) == {"task"}


def test_the_head_starts_as_the_label_words() -> None:
    backbone = tiny.backbone("masked")
    fresh = case_of(InfoPrompt, "masked", Path("unused")).tuned(backbone)
    word_ids = fresh.asking.word_ids
    method = method_of(fresh)
    fresh.initialise(torch.Generator().manual_seed(3))
    for row, ids in zip(method.head, word_ids, strict=True):
        torch.testing.assert_close(row, backbone.vocabulary.embed(torch.tensor(ids)).mean(0))


def test_static_rows_may_start_as_copies_of_the_masks_embedding() -> None:
    """The release's class for static prompts, which it does not use, starts so."""
    backbone = tiny.backbone("masked")
    config = InfoPromptConfig(**InfoPrompt.tiny, init="text", init_text=backbone.tokenizer.mask_token)
    made = InfoPrompt(config, Shape(tiny.WIDTH, hidden=tiny.WIDTH, classes=2))
    made.initialise(Starting(backbone.vocabulary, torch.Generator(), labels=[[7], [8]]))
    mask = backbone.vocabulary.embed(torch.tensor([backbone.tokenizer.mask_token_id]))
    assert torch.equal(made.rows.detach(), mask.expand(4, -1))


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_is_one_linear_map_of_the_answers_state(family: str, tmp_path: Path) -> None:
    """Invariant 3: Theta O M folds into one [c, h] matrix and a constant; nothing is drawn."""
    made = tuned(tmp_path, family)
    batch, m = batch_of(made, tmp_path), method_of(made)
    state = made.backbone.answer(batch, made.prompt(batch)).float()
    matrix, constant = m.head @ m.out.T @ m.mean.T, m.head @ (m.mean_bias @ m.out + m.out_bias)
    torch.testing.assert_close(made.scores(batch), state @ matrix.T + constant, rtol=1e-4, atol=1e-4)
    assert torch.equal(made.scores(batch), made.scores(batch))


def test_a_static_prompt_folds_and_an_instance_prompt_does_not(tmp_path: Path) -> None:
    assert method_of(tuned(tmp_path / "a")).fold().as_rows().shape == (4, tiny.WIDTH)
    assert method_of(tuned(tmp_path / "b", prompt_source="instance")).depends


# ---- 5 to 7: the losses --------------------------------------------------------------------------------------------


def said(method: InfoPrompt, answer: Tensor, view: View) -> Outputs:
    return Outputs(view, answer=answer, target=torch.zeros(len(answer), dtype=torch.long))


def small(**settings: Any) -> InfoPrompt:
    """Of width 8, with all its tensors drawn."""
    made = InfoPrompt(InfoPromptConfig(rank=4, negatives=8, **settings), Shape(8, hidden=8, classes=2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return made


@pytest.mark.parametrize("influence", [0.0, 3.0])
def test_a_prompt_without_influence_carries_no_information(influence: float) -> None:
    """Invariant 5: the best that training finds is log(1 + negatives) where the prompt leaves the answer's state."""
    made = small(representation_weight=1.0, head_weight=0.0, kl_weight=0.0)
    optimizer = torch.optim.Adam(made.parameters(), lr=0.02)
    states = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    direction = torch.ones(8) / math.sqrt(8)

    def loss(step: int) -> Tensor:
        view = View(answer=states, chance=Chance(0, step, torch.arange(32)))
        return made.loss(torch.zeros(()), said(made, states + influence * direction, view)).total

    for step in range(150):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
    with torch.no_grad():
        found = math.log(9) - sum(float(loss(step)) for step in range(1000, 1040)) / 40
    assert abs(found) < 0.05 if influence == 0 else found > 1.0


def head_loss(scale: float, direction: float = 1.0, floor: float | None = None) -> tuple[float, Tensor]:
    """The head's loss of one row along the head's mean, among four tokens, and the gradient of that row."""
    made = InfoPrompt(
        InfoPromptConfig(rank=2, slots=("end",), representation_weight=0, kl_weight=0, nce_floor=floor),
        Shape(8, hidden=8, classes=2),
    )
    t = torch.ones(8) / math.sqrt(8)
    with torch.no_grad():
        made.head.copy_(direction * t.expand(2, 8))
        made.rows.copy_(scale * t[None])
    tokens = torch.zeros(1, 6, 8)
    mask = torch.tensor([[True] * 4 + [False] * 2])
    tokens[:, 4:] = 1e3  # padding does not count
    loss = made.loss(torch.zeros(()), said(made, torch.zeros(1, 8), View(mask=mask, embeddings=tokens)))
    loss.total.backward()
    assert made.rows.grad is not None
    return loss.parts["head"], made.rows.grad


def test_extremes_of_the_head_loss() -> None:
    """Invariant 6."""
    value, gradient = head_loss(3.0, direction=0.0)
    assert value == pytest.approx(math.log(5))
    assert not bool(gradient.any())
    assert head_loss(100.0)[0] < 1e-6
    assert head_loss(0.0)[0] == pytest.approx(math.log(5))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_of_the_text_is_a_negative_and_padding_is_none(family: str, tmp_path: Path) -> None:
    """Invariant 6 on real texts, special tokens and the mask included: a head without direction costs log(1 + T)."""
    made = tuned(tmp_path, family, train=True, representation_weight=0.0, kl_weight=0.0)
    batch = batch_of(made, tmp_path)
    with torch.no_grad():
        method_of(made).head.sub_(method_of(made).head.mean(0))
    counts = batch.attention_mask.sum(1)
    assert len(set(counts.tolist())) > 1
    assert made.loss(batch).parts["head"] == pytest.approx(float(torch.log1p(counts).mean()), abs=1e-5)


@pytest.mark.parametrize(("share", "silent"), [(0.13, True), (0.14, False)])
@pytest.mark.parametrize("floor", [None, -2.0])
def test_the_floor_silences_the_heads_loss(floor: float | None, share: float, silent: bool) -> None:
    """Invariant 7: with it at most 2, and no gradient below a probability of e^-2 = 0.1353; without it there is one."""
    score = math.log(4 * share / (1 - share))
    value, gradient = head_loss(score * math.sqrt(8), floor=floor)
    silent = silent and floor is not None
    assert value == pytest.approx(2.0 if silent else -math.log(share), abs=1e-5)
    assert bool(gradient.any()) == (not silent)


@pytest.mark.parametrize("floor", [None, -2.0])
def test_the_floor_silences_the_representations_loss_at_the_start(floor: float | None) -> None:
    """Invariant 7: among 8 negatives nothing is learnt where all score alike."""
    made = small(representation_weight=1.0, head_weight=0.0, kl_weight=0.0, nce_floor=floor)
    with torch.no_grad():
        made.critic_bias.zero_()
        made.rows.zero_()
    state = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    view = View(answer=state, chance=Chance(0, 0, torch.arange(5)))
    loss = made.loss(torch.zeros(()), said(made, state + 1, view))
    assert loss.parts["representation"] == pytest.approx(2.0 if floor else math.log(9), abs=1e-6)
    loss.total.backward()
    assert made.critic_bias.grad is not None
    assert bool(made.critic_bias.grad.any()) == (floor is None)


@pytest.mark.parametrize(("bias", "log_std"), [(-50.0, -2.0), (50.0, 10.0)])
def test_the_spread_stays_between_bounds(bias: float, log_std: float) -> None:
    made = small()
    with torch.no_grad():
        made.spread_bias.fill_(bias)
    state, index = torch.randn(3, 8, generator=torch.Generator().manual_seed(1)), torch.arange(3)
    noisy = made.scores(said(made, state, View(chance=Chance(0, 0, index))))
    drawn = Chance(0, 0, index).normal(4, purpose=PREDICTION)
    shift = (math.exp(log_std) * drawn) @ made.out @ made.head.T
    torch.testing.assert_close(noisy - made.scores(said(made, state, View())), shift, rtol=1e-3, atol=1e-5)


def test_predicting_needs_no_second_pass_unless_the_prompt_is_made_of_it(tmp_path: Path) -> None:
    static, instance = tuned(tmp_path / "a"), tuned(tmp_path / "b", prompt_source="instance")
    assert static.view(batch_of(static, tmp_path)) == View()
    seen = instance.view(batch_of(instance, tmp_path))
    assert seen.answer is not None
    assert seen.chance is None


# ---- 8: gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["static", "instance"])
def test_the_critic_does_not_move_the_prompt(source: str, tmp_path: Path) -> None:
    """Invariant 8: the prompt learns from this loss through the model's state alone, never through the context."""
    made = tuned(tmp_path, train=True, prompt_source=source, head_weight=0.0, kl_weight=0.0, representation_weight=1.0)
    batch, method = batch_of(made, tmp_path), method_of(made)
    view = made.view(batch)
    seen = made.outputs(batch)
    assert seen.answer is not None
    cut = Outputs(view, answer=seen.answer.detach(), target=seen.target)
    own = [method.rows] if source == "static" else [method.up, method.down]
    zero = torch.zeros(())
    through = torch.autograd.grad(method.loss(zero, seen).total, own, allow_unused=True)
    assert all(grad is not None and bool(grad.any()) for grad in through)
    without = torch.autograd.grad(method.loss(zero, cut).total, own, allow_unused=True)
    assert all(grad is None for grad in without)
    with torch.no_grad():
        before = method.loss(zero, cut).parts["representation"]
        for parameter in own:
            parameter.add_(1)
    assert method.loss(zero, cut).parts["representation"] != pytest.approx(before), "the context is the prompt's"


@pytest.mark.parametrize("settings", [{}, {"prompt_source": "instance"}, RELEASE | {"nce_floor": None}])
def test_a_step_reaches_every_tensor_and_nothing_of_the_backbone(settings: dict[str, Any], tmp_path: Path) -> None:
    """Invariant 8, all losses together."""
    made = tuned(tmp_path, train=True, **settings)
    made.loss(batch_of(made, tmp_path)).total.backward()
    for name, parameter in method_of(made).named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name
    assert all(parameter.grad is None for parameter in made.backbone.model.parameters())


def test_the_heads_loss_moves_prompt_and_head(tmp_path: Path) -> None:
    made = tuned(tmp_path, train=True, representation_weight=0.0, kl_weight=0.0, head_weight=1.0)
    method, seen = method_of(made), made.outputs(batch_of(made, tmp_path))
    assert seen.answer is not None
    cut = Outputs(seen.view, answer=seen.answer.detach(), target=seen.target)
    method.loss(torch.zeros(()), cut).total.backward()
    grown = {name for name, value in method.named_parameters() if value.grad is not None and bool(value.grad.any())}
    assert grown == {"rows", "head"}


# ---- noise, slots, instances ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"prompt_source": "instance"}])
def test_noise_follows_a_row_and_not_its_batch(settings: dict[str, Any], tmp_path: Path) -> None:
    made = tuned(tmp_path, train=True, **settings)
    rows = case_of(InfoPrompt, "masked", tmp_path).rows(made)

    def loss(part: Any) -> Tensor:
        return made.loss(made.batch(part)).total.detach()

    whole = loss(rows)
    parts = (loss(rows[:2]) * 2 + loss(rows[2:]) * (len(rows) - 2)) / len(rows)
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-5)
    made.moment = (0, 2)
    assert float((loss(rows) - whole).abs()) > 1e-4


def test_each_row_gets_the_prompt_of_its_own_text(tmp_path: Path) -> None:
    """Not that of the first row of the batch, as in the release."""
    made = tuned(tmp_path, prompt_source="instance")
    batch = batch_of(made, tmp_path)
    together = made.prompt(batch).rows
    assert together is not None
    for place in range(len(batch)):
        alone = made.prompt(batch.rows(torch.tensor([place]))).rows
        torch.testing.assert_close(together[place], alone[0], rtol=1e-4, atol=1e-5)
    assert float((together[0] - together[1]).detach().abs().max()) > 1e-4


def test_the_release_has_four_places_around_the_mask(tmp_path: Path) -> None:
    made = tuned(tmp_path, **RELEASE)
    batch = batch_of(made, tmp_path)
    placed = made.backbone.place(batch, made.prompt(batch))
    assert made.added_tokens == 4
    vocabulary = made.backbone.table.weight.shape[0]
    for row, real in zip(placed.input_ids, placed.attention_mask.bool(), strict=True):
        ids = row[real].tolist()
        virtual = [place for place, token in enumerate(ids) if token >= vocabulary]
        mask = ids.index(made.backbone.tokenizer.mask_token_id)
        # "end" is behind the last special token, where the release's fourth place is before it
        assert virtual == [1, mask - 1, mask + 1, len(ids) - 1]


def test_the_releases_run_file_has_its_numbers() -> None:
    run, c = RELEASE_RUN, InfoPromptConfig(**RELEASE)
    assert (c.num_virtual_tokens, c.rank, c.negatives, c.nce_floor) == (1, 32, 4 * run.train.batch_size, -2.0)
    assert (c.representation_weight, c.head_weight, c.kl_weight, c.modules_lr) == (0.2, 0.1, 0.1, 1e-3)
    assert (run.train.batch_size, run.train.epochs, run.train.warmup, run.data.max_length) == (8, 30, 0.06, 512)
    assert (c.prompt_source, c.instance_state, c.representation) == ("instance", "first", "gaussian")


@pytest.mark.parametrize("family", ["causal", "seq2seq"])
def test_the_releases_places_need_a_mask(family: str, tmp_path: Path) -> None:
    # before anything is trained or written
    with pytest.raises(SiteError, match="needs a model that reads its answer at a mask"):
        tuned(tmp_path, family, **RELEASE)


def test_the_state_of_the_first_token_is_that_of_its_own_text(tmp_path: Path) -> None:
    """Whatever padding stands before it."""
    made = tuned(tmp_path, prompt_source="instance", instance_state="first")
    batch, m = batch_of(made, tmp_path), method_of(made)
    first = made.backbone.hidden(batch, Prompt())[:, 0].float()
    wanted = gelu(first @ m.down + m.down_bias) @ m.up + m.up_bias
    for given in (batch, padded(batch, left=3)):
        found = made.prompt(given).rows
        assert found is not None
        torch.testing.assert_close(found.flatten(1), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "shape", "message"),
    [
        ({}, Shape(8, hidden=8), "needs a task with labels"),
        ({"representation": "deterministic"}, Shape(8, hidden=16, classes=2), "use gaussian on this model"),
        ({"match_length": 1}, Shape(64, hidden=64, classes=2), "leaves the critic out"),
        ({"match_length": 1, "representation_weight": 0.0}, Shape(64, hidden=64, classes=2), "fewer slots"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], shape: Shape, message: str) -> None:
    config = InfoPromptConfig(**settings)
    with pytest.raises(ConfigError, match=message) as caught:
        InfoPrompt.match_budget(config, config.match_length or 100, shape)
    assert "\n" not in str(caught.value)


def test_a_budget_is_kept_and_used() -> None:
    shape = Shape(32, hidden=32, classes=3)
    config = InfoPrompt.match_budget(InfoPromptConfig(), 60, shape)
    more = config.model_copy(update={"rank": config.rank + 1})
    assert InfoPrompt.count(config, shape) <= 60 * 32
    assert config.rank == 32 or InfoPrompt.count(more, shape) > 60 * 32
