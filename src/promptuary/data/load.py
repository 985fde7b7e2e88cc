"""Examples from the demo, a file, a folder or the hub: read, checked row by row, split and named by a hash.

Knows no task, template or tokenizer; which fields must be there is told by the caller.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator

from promptuary.data.splits import SPLITS, Protocol, complete, follow_protocol, naming, sample, split_hash
from promptuary.errors import ConfigError, DataError
from promptuary.registry import suggest
from promptuary.settings import Settings

Example = dict[str, Any]
OnBadRow = Literal["error", "skip"]

USUAL = {"train": ("train",), "validation": ("validation", "valid", "dev", "val"), "test": ("test",)}
"""Split -> the names under which it is looked for."""

_SHOWN = 5
_HIDDEN = {"-1": " (-1 hides an answer; data.protocol can do without such a test split)"}
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


class DataConfig(Settings):
    """Which examples a run sees."""

    source: str = Field(description='"demo" (packaged; yours is ./demo), a folder, a training file, or a hub data set')
    subset: str | None = Field(None, description="configuration name of a hub data set, such as sst2 of nyu-mll/glue")
    revision: str | None = Field(None, description="branch, tag or commit of a hub data set")
    train: str | None = Field(None, description="training split on the hub, or file in the folder; None: train")
    validation: str | None = Field(None, description="validation split or file; None: validation, valid, dev or val")
    test: str | None = Field(None, description="test split or file; None: test")
    rename: dict[str, str] = Field(default_factory=dict, description="column in the data -> field of the task")
    label: str = Field("label", description="field that holds the answer (after rename)")
    label_names: tuple[str, ...] | None = Field(None, description="names of integer labels, from 0")
    shots: int | None = Field(None, ge=1, description="few-shot: rows per label, for training and again for validation")
    train_size: int | None = Field(None, ge=1, description="this many training rows by seed; None: all")
    validation_size: int | None = Field(None, ge=1, description="this many validation rows by seed; None: all")
    protocol: Protocol = Field(
        "given",
        description="given: the splits as they are; halve_validation: the official validation, shuffled with seed 42, "
        "is cut into validation and test (ATTEMPT, MPT, DePT: small sets); carve_train: 1000 training rows, seed 42, "
        "become validation and the official validation becomes test (the same papers: large sets)",
    )
    split_seed: int | None = Field(None, description="of what is sampled; None: the run's seed. Protocols use 42")
    on_bad_row: OnBadRow = Field("error", description="a row that is broken or lacks a field: stop, or leave it out")
    max_length: int = Field(
        256, ge=1, description="most tokens of a text (DePT: 256); fields are cut, never the prompt, label or mask"
    )

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> Self:
        if self.shots is not None and (self.train_size is not None or self.validation_size is not None):
            raise ValueError("shots already sets the sizes; leave out train_size and validation_size, or shots")
        return self


@dataclass(frozen=True)
class Splits:
    """The examples of a run.

    `hash`: 16 hex digits over which rows these are and what they hold; `notes`: what was done to get them.
    """

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    hash: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """What a file holds: `rows` and what is wrong with `bad` ones, by number, counted from 1 in `unit`s."""

    name: str
    unit: Literal["line", "row"]
    rows: dict[int, Example]
    bad: dict[int, str]


def _text(path: Path) -> str:
    content = path.read_bytes()
    if not content.strip():
        raise DataError(f"{path.name} is empty; expected examples")
    text, at = "", content.find(b"\0")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = error.start
    if at >= 0:
        line = content.count(b"\n", 0, at) + 1
        raise DataError(f"{path.name} line {line} holds byte {content[at]:#04x}, not UTF-8 text; save it as UTF-8")
    return text


def _table(path: Path, unit: Literal["line", "row"], values: Iterable[tuple[int, Example | str]]) -> Table:
    """Numbered rows; a text in the place of a row says why it could not be read."""
    numbered = list(values)
    rows = {number: value for number, value in numbered if isinstance(value, dict)}
    return Table(path.name, unit, rows, {number: value for number, value in numbered if isinstance(value, str)})


def _object(value: Any) -> Example | str:
    return value if isinstance(value, dict) else f"not an object but a {type(value).__name__}"


def _json_line(line: str) -> Example | str:
    try:
        return _object(json.loads(line))
    except ValueError:
        return "not JSON"


def _read_jsonl(path: Path) -> Table:
    # split at "\n" alone: str.splitlines also cuts at U+2028, which JSON allows inside a text
    lines = enumerate(_text(path).split("\n"), start=1)
    return _table(path, "line", ((number, _json_line(line)) for number, line in lines if line.strip()))


def _read_json(path: Path) -> Table:
    try:
        values = json.loads(_text(path))
    except ValueError as error:
        raise DataError(f"{path.name} is not JSON: {error}; a file of one object per line is called .jsonl") from None
    if not isinstance(values, list):
        raise DataError(f"{path.name}: expected a list of objects, got a {type(values).__name__}")
    return _table(path, "row", enumerate(map(_object, values), start=1))


def _records(path: Path, delimiter: str) -> Iterator[tuple[int, Example | str]]:
    """Each record with the line in which it begins; the first one is the header."""
    text, begin = _text(path), 1
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    try:
        for cells in reader:
            if not header:
                header = cells
                for name in cells:
                    if cells.count(name) > 1:
                        raise DataError(f'{path.name}: two columns are called "{name}"; rename one')
            elif len(cells) == len(header):
                yield begin, dict(zip(header, cells, strict=True))
            elif cells:
                yield begin, f"{len(cells)} values for {len(header)} columns"
            begin = reader.line_num + 1
    except csv.Error as error:
        fix = "double every quote inside a quoted text, or save as .jsonl"
        raise DataError(f"{path.name}: a quote is out of place in the row of line {begin} ({error}); {fix}") from None


def _read_parquet(path: Path) -> Table:
    import pyarrow.parquet

    try:
        values = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path.name} cannot be read as parquet: {error}".partition("\n")[0]) from None
    return _table(path, "row", enumerate(values, start=1))


READERS: dict[str, Callable[[Path], Table]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": lambda path: _table(path, "line", _records(path, ",")),
    ".tsv": lambda path: _table(path, "line", _records(path, "\t")),
    ".parquet": _read_parquet,
}
"""File ending -> reader."""


def _content(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def _listing(names: Sequence[str]) -> str:
    return (", ".join(names[:10]) + (", ..." if len(names) > 10 else "")) or "nothing"


def read_table(path: Path) -> Table:
    """Read one file.

    Raises:
        DataError: missing, unreadable, empty, damaged or of an unknown ending; broken rows stand in `bad` instead.
    """
    if not path.parent.is_dir():
        raise DataError(f"there is no file {path} (nor the folder {path.parent}); check data.source")
    if not path.is_file():
        there = _content(path.parent)
        raise DataError(f"there is no file {path}{suggest(path.name, there)} ({path.parent} holds {_listing(there)})")
    if path.suffix.lower() not in READERS:
        raise DataError(f'{path.name}: unknown file ending "{path.suffix}"; expected one of {", ".join(READERS)}')
    try:
        table = READERS[path.suffix.lower()](path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if not table.rows and not table.bad:
        raise DataError(f"{path.name} holds no examples; expected at least one (below the header of a table)")
    return table


def read_examples(path: Path, on_bad_row: OnBadRow = "error") -> list[Example]:
    """The rows of one file.

    Raises:
        DataError: as `read_table`; or rows are broken and `on_bad_row` is "error"; or no row is left.
    """
    table, _ = _settle(read_table(path), on_bad_row)
    return list(table.rows.values())


def _places(unit: str, numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
    return f"{unit}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:_SHOWN]))}{more}"


def _settle(table: Table, on_bad_row: OnBadRow) -> tuple[Table, list[str]]:
    """The table without bad rows, and a note on them; an error where they are not to be skipped, or all are bad."""
    if not table.bad:
        return table, []
    numbers = sorted(table.bad)
    if on_bad_row == "error" or not table.rows:
        by_reason: dict[str, list[int]] = {}
        for number in numbers[:_SHOWN]:
            by_reason.setdefault(table.bad[number], []).append(number)
        reasons = "; ".join(f"{_places(table.unit, where)}: {reason}" for reason, where in by_reason.items())
        more = f" (and {len(numbers) - _SHOWN} more bad rows)" if len(numbers) > _SHOWN else ""
        fix = "mend them or set data.on_bad_row=skip" if table.rows else "no usable row is left"
        raise DataError(f"{table.name} {reasons}{more}; {fix}")
    rows = "1 bad row" if len(numbers) == 1 else f"{len(numbers)} bad rows"
    return replace(table, bad={}), [f"{rows} skipped: {table.name} {_places(table.unit, numbers)}"]


def _columns(table: Table) -> list[str]:
    return list(dict.fromkeys(name for row in table.rows.values() for name in row))


def _no_column(table: Table, name: str, fix: str) -> DataError:
    there = _columns(table)
    return DataError(f'{table.name} has no column "{name}"{suggest(name, there) or fix} (columns: {_listing(there)})')


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


def _label_name(value: Any, names: Sequence[str]) -> str | None:
    """The name of an integer label, also where the file holds it as text; a name stays. None: neither."""
    if value in names:
        return str(value)
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return names[number] if 0 <= number < len(names) and float(value) == number else None


def _is_missing(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    # NaN, the only thing that differs from itself, is how pandas writes what is missing
    return value is None or (isinstance(value, float) and value != value)


def _usable(table: Table, required: Sequence[str], config: DataConfig) -> tuple[Table, list[str]]:
    """Name the labels, and find the rows that lack something."""
    columns = _columns(table)
    for field in required:
        if columns and field not in columns:
            raise _no_column(table, field, "; set data.rename")
    rows, bad, names = {}, dict(table.bad), config.label_names
    for number, row in table.rows.items():
        missing = next((field for field in required if _is_missing(row.get(field))), None)
        answer = row.get(config.label)
        if missing is not None:
            bad[number] = f"{missing} is missing or blank"
        elif names is None or _is_missing(answer):
            rows[number] = row
        elif (name := _label_name(answer, names)) is not None:
            rows[number] = {**row, config.label: name}
        else:
            hidden = _HIDDEN.get(str(answer), "")
            bad[number] = f"label {answer!r} is neither 0 to {len(names) - 1} nor one of {_listing(names)}{hidden}"
    return _settle(replace(table, rows=rows, bad=bad), config.on_bad_row)


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
        raise DataError(f"{where} has nothing named train; set data.train (it holds {_listing(there)})")
    return chosen


def _from_folder(folder: Path, names: Mapping[str, str | None]) -> dict[str, Table]:
    chosen = _pick(str(folder), _content(folder), READERS, names)
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
            raise DataError(f'{config.source} has no split "{name}"{suggest(name, there)} (splits: {_listing(there)})')
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


def load(config: DataConfig, required: Sequence[str], generator: torch.Generator) -> Splits:
    """The examples of a run.

    Args:
        config: where they are and how they are split.
        required: fields that every example must have, neither missing nor blank.
        generator: chooses few-shot rows, samples and what is set aside; the protocols use seed 42 alone.

    Raises:
        DataError: one line that names the file and the rows, the column or the label that is wrong.
        ConfigError: the settings contradict each other or the data.
    """
    # the protocols make their own test split, so the official one, whose answers are often hidden, is not opened
    wanted = SPLITS if config.protocol == "given" else ("train", "validation")
    needed = required if config.shots is None else tuple(dict.fromkeys((*required, config.label)))
    notes: list[str] = []
    found: dict[str, list[tuple[str, int, Example]]] = {}
    for split, table in _renamed(_tables(config, wanted), config.rename).items():
        usable, skipped = _usable(table, needed, config)
        found[split] = [(split, number, row) for number, row in usable.rows.items()]
        notes += skipped
    if config.protocol != "given":
        found, note = follow_protocol(config.protocol, found)
        notes.append(note)
    found, more = complete(found, config.shots, lambda row: row[2][config.label], generator)
    for split, size in (("train", config.train_size), ("validation", config.validation_size)):
        if size is not None:
            with naming(split):
                found[split], _ = sample(found[split], size, generator)
    examples = {split: [row for _, _, row in rows] for split, rows in found.items()}
    return Splits(**examples, hash=split_hash(found), notes=(*notes, *more))
