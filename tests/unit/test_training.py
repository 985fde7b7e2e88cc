"""Training: every kind of task on every family, lengths and rates, what is kept, and what is refused before it starts.

Knows no method's insides. Stops, crashes and NaN are in test_training_faults.py.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import tiny
import toy
from promptuary.checkpoint import load_prompt
from promptuary.errors import ConfigError, DataError, PromptuaryError
from promptuary.evaluation import evaluate
from promptuary.seeds import seeded
from promptuary.training import Listener, Training, train

KEYS = [
    "method",
    "task",
    "backbone",
    "seed",
    "metrics",
    "primary_metric",
    "trainable_parameters",
    "added_tokens",
    "steps",
    "seconds_per_step_median",
    "train_seconds",
    "peak_memory_bytes",
    "best_step",
    "versions",
    "run_hash",
]
WRITES = [
    pair
    for pair in itertools.product(toy.TASKS, tiny.FAMILIES)
    if pair[0] != "generate" or pair[1] in ("causal", "seq2seq")
]


class Watching(Listener):
    """Keeps everything that it is told, and the tensors after each validation and the rates before each step."""

    def __init__(self) -> None:
        self.plan: Mapping[str, Any] = {}
        self.steps: list[Mapping[str, Any]] = []
        self.scores: list[Mapping[str, Any]] = []
        self.notes: list[str] = []
        self.states: dict[int, dict[str, torch.Tensor]] = {}
        self.rates: list[dict[str, float]] = []

    def begun(self, training: Training) -> None:
        self.training = training

    def planned(self, plan: Mapping[str, Any]) -> None:
        self.plan = plan
        self.rates.append(self.training.solver.rates())

    def stepped(self, row: Mapping[str, Any]) -> None:
        self.steps.append(row)
        self.rates.append(self.training.solver.rates())

    def validated(self, row: Mapping[str, Any]) -> None:
        self.scores.append(row)
        self.states[row["step"]] = self.training.tuned.state()

    def noted(self, text: str) -> None:
        self.notes.append(text)


def refusal(call: Any, kind: type[PromptuaryError] = ConfigError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def prompt_of(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "prompt" / "prompt.safetensors")


def same(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# ---- end to end -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "family"), WRITES, ids=lambda value: value)
def test_every_kind_of_task_trains_on_every_family_that_can(task: str, family: str, tmp_path: Path) -> None:
    watching = Watching()
    run = toy.run(tmp_path, family=family, task=task)
    result = train(run, listener=watching, backbone=tiny.backbone(family))
    facts = json.loads((result.dir / "result.json").read_text())
    assert set(KEYS) <= set(facts)
    assert (facts["steps"], facts["backbone"], facts["task"]) == (3, f"tiny-{family}", run.task.name)
    assert facts["run_hash"] == run.hash()
    assert facts["metrics"] == result.metrics
    assert all(isinstance(value, float) and math.isfinite(value) for value in result.metrics.values())
    rows = toy.metric_rows(result.dir)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 3
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
    assert [row["step"] for row in rows if row.get("split") == "validation"] == [0, 2, 3]
    assert not same(watching.states[0], watching.states[3])
    lines = (result.dir / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["gold"] for line in lines] == evaluate(result.prompt, toy.rows(4, seed=2)).gold
    again = load_prompt(result.dir, tiny.backbone(family))
    assert again.predict(toy.rows(4)) == result.prompt.predict(toy.rows(4))


IMPOSSIBLE = {
    "generate-masked": ("masked", "generate", {}),
    "generate-encoder": ("encoder", "generate", {}),
    "mask-in-the-middle-causal": ("causal", "classify_words", {"template": "{mask} : {text}"}),
    "no-mask-masked": ("masked", "classify_words", {"template": "{text}"}),
}


@pytest.mark.parametrize(("family", "task", "changes"), IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    family: str, task: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    overrides = [f"task.{name}={json.dumps(value)}" for name, value in changes.items()]
    run = toy.run(tmp_path, *overrides, family=family, task=task)
    assert refusal(lambda: train(run, backbone=tiny.backbone(family)))
    assert not (tmp_path / "run").exists()


# ---- what is learnt -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["classify_words", "generate"])
def test_accumulation_changes_nothing(task: str, tmp_path: Path) -> None:
    watched = [Watching(), Watching()]
    for parts, watching in zip((1, 3), watched, strict=True):
        run = toy.run(tmp_path, task=task, name=f"parts-{parts}", accumulation=parts, steps=6, batch_size=5)
        train(run, listener=watching, backbone=tiny.backbone("causal"))
    start, whole, cut = (watched[0].states[0], *(watching.states[6] for watching in watched))
    assert (whole["method.rows"] - start["method.rows"]).abs().max() > 1e-3
    assert torch.allclose(whole["method.rows"], cut["method.rows"], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("task", "metric", "better", "family", "seed"),
    [("classify_words", "accuracy", max, "causal", 0), ("regress_words", "mean_squared_error", min, "seq2seq", 3)],
)
def test_the_best_checkpoint_is_saved_and_not_the_last(
    task: str, metric: str, better: Any, family: str, seed: int, tmp_path: Path
) -> None:
    """With a rate that jumps about, and seeds with which the best validation is neither the first nor the last."""
    watching = Watching()
    fast = ["method.prompt_lr=0.5", "method.lr_unit=absolute", f"task.metrics=[{metric}]", f"seed={seed}"]
    train_settings = {"steps": 8, "batch_size": 2, "evaluate_every": 1, "schedule": "constant"}
    run = toy.run(tmp_path, *fast, task=task, family=family, **train_settings)
    result = train(run, listener=watching, backbone=tiny.backbone(family))
    scores = [row[metric] for row in watching.scores]
    best = scores.index(better(scores))
    assert 0 < best < 8
    assert scores[best] not in (scores[0], scores[8])
    assert (result.facts["best_step"], result.facts["validation"]) == (best, {metric: scores[best]})
    assert same(prompt_of(result.dir), watching.states[best])
    assert not same(watching.states[best], watching.states[8])


def test_training_stops_when_validation_gets_no_better(tmp_path: Path) -> None:
    still = ["method.prompt_lr=1e-12", "method.weight_decay=0"]
    run = toy.run(tmp_path, *still, steps=40, evaluate_every=2, patience=3)
    result = train(run, backbone=tiny.backbone("causal"))
    assert (result.facts["steps"], result.facts["best_step"]) == (6, 0)


@pytest.mark.parametrize("bucket", [True, False])
def test_every_example_is_seen_once_per_epoch(bucket: bool, tmp_path: Path) -> None:
    training = Training(toy.run(tmp_path, bucket=bucket, batch_size=4), Listener(), tiny.backbone("causal"))
    assert training.feed.steps_per_epoch == 3
    orders = []
    for epoch in range(3):
        seen = [row.index for step in range(3) for row in training.feed.at(3 * epoch + step)]
        assert sorted(seen) == list(range(11))
        orders.append(seen)
    assert orders[0] != orders[1] != orders[2]
    # any step can be asked for by itself, which is what resuming does
    assert [row.index for row in training.feed.at(4)] == orders[1][4:8]


def test_texts_of_similar_length_come_together_unless_switched_off(tmp_path: Path) -> None:
    orders = []
    for settings in ({}, {"bucket": True}, {"bucket": False}):
        training = Training(toy.run(tmp_path, batch_size=4, **settings), Listener(), tiny.backbone("causal"))
        orders.append([[row.index for row in training.feed.at(step)] for step in range(3)])
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_the_frozen_model_is_in_eval_mode_in_training_unless_asked(kind: str, tmp_path: Path) -> None:
    for dropout in (False, True):
        backbone, modes, losses = tiny.backbone(kind, dropout=dropout), set[bool](), list[float]()
        drops = [part for part in backbone.model.modules() if isinstance(part, torch.nn.Dropout) and part.p > 0]
        assert drops
        handles = [
            part.register_forward_hook(lambda drop, *_: modes.add(drop.training) if torch.is_grad_enabled() else None)  # noqa: B023
            for part in drops
        ]
        training = Training(toy.run(tmp_path, family=kind, name=f"run-{dropout}"), Listener(), backbone)
        training.tuned.train(True)
        batch = training.tuned.batch(training.feed.at(0))
        modes.clear()
        with backbone.dropping():
            losses += [float(training.tuned.loss(batch).total.detach()) for _ in range(2)]
        assert (losses[0] == losses[1]) is not dropout
        training.run(resume=False, fresh=False)
        assert modes == {dropout}
        assert not any(part.training for part in backbone.model.modules())
        training.tuned.train(True)
        assert float(training.tuned.loss(batch).total.detach()) == float(training.tuned.loss(batch).total.detach())
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0.25, 2])
def test_warm_up_is_counted_in_steps_or_as_a_part(schedule: str, warmup: float, tmp_path: Path) -> None:
    watching = Watching()
    run = toy.run(
        tmp_path, "method.lr_unit=absolute", "method.prompt_lr=0.1", schedule=schedule, warmup=warmup, steps=8
    )
    train(run, listener=watching, backbone=tiny.backbone("causal"))
    after = {"linear": lambda p: 1 - p, "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2, "constant": lambda p: 1.0}
    expected = [0.1 * (step / 2 if step < 2 else after[schedule]((step - 2) / 6)) for step in range(9)]
    assert [rates["method.rows"] for rates in watching.rates] == pytest.approx(expected, abs=1e-9)


def test_relative_rates_are_in_units_of_the_starting_rows(tmp_path: Path) -> None:
    training = Training(toy.run(tmp_path, "method.prompt_lr=0.5"), Listener(), tiny.backbone("causal"))
    (group,) = training.tuned.trained()
    assert group.learning_rate == pytest.approx(0.5 * float(group.parameter.detach().pow(2).mean().sqrt()), rel=1e-5)


def test_epochs_decide_instead_of_steps(tmp_path: Path) -> None:
    training = Training(toy.run(tmp_path, epochs=2.5, steps=1000, batch_size=4), Listener(), tiny.backbone("causal"))
    assert (training.steps, training.evaluate_every, training.save_every) == (8, 2, 2)
    short = Training(toy.run(tmp_path, epochs=0.01), Listener(), tiny.backbone("causal"))
    assert short.steps == 1


def test_mixed_precision_trains(tmp_path: Path) -> None:
    result = train(toy.run(tmp_path, mixed_precision="bf16"), backbone=tiny.backbone("causal"))
    assert all(
        value.dtype == torch.float32 and bool(value.isfinite().all()) for value in prompt_of(result.dir).values()
    )


def test_scores_that_are_not_finite_are_no_scores(tmp_path: Path) -> None:
    run = toy.run(tmp_path, "task.metrics=[mean_squared_error]", task="regress_head", steps=2, evaluate_every=1)

    class Breaking(Watching):
        def begun(self, training: Training) -> None:
            super().begun(training)
            self.real = training.tuned.task.low
            training.tuned.task.low = float("nan")

        def stepped(self, row: Any) -> None:
            self.training.tuned.task.low = self.real

    watching = Breaking()
    result = train(run, listener=watching, backbone=tiny.backbone("causal"))
    rows = [row for row in toy.metric_rows(result.dir) if row.get("split") == "validation"]
    assert rows[0]["mean_squared_error"] is None
    assert result.facts["best_step"] in (1, 2)
    assert result.facts["validation"]["mean_squared_error"] == min(row["mean_squared_error"] for row in rows[1:])


# ---- where a prompt starts ------------------------------------------------------------------------------------------


def test_a_prompt_can_start_from_a_saved_one(tmp_path: Path) -> None:
    first = train(toy.run(tmp_path, family="masked", name="first"), backbone=tiny.backbone("masked")).dir
    saved = ["method.init=saved", f"method.init_prompt={first}", "method.num_virtual_tokens=5", "seed=9"]
    run = toy.run(tmp_path, *saved, family="masked", name="second")
    start = Training(run, Listener(), tiny.backbone("masked")).tuned.state()["method.rows"]
    rows = prompt_of(first)["method.rows"]
    assert torch.equal(start, torch.cat([rows, rows[:2]]))
    assert train(run, backbone=tiny.backbone("masked")).facts["added_tokens"] == 5
    lost = toy.run(tmp_path, "method.init=saved", family="masked", name="third")
    assert "method.init_prompt names no prompt" in refusal(lambda: train(lost, backbone=tiny.backbone("masked")))


def test_seeds_decide_the_start_and_purposes_are_apart(tmp_path: Path) -> None:
    def start(seed: int) -> torch.Tensor:
        return Training(toy.run(tmp_path, f"seed={seed}"), Listener(), tiny.backbone("causal")).tuned.state()[
            "method.rows"
        ]

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))
    draws = [torch.rand(1, generator=seeded(*parts)).item() for parts in ((0, 1), (0, 2), (1, 1), (0, 3, 0), (0, 3, 1))]
    assert len(set(draws)) == 5


# ---- before the first step ------------------------------------------------------------------------------------------


def test_the_plan_says_what_will_be_done(tmp_path: Path) -> None:
    watching = Watching()
    run = toy.run(tmp_path, "data.max_length=9", steps=4, batch_size=3, family="masked")
    train(run, listener=watching, backbone=tiny.backbone("masked"))
    tuned = watching.training.tuned
    lengths = [len(tuned.rows([example], labelled=True)[0].encoded.ids) for example in toy.rows(11)]
    whole = [len(example["text"].split()) + 5 for example in toy.rows(11)]
    assert watching.plan["cut_texts"] == sum(length > 9 for length in whole) > 0
    assert watching.plan["longest_text"] == max(lengths) == 9
    expected = {
        "examples": {"train": 11, "validation": 5, "test": 4},
        "steps": 4,
        "batch_size": 3,
        "method": "prompt_tuning",
        "task": "classify",
        "trainable_parameters": 96,
        "added_tokens": 3,
        "prompt_bytes": 384,
        "out": str(tmp_path / "run"),
    }
    assert watching.plan.items() >= expected.items()
    weights = sum(parameter.numel() * 4 for parameter in tiny.model("bert").parameters())
    assert watching.plan["memory_bytes_estimate"] > weights
    written = {name.rstrip("/") for name in watching.plan["writes"]}
    assert written | {"run.json", ".lock"} == {path.name for path in (tmp_path / "run").iterdir()}
    assert json.dumps(watching.plan)


def long_text(where: Path, split: str, words: int) -> None:
    folder = toy.folder(where / "data")
    example = {**toy.rows(1)[0], "text": " ".join(["cat"] * words)}
    with (folder / f"{split}.jsonl").open("a") as file:
        file.write(json.dumps(example) + "\n")


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_texts_longer_than_the_models_positions_are_refused(split: str, tmp_path: Path) -> None:
    backbone = tiny.backbone("gpt2")
    assert backbone.max_positions == 64
    long_text(tmp_path, split, 60)
    run = toy.run(tmp_path, "data.max_length=100", family="gpt2")
    text = refusal(lambda: train(run, backbone=backbone))
    assert "the longest text (62 tokens) and the prompt (3 rows) exceed the model's 64 positions" in text
    assert "lower data.max_length to 61" in text
    assert not (tmp_path / "run").exists()
    fits = toy.run(tmp_path, "data.max_length=61", family="gpt2", steps=1)
    assert train(fits, backbone=backbone).metrics


def test_the_answer_behind_a_text_needs_positions_too(tmp_path: Path) -> None:
    long_text(tmp_path, "test", 100)
    overrides = ["data.max_length=50", "task.max_new_tokens=12"]
    run = toy.run(tmp_path, *overrides, family="gpt2", task="generate")
    text = refusal(lambda: train(run, backbone=tiny.backbone("gpt2")))
    assert "the answer (12 tokens)" in text
    assert "lower data.max_length to 49" in text
    phrases = ["data.max_length=60", 'task.labels={"positive": "very very good", "negative": "bad"}']
    run = toy.run(tmp_path, *phrases, family="gpt2")
    assert "lower data.max_length to 58" in refusal(lambda: train(run, backbone=tiny.backbone("gpt2")))


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_wrong_label_anywhere_is_found_before_training(split: str, tmp_path: Path) -> None:
    folder = toy.folder(tmp_path / "data")
    wrong = [*toy.rows(2), {**toy.rows(1)[0], "label": "positve"}]
    toy.jsonl(folder / f"{split}.jsonl", wrong)
    text = refusal(lambda: train(toy.run(tmp_path), backbone=tiny.backbone("causal")), DataError)
    assert text.startswith(f'{split}.jsonl line 3: unknown label "positve"; did you mean "positive"?')
    assert not (tmp_path / "run").exists()


def test_an_occupied_folder_is_refused_and_stays(tmp_path: Path) -> None:
    run = toy.run(tmp_path)
    before = (train(run, backbone=tiny.backbone("causal")).dir / "result.json").read_bytes()
    text = refusal(lambda: train(run, backbone=tiny.backbone("causal")))
    assert "holds a run already" in text
    assert (tmp_path / "run" / "result.json").read_bytes() == before
    fresh = train(run, fresh=True, backbone=tiny.backbone("causal"))
    assert len([row for row in toy.metric_rows(fresh.dir) if "loss" in row]) == 3


def test_a_class_outside_of_the_registry_trains_by_module_and_name(tmp_path: Path) -> None:
    run = toy.run(tmp_path, "method={name: 'promptuary.methods.lamp:LAMP', length: 8, rank: 2, pool: 2}")
    result = train(run, backbone=tiny.backbone("causal"))
    assert (result.facts["method"], result.facts["added_tokens"]) == ("lamp", 4)
