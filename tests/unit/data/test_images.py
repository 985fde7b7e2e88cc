"""Pictures: what a model sees equals transformers' own processors, and what cannot be read is named in one line.

Knows no model; every image is made here.
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from promptuary.data.augment import AugmentConfig
from promptuary.data.images import Picture, check_image, picture_of, problems, random_box, stacked
from promptuary.errors import ConfigError, DataError
from promptuary.types import Sight

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SIGHT = Sight((16, 16), 16)
VARIED = AugmentConfig(crop=(0.08, 1.0), flip=0.5)


def noise(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def coded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    made = io.BytesIO()
    image.save(made, kind, **options)
    return made.getvalue()


def message(value: Any, name: str = "cat.jpg") -> str:
    with pytest.raises(DataError) as caught:
        check_image(picture_of(value, name))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- as transformers sees them --------------------------------------------------------------------------------------

PROCESSORS: list[tuple[str, dict[str, Any], Sight]] = [
    ("vit.image_processing_pil_vit.ViTImageProcessorPil", {}, Sight((224, 224), (224, 224), resample=2)),
    ("clip.image_processing_pil_clip.CLIPImageProcessorPil", {}, Sight((224, 224), 224, *CLIP, resample=3)),
    (
        "bit.image_processing_pil_bit.BitImageProcessorPil",  # what DINOv2 comes with
        {"size": {"shortest_edge": 256}, "image_mean": IMAGENET[0], "image_std": IMAGENET[1]},
        Sight((224, 224), 256, *IMAGENET, resample=3),
    ),
    (
        "deit.image_processing_pil_deit.DeiTImageProcessorPil",
        {"image_mean": IMAGENET[0], "image_std": IMAGENET[1]},
        Sight((224, 224), (256, 256), *IMAGENET, resample=3),
    ),
    (
        "siglip.image_processing_pil_siglip.SiglipImageProcessorPil",
        {"size": {"height": 48, "width": 64}},
        Sight((48, 64), (48, 64), resample=3),
    ),
    (
        "clip.image_processing_pil_clip.CLIPImageProcessorPil",  # the middle is larger than the image: black around it
        {"size": {"shortest_edge": 19}, "crop_size": {"height": 32, "width": 24}},
        Sight((32, 24), 19, *CLIP, resample=3),
    ),
]


@pytest.mark.parametrize("size", [(301, 200), (97, 240), (64, 64), (1, 1)])
@pytest.mark.parametrize(("where", "options", "sight"), PROCESSORS)
def test_pixels_are_those_of_transformers(
    where: str, options: dict[str, Any], sight: Sight, size: tuple[int, int]
) -> None:
    module, name = where.rsplit(".", 1)
    processor = getattr(__import__(f"transformers.models.{module}", fromlist=[name]), name)(**options)
    image = noise(*size)
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    found = Picture(image).pixels(sight)
    assert found.shape == (3, *sight.size) == expected.shape
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_file_its_bytes_an_array_and_an_image_are_one(tmp_path: Path) -> None:
    image = noise()
    image.save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    forms: list[Any] = [
        str(tmp_path / "a.png"),
        tmp_path / "a.png",
        content,
        bytearray(content),
        {"bytes": content, "path": None},
        {"bytes": None, "path": str(tmp_path / "a.png")},
        image,
        np.asarray(image),
    ]
    seen = stacked([picture_of(form) for form in forms], SIGHT)
    assert all(torch.equal(seen[0], one) for one in seen)
    assert len({picture_of(form).digest for form in forms[:6]}) == 1
    assert len({picture_of(form).digest for form in forms[6:]}) == 1
    assert picture_of("a.png", folder=tmp_path).digest == picture_of(content).digest
    assert (str(picture_of("a.png", folder=tmp_path)), str(picture_of(image))) == ("a.png", "the image")
    assert picture_of({"bytes": content, "path": "b/c.png"}).name == "b/c.png"


def test_another_image_has_another_digest() -> None:
    assert picture_of(noise(seed=1)).digest != picture_of(noise(seed=2)).digest
    wide, tall = Image.new("RGB", (2, 1)), Image.new("RGB", (1, 2))
    assert picture_of(wide).digest != picture_of(tall).digest


# ---- kinds of images ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_and_not_cut_off(kind: str) -> None:
    values = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    opened = picture_of(coded(Image.fromarray(values), kind)).opened()
    assert np.asarray(opened)[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("CMYK", "JPEG"), ("L", "JPEG"), ("L", "PNG"), ("1", "PNG"), ("P", "GIF"), ("RGBA", "PNG"), ("LA", "PNG")],
)
def test_every_mode_becomes_three_colours(mode: str, kind: str) -> None:
    image = noise().convert(mode)
    opened = picture_of(coded(image, kind)).opened()
    assert (opened.mode, opened.size) == ("RGB", (40, 30))
    assert np.asarray(opened).std() > 10
    assert picture_of(image).pixels(SIGHT).isfinite().all()


def test_a_palette_with_transparency_keeps_its_colours() -> None:
    image = noise().convert("RGB").quantize(16)
    content = coded(image, "PNG", transparency=bytes([0] * 8))
    assert np.array_equal(np.asarray(picture_of(content).opened()), np.asarray(image.convert("RGB")))


def test_numbers_with_fractions_are_refused() -> None:
    assert "fractions" in message(Image.fromarray(np.ones((2, 2), dtype=np.float32)))


def test_an_image_stands_as_its_exif_data_say() -> None:
    image = Image.new("RGB", (20, 10), "red")
    image.paste("blue", (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned right by a quarter
    opened = picture_of(coded(image, "PNG", exif=exif)).opened()
    assert opened.size == (10, 20)
    assert opened.getpixel((5, 2)) == (0, 0, 255)
    assert opened.getpixel((5, 17)) == (255, 0, 0)


def test_the_first_of_several_frames_counts() -> None:
    content = coded(noise(seed=1), "TIFF", save_all=True, append_images=[noise(seed=2)])
    assert np.array_equal(np.asarray(picture_of(content).opened()), np.asarray(noise(seed=1)))


# ---- what cannot be read --------------------------------------------------------------------------------------------


def huge_png() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "cat.jpg is empty (0 bytes)"),
        (b"these are words", "cat.jpg is no image, or of a kind that Pillow cannot read"),
        (coded(noise())[:-400], "cat.jpg is cut short or damaged ("),
        (coded(noise(), "PNG")[:-2000], "cat.jpg is cut short or damaged ("),
        (coded(noise(), "BMP")[:200], "cat.jpg is cut short or damaged ("),
        (huge_png(), "cat.jpg is too large: it has more than "),
    ],
)
def test_a_bad_file_is_named_with_its_reason(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "cat.jpg").write_bytes(content)
    assert message(content).startswith(expected)
    picture = picture_of("cat.jpg", folder=tmp_path)
    with pytest.raises(DataError) as caught:
        picture.pixels(SIGHT)
    assert str(caught.value).startswith(expected)
    good = picture_of(noise())
    assert problems([good, picture, good]) == [None, str(caught.value), None]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_damage_anywhere_is_an_error_or_an_image_and_never_a_crash(kind: str) -> None:
    good, chance = coded(noise(12, 9), kind), np.random.default_rng(0)
    for trial in range(150):
        content = bytearray(good)
        for place in chance.integers(0, min(len(content), 200 if trial % 2 else len(content)), 3):
            content[place] = chance.integers(0, 256)
        try:
            assert Picture(bytes(content)).pixels(SIGHT).shape == (3, 16, 16)
        except DataError as error:
            assert "\n" not in str(error)  # noqa: PT017 (either is right)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "cat.jpg is missing or blank"),
        (" ", "cat.jpg is missing or blank"),
        (float("nan"), "cat.jpg is missing or blank"),
        ({"bytes": None, "path": None}, "cat.jpg is missing or blank"),
        (3, "cat.jpg should be a path or an image, got int"),
        ([1], "cat.jpg should be a path or an image, got list"),
        ("http://x.org/a.jpg", "cat.jpg is an address, http://x.org/a.jpg; download it and give the path"),
        (np.zeros((2, 2), dtype=np.float32), "cat.jpg is an array of float32; expected uint8, from 0 to 255"),
        (np.zeros((0, 2, 3), dtype=np.uint8), "cat.jpg has no pixels (its shape is (0, 2, 3))"),
        (
            np.zeros((3, 8, 8), dtype=np.uint8),
            "cat.jpg is an array of shape (3, 8, 8); expected height, width and 3 colours, in this order",
        ),
        ("no/such.jpg", "no/such.jpg does not exist"),
        ("nul\0.jpg", "nul\0.jpg cannot be read: embedded null byte"),
        (Image.new("RGB", (0, 4)), "cat.jpg has no pixels (its size is 0 x 4)"),
    ],
)
def test_a_wrong_value_is_refused(value: Any, expected: str) -> None:
    assert message(value) == expected


def test_a_folder_is_no_image(tmp_path: Path) -> None:
    assert message(tmp_path) == f"{tmp_path} is a folder, not an image"


# ---- views ----------------------------------------------------------------------------------------------------------


def test_the_same_view_is_the_same_and_another_is_not() -> None:
    image = noise()
    views = [Picture(image, augment=VARIED, view=(0, 4, epoch, 7)).pixels(SIGHT) for epoch in range(20)]
    again = [Picture(image, augment=VARIED, view=(0, 4, epoch, 7)).pixels(SIGHT) for epoch in range(20)]
    assert all(map(torch.equal, views, again))
    assert len({view.numpy().tobytes() for view in views}) == 20
    assert torch.equal(Picture(image, augment=AugmentConfig(), view=(0,)).pixels(SIGHT), Picture(image).pixels(SIGHT))


def test_a_mirror_image_comes_as_often_as_asked() -> None:
    image = noise(16, 16)
    plain, mirrored = Picture(image).pixels(SIGHT), Picture(image).pixels(SIGHT).flip(2)
    config = AugmentConfig(flip=0.25)
    views = [Picture(image, augment=config, view=(0, number)).pixels(SIGHT) for number in range(400)]
    assert all(torch.equal(view, plain) or torch.equal(view, mirrored) for view in views)
    assert 70 < sum(torch.equal(view, mirrored) for view in views) < 130


@pytest.mark.parametrize("size", [(200, 100), (100, 200), (150, 150)])
def test_a_random_box_has_the_area_and_the_ratio_that_it_should_have(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    boxes = [random_box(size, (0.08, 0.5), generator) for _ in range(500)]
    areas, ratios = [], []
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
        areas.append((right - left) * (bottom - top) / (size[0] * size[1]))
        ratios.append((right - left) / (bottom - top))
    assert 0.075 < min(areas) < 0.1
    assert 0.45 < max(areas) < 0.51
    assert 0.72 < min(ratios) < 0.8
    assert 1.25 < max(ratios) < 1.37
    assert 0.26 < sum(areas) / 500 < 0.32


def test_where_no_box_fits_it_is_the_largest_in_the_middle() -> None:
    generator = torch.Generator().manual_seed(0)
    assert random_box((1000, 3), (1.0, 1.0), generator) == (498, 0, 502, 3)
    assert random_box((3, 1000), (1.0, 1.0), generator) == (0, 498, 3, 502)
    assert random_box((1, 1), (1.0, 1.0), generator) == (0, 0, 1, 1)


def test_the_whole_image_is_a_view_of_the_whole_image() -> None:
    image = noise(64, 64)
    config = AugmentConfig(crop=(1.0, 1.0))
    seen = Picture(image, augment=config, view=(0,)).pixels(SIGHT)
    assert seen.shape == (3, 16, 16)
    assert not torch.equal(seen, torch.zeros_like(seen))


@pytest.mark.parametrize("crop", [[0, 1], [0.5, 0.2], [0.5, 1.5], [0.5]])
def test_a_crop_is_two_parts(crop: list[float]) -> None:
    with pytest.raises(ConfigError, match="crop"):
        AugmentConfig.read({"crop": crop}, where="data.augment")
