"""A few rows out of a long stream of patch tokens: a uniform sample, pooled windows, or the centres of clusters.

Knows no model and no image: tokens come batch by batch, [b, n, v] for b images of n patches, and are never all held.

The four ways are those of SPT (Wang et al. 2024, arXiv 2402.02382). A sampler has a generator of its own: the same
numbers and the same stream give the same rows.
"""

from __future__ import annotations

import itertools
import math
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from promptuary.errors import ConfigError

Prototypes = Literal["random", "mean", "max", "kmeans"]

ROUNDS = 100
"""Most rounds of Lloyd's algorithm (our choice: what still moves then are single tokens between clusters)."""

_CHUNK = 16_384
"""Tokens that are compared with all centres at once."""


@runtime_checkable
class Sampler(Protocol):
    """Takes a stream of tokens and gives rows."""

    def update(self, tokens: Float[Tensor, "b n v"]) -> None:
        """See the tokens of some images."""

    def rows(self) -> Float[Tensor, "p v"]:
        """The rows, of all that was seen.

        Raises:
            ConfigError: too little was seen.
        """


def sampler(
    kind: Prototypes, count: int, generator: torch.Generator, *, official: bool = False, most: int = 200_000
) -> Sampler:
    """A sampler of `count` rows by its name.

    Args:
        kind: "random" tokens, the "mean" or "max" of windows of one image, or "kmeans" centres.
        count: p, the rows.
        generator: the source of chance, for this sampler alone.
        official: windows as the release cuts them.
        most: tokens that "kmeans" looks at.
    """
    if kind == "random":
        return Reservoir(count, generator)
    if kind == "kmeans":
        return KMeans(count, generator, most=most)
    return Pooled(kind, count, generator, official=official)


class Reservoir:
    """`count` tokens of a stream of unknown length, each set of them as likely as any other; in random order.

    Every token gets a number by chance, and those with the smallest stay. What comes out does not depend on how the
    stream is cut into batches.
    """

    def __init__(self, count: int, generator: torch.Generator) -> None:
        """Set up for `count` rows; `generator` gives one number for each token of the stream."""
        self.generator = generator
        self.seen = 0
        self._keys = torch.full((count,), math.inf, dtype=torch.float64)
        self._kept = torch.empty(0)

    def update(self, tokens: Float[Tensor, "b n v"]) -> None:
        """See some tokens; they are copied where they stay."""
        flat = tokens.flatten(0, 1)
        if self.seen == 0:
            self._kept = flat.new_empty(len(self._keys), flat.shape[1])
        self.seen += len(flat)
        keys = torch.rand(len(flat), generator=self.generator, dtype=torch.float64)
        both = torch.cat([self._keys, keys])
        stays = torch.zeros(len(both), dtype=torch.bool)
        stays[both.topk(len(self._keys), largest=False).indices] = True
        old, new = stays[: len(self._keys)], stays[len(self._keys) :]
        # as many leave as come
        self._kept[~old], self._keys[~old] = flat[new], keys[new]

    def sample(self) -> Float[Tensor, "q v"]:
        """What was kept: `count` tokens, or all where there were fewer."""
        order = self._keys.argsort()[: self.seen]
        return self._kept[order]

    def rows(self) -> Float[Tensor, "p v"]:
        """The tokens, each bit for bit one of the stream.

        Raises:
            ConfigError: the stream was shorter.
        """
        if self.seen < len(self._keys):
            raise _too_few(len(self._keys), self.seen)
        return self.sample()


class Pooled:
    """Windows along the patches of each image, pooled; a uniform sample among the windows of all images.

    The release picks `count` of the windows of all images, and so do we; a mean over images is another reading.
    """

    def __init__(
        self, kind: Literal["mean", "max"], count: int, generator: torch.Generator, *, official: bool = False
    ) -> None:
        """Set up.

        Args:
            kind: what a window becomes, element by element.
            count: p, the rows, and also the windows of an image.
            generator: picks among the windows.
            official: see `windows`.
        """
        self.kind, self.count, self.official = kind, count, official
        self.picked = Reservoir(count, generator)

    def update(self, tokens: Float[Tensor, "b n v"]) -> None:
        """Pool the windows of some images."""
        parts = [tokens[:, begin:end] for begin, end in windows(self.count, tokens.shape[1], official=self.official)]
        pooled = [part.mean(1) if self.kind == "mean" else part.amax(1) for part in parts]
        self.picked.update(torch.stack(pooled, dim=1))

    def rows(self) -> Float[Tensor, "p v"]:
        """The windows that were picked."""
        return self.picked.rows()


def windows(count: int, length: int, *, official: bool = False) -> list[tuple[int, int]]:
    """Begin and end of `count` windows along `length` patches.

    By default a partition: contiguous, of equal length up to one patch (our choice). `official`: as SPT's release cuts
    them, w = length // (count - 1) patches each, and the last one the length mod w that are left at the end of the
    image; where nothing is left, the last one is the whole image. With many windows the end of the image is in none.

    Raises:
        ConfigError: there are more windows than patches, or the release's cut needs two or more.
    """
    if official and count < 2:
        raise ConfigError("the release cuts an image into two windows or more; raise method.num_virtual_tokens")
    if (count - 1 if official else count) > length:
        raise ConfigError(
            f"an image has {length} patches, too few for {count} windows; lower method.num_virtual_tokens, or choose "
            "method.prototypes random or kmeans"
        )
    if not official:
        edges = [place * length // count for place in range(count + 1)]
        return list(itertools.pairwise(edges))
    width = length // (count - 1)
    left = length % width
    whole = [(place * width, (place + 1) * width) for place in range(count - 1)]
    return [*whole, (length - left if left else 0, length)]


class KMeans:
    """Centres of clusters of a uniform sample of the stream.

    Euclidean, started by k-means++, then Lloyd's algorithm to its end or for `ROUNDS` rounds, in float32. The release
    only reads centres from files and does not say how they were made; all of this is our choice.
    """

    def __init__(self, count: int, generator: torch.Generator, *, most: int = 200_000) -> None:
        """Set up.

        Args:
            count: p, the clusters.
            generator: samples the tokens and the first centres.
            most: tokens that are kept; all of the stream where it has no more.
        """
        self.count, self.generator = count, generator
        self.kept = Reservoir(max(most, count), generator)

    def update(self, tokens: Float[Tensor, "b n v"]) -> None:
        """See some tokens."""
        self.kept.update(tokens)

    def rows(self) -> Float[Tensor, "p v"]:
        """The centres.

        Raises:
            ConfigError: fewer tokens than clusters.
        """
        if self.kept.seen < self.count:
            raise _too_few(self.count, self.kept.seen)
        return clusters(self.kept.sample(), self.count, self.generator)[0]


def clusters(
    tokens: Float[Tensor, "n v"], count: int, generator: torch.Generator
) -> tuple[Float[Tensor, "p v"], Int[Tensor, " n"]]:
    """Centres of `count` clusters, each the mean of its tokens, and the cluster of each token.

    Args:
        tokens: at least `count` of them.
        count: p.
        generator: picks the first centres: k-means++, each by chance in proportion to its squared distance to the
            nearest one so far.
    """
    middle = tokens.mean(0)
    # from the middle: what all tokens have in common would drown their distances
    spread = torch.cat([(part - middle).pow(2).sum(1) for part in tokens.split(_CHUNK)])
    first = int(torch.randint(len(tokens), (), generator=generator))
    chosen, far = [first], torch.full((len(tokens),), math.inf)
    for _ in range(count - 1):
        far = torch.minimum(far, spread + _relative(tokens, tokens[chosen[-1:]], middle)[0]).clamp_(min=0)
        far[chosen] = 0
        # tokens that are all the same have no distances
        weights = far if bool(far.any()) else torch.ones_like(far)
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
    centres, labels = tokens[chosen], torch.full((len(tokens),), -1)
    for _ in range(ROUNDS):
        found = _nearest(tokens, centres, middle, spread)
        if torch.equal(found, labels):
            break
        labels, centres = found, _means(tokens, found, count)
    return centres, labels


def _relative(
    tokens: Float[Tensor, "n v"], centres: Float[Tensor, "p v"], middle: Float[Tensor, " v"]
) -> Float[Tensor, "p n"]:
    """Squared distances, less that of the token from the middle."""
    shift = centres - middle
    constant = shift.pow(2).sum(1) + 2 * (shift @ middle)
    return torch.addmm(constant[:, None], shift, tokens.T, alpha=-2)


def _nearest(
    tokens: Float[Tensor, "n v"],
    centres: Float[Tensor, "p v"],
    middle: Float[Tensor, " v"],
    spread: Float[Tensor, " n"],
) -> Int[Tensor, " n"]:
    """The nearest centre of each token; a centre without tokens gets the one that is farthest from its own."""
    parts = [_relative(part, centres, middle).min(0) for part in tokens.split(_CHUNK)]
    labels = torch.cat([part.indices for part in parts])
    sizes = torch.bincount(labels, minlength=len(centres))
    if bool((sizes > 0).all()):
        return labels
    far = spread + torch.cat([part.values for part in parts])
    for empty in (sizes == 0).nonzero()[:, 0].tolist():
        taken = int(far.masked_fill(sizes[labels] < 2, -math.inf).argmax())
        sizes[labels[taken]] -= 1
        labels[taken], sizes[empty] = empty, 1
    return labels


def _means(tokens: Float[Tensor, "n v"], labels: Int[Tensor, " n"], count: int) -> Float[Tensor, "p v"]:
    """The mean of each cluster; sums of chunks are added in float64."""
    total, numbers = torch.zeros(count, tokens.shape[1], dtype=torch.float64), torch.arange(count)[:, None]
    for part, own in zip(tokens.split(_CHUNK), labels.split(_CHUNK), strict=True):
        total += (own == numbers).to(part.dtype) @ part
    return (total / torch.bincount(labels, minlength=count)[:, None]).to(tokens.dtype)


def _too_few(count: int, seen: int) -> ConfigError:
    return ConfigError(
        f"{count} rows were asked for, but the images have {seen} patches (or windows) in all; lower "
        "method.num_virtual_tokens or raise method.images"
    )
