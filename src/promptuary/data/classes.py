"""Classes of a data set: their names, also from a file, and which of them count.

Knows no task and no image.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from promptuary.data.check import is_missing
from promptuary.data.read import Example, Table, listing, text_of
from promptuary.errors import DataError

Chosen = Literal["all", "base", "new"]


def in_order(labels: Iterable[str]) -> list[str]:
    """Labels once each: as numbers if all of them are whole numbers, else as texts."""
    found = set(labels)
    return sorted(found, key=int) if all(label.isdecimal() for label in found) else sorted(found)


def chosen_classes(labels: Sequence[str], which: Chosen) -> list[str]:
    """All classes, or the first half (of an odd number the larger one), "base", or the others, "new".

    Source: CoCoOp (arXiv 2203.05557), section 4.1, and its code for the order and the half.
    """
    half = (len(labels) + 1) // 2
    return list({"all": labels, "base": labels[:half], "new": labels[half:]}[which])


def with_classes(
    tables: Mapping[str, Table], label: str, which: Chosen, given: Sequence[str] | None, file: Path | None
) -> tuple[dict[str, Table], list[str]]:
    """Rows of the classes that count, with the names of their labels if a file has them.

    Args:
        tables: of each split; rows without a label, or with one that has no name, stay as they are.
        label: the column.
        which: which classes count.
        given: names of integer labels, which are also their order.
        file: with the names of the labels, see `class_names`.

    Returns:
        The tables, and notes on what was left out.

    Raises:
        DataError: as `class_names`; or no class is left.
    """
    rows = [row for table in tables.values() for row in table.rows.values()]
    labels = in_order(one for row in rows if (one := _label(row, label, given)) is not None)
    if given is not None:
        labels.sort(key=list(given).index)
    names = {one: one for one in labels} if file is None else class_names(file, labels)
    labels = [one for one in names if one in set(labels)]
    kept, notes = chosen_classes(labels, which), list[str]()
    if not kept:
        raise DataError(f"data.classes={which}: there is no such class among {len(labels)}")
    if which != "all":
        ends = f"{names[kept[0]]} to {names[kept[-1]]}"
        notes.append(f"data.classes={which}: rows of {len(kept)} of {len(labels)} labels, {ends}")
    known = dict.fromkeys(kept)
    found = dict[str, Table]()
    for split, table in tables.items():
        mine = {number: _label(row, label, given) for number, row in table.rows.items()}
        left = {number: row for number, row in table.rows.items() if mine[number] is None or mine[number] in known}
        if file is not None:
            left = {n: row if mine[n] is None else {**row, label: names[str(mine[n])]} for n, row in left.items()}
        found[split] = replace(table, rows=left)
    return found, notes


def _label(row: Example, label: str, given: Sequence[str] | None) -> str | None:
    value = row.get(label)
    if is_missing(value):
        return None
    return str(value) if given is None else label_name(value, given)


def label_name(value: Any, names: Sequence[str]) -> str | None:
    """The name of an integer label, also where the file holds it as text; a name stays. None: neither."""
    if value in names:
        return str(value)
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return names[number] if 0 <= number < len(names) and float(value) == number else None


def class_names(path: Path, labels: Iterable[str]) -> dict[str, str]:
    """The names of the labels in a data set, in the order of the labels.

    Args:
        path: a text file with a line for each class, its name, or its label and its name; or .json, a list of names or
            a mapping from labels to names. Names alone belong to the labels in their order (`in_order`), or to the
            numbers from 0.
        labels: that there are.

    Raises:
        DataError: missing or damaged, a label without a name, or two with the same.
    """
    found = in_order(labels)
    if not path.is_file():
        raise DataError(f"there is no file {path}; check data.labels_file")
    names = _mapping(path, _read(path), found)
    absent = [label for label in found if label not in names]
    if absent:
        raise DataError(f"{path.name} has no name for the label {absent[0]!r} (labels in it: {listing(list(names))})")
    first: dict[str, str] = {}
    for label, name in names.items():
        if first.setdefault(name, label) != label:
            raise DataError(
                f"{path.name} calls two classes {name!r}, {first[name]!r} and {label!r}; change one of them"
            )
    return names


def _read(path: Path) -> Any:
    text = text_of(path)
    if path.suffix.lower() != ".json":
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise DataError(
            f"{path.name} is not JSON; expected a list of names, or a mapping from labels to names"
        ) from None
    entries = list(values.values()) if isinstance(values, dict) else values
    if not isinstance(entries, list) or not all(isinstance(name, str) and name.strip() for name in entries):
        raise DataError(f"{path.name}: expected a list of names, or a mapping from labels to names")
    return values


def _mapping(path: Path, values: Any, labels: Sequence[str]) -> dict[str, str]:
    if isinstance(values, dict):
        return {label: name.strip() for label, name in values.items()}
    parts = [line.split("\t", 1) if "\t" in line else line.split(None, 1) for line in values]
    if path.suffix.lower() != ".json" and all(len(part) == 2 for part in parts):
        pairs = {label.strip(): name.strip() for label, name in parts}
        if set(labels) <= pairs.keys():
            return pairs
    if set(labels) <= set(values):
        return {name: name for name in values}
    if all(label.isdecimal() and int(label) < len(values) for label in labels):
        return {str(number): name for number, name in enumerate(values)}
    if len(values) != len(labels):
        raise DataError(f"{path.name} holds {len(values)} names for {len(labels)} labels ({listing(labels)})")
    return dict(zip(labels, values, strict=True))
