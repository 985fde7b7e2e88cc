"""R8: loss, gradient or update not finite, and spikes: first, in the middle, last, in a row. What is on disk is finite.

Knows no method's insides but those of the faulty one that it makes.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import safetensors.torch
import torch
from torch import Tensor

import tiny
import toy
from promptuary import registry
from promptuary.errors import TrainingDiverged
from promptuary.listening import Listener
from promptuary.methods.prompt_tuning import PromptTuning, PromptTuningConfig
from promptuary.run import Run
from promptuary.training import Training, train
from promptuary.training_state import snapshot
from promptuary.types import Losses, Outputs, Prompt, View

STEPS = 8
SKIPPED, ROLLED = "not finite, step skipped", "rolled back, learning rates halved"


class BrittleConfig(PromptTuningConfig):
    name: Literal["brittle"] = "brittle"  # type: ignore[assignment]


class Brittle(PromptTuning):
    """Prompt tuning in whose chosen steps one number goes wrong, as it would in a method with a fault."""

    name = "brittle"
    Config = BrittleConfig
    kind: ClassVar[str] = ""
    steps: ClassVar[Collection[int]] = ()
    calls: ClassVar[int] = 0

    def prompt(self, view: View) -> Prompt:
        if torch.is_grad_enabled():
            type(self).calls += 1
        return super().prompt(view)

    def loss(self, task_loss: Tensor, outputs: Outputs) -> Losses:
        if self.calls in self.steps:
            if self.kind == "gradient is NaN":
                task_loss.register_hook(lambda gradient: gradient * torch.nan)
            # 1e32: a loss and gradients within float32, the squares in their norm beyond it
            factor = {"loss is NaN": torch.nan, "overflow": 1e32, "spike": 1e4}.get(self.kind, 1.0)
            task_loss = task_loss * factor + (torch.inf if self.kind == "loss is infinite" else 0.0)
        return super().loss(task_loss, outputs)


WHAT = {"loss is NaN": "loss", "loss is infinite": "loss", "gradient is NaN": "gradient", "overflow": "gradient"}
MOMENTS = {"first": {1}, "middle": {4}, "last": {STEPS}, "consecutive": {4, 5, 6}}


@pytest.fixture
def brittle() -> Iterator[type[Brittle]]:
    registry.add("methods", Brittle)
    Brittle.calls, Brittle.steps, Brittle.kind = 0, (), ""
    yield Brittle
    del registry._ADDED["methods"]["brittle"]
    registry.load.cache_clear()


@pytest.fixture(scope="module")
def backbone() -> Any:
    return tiny.backbone("causal")


class Watching(Listener):
    """Keeps the state after each validation and at each note, and reads everything on disk whenever it is told."""

    def __init__(self) -> None:
        self.validated_states: dict[int, Any] = {}
        self.noted_states: dict[str, Any] = {}
        self.read = 0

    def begun(self, training: Training) -> None:
        self.training = training

    def stepped(self, row: Mapping[str, Any]) -> None:
        self.look()

    def validated(self, row: Mapping[str, Any]) -> None:
        self.validated_states[row["step"]] = self.state()
        self.look()

    def noted(self, text: str) -> None:
        self.noted_states[text] = self.state()
        self.look()

    def state(self) -> Any:
        return snapshot(self.training.tuned, self.training.solver)

    def look(self) -> None:
        self.read += finite_on_disk(self.training.folder.path)


def finite_on_disk(folder: Path) -> int:
    """How many tensors lie there; fails if one is not finite."""
    count = 0
    for file in folder.rglob("*.safetensors"):
        for name, value in safetensors.torch.load_file(file).items():
            assert bool(value.isfinite().all()), (file, name)
            count += 1
    return count


def run_of(where: Path, *overrides: str, **train_settings: Any) -> Run:
    method = "method={name: brittle, num_virtual_tokens: 3, prompt_lr: 0.01, lr_unit: absolute}"
    settings = {"steps": STEPS, "evaluate_every": 2, "save_every": 1, "warmup": 0, **train_settings}
    return toy.run(where, method, *overrides, **settings)


def events(folder: Path) -> list[tuple[int, str]]:
    return [(row["step"], row["event"]) for row in toy.metric_rows(folder) if "event" in row]


def same(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("kind", WHAT)
def test_what_is_not_finite_is_skipped_logged_and_never_on_disk(
    kind: str, moment: str, brittle: type[Brittle], backbone: Any, tmp_path: Path
) -> None:
    brittle.kind, brittle.steps = kind, MOMENTS[moment]
    watching = Watching()
    result = train(run_of(tmp_path), listener=watching, backbone=backbone)
    assert watching.read > 0
    assert finite_on_disk(result.dir) > 0
    wrong = sorted(MOMENTS[moment])
    rolled = [(6, ROLLED)] if moment == "consecutive" else []
    assert events(result.dir) == [(step, SKIPPED) for step in wrong] + rolled
    rows = {row["step"]: row for row in toy.metric_rows(result.dir) if "loss" in row}
    assert [rows[step]["what"] for step in wrong] == [WHAT[kind]] * len(wrong)
    assert [step for step, row in rows.items() if row["grad_norm"] is None or row["loss"] is None] == wrong
    assert result.facts["skipped_steps"] == len(wrong)
    assert result.facts["rollbacks"] == len(rolled)
    assert f"{len(wrong)} of {STEPS} steps were not finite and were skipped" in result.facts["notes"]
    # the schedule is that of the run's steps: linear, it has come to its end
    assert watching.training.solver.rates() == {"method.rows": pytest.approx(0, abs=1e-12)}
    if moment == "consecutive":
        (back,) = [state for note, state in watching.noted_states.items() if "rolled back" in note]
        good = watching.validated_states[2]
        assert same(back[0], good[0])
        assert same(back[1], good[1])
        assert back[2]["slots"] == good[2]["slots"]
        ((rate, first),) = back[2]["rates"]
        assert (rate, first) == (pytest.approx(0.005 * 2 / STEPS), pytest.approx(0.005))


@pytest.mark.parametrize("moment", ["middle", "last", "consecutive"])
def test_a_spike_is_logged_and_its_step_is_clipped_as_any_other(
    moment: str, brittle: type[Brittle], backbone: Any, tmp_path: Path
) -> None:
    brittle.kind, brittle.steps = "spike", {step + 2 for step in MOMENTS[moment]}
    result = train(run_of(tmp_path, steps=10), listener=Watching(), backbone=backbone)
    wrong = sorted(brittle.steps)
    assert events(result.dir) == [(step, "loss spike") for step in wrong]
    rows = {row["step"]: row for row in toy.metric_rows(result.dir) if "loss" in row}
    assert all(rows[step]["loss"] > 1000 * rows[step]["usual"] for step in wrong)
    assert result.facts["skipped_steps"] == 0


def test_a_rate_beyond_all_numbers_changes_nothing_and_is_said_to(
    brittle: type[Brittle], backbone: Any, tmp_path: Path
) -> None:
    run = run_of(tmp_path, "method.prompt_lr=1e39", steps=2, schedule="constant")
    watching = Watching()
    with pytest.raises(TrainingDiverged, match="not one of 2 steps was finite.*no prompt is written") as caught:
        train(run, listener=watching, backbone=backbone)
    assert (caught.value.exit_code, str(caught.value).count("\n")) == (1, 0)
    assert [row["what"] for row in toy.metric_rows(Path(run.out)) if "what" in row] == ["update", "update"]
    assert same(watching.state()[0], watching.validated_states[0][0])
    assert finite_on_disk(Path(run.out)) > 0
    assert not (Path(run.out) / "result.json").exists()


@pytest.mark.parametrize(("steps", "wrong"), [(1, {1}), (2, {1, 2}), (5, {1, 2, 3, 4, 5})])
def test_a_run_without_a_single_finite_step_has_diverged(
    steps: int, wrong: set[int], brittle: type[Brittle], backbone: Any, tmp_path: Path
) -> None:
    brittle.kind, brittle.steps = "loss is NaN", wrong
    run = run_of(tmp_path, steps=steps)
    for resume in (False, True):
        with pytest.raises(TrainingDiverged, match=f"not one of {steps} steps"):
            train(run, resume=resume, backbone=backbone)


def test_a_run_that_ends_in_faults_keeps_its_best_prompt_and_says_that_it_diverged(
    brittle: type[Brittle], backbone: Any, tmp_path: Path
) -> None:
    brittle.kind, brittle.steps = "gradient is NaN", {6, 7, 8}
    run, watching = run_of(tmp_path), Watching()
    with pytest.raises(TrainingDiverged, match="the last 3 steps were not finite; the prompt of step 0, ") as caught:
        train(run, listener=watching, backbone=backbone)
    assert caught.value.exit_code == 1
    facts = json.loads((Path(run.out) / "result.json").read_text())
    written = safetensors.torch.load_file(Path(run.out) / "prompt" / "prompt.safetensors")
    assert same(written, watching.validated_states[facts["best_step"]][0])
    again = train(run, resume=True, backbone=backbone)
    assert again.facts == facts


def test_giving_up_leaves_the_whole_sound_state(brittle: type[Brittle], backbone: Any, tmp_path: Path) -> None:
    brittle.kind, brittle.steps = "loss is infinite", range(5, 100)
    run, watching = run_of(tmp_path, steps=40), Watching()
    with pytest.raises(TrainingDiverged, match="after 3 roll-backs at step 16"):
        train(run, listener=watching, backbone=backbone)
    now, good = watching.state(), watching.validated_states[2]
    assert same(now[0], good[0])
    assert same(now[1], good[1])
    assert now[2]["rates"][0][1] == pytest.approx(0.01 / 8)
    assert finite_on_disk(Path(run.out)) > 0


def test_an_untrained_prompt_is_called_so(backbone: Any, tmp_path: Path) -> None:
    still = ["method.prompt_lr=1e-12", "method.weight_decay=0"]
    result = train(toy.run(tmp_path, *still), backbone=backbone)
    assert result.facts["best_step"] == 0
    assert any("what is saved is untrained" in note for note in result.facts["notes"])
