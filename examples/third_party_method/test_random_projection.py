"""Tests of the random projection: the library's contract, and what is particular to the method.

Knows nothing of Promptuary's own tests.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from promptuary_random_projection import RandomProjection, RandomProjectionConfig, signs

from promptuary import registry
from promptuary.methods.prompt_tuning import PromptTuning, PromptTuningConfig
from promptuary.prompts.init import Starting
from promptuary.testing import check_method, tiny
from promptuary.types import Shape, View

CARD = Path(__file__).parent / "random_projection.md"


@pytest.mark.parametrize("family", ["causal", "seq2seq", "masked", "encoder"])
def test_it_keeps_the_contract(family: str) -> None:
    """Every property of the library's own methods, and the card."""
    check_method(RandomProjection, families=[family], card=CARD)


def test_it_is_found_by_its_name() -> None:
    """Through the entry point, as a user's run file finds it."""
    assert registry.load("methods", "random_projection") is RandomProjection


def test_the_rows_lie_in_the_subspace() -> None:
    """Ten rows of rank three."""
    made = RandomProjection(RandomProjectionConfig(num_virtual_tokens=10, dimension=3), Shape(width=32))
    with torch.no_grad():
        made.z.normal_(generator=torch.Generator().manual_seed(0))
    rows = made.prompt(View()).as_rows().detach()
    assert rows.shape == (10, 32)
    assert int(torch.linalg.matrix_rank(rows)) == 3


def test_with_all_dimensions_it_starts_as_prompt_tuning_does() -> None:
    """Signs of full rank span every row; half of them do not."""
    vocabulary, shape = tiny.backbone("encoder").vocabulary, Shape(width=32)
    plain = PromptTuning(PromptTuningConfig(num_virtual_tokens=5), shape)
    wanted = plain.initialise(Starting(vocabulary, torch.Generator().manual_seed(0))).fold().as_rows()
    for dimension, equal in ((32, True), (16, False)):
        made = RandomProjection(RandomProjectionConfig(num_virtual_tokens=5, dimension=dimension), shape)
        found = made.initialise(Starting(vocabulary, torch.Generator().manual_seed(0))).fold().as_rows()
        assert torch.allclose(found, wanted, atol=1e-5) == equal


def test_the_projection_follows_from_its_seed_alone() -> None:
    """These are the bits for all time: a saved prompt holds the seed, not the matrix."""
    assert signs(2, 8, 0).tolist() == [[-1, -1, -1, -1, 1, -1, -1, -1], [-1, -1, -1, 1, -1, -1, -1, 1]]
    assert not torch.equal(signs(8, 64, 0), signs(8, 64, 1))
    large = signs(64, 256, 0)
    assert set(large.flatten().tolist()) == {-1.0, 1.0}
    assert abs(float(large.mean())) < 0.02
