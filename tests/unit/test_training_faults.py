"""Training when things go wrong: stops at any moment, damaged checkpoints, NaN; nothing is lost and nothing differs.

Knows no method's insides but those of the faulty ones that it makes.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import safetensors.torch
import torch

import tiny
import toy
from promptuary import registry
from promptuary.checkpoint import load_prompt
from promptuary.errors import ConfigError, FileFormatError, Interrupted, TrainingDiverged
from promptuary.methods.prompt_tuning import PromptTuning, PromptTuningConfig
from promptuary.run import Run
from promptuary.training import Listener, Result, Stop, Training, train
from promptuary.types import Prompt, View


class StopAt(Stop):
    """Asks for a stop at the n-th time that somebody looks whether there is one."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.looks = at, 0

    def check(self) -> None:
        self.looks += 1
        if self.looks == self.at:
            self.request()
        super().check()


class Watching(Listener):
    """Keeps notes, and tensors and rates at every validation and note; may stop the run."""

    def __init__(self, stop: Stop | None = None) -> None:
        self.stop = stop
        self.notes: list[str] = []
        self.states: dict[int, dict[str, torch.Tensor]] = {}
        self.noted_states: list[tuple[dict[str, torch.Tensor], dict[str, float]]] = []

    def begun(self, training: Training) -> None:
        self.training = training
        if self.stop is not None:
            training.stop = self.stop

    def validated(self, row: Any) -> None:
        self.states[row["step"]] = self.training.tuned.state()

    def noted(self, text: str) -> None:
        self.notes.append(text)
        self.noted_states.append((self.training.tuned.state(), self.training.solver.rates()))


def go(run: Run, listener: Listener | None = None, resume: bool = False) -> Result:
    return train(run, listener=listener, resume=resume, backbone=tiny.backbone("causal"))


def bytes_of(folder: Path) -> bytes:
    return (folder / "prompt" / "prompt.safetensors").read_bytes()


def losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in toy.metric_rows(folder) if "loss" in row}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def newest(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    states = sorted((folder / "checkpoints").iterdir(), key=lambda path: int(path.name.removeprefix("step-")))
    facts = json.loads((states[-1] / "state.json").read_text())
    return safetensors.torch.load_file(states[-1] / "state.safetensors"), facts


# ---- stops ----------------------------------------------------------------------------------------------------------

# 5 rows to validate in batches of 2: looks 1 to 3 and again after every second step; 2 looks in each step; 4 test rows
BROKEN = {
    "steps": 4,
    "evaluate_every": 2,
    "eval_batch_size": 2,
    "accumulation": 2,
    "save_every": 3,
    "schedule": "cosine",
}
MOMENTS = {
    "before anything": (1, 0),
    "in the first validation": (2, 0),
    "before the first step": (4, 0),
    "in the first step": (5, 0),
    "in the second step": (7, 1),
    "before a validation": (8, 2),
    "in a validation": (10, 2),
    "in the last step": (14, 3),
    "in the last validation": (17, 4),
    "in the test": (19, 4),
}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, dict[str, torch.Tensor]]:
    """The run that no test stops, and its tensors after the last step."""
    where = tmp_path_factory.mktemp("unbroken")
    looks = StopAt(-1)
    watching = Watching(looks)
    result = go(toy.run(where, "method.prompt_lr=0.5", **BROKEN), watching)
    assert looks.looks == 3 * 3 + 4 * 2 + 2
    assert len({tuple(state["method.rows"].flatten().tolist()) for state in watching.states.values()}) == 3
    return result, watching.states[4]


@pytest.mark.parametrize(("at", "step"), MOMENTS.values(), ids=MOMENTS.keys())
def test_a_run_that_was_stopped_anywhere_ends_as_the_unbroken_one(
    at: int, step: int, tmp_path: Path, unbroken: tuple[Result, dict[str, torch.Tensor]]
) -> None:
    whole, last = unbroken
    run = toy.run(tmp_path, "method.prompt_lr=0.5", **BROKEN)
    with pytest.raises(Interrupted, match=f"stopped at step {step} of 4; the state is saved") as caught:
        go(run, Watching(StopAt(at)))
    assert caught.value.exit_code == 130
    assert newest(Path(run.out))[1]["progress"]["step"] == step
    assert not (tmp_path / "run" / "result.json").exists()
    resumed = go(run, resume=True)
    assert same({"method.rows": newest(resumed.dir)[0]["trained/method.rows"]}, last)
    assert bytes_of(resumed.dir) == bytes_of(whole.dir)
    assert losses(resumed.dir) == losses(whole.dir)
    assert resumed.metrics == whole.metrics
    assert resumed.facts["best_step"] == whole.facts["best_step"]


def test_a_run_may_be_stopped_again_and_again(tmp_path: Path, unbroken: tuple[Result, dict[str, torch.Tensor]]) -> None:
    run, stops = toy.run(tmp_path, "method.prompt_lr=0.5", **BROKEN), 0
    while stops < 40:
        try:
            resumed = go(run, Watching(StopAt(4)), resume=True)
            break
        except Interrupted:
            stops += 1
    assert stops == 7
    assert bytes_of(resumed.dir) == bytes_of(unbroken[0].dir)
    assert same({"method.rows": newest(resumed.dir)[0]["trained/method.rows"]}, unbroken[1])


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_both_optimisers_resume_bit_for_bit(optimizer: str, tmp_path: Path) -> None:
    settings = {"optimizer": optimizer, "steps": 6, "evaluate_every": 6, "save_every": 2}
    quick = ["method.prompt_lr=0.5", "task.metrics=[accuracy]"]
    whole = Watching()
    go(toy.run(tmp_path, *quick, name="whole", **settings), whole)
    broken = toy.run(tmp_path, *quick, name="broken", **settings)
    with pytest.raises(Interrupted):
        # one batch to validate, then one look in each step
        go(broken, Watching(StopAt(1 + 4)))
    resumed = Watching()
    go(broken, resumed, resume=True)
    assert same(resumed.states[6], whole.states[6])
    assert not same(whole.states[6], whole.states[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_at_the_next_step_and_a_second_one_at_once(number: signal.Signals, tmp_path: Path) -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    seen = []

    class Sender(Listener):
        def stepped(self, row: Any) -> None:
            os.kill(os.getpid(), number)
            seen.append(({each: signal.getsignal(each) for each in before}, row["step"]))

    with pytest.raises(Interrupted, match="stopped at step 1 of 3"):
        go(toy.run(tmp_path), Sender())
    # after the first signal the usual handlers are back, so that a second one is not held up
    assert seen == [(before, 1)]
    assert {each: signal.getsignal(each) for each in before} == before


def test_training_in_a_thread_leaves_signals_alone(tmp_path: Path) -> None:
    found: list[Any] = []
    run = toy.run(tmp_path, steps=1)
    thread = threading.Thread(target=lambda: found.append(go(run)))
    thread.start()
    thread.join()
    assert found[0].metrics


def test_resuming_a_finished_run_gives_the_same_result(tmp_path: Path) -> None:
    run = toy.run(tmp_path, "method.prompt_lr=0.5", **{**BROKEN, "save_every": 2})
    first = go(run)
    prompt = bytes_of(first.dir)
    again = go(run, resume=True)
    assert bytes_of(again.dir) == prompt
    assert again.facts == json.loads((first.dir / "result.json").read_text())
    assert again.facts["seconds_per_step_median"] > 0


def test_resuming_with_other_settings_is_refused(tmp_path: Path) -> None:
    go(toy.run(tmp_path))
    with pytest.raises(ConfigError, match="other settings"):
        go(toy.run(tmp_path, "seed=3"), resume=True)


def test_resuming_nothing_starts_from_the_beginning(tmp_path: Path) -> None:
    watching = Watching()
    assert go(toy.run(tmp_path), watching, resume=True).facts["steps"] == 3
    assert watching.notes[0] == "no checkpoint yet: starting from the beginning"


# ---- damage ---------------------------------------------------------------------------------------------------------


def stopped(where: Path) -> Run:
    """A run that was stopped in its last step, with checkpoints at 2 and 3."""
    run = toy.run(where, "method.prompt_lr=0.5", **{**BROKEN, "save_every": 2})
    with pytest.raises(Interrupted):
        go(run, Watching(StopAt(14)))
    assert sorted(path.name for path in (where / "run" / "checkpoints").iterdir()) == ["step-2", "step-3"]
    return run


def cut(folder: Path) -> None:
    path = folder / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def test_a_damaged_newest_checkpoint_is_skipped_with_a_note(tmp_path: Path) -> None:
    run = stopped(tmp_path)
    whole = Watching()
    go(toy.run(tmp_path, "method.prompt_lr=0.5", name="whole", **{**BROKEN, "save_every": 2}), whole)
    cut(tmp_path / "run" / "checkpoints" / "step-3")
    watching = Watching()
    resumed = go(run, watching, resume=True)
    assert [note.startswith("skipped a checkpoint: ") for note in watching.notes].count(True) == 1
    assert "step-3" in watching.notes[0]
    events = [row for row in toy.metric_rows(resumed.dir) if row.get("event") == "resumed"]
    assert [event["step"] for event in events] == [2]
    assert same(watching.states[4], whole.states[4])


def test_without_a_whole_checkpoint_resuming_is_refused(tmp_path: Path) -> None:
    run = stopped(tmp_path)
    for step in (2, 3):
        cut(tmp_path / "run" / "checkpoints" / f"step-{step}")
    with pytest.raises(FileFormatError, match="no checkpoint in .* is whole: .*step-3") as caught:
        go(run, resume=True)
    assert "\n" not in str(caught.value)


# ---- NaN ------------------------------------------------------------------------------------------------------------


class FaultyConfig(PromptTuningConfig):
    name: Literal["faulty"] = "faulty"  # type: ignore[assignment]


class Faulty(PromptTuning):
    """Prompt tuning whose rows are NaN in chosen training steps."""

    name = "faulty"
    Config = FaultyConfig
    bad: ClassVar[Callable[[int, torch.Tensor], bool]]
    calls: ClassVar[int] = 0

    def prompt(self, view: View) -> Prompt:
        found = super().prompt(view)
        if not torch.is_grad_enabled():
            return found
        type(self).calls += 1
        wrong = type(self).bad(type(self).calls, self.rows.detach())
        return replace(found, rows=found.rows * torch.nan) if wrong and found.rows is not None else found


@pytest.fixture
def faulty() -> Iterator[type[Faulty]]:
    registry.add("methods", Faulty)
    Faulty.calls = 0
    yield Faulty
    del registry._ADDED["methods"]["faulty"]
    registry.load.cache_clear()


def faulty_run(where: Path, name: str = "run", **train_settings: Any) -> Run:
    method = "method={name: faulty, num_virtual_tokens: 3, prompt_lr: 0.01, lr_unit: absolute}"
    settings = {"schedule": "constant", "warmup": 0, "evaluate_every": 2, **train_settings}
    return toy.run(where, method, name=name, **settings)


def events(folder: Path) -> list[tuple[int, str]]:
    return [(row["step"], row["event"]) for row in toy.metric_rows(folder) if "event" in row]


SKIPPED, ROLLED = "not finite, step skipped", "rolled back, learning rates halved"


def test_steps_that_are_not_finite_are_skipped_and_left_behind(faulty: type[Faulty], tmp_path: Path) -> None:
    faulty.bad = lambda call, rows: call in (3, 5, 6)
    watching = Watching()
    result = go(faulty_run(tmp_path, steps=8, evaluate_every=1), watching)
    assert events(result.dir) == [(3, SKIPPED), (5, SKIPPED), (6, SKIPPED)]
    # each step has its own batch: one that never works does not hold up the run
    assert faulty.calls == 8
    assert result.facts["steps"] == 8
    changed = {step for step in range(1, 9) if not same(watching.states[step], watching.states[step - 1])}
    assert changed == {1, 2, 4, 7, 8}
    rows = {row["step"]: row["loss"] for row in toy.metric_rows(result.dir) if "loss" in row}
    assert [step for step, loss in rows.items() if loss is None] == [3, 5, 6]


def test_three_in_a_row_go_back_and_halve_the_rates(faulty: type[Faulty], tmp_path: Path) -> None:
    faulty.bad = lambda call, rows: call in (5, 6, 7)
    watching = Watching()
    result = go(faulty_run(tmp_path, steps=10), watching)
    assert events(result.dir) == [(5, SKIPPED), (6, SKIPPED), (7, SKIPPED), (7, ROLLED)]
    ((state, rates),) = [
        seen for note, seen in zip(watching.notes, watching.noted_states, strict=True) if "3 times in a row" in note
    ]
    # the tensors of step 4 were validated but no step on them was finite; those of step 2 were good
    assert same(state, watching.states[2])
    assert not same(state, watching.states[4])
    assert rates == {"method.rows": pytest.approx(0.005)}
    assert watching.training.solver.rates() == {"method.rows": pytest.approx(0.005)}
    assert result.facts["rollbacks"] == 1
    assert result.facts["steps"] == 10
    assert watching.notes[-1] == "3 of 10 steps were not finite and were skipped"


def test_slower_steps_get_past_what_fast_ones_fall_off(faulty: type[Faulty], tmp_path: Path) -> None:
    last: list[torch.Tensor] = []

    def too_far(call: int, rows: torch.Tensor) -> bool:
        if last and float((rows - last[-1]).abs().max()) > 0.0075:
            return True
        last.append(rows.clone())
        return False

    faulty.bad = too_far
    result = go(faulty_run(tmp_path, steps=12, evaluate_every=1))
    assert events(result.dir) == [(2, SKIPPED), (3, SKIPPED), (4, SKIPPED), (4, ROLLED)]
    assert len([loss for loss in losses(result.dir).values() if loss is not None]) == 9


def test_without_end_it_gives_up_with_the_last_good_state_on_disk(faulty: type[Faulty], tmp_path: Path) -> None:
    faulty.bad = lambda call, rows: call > 4
    watching = Watching()
    run = faulty_run(tmp_path, steps=40)
    with pytest.raises(TrainingDiverged, match="the last good state is saved") as caught:
        go(run, watching)
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    found = events(Path(run.out))
    assert [event for _, event in found].count(SKIPPED) == 12
    assert [event for _, event in found].count(ROLLED) == 3
    tensors, facts = newest(Path(run.out))
    assert all(bool(value.isfinite().all()) for value in tensors.values())
    assert torch.equal(tensors["trained/method.rows"], watching.states[2]["method.rows"])
    assert facts["progress"]["step"] == 16
    # and from there it can go on
    faulty.bad = lambda call, rows: False
    result = go(run, resume=True)
    assert result.facts["steps"] == 40
    assert load_prompt(result.dir, tiny.backbone("causal")).predict(["a cat"])


def test_a_stop_between_skipped_steps_changes_nothing(faulty: type[Faulty], tmp_path: Path) -> None:
    faulty.bad = lambda call, rows: call in (5, 6, 7)
    whole, broken = Watching(), Watching()
    go(faulty_run(tmp_path, "whole", steps=10), whole)
    faulty.calls = 0
    run = faulty_run(tmp_path, "broken", steps=10)
    with pytest.raises(Interrupted, match="stopped at step 6 of 10"):
        # a look for each of four validations and seven steps, the last of which is not taken
        go(run, Watching(StopAt(11)))
    go(run, broken, resume=True)
    assert same(broken.states[10], whole.states[10])
    assert newest(Path(run.out))[1]["progress"]["rollbacks"] == 1
