"""Folders of images, one for each class, to numbered rows; with a folder for each split around them or without.

Knows no task and opens no image: a row is a path and the name of the folder that it lies in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from promptuary.data.images import ENDINGS
from promptuary.data.read import Table, listing
from promptuary.data.splits import USUAL
from promptuary.errors import DataError

IMAGE, LABEL = "image", "label"
"""The columns of such a table."""


def image_folders(folder: Path, names: Mapping[str, str | None]) -> dict[str, Table]:
    """The rows of each split; none at all if this is no folder of images.

    Where a folder of a usual name for training lies in it, with a folder for each class, the splits are folders;
    otherwise the folder itself holds the training rows. A folder around all of that changes nothing.

    Args:
        folder: where they lie.
        names: split -> the name of its folder, or None for the usual ones.

    Raises:
        DataError: two folders have usual names of one split, one that was named does not exist, or one holds no images.
    """
    chosen: dict[str, Path] = {}
    source, folder = folder, _innermost(folder)
    for split, name in names.items():
        usual = [folder / known for known in USUAL[split]] if name is None else [source / name]
        there = [path for path in usual if _holds_classes(path)]
        if len(there) > 1:
            found = " and ".join(path.name for path in there)
            raise DataError(f"{folder} holds {found}; say which one with data.{split}")
        if there:
            chosen[split] = there[0]
    if "train" not in chosen and names.get("train") is None and _holds_classes(folder):
        chosen = {"train": folder} | {split: path for split, path in chosen.items() if names[split] is not None}
    if "train" not in chosen:
        return {}
    for split, name in names.items():
        if name is not None and split not in chosen:
            raise DataError(f"{source / name} is no folder with a folder of images for each class; check data.{split}")
    return {split: _table(path, folder) for split, path in chosen.items()}


def _shown(folder: Path) -> list[Path]:
    """What a folder holds, without hidden files."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS and path.is_file()


def _images(folder: Path) -> bool:
    """Whether there is an image in a folder, however deep."""
    return any(_is_image(path) or (path.is_dir() and _images(path)) for path in _shown(folder))


def _holds_classes(folder: Path) -> bool:
    """Whether it is a folder of folders of images, and not one of images itself: a class may be called train."""
    if not folder.is_dir() or any(_is_image(path) for path in _shown(folder)):
        return False
    return any(path.is_dir() and _images(path) for path in _shown(folder))


def _innermost(folder: Path) -> Path:
    """The folder, or the only one in it that holds the classes."""
    inside = [path for path in _shown(folder) if path.is_dir() and _images(path)]
    return _innermost(inside[0]) if len(inside) == 1 and _holds_classes(inside[0]) else folder


def _files(folder: Path) -> list[Path]:
    """All files in a folder, however deep, hidden ones left out."""
    return [file for path in _shown(folder) for file in (_files(path) if path.is_dir() else [path])]


def _table(root: Path, source: Path) -> Table:
    paths = list[str]()
    other, empty = Counter[str](), list[str]()
    for one in _shown(root):
        files = _files(one) if one.is_dir() else []
        images = [file for file in files if _is_image(file)]
        paths += [file.relative_to(root).as_posix() for file in images]
        if one.is_dir() and not images:
            empty.append(one.name)
        other.update(
            file.suffix.lower() or file.name for file in (files if one.is_dir() else [one]) if not _is_image(file)
        )
    within = root.relative_to(source).as_posix() if root.is_relative_to(source) else root.name
    name = source.resolve().name if root == source else f"{source.resolve().name}/{within}"
    numbered = dict(enumerate(sorted(paths), start=1))
    rows = {number: {IMAGE: path, LABEL: path.partition("/")[0]} for number, path in numbered.items()}
    notes = []
    if other:
        notes.append(f"{name}: {other.total()} files that are no images were left out ({listing(sorted(other))})")
    if empty:
        notes.append(f"{name}: folders without images were left out: {listing(empty)}")
    return Table(name, "file", rows, {}, root, numbered, tuple(notes))
