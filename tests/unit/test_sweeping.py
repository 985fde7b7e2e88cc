"""Sweeps: runs that go through one frozen model together give what each gives alone.

Knows no method's insides; what a single run does is in test_training.py.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiny
import toy
from promptuary import memory, sweeping
from promptuary.checkpoint import load_prompt
from promptuary.config import load_run
from promptuary.errors import ConfigError, Interrupted, OutOfMemory, PromptuaryError, TrainingDiverged
from promptuary.listening import Listener, Stop
from promptuary.run import Run
from promptuary.sweeping import sweep
from promptuary.training import Result, Training, train

PAIRS = [
    (task, family)
    for task in toy.TASKS
    for family in tiny.FAMILIES
    if task != "generate" or family in ("causal", "seq2seq")
]
TIMES = ("seconds_per_step_median", "train_seconds", "peak_memory_bytes", "notes", "run_hash")


def several(where: Path, name: str, family: str = "causal", task: str = "classify_words", **train: Any) -> list[Run]:
    """Three runs: of other seeds, rates, lengths and methods."""
    changes = [
        ("seed=1", "method.num_virtual_tokens=2"),
        ("seed=2", "method.prompt_lr=0.2", "train.schedule=constant"),
        ("seed=3", "method.name=dept", "method.num_virtual_tokens=4", "method.rank=2", "method.max_tokens=16"),
    ]
    return [
        toy.run(where, *own, family=family, task=task, name=f"{name}-{number}", **train)
        for number, own in enumerate(changes)
    ]


def expect_same(found: Result, wanted: Result) -> None:
    """Tensors, scores, log and facts, but for times and last digits."""
    # the tiny T5 makes a thousand of a last digit within four steps; a row of another run's would make it 1e-2
    one, two = found.prompt.state(), wanted.prompt.state()
    for name, value in two.items():
        torch.testing.assert_close(one[name], value, rtol=2e-3, atol=1e-4)
    for facts in ("steps", "best_step", "examples", "seed", "trainable_parameters", "added_tokens"):
        assert found.facts[facts] == wanted.facts[facts]
    assert found.facts.keys() == wanted.facts.keys()
    assert found.metrics == pytest.approx(wanted.metrics, abs=1e-4)
    logs = [toy.metric_rows(result.dir) for result in (found, wanted)]
    assert [row.keys() for row in logs[0]] == [row.keys() for row in logs[1]]
    for number, (mine, theirs) in enumerate(zip(*([row for row in log if "loss" in row] for log in logs), strict=True)):
        for what in ("loss", "grad_norm"):
            assert mine[what] == pytest.approx(theirs[what], rel=1e-3 if number else 1e-5, abs=1e-5)
    assert {path.name for path in found.dir.iterdir()} == {path.name for path in wanted.dir.iterdir()}


@pytest.mark.parametrize(("task", "family"), PAIRS)
def test_runs_of_a_sweep_give_what_each_gives_alone(task: str, family: str, tmp_path: Path) -> None:
    backbone = tiny.backbone(family)
    together = sweep(several(tmp_path, "together", family, task, steps=4), backbone=backbone)
    for run, found in zip(several(tmp_path, "alone", family, task, steps=4), together, strict=True):
        expect_same(found, train(run, backbone=backbone))
    shown = load_prompt(together[2].dir, backbone).predict([{"text": "red sun", "options": ["good", "bad"]}])
    assert shown == together[2].prompt.predict([{"text": "red sun", "options": ["good", "bad"]}])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_step_of_all_runs_is_one_pass(family: str, tmp_path: Path) -> None:
    backbone, sizes = tiny.backbone(family), list[int]()
    size = backbone.table.num_embeddings
    tables = [one for one in backbone.model.modules() if isinstance(one, nn.Embedding) and one.num_embeddings == size]
    runs = [toy.run(tmp_path, f"seed={seed}", family=family, name=f"r{seed}", steps=2) for seed in (1, 2, 3)]
    trainings = [Training(run, Listener(), backbone) for run in runs]
    for one in trainings:
        one.prepare(resume=False)
    backbone.hidden(backbone.probe(), trainings[0].tuned.prompt(backbone.probe()))
    parts = [sweeping.Part(one, iter(()), one.feed.at(0)) for one in trainings]  # type: ignore[arg-type]
    sweeping.together(parts)
    for table in tables:
        table.register_forward_hook(lambda module, given, made: sizes.append(given[0].shape[0]))
    sweeping.together(parts)
    rows = sum(len(part.rows or ()) for part in parts)
    # one, and what an encoder-decoder's decoder begins with; prompts of causal models run apart, once each
    assert sizes.count(rows) == (2 if family == "seq2seq" else 1)
    assert set(sizes) <= {rows, 3}


def test_each_prompt_learns_from_its_own_rows_alone(tmp_path: Path) -> None:
    """A run beside one whose rate is absurd is not touched by it."""
    backbone = tiny.backbone("causal")
    calm = toy.run(tmp_path, "seed=1", name="calm")
    wild = toy.run(tmp_path, "seed=2", "method.prompt_lr=30", name="wild")
    found = sweep([calm, wild], backbone=backbone)
    alone = train(toy.run(tmp_path, "seed=1", name="alone"), backbone=backbone)
    expect_same(found[0], alone)


def test_runs_of_other_lengths_and_parts(tmp_path: Path) -> None:
    """Some end before the others, and some take their batch in parts."""
    backbone = tiny.backbone("seq2seq")
    sizes = ({"steps": 2}, {"steps": 5, "batch_size": 3}, {"steps": 4, "accumulation": 2})

    def runs(name: str) -> list[Run]:
        return [toy.run(tmp_path, family="seq2seq", name=f"{name}{k}", **own) for k, own in enumerate(sizes)]

    for found, run in zip(sweep(runs("together"), backbone=backbone), runs("alone"), strict=True):
        expect_same(found, train(run, backbone=backbone))


def test_prompts_that_depend_on_the_text(tmp_path: Path) -> None:
    backbone = tiny.backbone("masked")
    settings = ("method.name=ept", "method.num_virtual_tokens=3", "method.rank=2", "method.reference_length=8",
                "method.max_tokens=16", "method.gate_input=text")  # fmt: skip

    def runs(name: str) -> list[Run]:
        return [toy.run(tmp_path, *settings, f"seed={seed}", family="masked", name=f"{name}{seed}") for seed in (1, 2)]

    for found, run in zip(sweep(runs("together"), backbone=backbone), runs("alone"), strict=True):
        expect_same(found, train(run, backbone=backbone))


def test_keys_and_values_of_other_lengths(tmp_path: Path) -> None:
    """Also on a model that cannot have them in one batch: those of one length go together then."""
    for family in ("causal", "seq2seq"):
        backbone = tiny.backbone(family)

        def runs(name: str, family: str = family) -> list[Run]:
            lengths = (2, 3, 2)
            return [
                toy.run(tmp_path, "method.name=prefix", f"method.num_virtual_tokens={length}", f"seed={seed}",
                        family=family, name=f"{family}-{name}{seed}")
                for seed, length in enumerate(lengths)
            ]  # fmt: skip

        for found, run in zip(sweep(runs("together"), backbone=backbone), runs("alone"), strict=True):
            expect_same(found, train(run, backbone=backbone))


class StopsAt(Listener):
    """Asks for a stop after so many steps of a run."""

    def __init__(self, step: int, stop: Stop) -> None:
        self.step, self.asked = step, stop

    def stepped(self, row: Mapping[str, Any]) -> None:
        if row["step"] == self.step:
            self.asked.request()


def test_a_stop_saves_all_runs_and_resume_goes_on_bit_for_bit(tmp_path: Path) -> None:
    backbone, stop = tiny.backbone("causal"), Stop()
    runs, unbroken = several(tmp_path, "broken", steps=5), several(tmp_path, "whole", steps=5)
    with pytest.raises(Interrupted, match=r"stopped: 0 of 3 runs are finished.*--resume") as caught:
        sweep(runs, backbone=backbone, stop=stop, listener=lambda run: StopsAt(3 if run.seed == 2 else 99, stop))
    assert caught.value.exit_code == 130
    steps = [max(int(p.name[5:]) for p in (Path(run.out) / "checkpoints").iterdir()) for run in runs]
    assert set(steps) <= {2, 3}
    again = sweep(runs, backbone=backbone, resume=True)
    for found, wanted in zip(again, sweep(unbroken, backbone=backbone), strict=True):
        for name, value in wanted.prompt.state().items():
            torch.testing.assert_close(found.prompt.state()[name], value, rtol=1e-5, atol=1e-6)
        assert found.metrics == wanted.metrics
    before = [(Path(run.out) / "result.json").read_bytes() for run in runs]
    sweep(runs, backbone=backbone, resume=True)
    assert [(Path(run.out) / "result.json").read_bytes() for run in runs] == before


def test_a_run_that_fails_leaves_the_others_going(tmp_path: Path) -> None:
    backbone = tiny.backbone("causal")
    good, bad = (
        toy.run(tmp_path, name="good"),
        toy.run(tmp_path, "method.prompt_lr=1e38", "method.lr_unit=absolute", name="bad", steps=40),
    )
    with pytest.raises(TrainingDiverged) as caught:
        sweep([bad, good], backbone=backbone)
    text = str(caught.value)
    assert "bad: " in text
    assert "(1 of 2 runs finished)" in text
    assert "\n" not in text
    alone = train(toy.run(tmp_path, name="alone"), backbone=backbone)
    facts = json.loads((Path(good.out) / "result.json").read_text())
    assert facts["metrics"] == alone.facts["metrics"]


def test_where_memory_is_short_fewer_go_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, notes = tiny.backbone("causal"), list[str]()
    real, tried = sweeping.together, list[int]()

    def tight(group: Any) -> Any:
        tried.append(len(group))
        if len(group) > 2:
            raise MemoryError
        return real(group)

    class Notes(Listener):
        def noted(self, text: str) -> None:
            notes.append(text)

    monkeypatch.setattr(sweeping, "together", tight)
    found = sweep(several(tmp_path, "tight"), backbone=backbone, listener=lambda run: Notes())
    assert tried[:2] == [3, 2]
    assert set(tried[1:]) == {2}
    assert [text for text in notes if "2 runs go together" in text]
    for result, run in zip(found, several(tmp_path, "alone"), strict=True):
        expect_same(result, train(run, backbone=backbone))


def test_memory_that_does_not_hold_one_run_is_told_of_that_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny.backbone("causal")
    calls = list[Callable[[], Any]]()

    def never(call: Callable[[], Any]) -> Any:
        calls.append(call)
        return None if "_pass" in repr(call) or "_step" in repr(call) else call()

    monkeypatch.setattr(memory, "attempt", never)
    with pytest.raises(OutOfMemory, match=r"run-0: step 1 runs out of memory"):
        sweep(several(tmp_path, "run"), backbone=backbone)


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "none": (lambda where: sweep([]), "a sweep needs at least one run"),
    "a path": (lambda where: sweep(["a.yaml"]), "sweep takes runs on one task each, got str"),  # type: ignore[list-item]
    "at_once": (lambda where: sweep([toy.run(where)], at_once=0), "at_once: expected a whole number of at least 1"),
    "one folder": (lambda where: sweep([toy.run(where), toy.run(where)]), "runs 1 and 2 have the same folder"),
    "backbone": (
        lambda where: sweep([toy.run(where, name="a"), toy.run(where, "backbone.kept_mib=1", name="b")]),
        "runs 1 and 2 differ in backbone.kept_mib (256 and 1), which runs of one sweep share",
    ),
    "task": (
        lambda where: sweep([toy.run(where, name="a"), toy.run(where, task="generate", name="b")]),
        "runs 1 and 2 differ in task.",
    ),
    "precision": (
        lambda where: sweep([toy.run(where, name="a"), toy.run(where, name="b", mixed_precision="bf16")]),
        "runs 1 and 2 differ in train.mixed_precision ('no' and 'bf16')",
    ),
    "dropout": (
        lambda where: sweep([toy.run(where, "backbone.dropout=true", name=name) for name in "ab"]),
        "backbone.dropout draws noise for a whole batch",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_share_a_model_is_refused_before_anything_is_written(what: str, tmp_path: Path) -> None:
    call, message = WRONG[what]
    with pytest.raises(ConfigError) as caught:
        call(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"data"}


def test_data_with_other_labels_are_refused(tmp_path: Path) -> None:
    values = [toy.settings(tmp_path, task="classify_head", name=name) for name in "ab"]
    other = [{**row, "label": "x" + row["label"]} for row in toy.rows(12)]
    values[1]["data"] = {"source": str(toy.jsonl(tmp_path / "other" / "train.jsonl", other)), "max_length": 40}
    with pytest.raises(ConfigError, match="data of runs 1 and 2 have other labels"):
        sweep([load_run(one) for one in values], backbone=tiny.backbone("causal"))


def test_a_run_of_today_cannot_be_overwritten(tmp_path: Path) -> None:
    backbone, runs = tiny.backbone("causal"), several(tmp_path, "run")
    sweep(runs, backbone=backbone)
    with pytest.raises(PromptuaryError, match="resume"):
        sweep(runs, backbone=backbone)


def test_a_sweep_runs_in_a_thread_as_well(tmp_path: Path) -> None:
    """Without signals, which only the main thread hears."""
    found = list[Result]()
    thread = threading.Thread(
        target=lambda: found.extend(sweep(several(tmp_path, "run"), backbone=tiny.backbone("causal")))
    )
    thread.start()
    thread.join()
    assert len(found) == 3
