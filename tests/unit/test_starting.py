"""What methods start from on models that see: real patch tokens of the run's own training images, and class texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pictures
import tiny
from promptuary.course import Course
from promptuary.errors import ConfigError
from promptuary.training import train


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pictures.write(tmp_path / "images", train=4, validation=1, test=1)


def started(folder: Path, out: Path, seed: int = 0, **parts: Any) -> Course:
    run = pictures.run(folder, out, "vision", seed=seed, **parts)
    return Course(run, tiny.backbone("vit"))


def recorded(course: Course, *, position: bool = False) -> list[torch.Tensor]:
    """All patch tokens of the training images that enter each layer, [n, v]."""
    batch = course.learner.batch(course.feed.rows["train"])
    return [found.flatten(0, 1) for found in course.learner.backbone.tokens(batch, position=position)]


def is_among(row: torch.Tensor, tokens: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return float((tokens - row).abs().amax(1).min()) <= tolerance


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("position", [True, False])
def test_prototypes_are_tokens_of_the_training_images_in_their_own_layer(
    deep: bool, position: bool, folder: Path, tmp_path: Path
) -> None:
    course = started(folder, tmp_path / "run", method={"name": "spt", "deep": deep, "position": position})
    rows = course.learner.prompt(course.learner.backbone.probe()).layers
    assert rows is not None
    tokens = recorded(course, position=position)
    assert len(rows[0]) == (2 if deep else 1)
    for layer, own in enumerate(rows[0]):
        assert all(is_among(row, tokens[layer]) for row in own)
        assert not any(is_among(row, tokens[1 - layer]) for row in own)
    assert not any(parameter.grad is not None for parameter in course.learner.backbone.model.parameters())


@pytest.mark.parametrize("prototypes", ["random", "mean", "max", "kmeans"])
def test_every_initialiser_runs_from_images_and_follows_the_seed(prototypes: str, folder: Path, tmp_path: Path) -> None:
    method = {"name": "spt", "prototypes": prototypes}
    states = [started(folder, tmp_path / "run", seed, method=method).learner.state() for seed in (0, 0, 1)]
    assert all(torch.equal(one, states[1][name]) for name, one in states[0].items())
    assert not torch.equal(states[0]["method.rows"], states[2]["method.rows"])


def test_the_official_views_are_those_of_training(folder: Path, tmp_path: Path) -> None:
    varied = {"augment": {"crop": [0.3, 0.6], "flip": 0.5}}
    found = []
    for data in ({}, varied):
        method = {"name": "spt", "official": True, "images": None}
        course = started(folder, tmp_path / "run", method=method, data=data)
        rows = course.learner.prompt(course.learner.backbone.probe()).layers
        assert rows is not None
        tokens = recorded(course)
        found.append(sum(is_among(row, tokens[0]) for row in rows[0, 0]))
    assert found[0] == 3, "without views the plain images are what training sees"
    assert found[1] == 0


@pytest.mark.parametrize("name", ["vpt", "spt"])
def test_frozen_prompts_train_a_head_alone(name: str, folder: Path, tmp_path: Path) -> None:
    run = pictures.run(folder, tmp_path / "run", "vision", method={"name": name, "frozen": True})
    before = Course(run, tiny.backbone("vit")).learner
    result = train(run, backbone=tiny.backbone("vit"))
    assert set(result.prompt.state()) == {"head.weight", "head.bias"}
    start, end = (one.prompt(one.backbone.probe()).layers for one in (before, result.prompt))
    assert start is not None
    assert torch.equal(start, end)


def test_a_frozen_prompt_without_a_head_would_train_nothing(folder: Path, tmp_path: Path) -> None:
    run = pictures.run(folder, tmp_path / "run", method={"name": "vpt", "frozen": True})
    with pytest.raises(ConfigError, match="nothing would be trained: vpt is frozen and there is no head"):
        Course(run, tiny.backbone("clip"))


def test_texts_of_classes_are_what_the_model_says_of_whole_sentences(folder: Path, tmp_path: Path) -> None:
    course = Course(pictures.run(folder, tmp_path / "run", method={"name": "kgcoop"}), tiny.backbone("clip"))
    method = course.learner.method
    assert method is not None
    plain = tiny.model("clip")
    ids = course.learner.backbone.tokenizer([f"a photo of a {name}." for name in course.task.names], padding=True)
    with torch.no_grad():
        wanted = plain.get_text_features(**{key: torch.tensor(value) for key, value in ids.items()}).pooler_output
    found: Any = vars(method)
    kept = next(value for value in found.values() if isinstance(value, torch.Tensor) and value.shape[-1] == 24)
    unit = torch.nn.functional.normalize(wanted, dim=-1)
    torch.testing.assert_close(torch.nn.functional.normalize(kept.view(5, -1), dim=-1), unit, rtol=1e-4, atol=1e-5)
