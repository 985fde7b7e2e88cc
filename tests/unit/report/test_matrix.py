"""Classes and confusions as a page shows them.

Knows no page.
"""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from promptuary.report import matrix

GOLD = ["a", "a", "a", "a", "b", "b", "c"]
ANSWERS = ["a", "b", "b", "c", "b", "b", "a"]


def test_the_weakest_class_comes_first_with_its_most_frequent_mistake() -> None:
    found = matrix.by_class(GOLD, ANSWERS, ["a", "b", "c", "unused"])
    shown = [(one.label, one.right, one.examples, one.instead, one.times) for one in found.table]
    assert shown == [("c", 0, 1, "a", 1), ("a", 1, 4, "b", 2), ("b", 2, 2, "", 0)]
    assert (found.count, found.without, found.left_out) == (4, 1, 0)


def test_the_most_frequent_confusion_comes_first_and_right_answers_are_none() -> None:
    found = matrix.by_class(GOLD, ANSWERS, ["a", "b", "c"]).confusions
    assert [(one.true, one.given, one.count) for one in found] == [("a", "b", 2), ("a", "c", 1), ("c", "a", 1)]
    assert [one.share for one in found] == [0.5, 0.25, 1.0]


def test_few_classes_have_their_names_at_the_matrix_and_every_count_in_a_cell() -> None:
    found = matrix.by_class(GOLD, ANSWERS, ["a", "b", "c"]).matrix
    assert found is not None
    assert (found.names, found.image) == (("a", "b", "c"), None)
    assert sum(one.count for one in found.cells) == len(GOLD)
    # given ones across, true ones down
    cell = next(one for one in found.cells if one.title == "a → b: 2 of 4")
    assert (cell.x, cell.y) == (found.margin + found.cell, found.margin)
    assert {one.right for one in found.cells if one.x == one.y} == {True}


def test_many_classes_become_pixels_whose_strength_is_their_share() -> None:
    labels = [f"class {number}" for number in range(101)]
    answers = [labels[1], *labels[1:]]
    found = matrix.by_class([*labels, labels[0]], [*answers, labels[0]], labels).matrix
    assert found is not None
    assert found.image is not None
    assert found.names == ()
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(found.image.partition(",")[2]))))
    assert pixels.shape == (101, 101, 4)
    assert pixels[5, 5, 3] == 255
    assert pixels[0, 0, 3] == pixels[0, 1, 3] == round(255 * 0.5**0.5)
    assert pixels[..., 3].astype(bool).sum() == 102
    assert tuple(pixels[0, 0, :3]) != tuple(pixels[0, 1, :3])


@pytest.mark.parametrize("classes", [matrix.MOST, matrix.MOST + 5])
def test_too_many_classes_are_cut_and_counted(classes: int) -> None:
    labels = [f"class {number}" for number in range(classes)]
    found = matrix.by_class(labels, labels, labels)
    assert len(found.table) == matrix.MOST
    assert found.left_out == classes - matrix.MOST
    assert (found.matrix is None) == (classes > matrix.MOST)
    if found.matrix is not None:
        assert len(found.matrix.cells) == min(classes, matrix.POINTED)
