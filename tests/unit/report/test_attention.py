"""Maps of attention over a real tiny model's patches.

Knows no page.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from promptuary import registry
from promptuary.errors import SiteError
from promptuary.report import attention
from promptuary.testing import case_of
from promptuary.tuned import Tuned


def pixels(address: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))


def test_a_map_has_a_pixel_for_each_patch_in_the_order_of_the_image() -> None:
    values = np.zeros((1, 1, 6))
    values[0, 0, 4] = 1.0  # second row, second column of 2 x 3
    (one,), rows = attention.maps(values, (2, 3))
    found = pixels(one.overlay)
    assert found.shape == (2, 3, 4)
    brightness = found[..., :3].sum(-1)
    assert np.unravel_index(brightness.argmax(), (2, 3)) == (1, 1)
    assert (one.share, one.peak) == (1.0, pytest.approx(6.0))
    assert rows == ()


def test_even_attention_is_an_even_middle_tone_and_not_noise() -> None:
    values = np.full((4, 4), 1 / 32) + np.random.default_rng(0).normal(0, 1e-6, (4, 4))
    found = np.asarray(attention.overlay(values)).astype(int)
    assert np.ptp(found.reshape(16, 4), axis=0).max() <= 1
    assert np.asarray(attention.overlay(np.zeros((2, 2)))).min(axis=(0, 1))[3] > 0


@pytest.mark.parametrize(
    ("depth", "layers"), [(1, ["layer 1"]), (2, ["layer 1", "layer 2"]), (12, ["layer 1", "layer 6", "layer 12"])]
)
def test_layers_are_the_first_a_middle_and_the_last_one(depth: int, layers: list[str]) -> None:
    values = np.random.default_rng(0).random((depth, 50, 4))
    found, rows = attention.maps(values, (2, 2))
    assert [one.name for one in found] == layers
    assert [rows[0].name, rows[-1].name, len(rows)] == ["row 1", "row 50", attention.ROWS]
    np.testing.assert_allclose(found[-1].share, values[-1].mean(0).sum())
    np.testing.assert_allclose(rows[-1].share, values[-1, 49].sum())


def test_the_image_under_the_maps_is_what_the_model_sees(tmp_path: Path) -> None:
    case = case_of(registry.load("methods", "vpt"), "vision", tmp_path)
    tuned = case.tuned()
    (found,) = attention.looks(tuned, tuned.rows(case.examples()[:1], labelled=False))
    assert (found.width, found.height, found.of_prompt) == (16, 16, True)
    assert len(found.layers) == 2
    assert all(0 < one.share < 1 and one.peak >= 1 for one in (*found.layers, *found.rows))
    assert pixels(found.layers[0].overlay).shape == (4, 4, 4)
    sight = tuned.backbone.sight
    assert sight is not None
    (batch_pixels,) = tuned.batch(tuned.rows(case.examples()[:1], labelled=False)).pixels.numpy()
    seen = np.asarray(attention._seen(batch_pixels, sight)).astype(float)
    # half a step of 255 is all that may be lost
    np.testing.assert_allclose(seen.transpose(2, 0, 1) / 255, batch_pixels * 0.5 + 0.5, atol=0.5 / 255 + 1e-6)


def test_without_rows_it_is_the_class_token_that_looks(tmp_path: Path) -> None:
    case = case_of(registry.load("methods", "vpt"), "vision", tmp_path)
    bare = Tuned(case.backbone(), case.task())
    (found,) = attention.looks(bare, bare.rows(case.examples()[:1], labelled=False))
    assert not found.of_prompt
    assert found.rows == ()


def test_a_model_with_nothing_that_looks_says_so(tmp_path: Path) -> None:
    case = case_of(registry.load("methods", "vpt"), "siglip", tmp_path)
    bare = Tuned(case.backbone(), case.task())
    with pytest.raises(SiteError, match="looks"):
        attention.looks(bare, bare.rows(case.examples()[:1], labelled=False))
