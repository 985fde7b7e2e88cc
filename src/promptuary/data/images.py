"""Pictures: opened from whatever holds them, checked to the last byte, and turned into what a model sees.

Knows no task, model or data set; what a model wants is told by its `Sight`.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from promptuary.data.augment import AugmentConfig
from promptuary.errors import DataError
from promptuary.seeds import seeded
from promptuary.types import Sight

Source = str | bytes | Image.Image

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
"""Endings of the files that count as images in a folder, whatever their case."""

UNNAMED = "the image"

_DAMAGE = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, LookupError, TypeError, OverflowError, RuntimeError
)  # fmt: skip
"""What Pillow's readers raise for a damaged file, one format this and another that."""

_WORKERS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Picture:
    """An image that is opened when it is needed.

    `source`: a path, the bytes of a file, or an image in memory; `name`: what messages call it.
    `view`: seed and further numbers that a random view is drawn from, as `augment` says; None is the plain image.
    """

    source: Source = field(repr=False)
    name: str = UNNAMED
    augment: AugmentConfig | None = None
    view: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return self.name

    @cached_property
    def digest(self) -> str:
        """16 hex digits over the file, or over the pixels of an image in memory; asking once checks the whole image.

        Raises:
            DataError: as `opened`.
        """
        return check_image(self)

    def opened(self) -> Image.Image:
        """The whole image, in RGB, as its EXIF data say that it stands.

        Of several frames the first one. What is transparent keeps its colour. Of 16 bits the upper 8 count.

        Raises:
            DataError: one line that names the image: it is missing, empty, no image, cut short, damaged, or too large.
        """
        return self._decoded(self._content())

    def pixels(self, sight: Sight) -> Float[Tensor, "3 i j"]:
        """What a model sees: the image, or a random view of it; the same view is the same to the last bit.

        Without a view as transformers' own image processors do it: resized, the middle cut out (or framed with black
        where it is smaller), divided by 255, normalised.

        Raises:
            DataError: as `opened`.
        """
        image = self.opened()
        if self.view is None or self.augment is None or not self.augment.varies_images:
            return _normalised(_middle(image, sight), sight)
        generator = seeded(*self.view)
        if self.augment.crop is None:
            image = _middle(image, sight)
        else:
            box = random_box(image.size, self.augment.crop, generator)
            image = image.crop(box).resize(sight.size[::-1], _filter(sight))
        if float(torch.rand((), generator=generator)) < self.augment.flip:
            image = ImageOps.mirror(image)
        return _normalised(image, sight)

    def _content(self) -> bytes | Image.Image:
        if not isinstance(self.source, str):
            return self.source
        try:
            return Path(self.source).read_bytes()
        except FileNotFoundError:
            where = "" if self.name == self.source else f" (looked for {self.source})"
            raise DataError(f"{self.name} does not exist{where}") from None
        except IsADirectoryError:
            raise DataError(f"{self.name} is a folder, not an image") from None
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise DataError(f"{self.name} cannot be read: {reason}") from None

    def _decoded(self, content: bytes | Image.Image) -> Image.Image:
        if isinstance(content, bytes) and not content:
            raise DataError(f"{self.name} is empty (0 bytes)")
        try:
            image = Image.open(io.BytesIO(content)) if isinstance(content, bytes) else content
            if 0 in image.size:
                raise DataError(f"{self.name} has no pixels (its size is {image.width} x {image.height})")
            image.load()
        except Image.DecompressionBombError:
            limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
            raise DataError(f"{self.name} is too large: it has more than {limit:,} pixels; make it smaller") from None
        except UnidentifiedImageError:
            raise DataError(f"{self.name} is no image, or of a kind that Pillow cannot read") from None
        except MemoryError:
            raise DataError(f"{self.name} is too large for the memory of this machine; make it smaller") from None
        except _DAMAGE as error:
            reason = str(error).partition("\n")[0]
            raise DataError(f"{self.name} is cut short or damaged ({reason})") from None
        return self._rgb(self._upright(image))

    def _upright(self, image: Image.Image) -> Image.Image:
        try:
            return ImageOps.exif_transpose(image)
        except _DAMAGE:  # what stands beside the pixels is damaged: nothing says that it should be turned
            return image

    def _rgb(self, image: Image.Image) -> Image.Image:
        if image.mode == "F":
            raise DataError(f"{self.name} holds numbers with fractions, which have no fixed white; save it with 8 bits")
        if image.mode.startswith("I"):
            # Pillow's own conversion cuts off at 255 instead of scaling
            image = Image.fromarray((np.asarray(image).clip(0, 0xFFFF) >> 8).astype(np.uint8))
        if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
            image = image.convert("RGBA")
        return image.convert("RGB")


def check_image(picture: Picture) -> str:
    """Decode an image to its last byte.

    Returns:
        16 hex digits over its content.

    Raises:
        DataError: as `Picture.opened`.
    """
    content = picture._content()
    image = picture._decoded(content)
    shown = content if isinstance(content, bytes) else f"{image.size}".encode() + image.tobytes()
    return hashlib.sha256(shown).hexdigest()[:16]


def picture_of(value: Any, name: str = UNNAMED, folder: Path | None = None) -> Picture:
    """What a field of an example holds, as a picture.

    Args:
        value: a path, the bytes of a file, both in a mapping of `bytes` and `path` (as `datasets` stores images), an
            image of Pillow, an array of whole numbers from 0 to 255 [i, j], [i, j, 3] or [i, j, 4], or a picture.
        name: what messages call it, if it has no path.
        folder: where a relative path begins; None is the working directory.

    Raises:
        DataError: nothing, or another kind of value. Whether there is an image behind a path is not looked at.
    """
    if isinstance(value, Picture):
        return value
    if isinstance(value, Image.Image):
        return Picture(value, name)
    if isinstance(value, bytes | bytearray):
        return Picture(bytes(value), name)
    if isinstance(value, np.ndarray):
        return Picture(_from_array(value, name), name)
    if isinstance(value, Mapping) and "bytes" in value:
        path, content = value.get("path"), value["bytes"]
        return picture_of(path, name, folder) if content is None else Picture(content, str(path or name))
    # NaN, the only thing that differs from itself, is how pandas writes what is missing
    if value is None or (isinstance(value, float) and value != value) or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{name} is missing or blank")
    if not isinstance(value, str | Path):
        raise DataError(f"{name} should be a path or an image, got {type(value).__name__}")
    if str(value).startswith(("http://", "https://")):
        raise DataError(f"{name} is an address, {value}; download it and give the path")
    path = Path(value).expanduser()
    return Picture(str(path if folder is None else folder / path), str(value))


def stacked(pictures: Sequence[Picture], sight: Sight) -> Float[Tensor, "b 3 i j"]:
    """What a model sees of several pictures, in their order.

    Raises:
        DataError: as `Picture.opened`.
    """
    if len(pictures) == 1:
        return pictures[0].pixels(sight)[None]
    with ThreadPoolExecutor(_WORKERS) as pool:
        return torch.stack(list(pool.map(Picture.pixels, pictures, [sight] * len(pictures))))


def problems(pictures: Sequence[Picture]) -> list[str | None]:
    """Why each picture cannot be used; None if it can."""
    with ThreadPoolExecutor(_WORKERS) as pool:
        return list(pool.map(_problem, pictures))


def random_box(
    size: tuple[int, int], scale: tuple[float, float], generator: torch.Generator
) -> tuple[int, int, int, int]:
    """A random part of an image: left, top, right and lower edge.

    Its area is a uniform part of the whole one, its ratio of width to height log-uniform from 3/4 to 4/3; where ten
    tries do not fit, the largest part in the middle that has such a ratio.

    Source: Szegedy et al. 2015 (arXiv 1409.4842), section 6, in the form that is common as "random resized crop".

    Args:
        size: width and height.
        scale: least and most area, as parts of the whole.
        generator: the only source of chance.
    """
    width, height = size
    low, high = math.log(3 / 4), math.log(4 / 3)
    for _ in range(10):
        share, bent = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        area = width * height * (scale[0] + share * (scale[1] - scale[0]))
        ratio = math.exp(low + bent * (high - low))
        wide, tall = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < tall <= height:
            top = int(torch.randint(height - tall + 1, (), generator=generator))
            left = int(torch.randint(width - wide + 1, (), generator=generator))
            return left, top, left + wide, top + tall
    wide, tall = min(width, max(1, round(height * 4 / 3))), min(height, max(1, round(width * 4 / 3)))
    left, top = (width - wide) // 2, (height - tall) // 2
    return left, top, left + wide, top + tall


def _problem(picture: Picture) -> str | None:
    try:
        picture.digest  # noqa: B018 (asking is what checks)
    except DataError as error:
        return str(error)
    return None


def _from_array(value: np.ndarray[Any, Any], name: str) -> Image.Image:
    if value.dtype != np.uint8:
        raise DataError(f"{name} is an array of {value.dtype}; expected uint8, from 0 to 255")
    if value.size == 0:
        raise DataError(f"{name} has no pixels (its shape is {value.shape})")
    if value.ndim == 3 and value.shape[2] == 1:
        value = value[:, :, 0]
    if value.ndim != 2 and not (value.ndim == 3 and value.shape[2] in (3, 4)):
        raise DataError(
            f"{name} is an array of shape {value.shape}; expected height, width and 3 colours, in this order"
        )
    return Image.fromarray(value)


def _filter(sight: Sight) -> Image.Resampling:
    return Image.Resampling(sight.resample)


def _middle(image: Image.Image, sight: Sight) -> Image.Image:
    """Resized, and its middle; black where the resized image is smaller."""
    if isinstance(sight.resize, tuple):
        height, width = sight.resize
    else:
        short, long = sorted(image.size)
        other = int(sight.resize * long / short)
        height, width = (other, sight.resize) if image.height >= image.width else (sight.resize, other)
    image = image.resize((width, height), _filter(sight))
    tall, wide = sight.size
    left, top = (width - wide) // 2, (height - tall) // 2
    return image.crop((left, top, left + wide, top + tall))


def _normalised(image: Image.Image, sight: Sight) -> Float[Tensor, "3 i j"]:
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (sight.mean, sight.std))
    return (values - mean) / std
