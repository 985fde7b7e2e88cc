"""MP2: the invariants of the specification, numbered as there, at the input and in every layer, and its sources.

Knows no other method but prompt tuning, prefix tuning and black-box tuning, which it reduces to.
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
from promptuary.course import Course, JointCourse
from promptuary.errors import ConfigError, Interrupted
from promptuary.listening import Listener
from promptuary.methods.bbt import BBT
from promptuary.methods.mp2 import MP2, MP2Config
from promptuary.methods.prefix import Prefix
from promptuary.methods.prompt_tuning import PromptTuning
from promptuary.prompts.init import Saved, Starting
from promptuary.run import JointRun
from promptuary.seeds import Chance
from promptuary.sources import load_source
from promptuary.staging import Staging
from promptuary.testing import case_of, check_property
from promptuary.testing import tiny as models
from promptuary.training import Training, train
from promptuary.types import Shape, View

D = tiny.WIDTH
SMALL = {"num_virtual_tokens": 3, "modules": 4, "intrinsic_dimension": 5}


def made(phase: str = "pretrain", seed: int = 0, sources: tuple[Saved, ...] = (), **settings: Any) -> MP2:
    config = MP2Config(phase=phase, **{**SMALL, **settings})
    backbone = tiny.backbone("bert")
    start = Starting(backbone.vocabulary, torch.Generator().manual_seed(seed), sources=sources)
    method = MP2(config, backbone.shape if config.depth == "layers" else Shape(D))
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


def folded(method: MP2) -> Tensor:
    """Keys and values of every layer, [l, 2, k, n, e]."""
    found = method.fold().kv
    assert found is not None
    return found[0]


DEEP: dict[str, Any] = {"depth": "layers"}


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


def test_when_gates_are_drawn_can_be_said() -> None:
    """Ambiguity 4: a drawn router on a new task, or none at all, not even in pre-training."""
    view = View(chance=Chance(0, 1, torch.tensor([0])))
    drawn, mean = made("gradient", gates="train"), made("pretrain", gates="mean")
    assert not torch.equal(drawn.weights(view), drawn.weights(View()))
    assert torch.equal(mean.weights(view), mean.weights(View()))


def test_with_the_releases_epsilon_weights_vanish_where_all_gates_are_shut() -> None:
    """Ambiguity 7, in the specification's numbers for eight modules; the default keeps the sum."""
    for logit, kept in ((-25.0, 0.99), (-40.0, 3.4e-5)):
        one, other = made(preset="release", modules=8), made(modules=8)
        with torch.no_grad():
            one.router.fill_(logit)
            other.router.fill_(logit)
        assert float(one.weights(View()).sum().detach()) == pytest.approx(kept, rel=0.03)
        assert float(other.weights(View()).sum().detach()) == pytest.approx(1)
    assert made(preset="release", epsilon=0.0).settings.smallest == 0


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


def test_the_release_has_its_own_rates_and_calls() -> None:
    """Rates by depth and phase; 200 of 8,000 calls for the router; what is set is kept."""
    table = {
        ("input", "pretrain"): (5e-3, 1e-3),
        ("input", "gradient"): (1e-2, 3e-4),
        ("layers", "pretrain"): (5e-4, 1e-4),
        ("layers", "gradient"): (3e-3, 2e-5),
    }
    for (depth, phase), wanted in table.items():
        for method, rates in ((made(phase, depth=depth, preset="release"), wanted), (made(phase), (5e-3, 1e-3))):
            found = {method.groups[one.name]: one.learning_rate for one in method.trained()}
            assert (found["router"], found["modules"]) == rates
    own = made("gradient", preset="release", router_lr=0.5)
    assert {one.learning_rate for one in own.trained()} == {0.5, 3e-4}
    assert [8000 * stage.share for stage in made("blackbox", preset="release").stages()] == pytest.approx([200, 7800])
    assert made("blackbox", preset="release", router_share=0.3).stages()[0].share == 0.3


def test_the_router_may_go_on_in_the_second_stage() -> None:
    """Ambiguity 3: frozen by default."""
    assert made("gradient").stages()[1].parameters == {"parts"}
    assert made("gradient", freeze_router=False).stages()[1].parameters == {"parts", "router"}


def test_the_router_is_searched_in_steps_of_its_own_size(tmp_path: Path) -> None:
    """A gate opens and shuts within some units, the vector moves a prompt within tenths; what the user says wins."""
    values = toy.settings(tmp_path, "masked")
    method = {"name": "mp2", **SMALL, "phase": "blackbox"}
    for solver, wanted in ((None, [1.0, 0.1]), ({"name": "evolution", "sigma": 0.3}, [0.3, 0.3])):
        run = build({**values, "method": method, **({} if solver is None else {"solver": solver})})
        staging = Staging(run, Course(run, tiny.backbone("masked")))
        assert [staging.solver(stage).rates()["sigma"] for stage in (0, 1)] == pytest.approx(wanted)


def test_the_router_may_be_searched_as_in_the_release(tmp_path: Path) -> None:
    """Ambiguity 8, and 9's budget: 20 calls of 60 by Bayesian optimisation in its box, the rest by evolution."""
    values, states = toy.settings(tmp_path, "masked"), Moves()
    method = {"name": "mp2", **SMALL, "phase": "blackbox", "preset": "release"}
    run = build({**values, "method": method, "solver": {"name": "evolution", "budget": 60}})
    course = Course(run, tiny.backbone("masked"))
    staging = Staging(run, course)
    assert staging.borders == [0, 1, 3]
    solvers = [staging.solver(stage) for stage in (0, 1)]
    assert [one.name for one in solvers] == ["bayes", "evolution"]
    result = train(run, backbone=tiny.backbone("masked"), listener=states)
    assert result.facts["forward_calls"] == 60
    assert states.moves[1] <= {"method.router"}
    assert float(states.states[1]["method.router"].abs().max()) <= 5
    again = train(run.model_copy(update={"out": str(tmp_path / "again")}), backbone=tiny.backbone("masked"))
    one, two = (Path(found.dir) / "prompt" / "prompt.safetensors" for found in (result, again))
    assert one.read_bytes() == two.read_bytes()
    plain = build({**values, "method": {**method, "router_search": "evolution"}})
    assert Staging(plain, course).stages[0].solver == "bayes"
    own = Staging(plain, Course(plain, tiny.backbone("masked")))
    assert own.solver(0).name == "evolution"
    gradient = build({**values, "method": method, "solver": {"name": "gradient"}})
    assert Staging(gradient, Course(gradient, tiny.backbone("masked"))).solver(0).name == "gradient"


def test_what_is_kept_is_never_worse_than_the_router_alone(tmp_path: Path) -> None:
    """Invariant 9: on the validation rows, whatever the vector's search did after it."""
    values = toy.settings(tmp_path, "masked")
    values["train"] |= {"steps": 8, "evaluate_every": 1}
    run = build({**values, "method": {"name": "mp2", **SMALL, "phase": "blackbox"}})
    result = train(run, backbone=tiny.backbone("masked"))
    name = result.facts["primary_metric"]
    rows = [row for row in toy.metric_rows(result.dir) if row.get("split") == "validation"]
    scores = [row[name] for row in rows if row["step"] <= 4]
    assert len(scores) == 5
    assert result.facts["validation"][name] >= max(scores)


# ---- deep ----------------------------------------------------------------------------------------------------------


def test_deep_counts_are_the_published_arithmetic() -> None:
    """Invariant 1: L(N K + K d + d n D) + 2 D, where D stands for the keys and values of one position in one layer."""
    config, half = MP2Config(depth="layers"), Shape(1024, layers=24, heads=8, head=64)
    shared = MP2.count(config, half) - 24 * 8
    assert 38 * 24 * 8 + shared + 2 * 1024 == 368_706_944
    gradient = MP2Config(depth="layers", phase="gradient")
    assert MP2.sizes(gradient, half) == {"router": (24, 8), "parts": (24, 8, 51_200)}
    assert MP2.count(gradient, half) == 192 + 9_830_400
    assert MP2.count(MP2Config(depth="layers", phase="blackbox"), half) == 192 + 24 * 300
    # a real model has as many keys as values, each as wide as its states
    whole = Shape(1024, layers=24, heads=16, head=64)
    assert MP2.count(gradient, whole) == 192 + 2 * 9_830_400
    one = MP2Config(depth="layers", one_matrix=True)
    assert MP2.count(config, whole) - MP2.count(one, whole) == 23 * 300 * 50 * 2 * 1024
    assert folded(made(**DEEP)).numel() == 2 * 2 * 3 * D


@pytest.mark.parametrize("one_matrix", [False, True])
def test_deep_mixtures_fold_and_each_layer_has_its_own(one_matrix: bool) -> None:
    """Invariants 2 and 4 in every layer: (w z) A = w (z A), with weights that no other layer has a say in."""
    first = moved(made(**DEEP, one_matrix=one_matrix))
    second = made("gradient", sources=(saved(first),), **DEEP, one_matrix=one_matrix)
    with torch.no_grad():
        second.router.copy_(first.router)
    torch.testing.assert_close(folded(first), folded(second), rtol=1e-4, atol=1e-5)
    weights = first.weights(View())
    assert weights.shape == (2, 4)
    torch.testing.assert_close(weights.sum(1), torch.ones(2))
    for layer in range(2):
        a = first.a if one_matrix else first.a[layer]
        by_hand = sum(float(weights[layer, k].detach()) * (first.z[layer, k] @ a) for k in range(4))
        wanted = first.placeholders[layer] + by_hand.view_as(first.placeholders[layer])  # type: ignore[union-attr]
        torch.testing.assert_close(folded(first)[layer], wanted.detach(), rtol=1e-4, atol=1e-5)
    before = folded(first)
    with torch.no_grad():
        first.router[1, 0] += 3
    assert torch.equal(folded(first)[0], before[0])
    assert not torch.equal(folded(first)[1], before[1])


def test_deep_one_module_does_not_depend_on_its_router() -> None:
    """Invariant 3."""
    method = moved(made(**DEEP, modules=1))
    before = folded(method)
    with torch.no_grad():
        method.router.add_(7)
    assert torch.equal(folded(method), before)


@pytest.mark.parametrize("family", ["causal", "masked", "seq2seq", "encoder"])
def test_deep_it_starts_as_a_prefix_of_words(family: str, tmp_path: Path) -> None:
    """Invariants 6 and 10: without a mixture the model reads its placeholders, and answers what a prefix answers."""
    case = case_of(MP2, family, tmp_path, {**MP2.tiny, **DEEP})
    tuned = case.tuned()
    method = tuned.method
    assert isinstance(method, MP2)
    assert method.sites == {"kv"}
    with torch.no_grad():
        method.a.zero_()
    other = case_of(Prefix, family, tmp_path).tuned(tuned.backbone)
    assert isinstance(other.method, Prefix)
    with torch.no_grad():
        other.method.kv.copy_(method.placeholders)
    batch = tuned.batch(case.rows(tuned))
    assert torch.equal(tuned.scores(batch), other.scores(batch))
    untouched = made(**DEEP)
    assert 0 < float((folded(untouched) - untouched.placeholders).abs().max()) < 1e-3


def test_without_a_mixture_it_is_prompt_tuning_of_its_placeholders(tmp_path: Path) -> None:
    """Invariants 3 and 10: adding nothing is the model on the placeholders alone, bit for bit."""
    case = case_of(MP2, "masked", tmp_path)
    tuned = case.tuned()
    method = tuned.method
    assert isinstance(method, MP2)
    with torch.no_grad():
        method.a.zero_()
    other = case_of(PromptTuning, "masked", tmp_path, {"num_virtual_tokens": 3}).tuned(tuned.backbone)
    assert isinstance(other.method, PromptTuning)
    with torch.no_grad():
        other.method.rows.copy_(method.placeholders)
    batch = tuned.batch(case.rows(tuned))
    assert torch.equal(tuned.scores(batch), other.scores(batch))


@pytest.mark.parametrize("phase", ["pretrain", "gradient", "blackbox"])
@pytest.mark.parametrize(
    "name",
    [
        "parameter_count_is_the_stated_formula",
        "only_declared_parameters_get_gradients",
        "folded_equals_live",
        "padding_on_either_side_changes_nothing",
        "rows_with_different_prompts_equal_separate_runs",
        "saved_prompt_predicts_the_same",
        "detaching_restores_the_base",
        "forward_only_under_evolution",
        "a_resumed_run_equals_the_unbroken_one",
    ],
)
def test_deep_it_keeps_the_contract(phase: str, name: str, tmp_path: Path) -> None:
    # whole runs are dear: a family for each phase
    dear = {"pretrain": ["masked"], "gradient": ["seq2seq"], "blackbox": ["causal"]}[phase]
    for family in dear if name.startswith("a_resumed") else models.FAMILIES:
        case = case_of(MP2, family, tmp_path / family, {**MP2.tiny, **DEEP, "phase": phase})
        (tmp_path / family).mkdir(exist_ok=True)
        check_property(case, name)


class Moves(Listener):
    """Which tensors each step changed."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop, self.moves, self.states = stop, dict[int, set[str]](), dict[int, dict[str, Tensor]]()

    def begun(self, training: Training) -> None:
        self.training, self.before = training, training.tuned.state()

    def stepped(self, row: Mapping[str, Any]) -> None:
        after, step = self.training.tuned.state(), row["step"]
        self.moves[step] = {name for name, value in after.items() if not torch.equal(value, self.before[name])}
        self.before = self.states[step] = after
        if step == self.stop:
            self.training.stop.request()


@pytest.mark.parametrize("stop", [2, 5, 6, 7])
def test_deep_black_box_searches_a_layer_at_a_time_and_goes_on_where_it_was(stop: int, tmp_path: Path) -> None:
    """Divide and conquer: routers of all layers first, then one search for each layer, in turn; every call counted."""
    values = toy.settings(tmp_path, "masked")
    values["train"] |= {"steps": 12, "evaluate_every": 3, "save_every": 2}
    method = {"name": "mp2", **SMALL, **DEEP, "phase": "blackbox", "router_share": 0.34}
    whole = Moves()
    run = build({**values, "method": method, "out": str(tmp_path / "whole")})
    result = train(run, backbone=tiny.backbone("masked"), listener=whole)
    for step, moved_there in whole.moves.items():
        assert moved_there <= {"method.router" if step <= 4 else f"method.vector_{(step - 5) % 2}"}, step
    assert {name for moved_there in whole.moves.values() for name in moved_there} == {
        "method.router", "method.vector_0", "method.vector_1",
    }  # fmt: skip
    assert result.facts["forward_calls"] == 12 * 20
    run = build({**values, "method": method, "out": str(tmp_path / "parts")})
    with pytest.raises(Interrupted):
        train(run, backbone=tiny.backbone("masked"), listener=Moves(stop))
    rest = Moves()
    train(run, backbone=tiny.backbone("masked"), listener=rest, resume=True)
    for step in range(stop + 1, 13):
        assert all(torch.equal(value, whole.states[step][name]) for name, value in rest.states[step].items()), step


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"one_matrix": True}, "one_matrix is for depth: layers"),
        ({"depth": "layers", "init": "saved", "init_prompt": "x"}, "placeholders are keys and values"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        MP2Config.read({"name": "mp2", **settings}, where="method")
    assert "\n" not in str(caught.value)


def test_deep_modules_do_not_go_on_from_shallow_ones() -> None:
    with pytest.raises(ConfigError, match="the same depth"):
        made("gradient", sources=(saved(moved(made())),), **DEEP)


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
