"""InfoPrompt: the invariants of the specification, numbered as there, and what its settings change.

Knows no other method but prompt tuning, which it reduces to. The estimators themselves are tested against distributions
with known answers in test_losses.py (invariant 4).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import tiny
from promptuary.errors import ConfigError
from promptuary.methods.infoprompt import InfoPrompt, InfoPromptConfig
from promptuary.testing import case_of
from promptuary.tuned import Tuned
from promptuary.types import Outputs, Prompt, Shape, View

RELEASE = {
    "prompt_source": "instance", "instance_state": "first", "num_virtual_tokens": 1, "nce_floor": -2.0,
    "slots": ("after_bos", "before_answer", "after_answer", "end"),
}  # fmt: skip
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


def test_a_prompt_without_influence_carries_no_information() -> None:
    """Invariant 5: where the answer's state is that of the text alone, the best is log(1 + negatives)."""
    made = InfoPrompt(
        InfoPromptConfig(rank=4, negatives=6, kl_weight=0, head_weight=0), Shape(16, hidden=16, classes=2)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        for name in ("critic", "critic_bias"):
            getattr(made, name).zero_()
    state = torch.randn(5, 16, generator=generator)
    view = View(mask=torch.ones(5, 3).bool(), embeddings=torch.randn(5, 3, 16), answer=state)
    found = made.loss(torch.zeros(()), said(made, state, view)).parts["representation"]
    assert found == pytest.approx(math.log(2), abs=1e-6), "in evaluation one negative stands for all: the mean"


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


@pytest.mark.parametrize("floor", [None, -2.0])
def test_the_floor_silences_a_loss(floor: float | None) -> None:
    """Invariant 7: with it at most 2, and no gradient below a probability of e^-2; without it there is one."""
    value, gradient = head_loss(-20.0, floor=floor)
    assert (value == 2.0) == (floor is not None)
    assert bool(gradient.any()) == (floor is None)


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
    assert all(parameter.grad is None for parameter in made.backbone.model.parameters())


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


@pytest.mark.parametrize(
    ("settings", "shape", "message"),
    [
        ({}, Shape(8, hidden=8), "needs a task with labels"),
        ({"representation": "deterministic"}, Shape(8, hidden=16, classes=2), "use gaussian on this model"),
        ({"match_length": 1}, Shape(64, hidden=64, classes=2), "leaves the critic out"),
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
