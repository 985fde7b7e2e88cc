"""A run on several tasks: what is trained, fed, shared, saved, resumed, and what equals runs on each task alone.

Knows no real model: tiny ones, and toy data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tiny
import toy
from promptuary.building import build_method
from promptuary.checkpoint import find_prompt, load_prompt, save_prompt
from promptuary.config import load_run, part_of
from promptuary.course import JointCourse
from promptuary.errors import ConfigError, DataError, FileFormatError, Interrupted
from promptuary.joint import MEAN
from promptuary.listening import Listener
from promptuary.run import JointRun
from promptuary.seeds import Chance
from promptuary.solvers.gradient import GradientSolver
from promptuary.sources import load_start
from promptuary.training import Training, train

WORDS = toy.TASKS["classify_words"]
OTHER = {**WORDS, "template": "{text} so it is {mask}", "labels": {"positive": "red", "negative": "very bad"}}


def joint(
    folder: Path, tasks: Mapping[str, Any] | None = None, method: Mapping[str, Any] | None = None, **changes: Any
) -> JointRun:
    """Two tasks on toy data of different sizes."""
    for name, count in (("one", 12), ("two", 24)):
        toy_data(folder / name, count, seed=len(name) + count)
    default = {
        "one": {"task": WORDS, "data": {"source": str(folder / "one"), "max_length": 40}},
        "two": {"task": OTHER, "data": {"source": str(folder / "two"), "max_length": 40}},
    }
    run = load_run(
        {
            "tasks": tasks if tasks is not None else default,
            "backbone": {"model": "tiny-masked", "family": "masked"},
            "method": method or {"name": "prompt_tuning", "num_virtual_tokens": 3},
            "train": {"steps": 10, "batch_size": 4, "evaluate_every": 5, "save_every": 2, **changes.pop("train", {})},
            "out": str(folder / changes.pop("out", "run")),
            **changes,
        }
    )
    assert isinstance(run, JointRun)
    return run


def toy_data(folder: Path, count: int, seed: int) -> None:
    if folder.exists():
        return
    folder.mkdir(parents=True)
    for split, rows in (("train", count), ("validation", 8), ("test", 8)):
        lines = "".join(json.dumps(row) + "\n" for row in toy.rows(rows, seed))
        (folder / f"{split}.jsonl").write_text(lines)


def trained(run: JointRun, **options: Any) -> Any:
    return train(run, backbone=tiny.backbone("masked"), **options)


def test_each_task_gets_a_prompt_folder_that_predicts_alone(tmp_path: Path) -> None:
    result = trained(joint(tmp_path))
    assert set(result.metrics) == {MEAN, *(f"{task}/{m}" for task in ("one", "two") for m in ("accuracy", "macro_f1"))}
    assert result.metrics[MEAN] == pytest.approx((result.metrics["one/accuracy"] + result.metrics["two/accuracy"]) / 2)
    assert set(result.facts["tasks"]) == {"one", "two"}
    assert result.facts["examples"] == {"train": 36, "validation": 16, "test": 16}
    examples = [{"text": "red cat runs"}, {"text": "blue sky"}]
    for name in ("one", "two"):
        again = load_prompt(tmp_path / "run" / "prompts" / name, tiny.backbone("masked"))
        assert again.predict(examples) == result.prompts[name].predict(examples)
    tasks = [json.loads(line)["task"] for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert tasks == ["one"] * 8 + ["two"] * 8


def test_a_folder_of_several_prompts_is_no_prompt(tmp_path: Path) -> None:
    trained(joint(tmp_path, train={"steps": 2}))
    with pytest.raises(FileFormatError, match=r"prompts of several tasks.*prompts/one"):
        find_prompt(tmp_path / "run")
    result = trained(joint(tmp_path, out="b", train={"steps": 2}))
    with pytest.raises(ConfigError, match="one, two"):
        _ = result.prompt


@pytest.mark.parametrize("rows", ["task", "mixed"])
def test_the_loss_of_a_step_is_the_mean_over_its_rows(rows: str, tmp_path: Path) -> None:
    """Whatever tasks they are of: the same as each task's own loss, weighted by its rows; with equal gradients."""
    training = Training(joint(tmp_path, mixture={"rows": rows}), Listener(), tiny.backbone("masked"))
    learner = training.tuned.train(True)
    for step in range(4):
        picked = training.feed.at(step)
        assert len({row.part for row in picked}) == 1 or rows == "mixed"
        batch = learner.batch(picked)
        found = learner.loss(batch).total
        wanted = torch.zeros(())
        for part, tuned in enumerate(learner.several):
            own = [row for row in picked if row.part == part]
            if own:
                wanted = wanted + tuned.loss(tuned.batch(own)).total * len(own) / len(picked)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        tensors = [group.parameter for group in learner.trained()]
        one, two = (torch.autograd.grad(x, tensors, allow_unused=True, retain_graph=True) for x in (found, wanted))
        for mine, other in zip(one, two, strict=True):
            assert (mine is None) == (other is None)
            if mine is not None:
                torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    if rows == "mixed":
        assert any(len({row.part for row in training.feed.at(step)}) == 2 for step in range(4))


@pytest.mark.parametrize("rows", ["task", "mixed"])
@pytest.mark.parametrize("method", ["prompt_tuning", "mp2"])
def test_a_batch_in_parts_is_the_batch_in_one(method: str, rows: str, tmp_path: Path) -> None:
    settings = {"name": method, "num_virtual_tokens": 3}
    states = []
    for accumulation in (1, 3):
        run = joint(
            tmp_path, method=settings, mixture={"rows": rows}, out=f"run-{accumulation}",
            train={"accumulation": accumulation, "steps": 3},
        )  # fmt: skip
        training = Training(run, Listener(), tiny.backbone("masked"))
        training.run(resume=False, fresh=False)
        training.tuned.restore(training.tuned.state())
        states.append(training.tuned.state())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-3, atol=1e-5)


def test_without_shared_parts_a_task_learns_what_it_learns_alone(tmp_path: Path) -> None:
    """The same rows in the same order give the same prompt, bit for bit, with another task between them."""
    run = joint(tmp_path, train={"steps": 6, "schedule": "constant", "warmup": 0})
    backbone = tiny.backbone("masked")
    both = Training(run, Listener(), backbone)
    both.run(resume=False, fresh=False)
    last = both.folder.load_state()
    assert last is not None
    state = {name: value for name, value in last[0].items() if name.startswith("trained/")}
    for part, name in enumerate(("one", "two")):
        alone = JointCourse(run, backbone).courses[name]
        tuned = alone.learner.train(True)
        solver = GradientSolver(
            tuned.trained(), optimizer="adamw", schedule="constant", steps=6, warmup=0, clip=run.train.clip
        )
        for step in range(6):
            rows = both.feed.at(step)
            tuned.moment = run.seed, step
            if rows[0].part == part:
                solver.step(tuned, [tuned.batch(rows)], float(len(rows)))
        for key, value in tuned.state().items():
            assert torch.equal(state[f"trained/{name}/{key}"], value)


def test_what_a_method_shares_is_one_tensor(tmp_path: Path) -> None:
    settings = {"name": "mp2", "num_virtual_tokens": 3, "modules": 2, "intrinsic_dimension": 4, "router_lr": 0.5}
    train_settings = {"steps": 40, "evaluate_every": 40}
    training = Training(joint(tmp_path, method=settings, train=train_settings), Listener(), tiny.backbone("masked"))
    one, two = (tuned.method for tuned in training.tuned.several)
    assert one.z is two.z
    assert one.a is two.a
    assert one.placeholders is two.placeholders
    assert one.router is not two.router
    names = {group.name for group in training.tuned.trained()}
    assert names == {"shared/method.z", "shared/method.a", "one/method.router", "two/method.router"}
    width = tiny.WIDTH
    assert training.tuned.trainable_parameters == 2 * 2 + 2 * 4 + 4 * 3 * width
    training.run(resume=False, fresh=False)
    last = training.folder.load_state()
    assert last is not None
    training.tuned.restore({name.removeprefix("trained/"): t for name, t in last[0].items() if "trained/" in name})
    assert not torch.equal(one.router, two.router)
    for name, tuned in zip(("one", "two"), training.tuned.several, strict=True):
        save_prompt(tuned, tmp_path / "saved" / name)
    saved = [load_prompt(tmp_path / "saved" / name, tiny.backbone("masked")).method for name in ("one", "two")]
    for own, method in zip(saved, (one, two), strict=True):
        assert torch.equal(own.z, one.z)
        assert torch.equal(own.a, one.a)
        assert torch.equal(own.router, method.router)


def test_one_prompt_for_all_tasks(tmp_path: Path) -> None:
    result = trained(joint(tmp_path, mixture={"prompt": "one"}))
    rows = [result.prompts[name].method.fold().as_rows() for name in ("one", "two")]
    assert torch.equal(*rows)
    assert result.facts["trainable_parameters"] == 3 * tiny.WIDTH


def test_the_tasks_of_a_run_are_sources_together(tmp_path: Path) -> None:
    settings = {"name": "mp2", "num_virtual_tokens": 3, "modules": 2, "intrinsic_dimension": 4}
    trained(joint(tmp_path, method=settings))
    backbone = tiny.backbone("masked")
    whole = {**settings, "phase": "gradient", "sources": [str(tmp_path / "run")]}
    run = load_run(toy.settings(tmp_path / "next", "masked") | {"method": whole})
    method = build_method(run.method, backbone.shape)
    assert len(load_start(method.config, backbone)[1]) == 2


class StopAt(Listener):
    """Asks for a stop."""

    def __init__(self, step: int) -> None:
        self.step = step

    def begun(self, training: Training) -> None:
        self.training = training

    def stepped(self, row: Mapping[str, Any]) -> None:
        if row["step"] == self.step:
            self.training.stop.request()


@pytest.mark.parametrize("rows", ["task", "mixed"])
@pytest.mark.parametrize("method", ["prompt_tuning", "mp2"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(method: str, rows: str, tmp_path: Path) -> None:
    settings = {"name": method, "num_virtual_tokens": 3}
    mixture = {"rows": rows, "strategy": "temperature"}
    whole = trained(joint(tmp_path, method=settings, mixture=mixture, out="whole"))
    run = joint(tmp_path, method=settings, mixture=mixture, out="parts")
    with pytest.raises(Interrupted):
        trained(run, listener=StopAt(5))
    resumed = trained(run, resume=True)
    assert resumed.metrics == whole.metrics
    for name in ("one", "two"):
        one, two = ((tmp_path / out / "prompts" / name / "prompt.safetensors") for out in ("whole", "parts"))
        assert one.read_bytes() == two.read_bytes()
    again = trained(run, resume=True)
    assert again.facts == resumed.facts


def test_all_kinds_of_tasks_in_one_run(tmp_path: Path) -> None:
    data = {"source": str(tmp_path / "one"), "max_length": 40}
    tasks = {kind: {"task": toy.TASKS[kind], "data": data} for kind in ("classify_words", "classify_head", "choose")}
    mixed = trained(joint(tmp_path, tasks=tasks, mixture={"rows": "mixed"}, train={"steps": 3}))
    assert set(mixed.facts["tasks"]) == set(tasks)
    tasks["generate"] = {"task": toy.TASKS["generate"], "data": data}
    run = joint(tmp_path, tasks=tasks, backbone={"model": "t", "family": "seq2seq"}, out="b", train={"steps": 6})
    assert set(train(run, backbone=tiny.backbone("seq2seq")).facts["tasks"]) == set(tasks)
    settings = {"backbone": {"model": "t", "family": "seq2seq"}, "mixture": {"rows": "mixed"}, "out": "c"}
    run = joint(tmp_path, tasks=tasks, **settings)
    with pytest.raises(ConfigError, match=r"task generate writes.*mixture\.rows: task"):
        train(run, backbone=tiny.backbone("seq2seq"))


def test_a_task_may_change_the_method(tmp_path: Path) -> None:
    run = joint(tmp_path)
    tasks = {name: task.model_dump() for name, task in run.tasks.items()}
    tasks["two"]["method"] = {"num_virtual_tokens": 5}
    made = joint(tmp_path, tasks=tasks)
    assert part_of(made, "two").method.num_virtual_tokens == 5
    assert part_of(made, "one").method.num_virtual_tokens == 3
    again = load_run(yaml.safe_load(made.to_yaml()))
    assert again == made
    assert again.hash() == made.hash()
    with pytest.raises(ConfigError, match=r"tasks\.two: rows is shared"):
        Training(joint(tmp_path, tasks=tasks, mixture={"prompt": "one"}), Listener(), tiny.backbone("masked"))


def test_noise_of_a_step_is_the_same_for_all_tasks() -> None:
    first, second = (Chance(3, 7, torch.tensor(index)) for index in ([0, 1], [5]))
    assert first.shared().initial_seed() == second.shared().initial_seed()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": {"one": {"task": WORDS, "data": {"source": "x"}}}}, "at least two"),
        ({"tasks": ["one", "two"]}, "mapping of at least two names"),
        ({"task": WORDS}, "either tasks or task"),
        ({"mixture": {"strategy": "even"}}, r"mixture\.strategy"),
        ({"mixture": {"strateg": "uniform"}}, 'did you mean "strategy"'),
        ({"tasks": {"a/b": {}, "c": {}}}, "names a folder"),
        ({"tasks": {"a": {"task": WORDS}, "c": {}}}, r"tasks\.a: data is required"),
        ({"tasks": {"a": {"suite": "glue/sst"}, "c": {}}}, r'tasks\.a: no suite "glue/sst"'),
        ({"tasks": {"a": {"tsk": WORDS}, "c": {}}}, r'tasks\.a: unknown field "tsk"'),
        ({"tasks": {"a": "sst2", "c": {}}}, r"tasks\.a should be a mapping"),
    ],
)
def test_a_wrong_setting_is_one_line_with_its_task(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    values = yaml.safe_load(joint(tmp_path).to_yaml())
    with pytest.raises(ConfigError, match=message) as caught:
        load_run({**values, **change})
    assert "\n" not in str(caught.value)


def test_wrong_data_is_one_line_with_its_task(tmp_path: Path) -> None:
    run = joint(tmp_path)
    tasks = {name: task.model_dump() for name, task in run.tasks.items()}
    tasks["two"]["data"]["source"] = str(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"^tasks\.two: ") as caught:
        trained(joint(tmp_path, tasks=tasks))
    assert "\n" not in str(caught.value)
    tasks = {"shared": tasks["one"], "one": tasks["one"]}
    with pytest.raises(ConfigError, match='"shared" is the name'):
        trained(joint(tmp_path, tasks=tasks))
    worse = {**toy.TASKS["regress_head"], "metrics": ["mean_squared_error"]}
    data = {"source": str(tmp_path / "one"), "max_length": 40}
    with pytest.raises(ConfigError, match=r"tasks\.b: mean_squared_error is better when it is lower"):
        trained(joint(tmp_path, tasks={"a": tasks["one"], "b": {"task": worse, "data": data}}))
