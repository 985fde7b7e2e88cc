"""R9: memory that runs out in training, in evaluation and on saving; the run ends with the same prompt.

The real exceptions are raised from within the model's forward pass, as soon as a batch is larger than what "fits".
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import tiny
import toy
from promptuary import files
from promptuary.errors import Interrupted, OutOfMemory
from promptuary.listening import Listener, Stop
from promptuary.run import Run
from promptuary.training import Result, Training, train

ERRORS = {
    "accelerator": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "processor": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)"
    ),
}
# batch, accumulation, what fits, and the micro-batch that the run comes down to
SIZES = {"8 in one": (8, 1, 4, 4), "8 in two": (8, 2, 2, 2), "5 in one": (5, 1, 1, 1)}
EVENT = "out of memory, batch halved"


class Full:
    """A model that runs out of memory from a call on, whenever it gets more rows than fit."""

    def __init__(self, error: Exception, *, training: bool, rows: int, from_call: int = 1) -> None:
        self.error, self.training, self.rows, self.from_call = error, training, rows, from_call
        self.calls = self.raised = 0

    def __call__(self, module: Any, inputs: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled() is not self.training:
            return
        self.calls += 1
        if self.calls >= self.from_call and len(inputs[0]) > self.rows:
            self.raised += 1
            raise self.error

    @contextlib.contextmanager
    def inside(self, backbone: Any) -> Iterator[None]:
        # the second layer, so that a part of the pass is over
        handle = backbone.model.model.layers[1].register_forward_pre_hook(self)
        try:
            yield
        finally:
            handle.remove()


@pytest.fixture(scope="module")
def backbone() -> Any:
    return tiny.backbone("causal")


def run_of(where: Path, size: str, name: str, **more: Any) -> Run:
    batch, parts, _, _ = SIZES[size]
    settings = {"batch_size": batch, "accumulation": parts, "steps": 6, "evaluate_every": 3, **more}
    return toy.run(where, "method.prompt_lr=0.5", name=name, **settings)


def trained(folder: Path) -> torch.Tensor:
    path = max((folder / "checkpoints").iterdir(), key=lambda item: int(item.name.removeprefix("step-")))
    return safetensors.torch.load_file(path / "state.safetensors")["trained/method.rows"]


def rows_of(folder: Path) -> tuple[dict[int, float], list[dict[str, Any]]]:
    rows = toy.metric_rows(folder)
    return {row["step"]: row["loss"] for row in rows if "loss" in row}, [
        row for row in rows if row.get("event") == EVENT
    ]


def assert_same_run(result: Result, whole: Result) -> None:
    assert torch.allclose(trained(result.dir), trained(whole.dir), atol=1e-6, rtol=0)
    prompts = [safetensors.torch.load_file(one.dir / "prompt" / "prompt.safetensors") for one in (result, whole)]
    assert torch.allclose(prompts[0]["method.rows"], prompts[1]["method.rows"], atol=1e-6, rtol=0)
    losses = [rows_of(one.dir)[0] for one in (result, whole)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert len(losses[0]) == 6


@pytest.mark.parametrize(("size", "kind"), zip(SIZES, ("accelerator", "processor", "accelerator"), strict=True))
def test_training_goes_on_in_smaller_parts_of_the_same_batches(
    size: str, kind: str, backbone: Any, tmp_path: Path
) -> None:
    whole = train(run_of(tmp_path, size, "whole"), backbone=backbone)
    _, parts, fits, left = SIZES[size]
    # some steps go well; then every pass of more rows than fit fails, also in the last part of a step
    full = Full(ERRORS[kind], training=True, rows=fits, from_call=3 * parts)
    with full.inside(backbone):
        run = run_of(tmp_path, size, "tight")
        result = train(run, backbone=backbone)
    assert full.raised > 0
    assert_same_run(result, whole)
    events = rows_of(result.dir)[1]
    assert [event["micro_batch"] for event in events][-1] == left == result.facts["micro_batch"]
    assert len(events) == full.raised
    assert not any("eval_batch_size" in event for event in events)


@pytest.mark.parametrize(("size", "kind"), zip(SIZES, ("accelerator", "processor", "accelerator"), strict=True))
def test_evaluation_halves_its_own_batch_and_never_that_of_training(
    size: str, kind: str, backbone: Any, tmp_path: Path
) -> None:
    whole = train(run_of(tmp_path, size, "whole"), backbone=backbone)
    full = Full(ERRORS[kind], training=False, rows=2)
    with full.inside(backbone):
        result = train(run_of(tmp_path, size, "tight"), backbone=backbone)
    assert torch.equal(trained(result.dir), trained(whole.dir))
    assert result.metrics == whole.metrics
    assert result.facts["micro_batch"] is None
    # 5 rows to validate: 32 are asked for, 3 are too many still; what is found out holds for the rest of the run
    assert [(event["step"], event["eval_batch_size"]) for event in rows_of(result.dir)[1]] == [(0, 2)]
    assert full.raised == 2


@pytest.mark.parametrize(("size", "kind"), zip(SIZES, ("accelerator", "processor", "accelerator"), strict=True))
def test_a_save_is_tried_once_more_and_the_checkpoint_before_it_stands(
    size: str, kind: str, backbone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(run_of(tmp_path, size, "whole"), backbone=backbone)
    real, fail = files.tensor_bytes, [True]

    def short(tensors: Any) -> bytes:
        if "trained/method.rows" in tensors and fail and fail.pop(0):
            raise ERRORS[kind]
        return real(tensors)

    monkeypatch.setattr(files, "tensor_bytes", short)
    result = train(run_of(tmp_path, size, "once"), backbone=backbone)
    assert not fail
    assert torch.equal(trained(result.dir), trained(whole.dir))
    # two steps of saving: the first works, the second does not, however often it is tried
    fail.extend([False, True, True])
    run = run_of(tmp_path, size, "never")
    with pytest.raises(OutOfMemory, match="the state of step 6 cannot be saved.*the checkpoint before it stands"):
        train(run, backbone=backbone)
    assert [path.name for path in (tmp_path / "never" / "checkpoints").iterdir()] == ["step-3"]
    assert_same_run(train(run, resume=True, backbone=backbone), whole)


def test_a_resumed_run_keeps_the_smaller_parts(backbone: Any, tmp_path: Path) -> None:
    class Ask(Listener):
        def begun(self, training: Training) -> None:
            self.training = training

        def stepped(self, row: Any) -> None:
            if row["step"] == 4:
                self.training.stop.request()

    whole = train(run_of(tmp_path, "8 in one", "whole"), backbone=backbone)
    both = [Full(ERRORS["processor"], training=training, rows=2) for training in (True, False)]
    run = run_of(tmp_path, "8 in one", "tight")
    with both[0].inside(backbone), both[1].inside(backbone):
        with pytest.raises(Interrupted):
            train(run, listener=Ask(), backbone=backbone, stop=Stop())
        raised = [full.raised for full in both]
        assert min(raised) >= 1
        result = train(run, resume=True, backbone=backbone)
    assert [full.raised for full in both] == raised
    assert_same_run(result, whole)
    state = json.loads((tmp_path / "tight" / "checkpoints" / "step-6" / "state.json").read_text())
    assert (state["progress"]["micro_batch"], state["progress"]["eval_batch_size"]) == (2, 2)


class Tight(Full):
    """Single rows fit if their layers keep nothing but inputs."""

    recomputes = False

    @contextlib.contextmanager
    def inside(self, backbone: Any) -> Iterator[None]:
        real = backbone.recomputing

        @contextlib.contextmanager
        def noted(wanted: bool = True) -> Iterator[None]:
            with real(wanted):
                self.recomputes = wanted
                yield

        backbone.recomputing = noted
        try:
            with super().inside(backbone):
                yield
        finally:
            del backbone.recomputing

    def __call__(self, module: Any, inputs: tuple[Any, ...]) -> None:
        self.rows = 1 if self.recomputes else 0
        super().__call__(module, inputs)


def test_below_one_example_layers_run_again_and_a_resumed_run_keeps_that(backbone: Any, tmp_path: Path) -> None:
    class Ask(Listener):
        def begun(self, training: Training) -> None:
            self.training = training
            self.notes = list[str]()

        def noted(self, text: str) -> None:
            self.notes.append(text)

        def stepped(self, row: Any) -> None:
            if row["step"] == 4:
                self.training.stop.request()

    whole = train(run_of(tmp_path, "8 in one", "whole"), backbone=backbone)
    tight, listener = Tight(ERRORS["accelerator"], training=True, rows=0, from_call=3), Ask()
    run = run_of(tmp_path, "8 in one", "tight")
    with tight.inside(backbone):
        with pytest.raises(Interrupted):
            train(run, listener=listener, backbone=backbone, stop=Stop())
        raised = tight.raised
        result = train(run, resume=True, backbone=backbone)
    # eight, four, two, one; then one with its layers run again
    assert tight.raised == raised == 4
    assert sum("gradient checkpointing" in note for note in listener.notes) == 1
    events = [row["event"] for row in toy.metric_rows(result.dir) if "event" in row]
    assert events == [EVENT] * 3 + ["out of memory, gradient checkpointing switched on", "resumed"]
    assert_same_run(result, whole)
    assert result.facts["gradient_checkpointing"] is True
    assert whole.facts["gradient_checkpointing"] is False
    state = json.loads((tmp_path / "tight" / "checkpoints" / "step-6" / "state.json").read_text())
    assert state["progress"]["recompute"] is True


def test_the_setting_alone_changes_no_number(backbone: Any, tmp_path: Path) -> None:
    whole = train(run_of(tmp_path, "8 in one", "whole"), backbone=backbone)
    assert_same_run(train(run_of(tmp_path, "8 in one", "again", gradient_checkpointing=True), backbone=backbone), whole)


def test_below_one_example_there_is_one_line_and_a_saved_state(backbone: Any, tmp_path: Path) -> None:
    run = run_of(tmp_path, "8 in one", "run")
    with (
        # a step runs the prompt, and the rows behind it
        Full(ERRORS["accelerator"], training=True, rows=0, from_call=3).inside(backbone),
        pytest.raises(
            OutOfMemory, match=r"step 2 runs out of memory with single examples \(up to \d+ tokens"
        ) as caught,
    ):
        train(run, backbone=backbone)
    assert (caught.value.exit_code, str(caught.value).count("\n")) == (1, 0)
    assert "lower data.max_length" in str(caught.value)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-1"]
    # where there is room, the run goes on from there
    whole = train(run_of(tmp_path, "8 in one", "whole"), backbone=backbone)
    assert_same_run(train(run, resume=True, backbone=backbone), whole)
    with (
        Full(ERRORS["processor"], training=False, rows=0).inside(backbone),
        pytest.raises(OutOfMemory, match="evaluation runs out of memory with a single example; lower data.max_length"),
    ):
        train(run_of(tmp_path, "8 in one", "other"), backbone=backbone)


def test_other_errors_are_not_taken_for_a_lack_of_memory(backbone: Any, tmp_path: Path) -> None:
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with Full(error, training=True, rows=0).inside(backbone), pytest.raises(RuntimeError, match="shapes cannot"):
        train(run_of(tmp_path, "8 in one", "run"), backbone=backbone)
