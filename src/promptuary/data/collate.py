"""Encoded rows to padded batches, and the order of an epoch.

Knows no tokenizer, template or device; everything is on the CPU and padded on the right to the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from promptuary.data.images import stacked
from promptuary.types import IGNORED, Batch, Candidates, Encoded, Sight


@dataclass(frozen=True)
class Row:
    """One encoded example and what is to be learnt from it.

    `index`: its place in the data set; `target`: class index or value; `target_ids`: the answer to be written;
    `choices`: token ids of this example's own candidate answers; `part`: which of the tasks of a run it belongs to.
    `writes`: most tokens that are written for it, where that is its own number.
    """

    encoded: Encoded
    index: int
    target: int | float | None = None
    target_ids: tuple[int, ...] | None = None
    choices: tuple[tuple[int, ...], ...] | None = None
    part: int = 0
    writes: int | None = None


def _padded(rows: Sequence[Sequence[int]], value: int) -> Int[Tensor, "b t"]:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.long)


def _all_or_none(present: Sequence[bool], what: str) -> bool:
    if any(present) and not all(present):
        raise ValueError(f"expected every row of a batch or none to have {what}, got {sum(present)} of {len(present)}")
    return all(present)


def collate(rows: Sequence[Row], pad: int, *, segments: bool, sight: Sight | None = None) -> Batch:
    """One batch of rows; their images are opened, unless it is known of each what the model makes of it.

    Args:
        rows: at least one; all with the same slots and the same kind of target.
        pad: token id of padding.
        segments: whether the model takes segment ids.
        sight: how the model wants images; None for one that does not see.

    Raises:
        ValueError: no rows, or rows of different kinds, or images for a model that does not see.
        DataError: an image cannot be read any more.
    """
    if not rows:
        raise ValueError("expected at least one row in a batch, got none")
    names = rows[0].encoded.slots.keys()
    if any(row.encoded.slots.keys() != names for row in rows):
        raise ValueError("expected the same slots in every row of a batch; fill all rows from one template")
    ids = [row.encoded.ids for row in rows]
    targets = [row.target for row in rows if row.target is not None]
    target_ids = [row.target_ids for row in rows if row.target_ids is not None]
    choices = [row.choices for row in rows if row.choices is not None]
    target = None
    if _all_or_none([row.target is not None for row in rows], "a target"):
        kind = torch.float32 if any(isinstance(value, float) for value in targets) else torch.long
        target = torch.tensor(targets, dtype=kind)
    _all_or_none([row.target_ids is not None for row in rows], "target ids")
    _all_or_none([row.choices is not None for row in rows], "choices")
    images = [row.encoded.image for row in rows if row.encoded.image is not None]
    features = [row.encoded.features for row in rows if row.encoded.features is not None]
    known = len(features) == len(rows)
    if not known and _all_or_none([row.encoded.image is not None for row in rows], "an image") and sight is None:
        raise ValueError("expected rows without images for a model that does not see")
    return Batch(
        input_ids=_padded(ids, pad),
        attention_mask=_padded([[1] * len(row) for row in ids], 0),
        index=torch.tensor([row.index for row in rows]),
        segment_ids=_padded([row.encoded.segments for row in rows], 0) if segments else None,
        slots={name: torch.tensor([row.encoded.slots[name] for row in rows]) for name in names},
        target=target,
        target_ids=_padded(target_ids, IGNORED) if target_ids else None,
        candidates=pad_choices(choices) if choices else None,
        part=torch.tensor([row.part for row in rows]) if any(row.part for row in rows) else None,
        pixels=stacked(images, sight) if images and not known and sight is not None else None,
        features=torch.stack(features) if known else None,
    )


def pad_candidates(ids: Sequence[Sequence[int]]) -> Candidates:
    """The same candidate answers for all rows, [c, k].

    Raises:
        ValueError: no candidates.
    """
    if not ids:
        raise ValueError("expected at least one candidate answer, got none")
    return Candidates(_padded(ids, 0), _padded([[1] * len(answer) for answer in ids], 0).bool())


def pad_choices(choices: Sequence[Sequence[Sequence[int]]]) -> Candidates:
    """Each row its own candidates, [b, c, k]; where a row has fewer than c, the rest has no real token."""
    count = max(len(row) for row in choices)
    flat = pad_candidates([answer for row in choices for answer in (*row, *[()] * (count - len(row)))])
    return Candidates(flat.ids.view(len(choices), count, -1), flat.mask.view(len(choices), count, -1))


def batches(
    lengths: Sequence[int],
    batch_size: int,
    *,
    generator: torch.Generator | None,
    bucket: bool = True,
    window: int = 8,
) -> list[list[int]]:
    """The order of one epoch: places of rows, batch by batch, each exactly once.

    Args:
        lengths: tokens per row.
        batch_size: rows per batch; the last one cut may be smaller.
        generator: shuffles (training). None: longest first, so that memory errors come early (evaluation).
        bucket: whether rows of similar length come together; otherwise the shuffled or the given order stands.
        window: how many batches are sorted by length together, so that the order stays random beyond them.

    Raises:
        ValueError: `batch_size` or `window` is not positive.
    """
    if batch_size < 1 or window < 1:
        raise ValueError(f"expected batch_size and window of at least 1, got {batch_size} and {window}")
    order: list[int] = list(range(len(lengths)))
    span = max(len(lengths), 1)
    if generator is not None:
        order, span = torch.randperm(len(lengths), generator=generator).tolist(), batch_size * window
    if bucket:
        windows = [order[start : start + span] for start in range(0, len(order), span)]
        order = [place for part in windows for place in sorted(part, key=lambda place: -lengths[place])]
    cut = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if bucket and generator is not None:
        cut = [cut[place] for place in torch.randperm(len(cut), generator=generator).tolist()]
    return cut
