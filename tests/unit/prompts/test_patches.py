"""Samplers of patch tokens: what a row is made of, that every token has its chance, and that cuts do not matter.

Knows no method.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from promptuary.errors import ConfigError
from promptuary.prompts import patches
from promptuary.prompts.patches import KMeans, Pooled, Reservoir, Sampler, clusters, sampler, windows


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stream(images: int = 12, count: int = 9, width: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(images, count, width, generator=seeded(seed)) + 3


def run(one: Sampler, tokens: Tensor, cuts: Sequence[int] = (4,)) -> Tensor:
    """Rows out of a stream that comes in batches of these sizes, over and over."""
    place = number = 0
    while place < len(tokens):
        size = cuts[number % len(cuts)]
        one.update(tokens[place : place + size])
        place, number = place + size, number + 1
    return one.rows()


def places(rows: Tensor, among: Tensor) -> list[int]:
    """Where each row stands bit for bit among others."""
    found = (rows[:, None] == among[None]).all(-1)
    assert bool((found.sum(1) == 1).all()), "each row is one of them"
    return found.float().argmax(1).tolist()


@pytest.mark.parametrize("cuts", [(1,), (12,), (5, 2)])
def test_random_rows_are_different_tokens_of_the_stream_however_it_is_cut(cuts: tuple[int, ...]) -> None:
    tokens = stream()
    found = run(Reservoir(20, seeded(1)), tokens, cuts)
    assert found.shape == (20, 5)
    assert len(set(places(found, tokens.flatten(0, 1)))) == 20
    assert torch.equal(found, run(Reservoir(20, seeded(1)), tokens))
    assert not torch.equal(found, run(Reservoir(20, seeded(2)), tokens))


def test_every_token_and_every_order_is_as_likely_as_any_other() -> None:
    tokens = torch.arange(12.0).view(6, 2, 1)
    source, hits, first = seeded(3), torch.zeros(12), torch.zeros(12)
    trials = 4000
    for _ in range(trials):
        found = run(Reservoir(3, source), tokens, (1, 3))[:, 0].long()
        hits[found] += 1
        first[found[0]] += 1
    # six standard deviations of a binomial
    assert bool(((hits / trials - 3 / 12).abs() < 6 * (3 / 12 * 9 / 12 / trials) ** 0.5).all())
    assert bool(((first / trials - 1 / 12).abs() < 6 * (1 / 12 * 11 / 12 / trials) ** 0.5).all())


def test_a_sample_is_kept_apart_from_the_stream() -> None:
    tokens = stream()
    one = Reservoir(8, seeded())
    one.update(tokens)
    before = one.rows().clone()
    tokens.zero_()
    assert torch.equal(one.rows(), before)


def test_a_sample_of_all_tokens_is_all_of_them() -> None:
    tokens = stream(3, 4)
    assert sorted(places(run(Reservoir(12, seeded()), tokens), tokens.flatten(0, 1))) == list(range(12))


@pytest.mark.parametrize(("count", "length"), [(20, 196), (50, 196), (100, 196), (3, 7), (7, 7), (1, 5)])
def test_our_windows_are_a_partition_of_nearly_equal_parts(count: int, length: int) -> None:
    found = windows(count, length)
    assert [place for begin, end in found for place in range(begin, end)] == list(range(length))
    sizes = {end - begin for begin, end in found}
    assert len(found) == count
    assert max(sizes) - min(sizes) <= 1


def test_official_windows_are_those_of_the_release() -> None:
    found = windows(20, 196, official=True)
    assert found[:2] == [(0, 10), (10, 20)]
    assert found[18:] == [(180, 190), (190, 196)]
    # 100: one patch each, those behind the 99th in none, and the last window is the whole image
    found = windows(100, 196, official=True)
    assert (len(found), found[98], found[99]) == (100, (98, 99), (0, 196))
    for count in (50, 80, 100):
        assert 196 % (196 // (count - 1)) == 0
        assert windows(count, 196, official=True)[-1] == (0, 196)
    # 60: three patches each for 59 windows, one left; 18 patches are in no window
    found = windows(60, 196, official=True)
    inside = {place for begin, end in found for place in range(begin, end)}
    assert len(set(range(196)) - inside) == 18
    whole = [count for count in range(2, 198) if windows(count, 196, official=True)[-1] == (0, 196)]
    assert len(whole) == 150


@pytest.mark.parametrize(("kind", "official"), [("mean", False), ("max", False), ("mean", True), ("max", True)])
@pytest.mark.parametrize("count", [4, 5])
def test_a_pooled_row_is_a_window_of_one_image(kind: str, official: bool, count: int) -> None:
    """Of nine patches the release makes, for 4, three of three and, as 9 mod 3 is 0, the whole image."""
    tokens = stream()
    cut = windows(count, 9, official=official)
    if official:
        assert cut == ([(0, 3), (3, 6), (6, 9), (0, 9)] if count == 4 else [(0, 2), (2, 4), (4, 6), (6, 8), (8, 9)])
    candidates = [
        image[begin:end].mean(0) if kind == "mean" else image[begin:end].max(0).values
        for image in tokens
        for begin, end in cut
    ]
    found = run(Pooled(kind, count, seeded(1), official=official), tokens, (5, 2))
    gap = (found[:, None] - torch.stack(candidates)[None]).abs().amax(-1)
    assert float(gap.min(1).values.max()) < 1e-6
    assert len(set(gap.argmin(1).tolist())) == count
    assert len({place // count for place in gap.argmin(1).tolist()}) > 1, "not all of one image"


def test_windows_that_an_image_cannot_fill_are_refused() -> None:
    with pytest.raises(ConfigError, match="an image has 9 patches, too few for 10 windows"):
        Pooled("mean", 10, seeded()).update(stream())
    assert windows(10, 9, official=True)[-1] == (0, 9)
    with pytest.raises(ConfigError, match="an image has 9 patches, too few for 11 windows"):
        windows(11, 9, official=True)
    with pytest.raises(ConfigError, match="two windows or more"):
        windows(1, 9, official=True)


@pytest.mark.parametrize("kind", ["random", "mean", "max", "kmeans"])
def test_a_stream_that_is_too_short_is_refused(kind: patches.Prototypes) -> None:
    one = sampler(kind, 9, seeded())
    with pytest.raises(ConfigError, match="9 rows were asked for, but the images have 0 patches"):
        one.rows()
    one.update(stream(1))
    if kind in ("random", "kmeans"):
        more = sampler(kind, 10, seeded())
        more.update(stream(1))
        with pytest.raises(ConfigError, match="10 rows were asked for, but the images have 9"):
            more.rows()
    assert one.rows().shape == (9, 5)


@pytest.mark.parametrize("kind", ["random", "mean", "max", "kmeans"])
def test_one_seed_gives_one_set_of_rows(kind: patches.Prototypes) -> None:
    first, again, other = (run(sampler(kind, 4, seeded(seed)), stream()) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_centres_are_means_of_the_tokens_that_are_nearest_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "_CHUNK", 64)
    tokens = stream(40, 10, 6).flatten(0, 1)
    centres, labels = clusters(tokens, 7, seeded())
    for number in range(7):
        expected = tokens[labels == number].double().mean(0).float()
        torch.testing.assert_close(centres[number], expected, atol=1e-5, rtol=0)
    far = torch.cdist(tokens.double(), centres.double())
    torch.testing.assert_close(far.min(1).values, far.gather(1, labels[:, None])[:, 0])
    torch.testing.assert_close(far.argmin(1), labels)


@pytest.mark.parametrize("seed", range(5))
def test_inertia_is_below_that_of_a_random_choice(seed: int) -> None:
    tokens = stream(60, 10, 6, seed).flatten(0, 1)
    centres = run(KMeans(8, seeded(seed)), tokens[None])
    chosen = run(Reservoir(8, seeded(seed)), tokens[None])
    inertia, other = (float(torch.cdist(tokens, one).min(1).values.pow(2).sum()) for one in (centres, chosen))
    assert inertia < 0.9 * other


def test_clusters_that_stand_apart_are_found_far_from_the_origin() -> None:
    middles = 1000 + 20 * torch.eye(6)
    tokens = (middles[:, None] + 0.1 * torch.randn(6, 50, 6, generator=seeded())).transpose(0, 1)
    found = run(KMeans(6, seeded(1)), tokens)
    order = torch.cdist(middles, found).argmin(1)
    torch.testing.assert_close(found[order], tokens.mean(0), atol=1e-3, rtol=0)


def test_tokens_of_few_kinds_give_their_kinds_and_no_cluster_is_empty() -> None:
    tokens = torch.tensor([[0.0, 0.0], [5.0, 1.0]]).repeat(10, 1)
    centres, labels = clusters(tokens, 4, seeded())
    assert sorted(set(labels.tolist())) == [0, 1, 2, 3]
    assert {tuple(row) for row in centres.tolist()} == {(0.0, 0.0), (5.0, 1.0)}


def test_an_empty_cluster_takes_the_farthest_token_of_a_large_one() -> None:
    tokens = torch.tensor([[0.0], [0.1], [4.0], [50.0]])
    centres = torch.tensor([[0.0], [50.0], [-900.0]])
    middle = tokens.mean(0)
    found = patches._nearest(tokens, centres, middle, (tokens - middle).pow(2).sum(1))
    assert found.tolist() == [0, 0, 2, 1]


def test_kmeans_looks_at_no_more_tokens_than_it_may() -> None:
    tokens = stream()
    one = KMeans(3, seeded(), most=30)
    centres = run(one, tokens)
    kept = one.kept.sample()
    assert kept.shape == (30, 5)
    assert len(set(places(kept, tokens.flatten(0, 1)))) == 30
    labels = torch.cdist(kept, centres).argmin(1)
    for number in range(3):
        torch.testing.assert_close(centres[number], kept[labels == number].mean(0), atol=1e-5, rtol=0)
