"""What runs have in common and what tells them apart: columns of a table, rows of it, and their names.

Knows no method or task, no score and no file; settings are texts by path, as `found` gives them.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

from promptuary.report.found import Seen
from promptuary.report.samples import said
from promptuary.report.values import scalar

NAME = 60
"""Most characters of a name; our choice."""

CHOICE = (
    *("data.source", "data.subset", "data.revision", "data.train", "data.validation", "data.test", "data.label"),
    *("data.classes", "data.shots", "data.validation_shots", "data.train_size", "data.validation_size"),
    *("data.protocol", "data.label_names", "data.labels_file", "backbone.model", "backbone.revision"),
)
"""Settings that say what is asked of a method: on which data, how many of them, on which model. They make a column."""

SAME = frozenset(
    {
        *("seed", "out", "suite", "data.split_seed", "data.cache", "backbone.device", "backbone.kept_mib"),
        *("train.threads", "train.eval_batch_size", "train.save_every", "train.bucket"),
    }
)
"""Settings that are other numbers for the same method: seeds, places, and how it is computed."""

ABSENT = "not there"
"""A setting that the run's version did not know."""

_WORDS = {"data.shots": "{} shots", "data.train_size": "{} rows", "data.subset": "{}"}
_PLAIN = ("task", "data.source", "backbone.model")


def column_of(run: Seen) -> tuple[str, ...]:
    """What is asked in a run; runs that agree stand in one column."""
    return (_task(run), run.metric, *(run.settings.get(path, ABSENT) for path in CHOICE))


def _task(run: Seen) -> str:
    suite = scalar(run.settings.get("suite", "null"))
    if suite != "null":
        return suite
    joint = [path.removeprefix("tasks.") for path in run.settings if path.startswith("tasks.")]
    return "+".join(joint) or scalar(run.settings.get("task.name", "unknown"))


def column_names(columns: Sequence[tuple[str, ...]]) -> tuple[list[str], list[tuple[str, str]]]:
    """The shortest names that tell columns apart, and what all of them share, by what it is.

    Args:
        columns: as `column_of` gives them, all different.
    """
    paths = ("task", "metric", *CHOICE)
    places = [place for place in range(len(paths)) if len({column[place] for column in columns}) > 1]
    # what a reader looks for comes first; the rest only as far as it is needed
    needed = [place for place in places if paths[place] in (*_PLAIN, *_WORDS)]
    for place in places:
        if len({tuple(column[one] for one in needed) for column in columns}) == len(columns):
            break
        if place not in needed:
            needed.append(place)
    needed = needed or [0]
    names = _joined(paths, needed, columns, brief=True)
    if len(set(names)) < len(names):
        names = _joined(paths, needed, columns, brief=False)
    titles = {"task": "Task", "data.source": "Data", "backbone.model": "Model", "data.shots": "Shots"}
    shared = [
        (title, said(scalar(columns[0][place]), NAME))
        for place, path in enumerate(paths)
        if (title := titles.get(path)) and place not in places and columns[0][place] not in (ABSENT, "null")
    ]
    return [said(name, 2 * NAME) for name in names], shared


def _joined(
    paths: Sequence[str], needed: Sequence[int], columns: Sequence[tuple[str, ...]], *, brief: bool
) -> list[str]:
    """Names from values; in a brief one, what most columns have goes without saying."""
    usual = {place: Counter(column[place] for column in columns).most_common(1)[0][0] for place in needed}
    names = []
    for column in columns:
        parts = [
            _told(paths[one], column[one])
            for one in needed
            if not (brief and paths[one] not in _PLAIN and column[one] == usual[one])
        ]
        names.append(" · ".join(filter(None, parts)) or _told("task", column[0]))
    return names


def _told(path: str, value: str) -> str:
    value = scalar(value)
    if value.startswith("pip:"):
        value = value.partition("/")[0]
    if value in (ABSENT, "null"):
        return "" if path in (*_PLAIN, "data.subset") else "all rows" if path in _WORDS else f"no {path}"
    return said(value if path in _PLAIN else _WORDS.get(path, path.rpartition(".")[2] + " {}").format(value), NAME)


def telling(groups: Sequence[Sequence[Mapping[str, str]]]) -> list[str]:
    """The settings that differ within a group: of a method, within a column.

    A setting that is other in each column, such as a template or a rate that was chosen for each, tells nothing apart.

    Args:
        groups: settings of the runs of one method, a group for each column.
    """
    found = dict[str, None]()
    for group in groups:
        first = group[0]
        for other in group[1:]:
            if other is first or other == first:
                continue
            for path in first.keys() | other.keys():
                known = path in found or path in SAME or path in CHOICE
                if not known and first.get(path, ABSENT) != other.get(path, ABSENT):
                    found[path] = None
    return sorted(found, key=_rank)


def smallest(paths: Sequence[str], variants: Sequence[Mapping[str, str]]) -> list[str]:
    """The fewest of the settings that tell the variants apart; among as many, a method's own and the first ones.

    Args:
        paths: settings that tell them apart together.
        variants: settings of each variant, all different at `paths`.
    """

    def apart(some: Sequence[str]) -> int:
        return len({tuple(variant.get(path, ABSENT) for path in some) for variant in variants})

    for size in range(min(3, len(paths) + 1)):
        for some in itertools.combinations(paths[:40], size):
            if apart(some) == len(variants):
                return list(some)
    chosen = list[str]()
    while apart(chosen) < len(variants):
        chosen.append(max((path for path in paths if path not in chosen), key=lambda path: apart([*chosen, path])))
    return chosen


def variant_name(method: str, paths: Sequence[str], settings: Mapping[str, str]) -> str:
    """The method with the values that tell this variant from others."""
    last = [path.rpartition(".")[2] for path in paths]
    shown = [
        f"{path if last.count(name) > 1 or not path.startswith(('method.', 'baseline.')) else name} "
        f"{said(scalar(settings.get(path, ABSENT)), 24)}"
        for path, name in zip(paths, last, strict=True)
    ]
    return said(method, NAME) + (f" ({', '.join(shown)})" if shown else "")


def _rank(path: str) -> tuple[int, int, str]:
    parts = ("method", "baseline", "solver", "train", "task", "data", "backbone")
    part = path.partition(".")[0]
    return (parts.index(part) if part in parts else len(parts), len(path), path)
