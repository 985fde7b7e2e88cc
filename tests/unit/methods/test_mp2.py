"""MP2: the invariants of the specification, numbered as there, and what it starts from.

Knows no other method but prompt tuning and black-box tuning, which it reduces to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
import toy
from promptuary.config import build
from promptuary.course import JointCourse
from promptuary.errors import ConfigError
from promptuary.methods.bbt import BBT
from promptuary.methods.mp2 import MP2, MP2Config
from promptuary.prompts.init import Saved, Starting
from promptuary.run import JointRun
from promptuary.seeds import Chance
from promptuary.sources import load_source
from promptuary.testing import case_of
from promptuary.training import train
from promptuary.types import Shape, View

D = tiny.WIDTH
SMALL = {"num_virtual_tokens": 3, "modules": 4, "intrinsic_dimension": 5}


def made(phase: str = "pretrain", seed: int = 0, sources: tuple[Saved, ...] = (), **settings: Any) -> MP2:
    config = MP2Config(phase=phase, **{**SMALL, **settings})
    vocabulary = tiny.backbone("bert").vocabulary
    start = Starting(vocabulary, torch.Generator().manual_seed(seed), sources=sources)
    method = MP2(config, Shape(D))
    method.initialise(start)
    return method


def moved(method: MP2, seed: int = 1) -> MP2:
    """With tensors far from their start, so that every part matters."""
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return method


def saved(method: MP2, name: str = "earlier") -> Saved:
    tensors = {key: value.detach().clone() for key, value in method.state_dict().items()}
    return Saved(name, "mp2", method.config.model_dump(), tensors, method.fold(), {})


def rows(method: MP2) -> Tensor:
    return method.fold().as_rows()


# ---- 1: counts -----------------------------------------------------------------------------------------------------


def test_counts_are_the_published_arithmetic() -> None:
    """Invariant 1: 38 routers and what they share; 8 and 409,600 on a new task; the folded form."""
    released = MP2Config()
    shared = MP2.count(released, Shape(1024)) - 8
    assert 38 * 8 + shared + 2 * 1024 == 15_364_752
    gradient = MP2Config(phase="gradient")
    assert MP2.sizes(gradient, Shape(1024)) == {"router": (8,), "parts": (8, 51_200)}
    assert MP2.count(gradient, Shape(1024)) == 8 + 409_600
    assert MP2.count(MP2Config(phase="blackbox"), Shape(1024)) == 8 + 300
    assert rows(made()).numel() == 3 * D


@pytest.mark.parametrize("phase", ["pretrain", "gradient", "blackbox"])
def test_the_formula_counts_what_is_trained(phase: str) -> None:
    method = made(phase)
    assert MP2.count(method.config, Shape(D)) == sum(value.numel() for value in method.parameters())


@pytest.mark.parametrize("phase", ["pretrain", "gradient"])
@pytest.mark.parametrize("length", [20, 40])
def test_a_budget_is_kept_and_used(phase: str, length: int) -> None:
    config = MP2.match_budget(MP2Config(phase=phase, num_virtual_tokens=3), length, Shape(D))
    count = MP2.count(config, Shape(D))
    field = "modules" if phase == "gradient" else "intrinsic_dimension"
    more = config.model_copy(update={field: getattr(config, field) + 1})
    assert count <= length * D < MP2.count(more, Shape(D))


# ---- 2, 3: linearity and reductions --------------------------------------------------------------------------------


def test_mixing_short_vectors_or_long_modules_is_the_same() -> None:
    """Invariant 2: (w z) A = w (z A), and both fold into one static prompt."""
    first = moved(made())
    second = made("gradient", sources=(saved(first),))
    with torch.no_grad():
        second.router.copy_(first.router)
    torch.testing.assert_close(rows(first), rows(second), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first.prompt(View()).rows[0], rows(first))


@pytest.mark.parametrize("value", [-30.0, 0.0, 30.0])
def test_one_module_does_not_depend_on_its_router(value: float) -> None:
    """Invariant 3: K = 1 is prompt tuning in an intrinsic dimension."""
    method = moved(made(modules=1))
    with torch.no_grad():
        method.router.fill_(value)
    wanted = method.placeholders + (method.z[0] @ method.a).view(3, D)
    torch.testing.assert_close(rows(method), wanted)


def test_one_module_and_a_drawn_matrix_are_black_box_tuning(tmp_path: Path) -> None:
    """Invariant 3, the other half: with BBT's A the two give the same rows for the same vector."""
    bbt = case_of(BBT, "masked", tmp_path).tuned().method
    assert isinstance(bbt, BBT)
    k, n = bbt.settings.intrinsic_dimension, bbt.settings.num_virtual_tokens
    method = made("blackbox", num_virtual_tokens=n, modules=1, intrinsic_dimension=k)
    with torch.no_grad():
        method.z.zero_()
        method.a.copy_(bbt.scale * bbt.matrix)
        method.placeholders.copy_(bbt.base)
        method.vector.copy_(bbt.vector)
    torch.testing.assert_close(rows(method), bbt.fold().as_rows())


# ---- 4: the router -------------------------------------------------------------------------------------------------


def test_weights_are_shares() -> None:
    """Invariant 4: not below zero, sum one, also where all gates are all but shut; equal logits give the mean."""
    method = made()
    for value in (0.0, 3.0, -80.0):
        with torch.no_grad():
            method.router.fill_(value)
        torch.testing.assert_close(method.weights(View()), torch.full((4,), 0.25))
    with torch.no_grad():
        method.router.copy_(torch.tensor([5.0, -5.0, -5.0, -5.0]))
    found = method.weights(View()).detach()
    assert float(found.min()) >= 0
    assert float(found.sum()) == pytest.approx(1)
    assert float(found[0]) == pytest.approx(0.9933 / (0.9933 + 3 * 0.00669), abs=1e-3)
    assert float(MP2Config().modules) == 8


def test_gates_are_drawn_in_pre_training_only_and_once_a_step() -> None:
    """Invariant 4: stochastic in training, one sample for all rows of a step; deterministic everywhere else."""
    views = [View(chance=Chance(0, step, torch.tensor(index))) for step, index in ((1, [0, 3]), (1, [5]), (2, [0]))]
    method = made()
    first, same, other = (method.weights(view) for view in views)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(method.weights(View()), method.weights(View()))
    for phase in ("gradient", "blackbox"):
        method = made(phase)
        assert torch.equal(method.weights(views[0]), method.weights(View()))


def test_gradients_reach_the_router_through_the_sample() -> None:
    method = moved(made())
    prompt = method.prompt(View(chance=Chance(0, 1, torch.tensor([0]))))
    assert prompt.rows is not None
    prompt.rows.pow(2).sum().backward()
    assert all(bool((value.grad != 0).any()) for value in method.parameters())


# ---- 5, 6: tiling and the start ------------------------------------------------------------------------------------


def test_equal_modules_make_every_mixture_one_of_them() -> None:
    """Invariant 5: if all rows of z are v, the prompt is v A for every router."""
    method = moved(made(attach="replace"))
    v = torch.randn(5, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        method.z.copy_(v.expand(4, 5))
    torch.testing.assert_close(rows(method), (v @ method.a).view(3, D), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("phase", ["pretrain", "gradient", "blackbox"])
def test_it_starts_at_its_placeholders(phase: str) -> None:
    """Invariant 6: the mixture is all but zero at the start; without placeholders the prompt is."""
    method = made(phase)
    difference = rows(method) - method.placeholders
    assert 0 < float(difference.pow(2).mean().sqrt()) < 1e-3
    assert float(rows(made(phase, attach="replace")).abs().max()) < 1e-2


# ---- 7, 9: phases --------------------------------------------------------------------------------------------------


def test_phases_go_on_from_pre_training_with_a_new_router() -> None:
    """Modules and placeholders are the source's, the router is not; both ways start from the mean of the modules."""
    source = moved(made())
    for phase in ("gradient", "blackbox"):
        method = made(phase, seed=5, sources=(saved(source), saved(source, "other")))
        assert torch.equal(method.placeholders, source.placeholders)
        assert float(method.router.detach().abs().max()) <= 1e-3
        wanted = source.placeholders + (source.z.mean(0) @ source.a).view(3, D)
        torch.testing.assert_close(rows(method), wanted.detach(), rtol=1e-2, atol=1e-2)
    assert made().solver == made("gradient").solver == "gradient"
    assert made("blackbox").solver == "evolution"
    assert [stage.parameters for stage in made("blackbox").stages()] == [{"router"}, {"vector"}]
    assert sum(stage.share for stage in made("gradient").stages()) == 1


def test_the_search_starts_at_the_mixture_and_moves_in_its_space() -> None:
    method = moved(made("blackbox"))
    wanted = method.placeholders + ((method.weights(View()) @ method.z + method.vector) @ method.a).view(3, D)
    torch.testing.assert_close(rows(method), wanted.detach())
    assert {name for name, _ in method.named_parameters()} == {"router", "vector"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: Saved(one.name, "mpt", one.settings, one.tensors, None, {}), "is mpt of another"),
        (lambda one: saved(moved(made("gradient")), "adapted"), "of another phase"),
        (lambda one: saved(moved(made(modules=2)), "small"), "num_virtual_tokens, modules and"),
        (lambda one: saved(moved(made(seed=4), 9), "stranger"), "one and the same run"),
    ],
)
def test_sources_that_do_not_fit_are_refused(change: Any, message: str) -> None:
    source = saved(moved(made()))
    with pytest.raises(ConfigError, match=message) as caught:
        made("gradient", sources=(source, change(source)))
    assert "\n" not in str(caught.value)


# ---- 8: it finds what tasks have in common -------------------------------------------------------------------------


def joint(folder: Path, method: Mapping[str, Any], **changes: Any) -> JointRun:
    for number, name in enumerate(("one", "two")):
        for split, count in (("train", 12), ("validation", 4), ("test", 4)):
            toy.jsonl(folder / name / f"{split}.jsonl", toy.rows(count, number))
    data = {name: {"source": str(folder / name), "max_length": 40} for name in ("one", "two")}
    run = build_tasks(data, method, folder, changes)
    assert isinstance(run, JointRun)
    return run


def build_tasks(data: Mapping[str, Any], method: Mapping[str, Any], folder: Path, changes: Mapping[str, Any]) -> Any:
    from promptuary.config import load_run

    return load_run(
        {
            "tasks": {name: {"task": toy.TASKS["classify_words"], "data": own} for name, own in data.items()},
            "backbone": {"model": "tiny-masked", "family": "masked"},
            "method": {"name": "mp2", **SMALL, **method},
            "train": {"steps": 4, "batch_size": 4},
            "out": str(folder / "joint"),
            **changes,
        }
    )


def test_a_router_recovers_the_weights_of_a_known_mixture() -> None:
    """Invariant 8, on the rows themselves: the router alone is trained towards mixtures of known modules."""
    source = moved(made(num_virtual_tokens=6, intrinsic_dimension=16))
    for wanted in (torch.tensor([1.0, 0, 0, 0]), torch.tensor([0.5, 0.5, 0, 0])):
        method = made("gradient", sources=(saved(source),), num_virtual_tokens=6, intrinsic_dimension=16)
        goal = method.placeholders + (wanted @ method.parts.detach()).view(6, D)
        optimizer = torch.optim.Adam([method.router], lr=0.1)
        for _ in range(400):
            optimizer.zero_grad()
            found = method.prompt(View()).rows
            assert found is not None
            (found[0] - goal).pow(2).mean().backward()
            optimizer.step()
        weights = method.weights(View()).detach()
        assert float(torch.cosine_similarity(weights, wanted, dim=0)) > 0.95
        assert float(weights[wanted > 0].sum()) > 0.9


def test_pre_training_then_both_ways_of_adapting(tmp_path: Path) -> None:
    """Several tasks with shared modules, then a task by gradient and one by search, from that run's folder."""
    backbone = tiny.backbone("masked")
    train(joint(tmp_path, {}), backbone=backbone)
    source = load_source(tmp_path / "joint" / "prompts" / "one", backbone)
    assert json.loads((tmp_path / "joint" / "result.json").read_text())["trainable_parameters"] == (
        2 * 4 + 4 * 5 + 5 * 3 * D
    )
    values = toy.settings(tmp_path, "masked", name="next")
    for phase in ("gradient", "blackbox"):
        method = {"name": "mp2", **SMALL, "phase": phase, "sources": [str(tmp_path / "joint")]}
        run = build({**values, "method": method, "out": str(tmp_path / phase)})
        result = train(run, backbone=backbone)
        own = result.prompt.method
        assert isinstance(own, MP2)
        assert len(own.settings.sources) == 2
        assert torch.equal(own.placeholders, source.tensors["placeholders"])


def test_adapting_several_tasks_at_once_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="learns in stages"):
        _ = JointCourse(joint(tmp_path, {"phase": "gradient"}), tiny.backbone("masked")).stages


# ---- 10: placement -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["causal", "masked", "seq2seq", "encoder"])
def test_only_the_rows_of_the_prompt_are_added(family: str, tmp_path: Path) -> None:
    """Invariant 10: the text and its embeddings are as they were, behind n more positions."""
    tuned = case_of(MP2, family, tmp_path).tuned()
    batch = tuned.batch(case_of(MP2, family, tmp_path).rows(tuned))
    placed = tuned.backbone.place(batch, tuned.prompt(batch))
    added = placed.attention_mask.sum(1) - batch.attention_mask.sum(1)
    assert added.tolist() == [3] * len(batch)
    assert tuned.prompt(batch).sites == {"input"}
