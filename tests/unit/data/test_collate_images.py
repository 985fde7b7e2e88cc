"""Batches of images: the pixels of each row, or what is known of all of them, and never some of both.

Knows no model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from promptuary.data.collate import Row, collate
from promptuary.data.images import Picture
from promptuary.errors import DataError
from promptuary.types import Encoded, Sight

SIGHT = Sight((8, 6), (8, 6))


def picture(number: int) -> Picture:
    pixels = np.random.default_rng(number).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    return Picture(Image.fromarray(pixels), f"image {number}")


def row(number: int, **known: Any) -> Row:
    return Row(Encoded([0], [0], {}, image=picture(number), **known), number)


def gone() -> Picture:
    return Picture("/no/such.jpg", "such.jpg")


@pytest.mark.parametrize("count", [1, 2, 13])
def test_pixels_are_those_of_each_row_in_its_place(count: int) -> None:
    batch = collate([row(number) for number in range(count)], 0, segments=False, sight=SIGHT)
    assert batch.pixels is not None
    assert batch.pixels.shape == (count, 3, 8, 6)
    for number in range(count):
        assert torch.equal(batch.pixels[number], picture(number).pixels(SIGHT))
    assert (batch.features, batch.input_ids.shape) == (None, (count, 1))


def test_where_all_features_are_known_no_image_is_opened() -> None:
    rows = [Row(Encoded([0], [0], {}, image=gone(), features=torch.full((5,), float(n))), n) for n in range(3)]
    batch = collate(rows, 0, segments=False, sight=SIGHT)
    assert batch.pixels is None
    assert batch.features is not None
    assert batch.features[:, 0].tolist() == [0.0, 1.0, 2.0]


def test_where_only_some_are_known_all_images_are_opened() -> None:
    batch = collate([row(0, features=torch.zeros(5)), row(1)], 0, segments=False, sight=SIGHT)
    assert batch.features is None
    assert batch.pixels is not None
    assert len(batch.pixels) == 2


def test_texts_have_neither() -> None:
    batch = collate([Row(Encoded([3], [0], {}), 0)], 0, segments=False, sight=SIGHT)
    assert (batch.pixels, batch.features) == (None, None)


def test_rows_with_and_without_images_do_not_mix() -> None:
    with pytest.raises(ValueError, match="an image, got 1 of 2"):
        collate([row(0), Row(Encoded([3], [0], {}), 1)], 0, segments=False, sight=SIGHT)


def test_a_model_that_does_not_see_gets_no_images() -> None:
    with pytest.raises(ValueError, match="a model that does not see"):
        collate([row(0)], 0, segments=False)


def test_an_image_that_was_taken_away_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="such.jpg does not exist"):
        collate([row(0), Row(Encoded([0], [0], {}, image=gone()), 1)], 0, segments=False, sight=SIGHT)
