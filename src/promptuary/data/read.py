"""One file to numbered rows, and what is wrong with each row that cannot be read.

Knows no split, task or policy on bad rows.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from promptuary.errors import DataError
from promptuary.registry import suggest

Example = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """What a file holds: `rows` and what is wrong with `bad` ones, by number, counted from 1 in `unit`s.

    `folder`: where relative paths in it begin; `names`: what messages call a row instead of its number; `notes`: what
    was left out on reading.
    """

    name: str
    unit: Literal["line", "row", "file"]
    rows: dict[int, Example]
    bad: dict[int, str]
    folder: Path | None = None
    names: Mapping[int, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def text_of(path: Path) -> str:
    """The file as text; bytes that are none stand in it as U+DC80 to U+DCFF, for `_no_text` to find.

    Raises:
        DataError: empty, or another encoding altogether.
    """
    content = path.read_bytes()
    if not content.strip():
        raise DataError(f"{path.name} is empty; expected examples")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path.name} line 1 holds byte {content[0]:#04x}, not UTF-8 text; save it as UTF-8")
    return content.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")


def _no_text(text: str) -> str | None:
    """Which byte makes a part of a file no text; None if there is none."""
    if text.isascii() and "\0" not in text:
        return None
    code = next((ord(one) for one in text if one == "\0" or "\udc80" <= one <= "\udcff"), None)
    return None if code is None else f"holds byte {code & 0xFF:#04x}, not UTF-8 text (save the file as UTF-8)"


def _no_whole_text(path: Path, text: str, line: int) -> None:
    problem = _no_text(text)
    if problem is not None:
        raise DataError(f"{path.name} line {line} {problem}")


def _table(path: Path, unit: Literal["line", "row"], values: Iterable[tuple[int, Example | str]]) -> Table:
    """Numbered rows; a text in the place of a row says why it could not be read."""
    numbered = list(values)
    rows = {number: value for number, value in numbered if isinstance(value, dict)}
    bad = {number: value for number, value in numbered if isinstance(value, str)}
    return Table(path.name, unit, rows, bad, path.parent)


def _object(value: Any) -> Example | str:
    return value if isinstance(value, dict) else f"not an object but a {type(value).__name__}"


def _once(pairs: list[tuple[str, Any]]) -> Example:
    """A JSON object, unless a name stands twice in it."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(next(name for name in names if names.count(name) > 1))
    return made


class _TwiceError(ValueError):
    """A name that stands twice in an object of JSON."""


def _json_line(line: str) -> Example | str:
    try:
        return _no_text(line) or _object(json.loads(line, object_pairs_hook=_once))
    except _TwiceError as error:
        return f'"{error}" stands twice'
    except (ValueError, RecursionError):
        return "not JSON"


def _read_jsonl(path: Path) -> Table:
    # split at "\n" alone: str.splitlines also cuts at U+2028, which JSON allows inside a text
    lines = enumerate(text_of(path).split("\n"), start=1)
    return _table(path, "line", ((number, _json_line(line)) for number, line in lines if line.strip()))


def _read_json(path: Path) -> Table:
    text = text_of(path)
    for line, part in enumerate(text.split("\n"), start=1):
        _no_whole_text(path, part, line)
    try:
        values = json.loads(text, object_pairs_hook=_once)
    except _TwiceError as error:
        raise DataError(f'{path.name}: "{error}" stands twice in one object; keep one of them') from None
    except RecursionError:
        raise DataError(f"{path.name} is not JSON: too many brackets within each other") from None
    except ValueError as error:
        raise DataError(f"{path.name} is not JSON: {error}; a file of one object per line is called .jsonl") from None
    if not isinstance(values, list):
        raise DataError(f"{path.name}: expected a list of objects, got a {type(values).__name__}")
    return _table(path, "row", enumerate(map(_object, values), start=1))


def _records(path: Path, delimiter: str) -> Iterator[tuple[int, Example | str]]:
    """Each record with the line in which it begins; the first one is the header."""
    text, begin = text_of(path), 1
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    try:
        for cells in reader:
            if not header:
                header = cells
                _no_whole_text(path, "".join(cells), begin)
                for name in cells:
                    if cells.count(name) > 1:
                        raise DataError(f'{path.name}: two columns are called "{name}"; rename one')
            elif len(cells) == len(header):
                yield begin, _no_text("\n".join(cells)) or dict(zip(header, cells, strict=True))
            elif cells:
                yield begin, f"{len(cells)} values for {len(header)} columns"
            begin = reader.line_num + 1
    except csv.Error as error:
        fix = "double every quote inside a quoted text, or save as .jsonl"
        raise DataError(f"{path.name}: a quote is out of place in the row of line {begin} ({error}); {fix}") from None


def _listed(line: str) -> Example | str:
    """A line of a list of images: path and label, between them white space."""
    parts = line.rsplit(None, 1)
    if len(parts) < 2:
        return "not a path and a label (a .txt file is a list of images; texts are .jsonl, .csv or .tsv)"
    return _no_text(line) or {"image": parts[0].strip(), "label": parts[1]}


def _read_list(path: Path) -> Table:
    lines = enumerate(text_of(path).split("\n"), start=1)
    return _table(path, "line", ((number, _listed(line.strip())) for number, line in lines if line.strip()))


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
    ".txt": _read_list,
}
"""File ending -> reader."""

USUAL_ENDINGS = tuple(ending for ending in READERS if ending != ".txt")
"""Endings of the files that are looked for; a list of images is named."""


def content(folder: Path) -> list[str]:
    """Names of what a folder holds, sorted."""
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def listing(names: Sequence[str]) -> str:
    """The first ten names, for a message."""
    return (", ".join(names[:10]) + (", ..." if len(names) > 10 else "")) or "nothing"


def read_table(path: Path) -> Table:
    """Read one file.

    Raises:
        DataError: missing, unreadable, empty, damaged or of an unknown ending; broken rows stand in `bad` instead.
    """
    if not path.parent.is_dir():
        raise DataError(f"there is no file {path} (nor the folder {path.parent}); check data.source")
    if not path.is_file():
        there = content(path.parent)
        if path.is_dir():
            raise DataError(f"{path} is a folder, not a file (it holds {listing(content(path))})")
        near = suggest(path.name, [name for name in there if Path(name).suffix.lower() in READERS])
        raise DataError(f"there is no file {path}{near} ({path.parent} holds {listing(there)})")
    if path.suffix.lower() not in READERS:
        raise DataError(f'{path.name}: unknown file ending "{path.suffix}"; expected one of {", ".join(READERS)}')
    try:
        table = READERS[path.suffix.lower()](path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if not table.rows and not table.bad:
        raise DataError(f"{path.name} holds no examples; expected at least one (below the header of a table)")
    return table
