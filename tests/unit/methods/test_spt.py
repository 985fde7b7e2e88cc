"""SPT: rows are prototypes of the tokens that enter their own layer, drawn apart, and all else is VPT.

Knows no model: its tokens come from a fake stream. That a model's stream is right is for the tests of the families.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from promptuary.errors import ConfigError
from promptuary.methods.spt import SPT, SPTConfig
from promptuary.methods.vpt import VPT, VPTConfig
from promptuary.prompts.init import Starting
from promptuary.seeds import Chance
from promptuary.testing import tiny
from promptuary.types import Shape, View

BASE = Shape(768, hidden=768, visual=768, depth=12, patch=16, norms=24)
SMALL = Shape(8, hidden=8, visual=8, depth=3, patch=4, norms=6)
EVERY = pytest.mark.parametrize("prototypes", ["random", "mean", "max", "kmeans"])


class Stream:
    """Ten images of nine patches in batches of four; notes how it was asked."""

    def __init__(self, layers: Tensor | None = None) -> None:
        self.layers = torch.randn(3, 10, 9, 8, generator=torch.Generator().manual_seed(5)) if layers is None else layers
        self.asked: list[dict[str, Any]] = []
        self.drawn: list[int] = []

    def tokens(
        self, count: int | None, generator: torch.Generator, *, position: bool, replacement: bool, augmented: bool
    ) -> Iterator[list[Tensor]]:
        self.asked.append({"count": count, "position": position, "replacement": replacement, "augmented": augmented})
        self.drawn.append(int(torch.randint(2**40, (), generator=generator)))
        for place in range(0, self.layers.shape[1], 4):
            yield list(self.layers[:, place : place + 4])


def made(stream: Stream | None = None, seed: int = 0, **settings: Any) -> SPT:
    method = SPT(SPTConfig(**{"num_virtual_tokens": 4, **settings}), SMALL)
    source = torch.Generator().manual_seed(seed)
    method.initialise(Starting(tiny.backbone("bert").vocabulary, source, patches=stream or Stream()))
    return method


def places(rows: Tensor, among: Tensor) -> list[int]:
    """Where each row stands bit for bit among others."""
    found = (rows[:, None] == among[None]).all(-1)
    assert bool((found.sum(1) == 1).all()), "each row is one of them"
    return found.float().argmax(1).tolist()


@pytest.mark.parametrize("deep", [True, False])
def test_random_rows_are_tokens_of_their_own_layer(deep: bool) -> None:
    stream = Stream()
    rows = made(stream, deep=deep).fold().layers
    assert rows is not None
    assert rows.shape == (1, 3 if deep else 1, 4, 8)
    for layer, own in enumerate(rows[0]):
        assert len(set(places(own, stream.layers[layer].flatten(0, 1)))) == 4


@EVERY
@pytest.mark.parametrize("deep", [True, False])
def test_layers_are_drawn_apart(prototypes: str, deep: bool) -> None:
    """The same tokens in every layer give other rows in each; and every strategy works for one layer."""
    same = torch.randn(1, 10, 9, 8, generator=torch.Generator().manual_seed(6)).expand(3, -1, -1, -1)
    rows = made(Stream(same), prototypes=prototypes, deep=deep).rows.detach()
    assert len(rows) == (3 if deep else 1)
    for one in range(len(rows)):
        for other in range(one):
            assert not torch.equal(rows[one].sort(0).values, rows[other].sort(0).values)


@EVERY
def test_one_seed_gives_one_prompt(prototypes: str) -> None:
    first, again, other = (made(seed=seed, prototypes=prototypes).rows for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_kmeans_rows_are_the_means_of_the_tokens_nearest_to_them() -> None:
    stream = Stream()
    rows = made(stream, prototypes="kmeans").rows.detach()
    for own, entering in zip(rows, stream.layers.flatten(1, 2), strict=True):
        labels = torch.cdist(entering, own).argmin(1)
        for number in range(4):
            torch.testing.assert_close(own[number], entering[labels == number].mean(0), atol=1e-5, rtol=0)
    few = made(stream, prototypes="kmeans", cluster_tokens=4).rows.detach()
    for own, entering in zip(few, stream.layers.flatten(1, 2), strict=True):
        assert len(set(places(own, entering))) == 4, "as many tokens as clusters: each is a cluster"


@pytest.mark.parametrize("kind", ["mean", "max"])
def test_pooled_rows_are_windows_of_one_image_ours_and_official(kind: str) -> None:
    """Nine patches: ours 2, 2, 2, 3; the release's three of three and, nothing being left, the whole image."""
    stream = Stream()
    for official, cut in (
        (False, [(0, 2), (2, 4), (4, 6), (6, 9)]),
        (True, [(0, 3), (3, 6), (6, 9), (0, 9)]),
    ):
        rows = made(stream, prototypes=kind, official=official).rows.detach()
        for own, entering in zip(rows, stream.layers, strict=True):
            parts = [image[begin:end] for image in entering for begin, end in cut]
            pooled = torch.stack([part.mean(0) if kind == "mean" else part.max(0).values for part in parts])
            assert float((own[:, None] - pooled[None]).abs().amax(-1).min(1).values.max()) < 1e-6


def test_the_stream_is_asked_once_for_what_the_settings_say() -> None:
    stream = Stream()
    made(stream)
    made(stream, images=7, position=True)
    made(stream, official=True, images=None)
    assert stream.asked == [
        {"count": 1000, "position": False, "replacement": False, "augmented": False},
        {"count": 7, "position": True, "replacement": False, "augmented": False},
        {"count": None, "position": False, "replacement": True, "augmented": True},
    ]
    made(stream, seed=1)
    assert stream.drawn[0] == stream.drawn[1] != stream.drawn[3], "which images follows from the seed"


def test_without_images_it_says_so_in_one_line() -> None:
    method = SPT(SPTConfig(num_virtual_tokens=4), SMALL)
    with pytest.raises(ConfigError, match="spt starts from patches of the training images") as caught:
        method.initialise(Starting(tiny.backbone("bert").vocabulary, torch.Generator()))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="91 rows were asked for, but the images have 90 patches"):
        made(num_virtual_tokens=91)


def test_the_release_has_no_other_way_than_random_for_one_layer() -> None:
    with pytest.raises(ConfigError, match="expected prototypes: random with official: true and deep: false") as caught:
        SPTConfig.read({"official": True, "deep": False, "prototypes": "mean"}, where="method")
    assert "\n" not in str(caught.value)
    assert made(official=True, deep=False).rows.shape == (1, 4, 8)


@pytest.mark.parametrize(
    ("settings", "published"),
    [({}, 184_320), ({"deep": False, "num_virtual_tokens": 100}, 76_800), ({"frozen": True}, 0)],
)
def test_it_trains_as_many_numbers_as_vpt(settings: dict[str, Any], published: int) -> None:
    assert SPT.count(SPTConfig(**settings), BASE) == VPT.count(VPTConfig(**settings), BASE) == published
    assert sum(value.numel() for value in SPT(SPTConfig(**settings), BASE).parameters()) == published


def test_with_a_heads_numbers_these_are_the_published_totals() -> None:
    """ViT-B: CUB 338,120; over the five fine-grained sets 0.365 M deep, 0.257 M shallow with 100 rows."""
    classes, deep = (200, 555, 102, 120, 196), SPT.count(SPTConfig(), BASE)
    shallow = SPT.count(SPTConfig(deep=False, num_virtual_tokens=100), BASE)
    assert deep + 200 * 769 == 338_120
    heads = sum(number * 769 for number in classes) / 5
    assert round((deep + heads) / 1e6, 3) == 0.365
    assert round((shallow + heads) / 1e6, 3) == 0.257


def test_after_its_start_it_is_vpt() -> None:
    method, other = made(dropout=0.3), VPT(VPTConfig(num_virtual_tokens=4, dropout=0.3), SMALL)
    with torch.no_grad():
        other.rows.copy_(method.rows)
    step = View(chance=Chance(0, 2, torch.tensor([1, 4])))
    for view in (View(), step):
        assert torch.equal(method.prompt(view).layers, other.prompt(view).layers)
    assert [(g.name, g.learning_rate, g.weight_decay) for g in method.trained()] == [
        (g.name, g.learning_rate, g.weight_decay) for g in other.trained()
    ]


def test_frozen_prototypes_have_no_parameters() -> None:
    frozen = made(frozen=True)
    assert list(frozen.parameters()) == []
    assert torch.equal(frozen.prompt(View()).layers[0], made().rows)
