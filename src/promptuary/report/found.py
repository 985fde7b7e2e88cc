"""Run folders below a folder, as a report sees them: settings, result, validations, words, and what is damaged.

Knows no method, task or page, and never imports torch: what it reads may come from anywhere, so that nothing in it is
trusted, and a file that cannot be used costs a note and nothing else. The folders of the machine are taken out here.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from promptuary.public import public_name
from promptuary.report.values import LOADER, number, scalar, whole, written

OWN = frozenset({"checkpoints", "prompt", "prompts", "weights"})
"""Folders inside a run that hold no runs."""

MARKS = ("result.json", "run.json", "metrics.jsonl", "environment.json")
"""A folder with run.yaml and one of these is a run; run.yaml alone may be anybody's run file."""

SUMMARY = "summary.json"
"""Beside the runs, or in the folder itself: statistics that were made from the same runs."""

TRIALS = "trials"
"""A folder beside `runs`: runs that only chose settings, and were not tested."""

PLACES = frozenset({"model", "source", "out", "cache", "init_prompt", "labels_file", "train", "validation", "test"})
"""Settings that name places, also in the form data/pets; other texts are places only if they look like one."""

_LIMITS = {"run.yaml": 2**20, "metrics.jsonl": 2**27}
_LIMIT, _NODES, _NOTES = 4 * 2**20, 20_000, 60
_PART = re.compile(rb"^[A-Za-z_]+:[^\n]*\n(?:[ \n-][^\n]*\n|\n)*", re.MULTILINE)
_PLACE = re.compile(r"(?:~|\.{1,2})?/[^\0\n]*[^\s/][^\0\n]*|[A-Za-z]:\\[^\0\n]+")
_INSIDE = re.compile(r"(?<![\w:/.~])(?:~|\.{1,2})?(?:/[^\s/'\"`:;,()<>|]+){2,}/?")


@dataclass(frozen=True)
class Seen:
    """One run.

    `place`: its folder below the one that was looked into. `settings`: path such as `method.rank` -> the value as YAML
    in one line; parts are opened one level deep. `hidden`: settings that named a folder of the machine. `result`: as
    result.json says, empty of a run that has not ended. `curve`: validations, (step, score) by step. `steps`: last
    step that is on disk. `bytes`: of what was learnt, on disk. `machine`: tells machines apart, and is not shown.
    """

    place: str
    method: str
    settings: Mapping[str, str]
    hidden: frozenset[str]
    result: Mapping[str, Any]
    metric: str
    curve: tuple[tuple[int, float], ...]
    steps: int
    bytes: int | None
    machine: str

    @property
    def finished(self) -> bool:
        """Whether it has a result."""
        return bool(self.result)

    @property
    def score(self) -> float | None:
        """On the test split, if the run has ended and the score is a number."""
        metrics = self.result.get("metrics")
        return number(metrics.get(self.metric)) if isinstance(metrics, Mapping) else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % bootstrap interval of that score over examples."""
        found = self.result.get("interval_95")
        if not isinstance(found, list) or len(found) != 2:
            return None
        low, high = number(found[0]), number(found[1])
        return None if low is None or high is None or low > high else (low, high)

    @property
    def validation(self) -> float | None:
        """The score by which it was chosen."""
        found = self.result.get("validation")
        return number(found.get(self.metric)) if isinstance(found, Mapping) else None

    def count(self, name: str) -> int | None:
        """A whole number of the result, not below 0."""
        return whole(self.result.get(name))

    def examples(self, split: str) -> int | None:
        """Rows of a split; of several tasks all together."""
        found = self.result.get("examples")
        return whole(found.get(split)) if isinstance(found, Mapping) else None


@dataclass(frozen=True)
class Found:
    """Everything below a folder. `notes`: what was skipped and why, in words; `summaries`: of every summary.json."""

    runs: tuple[Seen, ...]
    notes: tuple[str, ...]
    summaries: tuple[Mapping[str, Any], ...] = ()


class Damaged(Exception):
    """A file is not what it should be; the message completes "skipped: "."""


def look(folder: Path) -> Found:
    """Read all runs below a folder, in the order of their places. Links are not followed.

    Raises:
        OSError: the folder itself cannot be read.
    """
    with os.scandir(folder):
        pass  # os.walk would be silent about it
    runs, notes, summaries = list[Seen](), list[str](), list[Mapping[str, Any]]()
    skipped = 0
    for place, names in _folders(folder):
        shown = "." if place == folder else place.relative_to(folder).as_posix()
        if SUMMARY in names:
            try:
                summaries.append(_json(place / SUMMARY))
            except Damaged as error:
                notes.append(f"{_text(shown)}: {error}; its tests are not shown")
        if not ("result.json" in names or ("run.yaml" in names and any(mark in names for mark in MARKS))):
            continue
        try:
            runs.append(_run(place, shown, names))
        except Damaged as error:
            skipped += 1
            if skipped <= _NOTES:
                notes.append(f"{_text(shown)} was skipped: {error}")
    if skipped > _NOTES:
        notes.append(f"{skipped - _NOTES:,} more runs were skipped for such reasons")
    runs.sort(key=lambda run: _natural(run.place))
    return Found(tuple(runs), (*notes, *_versions(runs)), tuple(summaries))


def _folders(folder: Path) -> Iterator[tuple[Path, set[str]]]:
    """Every folder below, with its files; not what stands inside a run, is being written, or was only tried."""
    for where, folders, names in os.walk(folder):
        inside = OWN if "run.yaml" in names else frozenset({TRIALS}) if "runs" in folders else frozenset()
        folders[:] = sorted(name for name in folders if name not in inside and not name.startswith("."))
        yield Path(where), set(names)


def _run(folder: Path, place: str, names: set[str]) -> Seen:
    if "run.yaml" not in names:
        raise Damaged("run.yaml is missing, so that nobody knows its settings")
    settings, hidden = _settings(folder / "run.yaml")
    method = settings.get("method.name", settings.get("baseline.name"))
    if method is None:
        raise Damaged("run.yaml names neither a method nor a baseline")
    result: Mapping[str, Any] = {}
    metric = ""
    if "result.json" in names:
        result = _json(folder / "result.json")
        metric = result["primary_metric"] if isinstance(result.get("primary_metric"), str) else ""
        if not isinstance(result.get("metrics"), dict) or metric not in result["metrics"]:
            raise Damaged("result.json has no score under the name that it gives as primary_metric")
    steps, curve, metric = _validations(folder / "metrics.jsonl", metric)
    machine = ""
    if "environment.json" in names:
        try:
            about = _json(folder / "environment.json")
            machine = json.dumps([about.get(name) for name in ("processor", "platform", "cores", "threads", "cuda")])
        except Damaged:
            machine = ""  # then its times are compared with none
    shown = scalar(method)
    return Seen(place, shown, settings, hidden, result, metric, curve, steps, _size(folder), machine)


def _settings(file: Path) -> tuple[dict[str, str], frozenset[str]]:
    """Settings as texts, opened one level, without places of the machine."""
    content = _read(file)
    parts = _PART.findall(content)
    if b"".join(parts) != content:
        parts = [content]
    try:
        # most parts stand in many runs, letter by letter, and are read once
        found = [_opened_part(part) for part in parts]
    except (yaml.YAMLError, ValueError, RecursionError):
        raise Damaged("run.yaml is not the YAML that a run writes") from None
    flat = {path: text for part in found for path, text, _ in part}
    return flat, frozenset(path for part in found for path, _, hidden in part if hidden)


@functools.lru_cache(4096)
def _opened_part(part: bytes) -> tuple[tuple[str, str, bool], ...]:
    """Path, written value and whether it named a place, of each setting in a piece of YAML.

    Raises:
        ValueError: it is no mapping, or becomes very large when written out.
        YAMLError: it is no YAML.
    """
    content = yaml.load(part, LOADER)
    if not isinstance(content, dict):
        raise ValueError("no settings")
    _count(content)
    flat = []
    for name, value in content.items():
        inner = value.items() if isinstance(value, dict) and value else [(None, value)]
        for key, one in inner:
            shown = _public(one, str(name if key is None else key))
            flat.append((str(name) if key is None else f"{name}.{key}", written(shown), bool(shown != one)))
    return tuple(flat)


def _count(content: Any) -> None:
    """Refuse what would become very large when written out, as a few lines of YAML can."""
    waiting, seen = [content], 0
    while waiting:
        seen += 1
        if seen > _NODES:
            raise ValueError("too many settings")
        one = waiting.pop()
        if isinstance(one, dict):
            waiting.extend(one.values())
        elif isinstance(one, list):
            waiting.extend(one)


def _public(value: Any, name: str) -> Any:
    """A value without the folders of the machine."""
    if isinstance(value, str):
        if name == "base_url":
            return "address"
        if name in PLACES and len(value) < 4096 and "\0" not in value:
            return _name(value)
        return value.replace("\\", "/").rstrip("/").rpartition("/")[2] if _PLACE.fullmatch(value) else value
    if isinstance(value, dict):
        return {key: _public(one, str(key)) for key, one in value.items()}
    return [_public(one, name) for one in value] if isinstance(value, list) else value


@functools.lru_cache(4096)
def _name(name: str) -> str:
    try:
        return public_name(name)
    except (OSError, RuntimeError):  # a name too long for a file, ~ of nobody
        return name


def without_places(text: str) -> str:
    """A sentence in which paths are reduced to their last parts."""
    return _INSIDE.sub(lambda found: found[0].rstrip("/").rpartition("/")[2], text)


def _validations(file: Path, metric: str) -> tuple[int, tuple[tuple[int, float], ...], str]:
    """Last step, validation scores, and which score that is, if it was not known yet."""
    try:
        content = _read(file)
    except Damaged:
        return 0, (), metric
    found, last = dict[int, float](), 0
    lines = content.splitlines()
    for place, line in enumerate(lines):
        if b'"validation"' not in line and place < len(lines) - 2:
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # the line that was being written when the run was stopped
        step = whole(row.get("step")) if isinstance(row, dict) else None
        if step is None:
            continue
        last = max(last, step)
        if row.get("split") == "validation":
            metric = metric or next((name for name in row if name not in ("step", "split", "calls")), "")
            score = number(row.get(metric))
            if score is not None:
                found[step] = score
    return last, tuple(sorted(found.items())), metric


def _size(folder: Path) -> int | None:
    """Bytes of the prompt, of all prompts, or of the weights."""
    total, seen = 0, False
    for name in ("prompt", "prompts", "weights"):
        for where, _, names in os.walk(folder / name):
            for one in names:
                try:
                    total, seen = total + os.lstat(os.path.join(where, one)).st_size, True
                except OSError:
                    continue
    return total if seen else None


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read(file), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise Damaged(f"{file.name} is damaged: it is no JSON") from None
    if not isinstance(content, dict):
        raise Damaged(f"{file.name} is damaged: it holds no object")
    return content


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _read(file: Path) -> bytes:
    """An ordinary file, neither through a link nor waiting for the other end of a pipe."""
    limit = _LIMITS.get(file.name, _LIMIT)
    try:
        with open(file, "rb", opener=_opened) as opened:
            size = os.fstat(opened.fileno()).st_size
            if size > limit:
                raise Damaged(f"{file.name} has {size:,} bytes, more than belong there")
            return opened.read(size)
    except OSError as error:
        reason = "it is a link" if error.errno == errno.ELOOP else str(error.strerror).lower()
        raise Damaged(f"{file.name} cannot be read: {reason}") from None


def _opened(path: str, flags: int) -> int:
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "It is no ordinary file")
    return handle


def _versions(runs: list[Seen]) -> list[str]:
    """That runs were made by several versions, whose scores and times may differ."""
    notes = []
    for package in ("promptuary", "torch", "transformers"):
        versions = (run.result.get("versions") for run in runs if run.finished)
        counted = Counter(str(one.get(package))[:40] for one in versions if isinstance(one, Mapping) and package in one)
        if len(counted) > 1:
            told = ", ".join(f"{version} ({count:,} runs)" for version, count in sorted(counted.items()))
            notes.append(f"the runs were made by several versions of {package}: {told}")
    return notes


def _text(value: str) -> str:
    """A name of a file, which may hold half characters."""
    return value.encode("utf-8", "replace").decode()


def _natural(place: str) -> tuple[tuple[bool, int, str], ...]:
    """Order in which s2 comes before s10."""
    parts = [(part, part.isascii() and part.isdecimal() and len(part) < 19) for part in re.split(r"([0-9]+)", place)]
    return tuple((counts, int(part) if counts else 0, part) for part, counts in parts if part)
