"""Views of training images in a run: each epoch has its own, whenever it is asked for; nothing else is varied.

Knows one tiny model that sees.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
import toy
from promptuary.config import build
from promptuary.errors import ConfigError
from promptuary.listening import Listener
from promptuary.testing.case import write_images
from promptuary.training import Training
from promptuary.types import Encoded

VARIED = {"crop": [0.3, 1.0], "flip": 0.5}


def training(where: Path, augment: dict[str, Any], seed: int = 0) -> Training:
    if not (where / "set").exists():
        write_images(where / "set")
    run = build(
        {
            "task": {"name": "classify", "image": "image", "reading": "head"},
            "data": {"source": str(where / "set"), "augment": augment},
            "backbone": {"model": "tiny-vit", "family": "vision"},
            "method": {"name": "vpt"},
            "train": {"steps": 12, "batch_size": 6},
            "seed": seed,
            "out": str(where / "out"),
        }
    )
    return Training(run, Listener(), tiny.backbone("vit"))


def pixels(made: Training, step: int) -> dict[int, torch.Tensor]:
    rows = made.feed.at(step)
    batch = made.feed.tuned.batch(rows)
    assert batch.pixels is not None
    return dict(zip(batch.index.tolist(), batch.pixels, strict=True))


def test_every_epoch_shows_another_view_of_the_same_rows(tmp_path: Path) -> None:
    plain, made = training(tmp_path, {}), training(tmp_path, VARIED)
    per_epoch = made.feed.steps_per_epoch
    epochs = [
        {index: one for step in range(per_epoch) for index, one in pixels(made, epoch * per_epoch + step).items()}
        for epoch in range(2)
    ]
    before = {index: one for step in range(per_epoch) for index, one in pixels(plain, step).items()}
    assert epochs[0].keys() == epochs[1].keys() == before.keys() == set(range(30))
    assert sum(not torch.equal(epochs[0][index], epochs[1][index]) for index in before) > 26
    assert sum(not torch.equal(epochs[0][index], before[index]) for index in before) > 26
    assert [row.index for row in made.feed.at(3)] == [row.index for row in plain.feed.at(3)]
    for name in ("validation", "test"):
        assert made.feed.rows[name] == plain.feed.rows[name]


def test_a_step_is_the_same_whenever_it_is_asked_for_and_another_seed_differs(tmp_path: Path) -> None:
    made, again, other = (training(tmp_path, VARIED, seed) for seed in (0, 0, 1))
    there = [pixels(made, step) for step in range(7)]
    back = [pixels(again, step) for step in reversed(range(7))][::-1]
    for one, two in zip(there, back, strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[index], two[index]) for index in one)
    third = {index: one for step in range(5) for index, one in pixels(other, step).items()}
    first = {index: one for step in there[:5] for index, one in step.items()}
    assert not any(torch.equal(first[index], third[index]) for index in first)


def test_what_is_known_of_an_image_is_not_known_of_its_view(tmp_path: Path) -> None:
    made = training(tmp_path, VARIED)
    rows = made.feed.rows["train"]
    for place, row in enumerate(rows):
        object.__setattr__(row, "encoded", Encoded([0], [0], {}, image=row.encoded.image, features=torch.ones(3)))
        assert made.feed.variant(place, 0).encoded.features is None


def test_augmentation_without_its_kind_of_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="delete and swap are for texts"):
        training(tmp_path, {"delete": 0.1})
    run = toy.run(tmp_path, "data.augment.flip=0.5", family="causal", task="classify_words", batch_size=4)
    with pytest.raises(ConfigError, match=r"crop and flip are for images; set task\.image"):
        Training(run, Listener(), tiny.backbone("causal"))
