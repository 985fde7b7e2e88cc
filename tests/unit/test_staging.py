"""Stages and solvers of a run: who trains what and when, resuming across a border, searching without any gradient.

Knows no real model: tiny ones, and toy data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tiny
import toy
from promptuary.config import build
from promptuary.course import Course
from promptuary.errors import ConfigError, Interrupted, OutOfMemory
from promptuary.listening import Listener
from promptuary.methods.prompt_tuning import PromptTuning
from promptuary.run import Run
from promptuary.staging import Staging
from promptuary.training import Training, train

MP2 = {"name": "mp2", "num_virtual_tokens": 3, "modules": 3, "intrinsic_dimension": 6, "router_lr": 0.1}


def run(path: Path, method: Mapping[str, Any], out: str = "run", **changes: Any) -> Run:
    """A run of a few steps on toy data."""
    values = toy.settings(path, "masked", name=out)
    values["train"] |= {"steps": 8, "evaluate_every": 3, "save_every": 2, **changes.pop("train", {})}
    return build({**values, "method": dict(method), **changes})


class States(Listener):
    """The tensors after each step."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop, self.states, self.notes = stop, dict[int, Any](), list[str]()

    def begun(self, training: Training) -> None:
        self.training = training
        self.states[0] = training.tuned.state()

    def stepped(self, row: Mapping[str, Any]) -> None:
        self.states[row["step"]] = self.training.tuned.state()
        if row["step"] == self.stop:
            self.training.stop.request()

    def noted(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize(
    ("phase", "first", "second"), [("gradient", "router", "parts"), ("blackbox", "router", "vector")]
)
def test_each_stage_trains_its_own_tensors_alone(phase: str, first: str, second: str, tmp_path: Path) -> None:
    seen = States()
    result = train(run(tmp_path, {**MP2, "phase": phase}), backbone=tiny.backbone("masked"), listener=seen)
    for step in range(1, 9):
        before, after = seen.states[step - 1], seen.states[step]
        moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
        assert moved <= {f"method.{first if step <= 4 else second}"}, step
    for name in (first, second):
        assert not torch.equal(seen.states[8][f"method.{name}"], seen.states[0][f"method.{name}"])
    rows = toy.metric_rows(result.dir)
    assert [(row["step"], row["stage"]) for row in rows if row.get("event") == "stage"] == [(4, second)]
    assert f"stage {second}" in seen.notes


@pytest.mark.parametrize("phase", ["gradient", "blackbox"])
@pytest.mark.parametrize("stop", [2, 3, 4, 5, 7])
def test_a_stop_before_at_or_after_a_border_changes_nothing(phase: str, stop: int, tmp_path: Path) -> None:
    method = {**MP2, "phase": phase}
    whole, parts = States(), States(stop)
    train(run(tmp_path, method, "whole"), backbone=tiny.backbone("masked"), listener=whole)
    with pytest.raises(Interrupted):
        train(run(tmp_path, method, "parts"), backbone=tiny.backbone("masked"), listener=parts)
    rest = States()
    train(run(tmp_path, method, "parts"), backbone=tiny.backbone("masked"), listener=rest, resume=True)
    for step in range(stop + 1, 9):
        assert all(torch.equal(value, whole.states[step][name]) for name, value in rest.states[step].items()), step
    one, two = (tmp_path / out / "prompt" / "prompt.safetensors" for out in ("whole", "parts"))
    assert one.read_bytes() == two.read_bytes()


def test_a_stage_may_fill_tensors_anew_and_says_so(tmp_path: Path) -> None:
    sources = []
    for seed in (1, 2):
        made = run(tmp_path, {"name": "prompt_tuning", "num_virtual_tokens": 3}, f"source-{seed}", seed=seed)
        train(made, backbone=tiny.backbone("masked"))
        sources.append(str(tmp_path / f"source-{seed}"))
    method = {"name": "spot", "num_virtual_tokens": 3, "sources": sources, "probe_share": 0.5}
    seen = States()
    result = train(run(tmp_path, method), backbone=tiny.backbone("masked"), listener=seen)
    (row,) = (row for row in toy.metric_rows(result.dir) if row.get("event") == "stage")
    found = [row[f"likeness of {one}"] for one in sources]
    mine = seen.states[4]["method.rows"].mean(0)
    for source, value in zip(sources, found, strict=True):
        rows = Training(run(tmp_path, {**method, "sources": [source]}, "x"), Listener(), tiny.backbone("masked"))
        start = rows.tuned.state()["method.rows"]
        assert value == pytest.approx(float(torch.cosine_similarity(start.mean(0), mine, dim=0)), abs=1e-5)
        if value == max(found):
            # one step away from the chosen source
            assert float((seen.states[5]["method.rows"] - start).abs().max()) < 0.05


@pytest.mark.parametrize("method", [MP2 | {"phase": "blackbox"}, {"name": "bbt", "num_virtual_tokens": 2}])
def test_a_search_asks_for_no_gradient(method: Mapping[str, Any], tmp_path: Path) -> None:
    """The model runs without recording anything, and every call is counted."""
    backbone, recorded = tiny.backbone("masked"), []
    backbone.model.register_forward_pre_hook(lambda *_: recorded.append(torch.is_grad_enabled()))
    result = train(run(tmp_path, method, train={"steps": 4}), backbone=backbone)
    assert recorded
    assert not any(recorded)
    assert result.facts["forward_calls"] == 4 * 20
    assert all(parameter.grad is None for parameter in backbone.model.parameters())


def test_a_model_without_gradients_is_searched_and_never_differentiated(tmp_path: Path) -> None:
    backbone = tiny.backbone("masked")
    backbone.differentiable = False
    inside = backbone.model.forward

    def silent(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode():
            return inside(*args, **kwargs)

    backbone.model.forward = silent
    with pytest.raises(ConfigError, match="evolution"):
        train(run(tmp_path, {"name": "prompt_tuning", "num_virtual_tokens": 2}), backbone=backbone)
    method = {"name": "bbt", "num_virtual_tokens": 8, "intrinsic_dimension": 60, "alpha": 20.0}
    result = train(run(tmp_path, method, train={"steps": 10}), backbone=backbone)
    losses = [row["loss"] for row in toy.metric_rows(result.dir) if "loss" in row]
    assert losses[-1] < losses[0]


def test_any_prompt_of_few_numbers_can_be_searched(tmp_path: Path) -> None:
    method = {"name": "prompt_tuning", "num_virtual_tokens": 2}
    solver = {"name": "evolution", "sigma": 0.5, "population": 8}
    made = run(tmp_path, method, solver=solver, train={"steps": 15})
    result = train(made, backbone=tiny.backbone("masked"))
    losses = [row["loss"] for row in toy.metric_rows(result.dir) if "loss" in row]
    assert losses[-1] < losses[0]
    assert result.facts["forward_calls"] == 15 * 8
    assert build(yaml.safe_load(made.to_yaml())) == made


@pytest.mark.parametrize(("budget", "steps"), [(20, 1), (59, 2), (60, 3)])
def test_a_budget_of_calls_is_kept(budget: int, steps: int, tmp_path: Path) -> None:
    solver = {"name": "evolution", "budget": budget}
    result = train(run(tmp_path, {"name": "bbt"}, solver=solver), backbone=tiny.backbone("masked"))
    assert result.facts["steps"] == steps
    assert result.facts["forward_calls"] == 20 * steps <= budget


@pytest.mark.parametrize("rows", ["all", "batch"])
def test_candidates_are_scored_on_all_rows_or_on_a_batch(rows: str, tmp_path: Path) -> None:
    solver = {"name": "evolution", "rows": rows}
    training = Training(run(tmp_path, {"name": "bbt"}, solver=solver), Listener(), tiny.backbone("masked"))
    sizes = []
    plain = training.step
    training.step = lambda given: (sizes.append(len(given)), plain(given))[1]  # type: ignore[method-assign]
    training.run(resume=False, fresh=False)
    assert set(sizes) == ({11} if rows == "all" else {4, 3})


def test_borders_follow_the_shares_and_every_stage_has_a_step(tmp_path: Path) -> None:
    for steps, share, border in ((8, 0.5, 4), (8, 0.01, 1), (8, 0.99, 7), (2, 0.5, 1), (400, 0.025, 10)):
        made = run(tmp_path, {**MP2, "phase": "gradient", "router_share": share}, train={"steps": steps})
        assert Staging(made, Course(made, tiny.backbone("masked"))).borders == [0, border, steps]
    made = run(tmp_path, {**MP2, "phase": "gradient"}, train={"steps": 1})
    with pytest.raises(ConfigError, match="fewer than the 2 stages"):
        Staging(made, Course(made, tiny.backbone("masked")))


def test_a_head_learns_in_the_last_stage(tmp_path: Path) -> None:
    seen, values = States(), toy.settings(tmp_path, "masked", "classify_head")
    values["train"] |= {"steps": 6}
    train(build({**values, "method": {**MP2, "phase": "gradient"}}), backbone=tiny.backbone("masked"), listener=seen)
    assert torch.equal(seen.states[3]["head.weight"], seen.states[0]["head.weight"])
    assert not torch.equal(seen.states[6]["head.weight"], seen.states[3]["head.weight"])


def test_a_batch_that_may_not_be_cut_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PromptTuning, "whole_batches", True)
    method = {"name": "prompt_tuning", "num_virtual_tokens": 2}
    with pytest.raises(ConfigError, match=r"accumulation: 1"):
        train(run(tmp_path, method, train={"accumulation": 2}), backbone=tiny.backbone("masked"))
    made = run(tmp_path, method)
    with pytest.raises(ConfigError, match="one process"):
        Staging(made, Course(made, tiny.backbone("masked")), processes=2)
    training = Training(made, Listener(), tiny.backbone("masked"))

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(training.tuned, "loss", full)
    with pytest.raises(OutOfMemory, match=r"cannot be cut; lower train\.batch_size"):
        training.run(resume=False, fresh=False)


def test_rates_of_a_stage_are_those_of_its_own_schedule(tmp_path: Path) -> None:
    rates: dict[int, float] = {}

    class Rates(Listener):
        def begun(self, training: Training) -> None:
            self.training = training

        def stepped(self, row: Mapping[str, Any]) -> None:
            (rates[row["step"]],) = self.training.solver.rates().values()

    made = run(tmp_path, {**MP2, "phase": "gradient", "modules_lr": 0.2}, train={"warmup": 0, "schedule": "linear"})
    train(made, backbone=tiny.backbone("masked"), listener=Rates())
    # after each step, linear to zero over the four of its stage
    for step, part in enumerate((0.75, 0.5, 0.25, 0), start=1):
        assert math.isclose(rates[step], 0.1 * part, abs_tol=1e-9)
        assert math.isclose(rates[step + 4], 0.2 * part, abs_tol=1e-9)
