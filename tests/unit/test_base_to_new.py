"""Base to new: who is tested on classes that were not trained on, among which names, and how it is summed up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pictures
import tiny
from promptuary.course import Course
from promptuary.evaluation import evaluate
from promptuary.metrics import harmonic_mean
from promptuary.training import train


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pictures.write(tmp_path / "images")


def course(folder: Path, out: Path, kind: str = "clip", **parts: Any) -> Course:
    return Course(pictures.run(folder, out, **parts), tiny.backbone(kind))


def test_the_first_half_of_the_sorted_classes_is_trained_on_and_the_others_are_tested_by_name(
    folder: Path, tmp_path: Path
) -> None:
    found = course(folder, tmp_path / "run", data={"classes": "base"})
    assert found.task.labels == ("apple", "bird", "cat")
    assert {example["label"] for example in found.splits.test} == {"apple", "bird", "cat"}
    assert found.new is not None
    assert found.new.tuned.task.words == ("a dog .", "a fish .")
    assert {example["label"] for example in found.new.examples} == {"dog", "fish"}
    assert found.facts()["examples"] == {"train": 18, "validation": 6, "test": 12, "new": 8}
    assert "2 classes that are not trained on, among themselves" in found.notes[-1]
    assert found.new.tuned.method is found.learner.method


@pytest.mark.parametrize("method", ["coop", "cocoop", "kgcoop", "pre", "lasp"])
def test_scores_on_both_and_their_harmonic_mean(method: str, folder: Path, tmp_path: Path) -> None:
    run = pictures.run(folder, tmp_path / "run", data={"classes": "base", "views": 1}, method={"name": method})
    result = train(run, backbone=tiny.backbone("clip"))
    base, new = result.metrics["accuracy"], result.metrics["new_accuracy"]
    assert result.metrics["harmonic_mean"] == pytest.approx(harmonic_mean(base, new))
    again = Course(run, result.prompt.backbone)
    assert again.new is not None
    moved = again.new.tuned
    moved.restore(result.prompt.state())
    assert evaluate(moved, again.new.examples, interval=False).scores["accuracy"] == pytest.approx(new)


def test_an_untrained_context_of_words_scores_as_the_words_themselves(folder: Path, tmp_path: Path) -> None:
    start = {"name": "coop", "init": "text", "init_text": "a red", "num_virtual_tokens": 2}
    found = course(folder, tmp_path / "run", data={"classes": "base"}, task={"label_template": "{} ."}, method=start)
    assert found.new is not None
    tuned = found.new.tuned
    words = [tuned.backbone.answer_ids(f"a red {name} .") for name in ("dog", "fish")]
    from promptuary.data.collate import pad_candidates
    from promptuary.types import Prompt

    batch = tuned.batch(found.new.rows)
    plain = tuned.backbone.score(batch, Prompt(), pad_candidates(words))
    torch.testing.assert_close(tuned.scores(batch), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("clip", {}),
        ("clip", {"data": {"classes": "base"}, "method": {"name": "coop", "class_specific": True}}),
        ("clip", {"data": {"classes": "base"}, "task": {"labels": {"apple": "red", "bird": "blue", "cat": "sky"}}}),
        ("clip", {"data": {"classes": "base"}, "task": {"reading": "head"}}),
        ("vit", {"data": {"classes": "base"}, "family": "vision"}),
    ],
    ids=["all classes", "contexts of classes", "given words", "head", "no text tower"],
)
def test_where_there_are_no_other_names_only_base_classes_are_tested(
    kind: str, parts: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    found = course(folder, tmp_path / "run", kind, **parts)
    assert found.new is None
    scores = found.evaluate("test", batch_size=8, interval=False).scores
    assert set(scores) == {"accuracy", "macro_f1"}
