"""Examples from the demo, a file, a folder or the hub: read, checked row by row, split and named by a hash.

Knows no task, template or tokenizer; which fields must be there is told by the caller.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import Field, model_validator

from promptuary.data.augment import AugmentConfig
from promptuary.data.check import SHOWN, RowCheck, is_missing, places
from promptuary.data.classes import Chosen, label_name, with_classes
from promptuary.data.folders import image_folders
from promptuary.data.images import Picture, picture_of, problems
from promptuary.data.read import READERS, USUAL_ENDINGS, Example, Table, content, listing, read_table
from promptuary.data.splits import SPLITS, USUAL, Protocol, complete, follow_protocol, naming, sample, split_hash
from promptuary.errors import ConfigError, DataError
from promptuary.registry import suggest
from promptuary.settings import Settings

OnBadRow = Literal["error", "skip"]

_HIDDEN = {"-1": " (-1 hides an answer; data.protocol can do without such a test split)"}
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


class DataConfig(Settings):
    """Which examples a run sees."""

    source: str = Field(
        min_length=1,
        description='"demo" (packaged; yours is ./demo), a folder of files, or of a folder of images for each class, '
        "a training file, or a hub data set",
    )
    subset: str | None = Field(None, description="configuration name of a hub data set, such as sst2 of nyu-mll/glue")
    revision: str | None = Field(None, description="branch, tag or commit of a hub data set")
    train: str | None = Field(None, description="training split on the hub, or file in the folder; None: train")
    validation: str | None = Field(None, description="validation split or file; None: validation, valid, dev or val")
    test: str | None = Field(None, description="test split or file; None: test")
    rename: dict[str, str] = Field(default_factory=dict, description="column in the data -> field of the task")
    label: str = Field("label", description="field that holds the answer (after rename)")
    label_names: tuple[str, ...] | None = Field(None, description="names of integer labels, from 0")
    labels_file: str | None = Field(
        None,
        description="file with the names of the labels, in data.source or elsewhere: a line for each, its name or its "
        "label and its name; or .json",
    )
    classes: Chosen = Field(
        "all",
        description="all labels; or the rows of the first half of them in their order, base, or of the others, new "
        "(base-to-new: CoCoOp, 2203.05557)",
    )
    shots: int | None = Field(None, ge=1, description="few-shot: rows per label, for training and again for validation")
    validation_shots: int | None = Field(
        None, ge=1, description="few-shot: rows per label for validation; None: shots (CoOp, 2109.01134: 4 at most)"
    )
    train_size: int | None = Field(None, ge=1, description="this many training rows by seed; None: all")
    validation_size: int | None = Field(None, ge=1, description="this many validation rows by seed; None: all")
    protocol: Protocol = Field(
        "given",
        description="given: the splits as they are; halve_validation: the official validation, shuffled with seed 42, "
        "is cut into validation and test (ATTEMPT, MPT, DePT: small sets); carve_train: 1000 training rows, seed 42, "
        "become validation and the official validation becomes test (the same papers: large sets); vtab: 800 training "
        "and 200 validation rows, seed 42; vtab_full: these 1000 are all trained on (VTAB-1k, 1910.04867)",
    )
    split_seed: int | None = Field(None, description="of what is sampled; None: the run's seed. Protocols use 42")
    on_bad_row: OnBadRow = Field("error", description="a row that is broken or lacks a field: stop, or leave it out")
    max_length: int = Field(
        256, ge=1, description="most tokens of a text (DePT: 256); fields are cut, never the prompt, label or mask"
    )
    views: int = Field(
        0,
        ge=0,
        description="what a frozen model makes of so many random views of each image (1 without data.augment) is "
        "computed once and kept on disk; as many as epochs gives what 0 gives, which opens every image in each step",
    )
    cache: str | None = Field(None, description="folder for that, which runs may share; None: in the run's own folder")
    augment: AugmentConfig = Field(AugmentConfig(), description="how training texts are varied; off by default")

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> Self:
        if self.shots is not None and (self.train_size is not None or self.validation_size is not None):
            raise ValueError("shots already sets the sizes; leave out train_size and validation_size, or shots")
        if self.validation_shots is not None and self.shots is None:
            raise ValueError("validation_shots goes with shots; set shots, or use validation_size")
        names = self.label_names
        if names is not None and self.labels_file is not None:
            raise ValueError("label_names and labels_file both name the labels; leave one of them out")
        if names is not None and not 1 < len(set(names)) == len(names):
            raise ValueError(f"label_names should be at least two different names, got {listing(names)}")
        return self


@dataclass(frozen=True)
class Splits:
    """The examples of a run.

    `hash`: 16 hex digits over which rows these are and what they hold; `notes`: what was done to get them, and what
    looks odd; `skipped`: the numbers of the bad rows that were left out, by file.
    """

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    hash: str
    notes: tuple[str, ...]
    skipped: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def read_examples(
    path: Path,
    on_bad_row: OnBadRow = "error",
    required: Sequence[str] = (),
    question: Callable[[Example], object] | None = None,
    image: str | None = None,
) -> list[Example]:
    """The rows of one file.

    Args:
        path: the file.
        on_bad_row: "error", or "skip" what is broken.
        required: columns that must be there.
        question: raises DataError for a row that cannot be answered.
        image: the column with images, or with paths to them from the file's folder.

    Raises:
        DataError: as `read_table`; or rows are broken and `on_bad_row` is "error"; or no row is left.
    """
    table = read_table(path)
    columns = _columns(table)
    for name in required:
        if columns and name not in columns:
            raise _no_column(table, name, "")
    table = table if image is None else _with_pictures(table, image)
    rows, bad = {}, dict(table.bad)
    for number, row in table.rows.items():
        try:
            if question is not None:
                question(row)
            rows[number] = row
        except DataError as error:
            bad[number] = str(error)
    settled, _ = _settle(replace(table, rows=rows, bad=bad), on_bad_row, "mend them")
    return list(settled.rows.values())


def _settle(table: Table, on_bad_row: OnBadRow, fix: str) -> tuple[Table, list[str]]:
    """The table without bad rows, and a note on them; an error where they are not to be skipped, or all are bad."""
    if not table.bad:
        return table, []
    numbers = sorted(table.bad)
    if on_bad_row == "error" or not table.rows:
        by_reason: dict[str, list[int]] = {}
        for number in numbers[:SHOWN]:
            by_reason.setdefault(table.bad[number], []).append(number)
        reasons = "; ".join(_reason(table, where, reason) for reason, where in by_reason.items())
        more = f" (and {len(numbers) - SHOWN} more bad rows)" if len(numbers) > SHOWN else ""
        fix = fix if table.rows else "no usable row is left"
        raise DataError(f"{table.name} {reasons}{more}; {fix}")
    rows = "1 bad row" if len(numbers) == 1 else f"{len(numbers)} bad rows"
    return replace(table, bad={}), [f"{rows} skipped: {table.name} {places(table.unit, numbers, table.names)}"]


def _reason(table: Table, numbers: Sequence[int], reason: str) -> str:
    """Where and why, without naming a file twice."""
    name, where = table.names.get(numbers[0]), places(table.unit, numbers, table.names)
    if name is not None and reason.startswith(f"{name} "):
        return where + reason.removeprefix(name)
    return f"{where}: {reason}"


def _columns(table: Table) -> list[str]:
    return list(dict.fromkeys(name for row in table.rows.values() for name in row))


def _no_column(table: Table, name: str, fix: str) -> DataError:
    there = _columns(table)
    if len(there) == 1 and any(mark in there[0] for mark in ";\t|"):
        fix = "; values are separated by commas in .csv and by tabs in .tsv"
        return DataError(f'{table.name} has one column, "{there[0]}"; expected "{name}"{fix}')
    return DataError(f'{table.name} has no column "{name}"{suggest(name, there) or fix} (columns: {listing(there)})')


def _renamed(tables: Mapping[str, Table], rename: Mapping[str, str]) -> dict[str, Table]:
    """All tables after renaming; one that has the new name already may lack the old one, if another has it."""
    known = {name for table in tables.values() for name in _columns(table)}
    renamed = {}
    for split, table in tables.items():
        columns = _columns(table)
        after = [rename.get(name, name) for name in columns]
        for old, new in rename.items():
            if columns and old not in columns and (old not in known or new not in columns):
                raise _no_column(table, old, " to rename")
            if after.count(new) > 1:
                raise ConfigError(f'data.rename makes two columns "{new}" of {table.name}; rename the other one away')
        rows = {n: {rename.get(name, name): value for name, value in row.items()} for n, row in table.rows.items()}
        renamed[split] = replace(table, rows=rows)
    return renamed


def _with_pictures(table: Table, name: str) -> Table:
    """The table with its images in the place of their paths or bytes; rows whose image cannot be read are bad."""
    rows, bad = dict(table.rows), dict(table.bad)
    found: dict[int, Picture] = {}
    for number, row in table.rows.items():
        if is_missing(row.get(name)):
            continue  # said elsewhere
        try:
            found[number] = picture_of(row[name], name, table.folder)
        except DataError as error:
            bad[number] = str(error)
            del rows[number]
    for (number, picture), problem in zip(found.items(), problems(list(found.values())), strict=True):
        if problem is None:
            rows[number] = {**rows[number], name: picture}
        else:
            bad[number] = problem
            del rows[number]
    return replace(table, rows=rows, bad=bad)


def _usable(
    split: str, table: Table, required: Sequence[str], config: DataConfig, check: RowCheck | None
) -> tuple[Table, list[str]]:
    """Name the labels, and find the rows that lack something or that the task cannot use."""
    columns = _columns(table)
    for name in required:
        if columns and name not in columns:
            fix = "task.image: image" if table.unit == "file" else "data.rename"
            raise _no_column(table, name, f"; set {fix}")
    table = table if check is None or check.image is None else _with_pictures(table, check.image)
    rows, bad, names = {}, dict(table.bad), config.label_names
    for number, row in table.rows.items():
        missing = next((name for name in required if is_missing(row.get(name))), None)
        answer = row.get(config.label)
        if missing is not None:
            bad[number] = f"{missing} is missing or blank"
            continue
        if names is not None and not is_missing(answer):
            known = label_name(answer, names)
            if known is None:
                hidden = _HIDDEN.get(str(answer), "")
                bad[number] = f"label {answer!r} is neither 0 to {len(names) - 1} nor one of {listing(names)}{hidden}"
                continue
            row = {**row, config.label: known}
        problem = None if check is None else check.problem(split, row)
        if problem is None:
            rows[number] = row
        else:
            bad[number] = problem
    return _settle(replace(table, rows=rows, bad=bad), config.on_bad_row, "mend them or set data.on_bad_row=skip")


def _pick(where: str, there: Sequence[str], endings: Iterable[str], names: Mapping[str, str | None]) -> dict[str, str]:
    """Which file or hub split is which: the one that was named, or the one with a usual name."""
    chosen = {}
    for split, name in names.items():
        usual = {known + ending for known in USUAL[split] for ending in endings}
        fitting = [name] if name is not None else [known for known in there if known in usual]
        if len(fitting) > 1:
            raise DataError(f"{where} holds {' and '.join(fitting)}; say which one with data.{split}")
        if fitting:
            chosen[split] = fitting[0]
    if "train" not in chosen:
        kinds = "".join(f" {ending}" for ending in endings).replace(" .", ", .").lstrip(",")
        expected = f" ({kinds.strip()})" if kinds.strip() else ""
        raise DataError(f"{where} has nothing named train{expected}; set data.train (it holds {listing(there)})")
    return chosen


def _from_folder(folder: Path, names: Mapping[str, str | None]) -> dict[str, Table]:
    tables = [known + ending for known in USUAL["train"] for ending in USUAL_ENDINGS]
    if not any((folder / name).is_file() for name in ([names["train"]] if names["train"] else tables)):
        images = image_folders(folder, names)
        if images:
            return images
    chosen = _pick(str(folder), content(folder), USUAL_ENDINGS, names)
    return {split: read_table(folder / name) for split, name in chosen.items()}


def _from_hub(config: DataConfig, names: Mapping[str, str | None]) -> dict[str, Table]:
    import datasets

    try:
        found = datasets.load_dataset(config.source, config.subset, revision=config.revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        fix = "check data.source, data.subset and the network"
        raise DataError(f'"{config.source}" is no file or folder, and as a hub data set: {reason}; {fix}') from None
    tables, there = {}, [str(name) for name in found]
    for split, name in _pick(config.source, there, [""], names).items():
        if name not in there:
            raise DataError(f'{config.source} has no split "{name}"{suggest(name, there)} (splits: {listing(there)})')
        rows = dict(enumerate(found[name].to_list(), start=1))
        tables[split] = Table(f"{config.source} {name}", "row", rows, {})
    return tables


def _tables(config: DataConfig, wanted: Sequence[str]) -> dict[str, Table]:
    names = config.model_dump(include={*wanted})
    if config.source == "demo":
        with as_file(files("promptuary.data") / "demo") as folder:
            return _from_folder(folder, names)
    path = Path(config.source).expanduser()
    if path.is_dir():
        return _from_folder(path, names)
    if path.is_file() or path.suffix.lower() in READERS or not _HUB_NAME.fullmatch(config.source):
        if config.train is not None:
            raise ConfigError("data.source is the training file itself; give its folder, or leave out data.train")
        chosen = {**names, "train": path.name}
        return {split: read_table(path.parent / name) for split, name in chosen.items() if name is not None}
    return _from_hub(config, names)


def _names_file(config: DataConfig) -> Path | None:
    """The file with the names of the labels, in the folder of the data or else where the path says."""
    if config.labels_file is None:
        return None
    named, source = Path(config.labels_file).expanduser(), Path(config.source).expanduser()
    beside = (source if source.is_dir() else source.parent) / named
    return beside if beside.is_file() else named


def load(
    config: DataConfig, required: Sequence[str], generator: torch.Generator, check: RowCheck | None = None
) -> Splits:
    """The examples of a run.

    Args:
        config: where they are and how they are split.
        required: fields that every example must have, neither missing nor blank.
        generator: chooses few-shot rows, samples and what is set aside; the protocols use seed 42 alone.
        check: finds the rows that the task cannot use, and what looks odd; a task's `check` makes one.

    Raises:
        DataError: one line that names the file and the rows, the column or the label that is wrong.
        ConfigError: the settings contradict each other or the data.
    """
    # the protocols make their own test split, so the official one, whose answers are often hidden, is not opened
    wanted = ("train", "validation") if config.protocol in ("halve_validation", "carve_train") else SPLITS
    # a label that was named is looked for, also where the task has its answer elsewhere
    names = (config.label_names, config.labels_file)
    by_label = config.shots is not None or config.classes != "all" or names != (None, None) or config.label != "label"
    needed = tuple(dict.fromkeys((*required, config.label))) if by_label else required
    notes: list[str] = []
    found: dict[str, list[tuple[str, int, Example]]] = {}
    units: dict[str, str] = {}
    skipped: dict[str, tuple[int, ...]] = {}
    tables = _renamed(_tables(config, wanted), config.rename)
    if config.classes != "all" or config.labels_file is not None:
        tables, about_classes = with_classes(
            tables, config.label, config.classes, config.label_names, _names_file(config)
        )
        notes += about_classes
    for split, table in tables.items():
        notes += table.notes
        usable, about_skipped = _usable(split, table, needed, config, check)
        found[split] = [(split, number, row) for number, row in usable.rows.items()]
        units[split] = f"{table.name} {table.unit}"
        skipped[table.name] = tuple(sorted({*table.rows, *table.bad} - set(usable.rows)))
        notes += about_skipped
    if config.protocol != "given":
        found, note = follow_protocol(config.protocol, found)
        notes.append(note)
    found, more = complete(found, config.shots, lambda row: row[2][config.label], generator, config.validation_shots)
    for split, size in (("train", config.train_size), ("validation", config.validation_size)):
        if size is not None:
            with naming(split):
                found[split], _ = sample(found[split], size, generator)
    examples = {split: [row for _, _, row in rows] for split, rows in found.items()}
    odd = [] if check is None else check.notes(found, units, {split: table.names for split, table in tables.items()})
    return Splits(
        **examples,
        hash=split_hash(found),
        notes=(*notes, *more, *odd),
        skipped={name: numbers for name, numbers in skipped.items() if numbers},
    )
