"""R1: every method, stopped in the middle of an epoch, between two and in the second, goes on bit for bit.

Plain, with augmentation, with accumulation, without and with buckets, and with the backbone's dropout at work. Knows no
method's insides.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import tiny
import toy
from promptuary import registry
from promptuary.config import load_run
from promptuary.errors import Interrupted
from promptuary.listening import Listener, Stop
from promptuary.run import Run
from promptuary.training import Training, train
from promptuary.training_state import pack, snapshot

METHODS: dict[str, dict[str, Any]] = {
    "prompt_tuning": {},
    "dept": {},
    "ept": {},
    "ept with a gate that reads the text": {"name": "ept", "gate_input": "text", "fusion_dim": 2},
    "lamp": {},
    "prefix": {},
}
PLAIN = {"train.bucket": False}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "augmentation": {**PLAIN, "data.augment.delete": 0.3, "data.augment.swap": 0.3},
    "accumulation": {**PLAIN, "train.accumulation": 2},
    "bucketing": {"train.bucket": True},
    "dropout": {**PLAIN, "backbone.dropout": True, "train.accumulation": 2},
    "everything": {
        "data.augment.delete": 0.3,
        "backbone.dropout": True,
        "train.accumulation": 2,
        "train.optimizer": "adafactor",
        "train.schedule": "cosine",
    },
}
# 11 rows in batches of 4: three steps in an epoch
MOMENTS = {"in the middle of an epoch": 2, "between two epochs": 3, "in the second epoch": 5}
STEPS = 6


class StopIn(Stop):
    """Asks for a stop in a step, before its last part."""

    def __init__(self, step: int, parts: int) -> None:
        super().__init__()
        self.step, self.left = step, parts
        self.training: Training | None = None

    def check(self) -> None:
        if self.training is not None and self.training.progress.step == self.step:
            self.left -= 1
            if self.left == 0:
                self.request()
        super().check()


class Keeping(Listener):
    """Keeps the whole state after each step."""

    def __init__(self, stop: StopIn | None = None) -> None:
        self.stop = stop
        self.states: dict[int, tuple[dict[str, torch.Tensor], dict[str, Any]]] = {}

    def begun(self, training: Training) -> None:
        self.training = training
        if self.stop is not None:
            self.stop.training = training

    def stepped(self, row: Mapping[str, Any]) -> None:
        made = self.training
        state = snapshot(made.tuned, made.solver)
        tensors, facts = pack(state, made.guard.sound, made.best_state, made.progress)
        self.states[row["step"]] = tensors, json.loads(json.dumps(facts))


@pytest.fixture(scope="module")
def backbones() -> dict[bool, Any]:
    """The same tiny model without and with dropout."""
    return {on: tiny.backbone("gpt2", dropout=on) for on in (False, True)}


def run_of(where: Path, method: str, setting: str, name: str) -> Run:
    values = toy.settings(where, "gpt2", name=name)
    values["method"] = {"name": method, **METHODS[method]}
    values["method"].update({k: v for k, v in registry.load("methods", values["method"]["name"]).tiny.items()})
    values["train"] = {"steps": STEPS, "batch_size": 4, "evaluate_every": 4, "save_every": 100}
    return load_run(values, [f"{key}={json.dumps(value)}" for key, value in SETTINGS[setting].items()])


def newest(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    path = max((folder / "checkpoints").iterdir(), key=lambda item: int(item.name.removeprefix("step-")))
    return safetensors.torch.load_file(path / "state.safetensors"), json.loads((path / "state.json").read_text())


def log_of(folder: Path) -> dict[int, tuple[float, float]]:
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in toy.metric_rows(folder) if "loss" in row}


def untimed(facts: Mapping[str, Any]) -> dict[str, Any]:
    progress = {key: value for key, value in facts["progress"].items() if key not in ("seconds", "times")}
    return {"progress": progress, "solver": facts["solver"], "sound": facts["sound"]}


def assert_same(one: tuple[Any, Any], two: tuple[Any, Any]) -> None:
    assert one[0].keys() == two[0].keys()
    assert [name for name in one[0] if not torch.equal(one[0][name], two[0][name])] == []
    assert untimed(one[1]) == untimed(two[1])


CELLS = [
    (method, setting)
    for method in METHODS
    for setting in SETTINGS
    # the two additions to the catalogue's 4 x 5 meet each other, and prompt tuning meets everything
    if (" " not in method and setting != "everything")
    or (method not in ("dept", "ept", "lamp", "prefix") and setting == "everything")
]


@pytest.mark.parametrize(("method", "setting"), CELLS)
def test_a_run_stopped_three_times_is_the_unbroken_one_bit_for_bit(
    method: str, setting: str, tmp_path: Path, backbones: dict[bool, Any]
) -> None:
    backbone = backbones[bool(SETTINGS[setting].get("backbone.dropout"))]
    keeping, parts = Keeping(), int(SETTINGS[setting].get("train.accumulation", 1))
    whole = train(run_of(tmp_path, method, setting, "whole"), listener=keeping, backbone=backbone)
    broken = run_of(tmp_path, method, setting, "broken")
    for number, step in enumerate(MOMENTS.values()):
        stop = StopIn(step, parts)
        # what others draw from torch's generator between two parts of a run is none of its business
        torch.manual_seed(100 + number)
        with pytest.raises(Interrupted, match=f"stopped at step {step} of {STEPS}"):
            train(broken, resume=number > 0, listener=Keeping(stop), backbone=backbone, stop=stop)
        assert_same(newest(tmp_path / "broken"), keeping.states[step])
    resumed = train(broken, resume=True, backbone=backbone)
    assert_same(newest(tmp_path / "broken"), newest(tmp_path / "whole"))
    assert log_of(tmp_path / "broken") == log_of(tmp_path / "whole")
    assert len(log_of(tmp_path / "whole")) == STEPS
    assert resumed.metrics == whole.metrics
    written = [folder / "prompt" / "prompt.safetensors" for folder in (whole.dir, resumed.dir)]
    assert written[0].read_bytes() == written[1].read_bytes()


@pytest.mark.parametrize(
    ("family", "task", "changes"),
    [("causal", "classify_words", ["method.placement=end"]), ("encoder", "choose", [])],
    ids=["texts before their prompt", "prototypes"],
)
@pytest.mark.parametrize("step", [4, 7, 11])
def test_what_a_model_keeps_has_no_say_in_how_a_run_goes_on(
    family: str, task: str, changes: list[str], step: int, tmp_path: Path
) -> None:
    """A process that continues in the third epoch has nothing kept of the first two."""

    def run(name: str) -> Run:
        return toy.run(tmp_path, *changes, family=family, task=task, name=name, steps=14)

    whole = train(run("whole"), backbone=tiny.backbone(family))
    stop = StopIn(step, 1)
    with pytest.raises(Interrupted):
        train(run("broken"), listener=Keeping(stop), stop=stop, backbone=tiny.backbone(family))
    resumed = train(run("broken"), resume=True, backbone=tiny.backbone(family))
    written = [folder / "prompt" / "prompt.safetensors" for folder in (whole.dir, resumed.dir)]
    assert written[0].read_bytes() == written[1].read_bytes()


@pytest.mark.parametrize("setting", ["augmentation", "bucketing", "dropout", "everything"])
def test_each_setting_really_changes_what_is_learnt(setting: str, tmp_path: Path, backbones: dict[bool, Any]) -> None:
    logs = []
    for name in ("plain", setting):
        backbone = backbones[bool(SETTINGS[name].get("backbone.dropout"))]
        train(run_of(tmp_path, "prompt_tuning", name, name), backbone=backbone)
        logs.append(log_of(tmp_path / name))
    assert logs[0].keys() == logs[1].keys()
    assert all(logs[0][step] != logs[1][step] for step in logs[0])


def test_dropout_is_at_work_in_training_alone(backbones: dict[bool, Any], tmp_path: Path) -> None:
    run = run_of(tmp_path, "prompt_tuning", "dropout", "run")
    result = train(run, backbone=backbones[True])
    assert result.prompt.predict(toy.rows(4)) == result.prompt.predict(toy.rows(4))
    assert not any(module.training for module in backbones[True].model.modules())


def test_training_leaves_torchs_own_generator_alone(backbones: dict[bool, Any], tmp_path: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    train(run_of(tmp_path, "prompt_tuning", "everything", "run"), backbone=backbones[True])
    assert torch.equal(torch.get_rng_state(), before)
