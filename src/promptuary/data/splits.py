"""Seeded choices among rows: few per label, a sample, a half, a part set aside; the published protocols; the hash.

Knows no file, and nothing of a row but what the caller's `label` function answers. Same generator state, same rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch

from promptuary.data.images import Picture
from promptuary.errors import DataError

T = TypeVar("T")

SPLITS = ("train", "validation", "test")

USUAL = {"train": ("train",), "validation": ("validation", "valid", "dev", "val"), "test": ("test",)}
"""Split -> the names under which it is looked for."""

Protocol = Literal["given", "halve_validation", "carve_train", "vtab", "vtab_full"]

PROTOCOL_SEED = 42
"""Seed of the splits that ATTEMPT, MPT, DePT and EPT share, whatever the seed of the run."""

CARVED = 1000
"""Training rows that the same papers set aside as validation."""


@contextmanager
def naming(split: str) -> Iterator[None]:
    """Put the name of a split before the errors about its rows."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{split}: {error}") from None


def _shuffled(count: int, generator: torch.Generator) -> list[int]:
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


def k_shot(
    rows: Sequence[T],
    k: int,
    label: Callable[[T], Hashable],
    generator: torch.Generator,
    expected: Iterable[Hashable] = (),
) -> tuple[list[T], list[T]]:
    """`k` rows of each label by chance.

    Args:
        rows: where to choose from.
        k: rows per label.
        label: gives the label of a row.
        generator: the source of chance.
        expected: labels that must be among them; every label that is there must be anyway.

    Returns:
        The chosen rows and the others, both in their old order.

    Raises:
        DataError: a label has fewer than `k` rows.
    """
    left = {name: k for name in (*expected, *map(label, rows))}
    chosen = set()
    for place in _shuffled(len(rows), generator):
        name = label(rows[place])
        if left[name]:
            left[name] -= 1
            chosen.add(place)
    for name, missing in left.items():
        if missing:
            raise DataError(f"expected {k} rows of each label, but label {name!r} has {k - missing}; lower data.shots")
    return [rows[place] for place in sorted(chosen)], [row for place, row in enumerate(rows) if place not in chosen]


def sample(rows: Sequence[T], count: int, generator: torch.Generator) -> tuple[list[T], list[T]]:
    """`count` rows by chance, whatever their labels, and the others, both in their old order.

    Raises:
        DataError: there are fewer than `count` rows.
    """
    if count > len(rows):
        raise DataError(f"expected {count} rows to choose, but there are {len(rows)}; ask for fewer")
    order = _shuffled(len(rows), generator)
    return [rows[place] for place in sorted(order[:count])], [rows[place] for place in sorted(order[count:])]


def carve(rows: Sequence[T], count: int, seed: int = PROTOCOL_SEED) -> tuple[list[T], list[T]]:
    """The first `count` of the shuffled rows, and the rest: the protocol's own order, so its very rows.

    Raises:
        DataError: nothing would be left.
    """
    if count >= len(rows):
        raise DataError(f"expected more than {count} rows to set {count} aside, but there are {len(rows)}")
    order = _shuffled(len(rows), torch.Generator().manual_seed(seed))
    return [rows[place] for place in order[:count]], [rows[place] for place in order[count:]]


def halve(rows: Sequence[T], seed: int = PROTOCOL_SEED) -> tuple[list[T], list[T]]:
    """The first and the second half of the shuffled rows; of an odd number the second half is the larger one.

    Raises:
        DataError: fewer than two rows.
    """
    if len(rows) < 2:
        raise DataError(f"expected at least 2 rows to cut in half, but there are {len(rows)}")
    return carve(rows, len(rows) // 2, seed)


VTAB = (800, 200)
"""Training and validation rows of VTAB-1k (arXiv 1910.04867, section 2)."""


def _vtab(protocol: Protocol, splits: Mapping[str, list[T]]) -> tuple[dict[str, list[T]], str]:
    """A thousand training rows; either 200 of them are kept for validation, or all of them are trained on."""
    own = next((name for name in ("test", "validation") if splits.get(name)), None)
    if own is None:
        raise DataError(f"data.protocol={protocol} needs a test split, and there is none; set data.test")
    with naming("train"):
        rows = splits["train"]
        if len(rows) < sum(VTAB):
            raise DataError(
                f"expected at least {sum(VTAB)} rows for data.protocol={protocol}, but there are {len(rows)}"
            )
        order = _shuffled(len(rows), torch.Generator().manual_seed(PROTOCOL_SEED))[: sum(VTAB)]
    train, validation = [rows[place] for place in order[: VTAB[0]]], [rows[place] for place in order[VTAB[0] :]]
    note = f"{VTAB[0]} training and {VTAB[1]} validation rows out of {len(rows)} (seed {PROTOCOL_SEED})"
    if protocol == "vtab_full":
        train = [*train, *validation]
        note += (
            f"; all {sum(VTAB)} are trained on, the validation rows among them, so scores on these say nothing: "
            "settle the settings with data.protocol=vtab, and validate at the last step alone (train.evaluate_every)"
        )
    return {"train": train, "validation": validation, "test": splits[own]}, f"{note}; the official {own} rows as test"


def follow_protocol(protocol: Protocol, splits: Mapping[str, list[T]]) -> tuple[dict[str, list[T]], str]:
    """Make the splits of a published protocol: ATTEMPT's, MPT's and DePT's, which make a test split, or VTAB-1k's.

    Args:
        protocol: "halve_validation" (small sets), "carve_train" (large sets), "vtab" or "vtab_full".
        splits: official train and validation; for VTAB-1k train, and test or validation.

    Returns:
        All three splits, and a note that says what was done.

    Raises:
        DataError: no validation split, or for VTAB-1k no test split, or too few rows.
    """
    if protocol in ("vtab", "vtab_full"):
        return _vtab(protocol, splits)
    if "validation" not in splits:
        raise DataError(f"data.protocol={protocol} needs a validation split, and there is none; set data.validation")
    train, official = splits["train"], splits["validation"]
    if protocol == "halve_validation":
        with naming("validation"):
            validation, test = halve(official)
        sizes = f"{len(validation)} validation and {len(test)} test rows"
        note = f"the official validation rows, shuffled with seed {PROTOCOL_SEED}, were cut into {sizes}"
    else:
        with naming("train"):
            validation, train = carve(train, CARVED)
        test = official
        note = f"{CARVED} training rows (seed {PROTOCOL_SEED}) serve as validation, the official validation as test"
    return {"train": train, "validation": validation, "test": test}, note


def complete(
    splits: Mapping[str, list[T]],
    shots: int | None,
    label: Callable[[T], Hashable],
    generator: torch.Generator,
    validation_shots: int | None = None,
) -> tuple[dict[str, list[T]], list[str]]:
    """Fill in the missing splits, and cut training and validation to `shots` rows per label.

    Args:
        splits: train, and what there is of validation and test.
        shots: rows per label, or None for all; the test split is never cut.
        label: gives the label of a row.
        generator: the source of chance.
        validation_shots: rows per label of the validation split, if not as many.

    Returns:
        All three splits in their usual order, and notes on what was missing.

    Raises:
        DataError: too few rows, of a label or at all.
    """
    train, validation, test = splits["train"], splits.get("validation"), splits.get("test") or splits.get("validation")
    notes = []
    if shots is not None:
        with naming("train"):
            train, others = k_shot(train, shots, label, generator)
        if validation is None:
            notes.append("no validation file: its rows were chosen per label among the other training rows")
        with naming("validation"):
            pool = others if validation is None else validation
            validation, _ = k_shot(pool, validation_shots or shots, label, generator, expected=map(label, train))
    elif validation is None:
        if len(train) < 2:
            raise DataError("no validation file, and a single training row cannot be split; add rows, or a file")
        validation, train = sample(train, max(1, len(train) // 10), generator)
        notes.append(f"no validation file: 10 % of the training rows ({len(validation)}) were set aside")
    if "test" not in splits:
        notes.append("no test file: the validation rows serve as test, so test scores are scores on validation")
    return {"train": train, "validation": validation, "test": test or validation}, notes


def _plain(value: Any) -> str:
    """A picture counts by its content, wherever it lies."""
    return value.digest if isinstance(value, Picture) else str(value)


def split_hash(splits: Mapping[str, Iterable[tuple[str, int, Mapping[str, Any]]]]) -> str:
    """16 hex digits over what each split holds, in order.

    Args:
        splits: split name -> its rows as (split of origin, place there, content).
    """
    digest = hashlib.sha256()
    for name, rows in splits.items():
        for origin, place, content in rows:
            line = json.dumps([name, origin, place, content], sort_keys=True, ensure_ascii=False, default=_plain)
            digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()[:16]
