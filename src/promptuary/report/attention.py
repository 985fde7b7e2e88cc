"""Where the rows of a prompt look: maps over the patches of an image, as translucent layers for the image.

Knows no method and no architecture; what looks and how is told by the backbone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from promptuary.errors import SiteError
from promptuary.report.samples import png, small

if TYPE_CHECKING:
    from promptuary.data.collate import Row
    from promptuary.tuned import Tuned

SIDE = 224
"""Longer side of the image under the maps, in pixels; our choice."""

ROWS = 6
"""Most single rows of a prompt that get a map of their own; our choice."""

PLAIN = 2.0
"""A map is drawn against its peak, but at least against this many times its mean; our choice.

So a row that looks everywhere alike gives an even middle tone, not noise stretched to full contrast."""

_RAMP = np.array([[24, 18, 58], [140, 41, 99], [233, 105, 44], [252, 222, 110]], dtype=np.float64)
"""Colours from none to most: dark violet, red, orange, yellow; told apart in grey as well."""

_ALPHA = 160


@dataclass(frozen=True)
class Map:
    """A layer over an image.

    `name`: what it shows; `share`: of the attention, how much goes to patches; `peak`: of the strongest patch against
    the mean; `overlay`: a data address of one pixel for each patch.
    """

    name: str
    share: float
    peak: float
    overlay: str


@dataclass(frozen=True)
class Looked:
    """An image as the model sees it, and its maps: in some layers the mean over the rows; single rows in the last.

    `index`: place of the example among those shown; `width`, `height`: of the image, in pixels; `of_prompt`: whether it
    is rows of the prompt that look, or else the class token.
    """

    index: int
    picture: str
    width: int
    height: int
    of_prompt: bool
    layers: tuple[Map, ...]
    rows: tuple[Map, ...]


def looks(tuned: Tuned, rows: Sequence[Row]) -> list[Looked]:
    """What the prompt looks at in some images, one after the other: the prompt may depend on the image.

    Args:
        tuned: on a model that sees.
        rows: encoded examples.

    Raises:
        SiteError: the model cannot tell.
    """
    return [_look(tuned, row) for row in rows]


def _look(tuned: Tuned, row: Row) -> Looked:
    backbone: Any = tuned.backbone
    batch = tuned.batch([row])
    if batch.pixels is None:
        raise SiteError("the images themselves are needed for maps of attention, and only features of them were kept")
    prompt = tuned.prompt(batch)
    found = backbone.attention(batch, prompt)[0].numpy()
    image = _seen(batch.pixels[0].float().cpu().numpy(), backbone.sight)
    layers, own = maps(found, backbone.grid)
    of_prompt = prompt.layers is not None
    return Looked(row.index, small(image, SIDE), image.width, image.height, of_prompt, layers, own)


def maps(attention: npt.NDArray[np.floating[Any]], grid: tuple[int, int]) -> tuple[tuple[Map, ...], tuple[Map, ...]]:
    """Mean maps of the first, the middle and the last layer, and maps of single rows in the last one.

    Args:
        attention: [l, p, n], shares of a whole.
        grid: rows and columns of patches; their product is n.

    Returns:
        The maps by layer, and those by row, none where p = 1.
    """
    depth, count, _ = attention.shape
    picked = sorted({0, (depth - 1) // 2, depth - 1})
    layers = tuple(_map(f"layer {layer + 1}", attention[layer].mean(0), grid) for layer in picked)
    if count == 1:
        return layers, ()
    ones = sorted({round(place) for place in np.linspace(0, count - 1, min(count, ROWS))})
    return layers, tuple(_map(f"row {one + 1}", attention[-1, one], grid) for one in ones)


def _map(name: str, values: npt.NDArray[np.floating[Any]], grid: tuple[int, int]) -> Map:
    share, mean = float(values.sum()), float(values.mean())
    peak = float(values.max()) / mean if mean > 0 else 1.0
    return Map(name, share, peak, png(overlay(values.reshape(grid))))


def overlay(values: npt.NDArray[np.floating[Any]]) -> Image.Image:
    """Values from 0 as translucent colours, one pixel for each: [i, j] to an image in RGBA."""
    top = max(float(values.max()), PLAIN * float(values.mean()))
    parts = values / top if top > 0 else np.zeros_like(values)
    stops = np.linspace(0, 1, len(_RAMP))
    colours = [np.interp(parts, stops, _RAMP[:, channel]) for channel in range(3)]
    colours.append(np.full(values.shape, float(_ALPHA)))
    return Image.fromarray(np.stack(colours, axis=-1).round().astype(np.uint8), "RGBA")


def _seen(pixels: npt.NDArray[np.floating[Any]], sight: Any) -> Image.Image:
    """The image as the model sees it, cut and scaled: [3, i, j] back to colours."""
    mean, std = (np.array(numbers)[:, None, None] for numbers in (sight.mean, sight.std))
    colours = ((pixels * std + mean) * 255).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(colours.transpose(1, 2, 0))
