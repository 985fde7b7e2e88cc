"""What a comparison shows: scores with their spread, differences that are shown, ranks, cost, and the tuning budget.

Knows no training and no method by name; rows and scores of examples go in, plain values come out.
"""

from __future__ import annotations

import itertools
import statistics as plain
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from promptuary import files
from promptuary.comparing import statistics
from promptuary.comparing.ledger import Ledger
from promptuary.comparing.rows import MEANS, SUMMARY, collect, remember, write

TEST = "paired multi-bootstrap over seeds and examples (Sellam et al. 2022), Holm-corrected within each block"
"""How methods are compared, in words."""

Row = Mapping[str, Any]


def summarise(ledger: Ledger) -> dict[str, Any]:
    """Write rows.jsonl and summary.json, and give the latter's content.

    Raises:
        StorageError: they cannot be written.
    """
    job = ledger.job
    rows = collect(ledger)
    write(ledger, rows)
    names = list(dict.fromkeys(group.block for group in job.groups))
    blocks = [_block(ledger, name, [row for row in rows if _of(row) == name]) for name in names]
    blocks = [one for one in blocks if one["methods"]]
    units = ledger.units
    failed = [
        {"unit": unit.name, "error": why}
        for unit in units
        if unit.seed is not None and ledger.result(unit) is None and (why := ledger.failed(unit)) is not None
    ]
    tested, how = [unit for unit in units if unit.seed is not None], job.config.tuning
    content = {
        "methods": list(job.config.methods),
        "seeds": list(job.config.seeds),
        "tuning": None if how is None else {**how.model_dump(mode="json"), "trials": _trials(ledger)},
        "reference": job.reference,
        "test": TEST,
        "alpha": statistics.ALPHA,
        "runs": len(tested),
        "finished": len(rows),
        "failed": failed,
        "left": len(tested) - len(rows) - len(failed),
        "trials_left": sum(not ledger.settled(unit) for unit in units if unit.trial is not None),
        "blocks": blocks,
        "ranks": _ranks(blocks, list(job.config.methods)),
    }
    files.write_json(ledger.path / SUMMARY, content)
    return content


def _of(row: Row) -> tuple[str, str, str]:
    return row["backbone"], row["task"], row["budget"]


def _trials(ledger: Ledger) -> int:
    """Trials of each method that is tuned; the job made sure that they are as many for all."""
    return max(group.trials for group in ledger.job.groups)


def _block(ledger: Ledger, name: tuple[str, str, str], rows: Sequence[Row]) -> dict[str, Any]:
    """One task, data size and backbone."""
    backbone, task, budget = name
    content: dict[str, Any] = {"backbone": backbone, "task": task, "budget": budget, "methods": [], "pairs": []}
    if not rows:
        return content
    count, higher = rows[0]["test_examples"], rows[0]["higher_is_better"]
    content |= {"metric": rows[0]["metric"], "higher_is_better": higher, "test_examples": count}
    content |= {"one_example": 1 / count, "small": count < statistics.SMALL, "note": ""}
    by_method: dict[str, list[Row]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    examples = _examples(ledger, by_method)
    content["methods"] = [_method(method, own, examples.get(method)) for method, own in by_method.items()]
    content["note"], content["pairs"] = _pairs(by_method, examples, higher_is_better=higher)
    _cost(content["methods"], ledger.job.reference)
    _best(content)
    return content


def _examples(ledger: Ledger, by_method: Mapping[str, Sequence[Row]]) -> dict[str, dict[int, np.ndarray[Any, Any]]]:
    """Scores of single examples by method and seed; empty where there are none or the examples are not the same."""
    found: dict[str, dict[int, np.ndarray[Any, Any]]] = {}
    known = set()
    for method, rows in by_method.items():
        for row in rows:
            kept = remember(ledger.path, ledger.path / row["folder"], {**row, "primary_metric": row["metric"]})
            known.add((kept["examples"], len(kept["scores"])))
            found.setdefault(method, {})[row["seed"]] = np.asarray(kept["scores"], dtype=np.float64)
    return found if len(known) == 1 and next(iter(known))[1] else {}


def _method(method: str, rows: Sequence[Row], examples: Mapping[int, Any] | None) -> dict[str, Any]:
    """One line of a block's table."""
    mean, deviation = statistics.spread([row["score"] for row in rows])
    first = rows[0]
    interval = None if examples is None else statistics.interval(np.stack(list(examples.values())))
    return {
        "method": method,
        "seeds": [row["seed"] for row in rows],
        "scores": [row["score"] for row in rows],
        "mean": mean,
        "std": deviation,
        "interval_95": interval,
        "best": False,
        "trials": first["trials"],
        "tuning_runs": first["tuning_runs"],
        "settings": first["settings"],
        **{name: first[name] for name in ("trainable_parameters", "prompt_bytes", "added_tokens")},
        **{name: _middle(rows, name) for name in ("seconds_per_step_median", "train_seconds", "peak_memory_bytes")},
    }


def _middle(rows: Sequence[Row], name: str) -> float | None:
    """The median over seeds."""
    values = [row[name] for row in rows if row[name] is not None]
    return plain.median(values) if values else None


def _pairs(
    by_method: Mapping[str, Sequence[Row]], examples: Mapping[str, Mapping[int, Any]], *, higher_is_better: bool
) -> tuple[str, list[dict[str, Any]]]:
    """Every two methods; and why there is no test, if there is none."""
    if len(by_method) < 2:
        return "there is one method alone", []
    metric = next(iter(by_method.values()))[0]["metric"]
    if metric not in MEANS:
        return f"no paired test: {metric} is no mean over examples", []
    if not examples:
        return "no paired test: the runs were not tested on the same examples", []
    seeds = sorted(set.intersection(*(set(own) for own in examples.values())))
    if not seeds:
        return "no paired test: the methods have no seed in common yet", []
    names = list(examples)
    scores = np.stack([np.stack([examples[name][seed] for seed in seeds]) for name in names])
    couples = list(itertools.combinations(range(len(names)), 2))
    drawn = statistics.resampled(scores, rounds=statistics.rounds_for(len(couples)))
    means = scores.mean(axis=(1, 2))
    found = [statistics.between(float(means[a] - means[b]), drawn[:, a], drawn[:, b]) for a, b in couples]
    pairs = []
    for (a, b), one, corrected in zip(couples, found, statistics.holm([one.p for one in found]), strict=True):
        said = statistics.verdict(names[a], names[b], one.difference, corrected, higher_is_better=higher_is_better)
        pairs.append({
            "one": names[a], "other": names[b], "seeds": seeds, "difference": one.difference,
            "interval_95": [one.low, one.high], "p": one.p, "p_corrected": corrected,
            "shown": corrected < statistics.ALPHA and one.difference != 0, "verdict": said,
        })  # fmt: skip
    note = "one seed: how much another seed would change is not known" if len(seeds) == 1 else ""
    return note, pairs


def _best(content: dict[str, Any]) -> None:
    """Mark the best method and those that are not shown to be worse."""
    sign = 1 if content["higher_is_better"] else -1
    top = max(content["methods"], key=lambda one: sign * one["mean"])["method"]
    worse = {
        pair["other"] if pair["one"] == top else pair["one"]
        for pair in content["pairs"]
        if pair["shown"] and top in (pair["one"], pair["other"])
    }
    for one in content["methods"]:
        one["best"] = one["method"] == top or (bool(content["pairs"]) and one["method"] not in worse)


def _cost(methods: Sequence[dict[str, Any]], reference: str | None) -> None:
    """Step time and memory as ratios to the reference, where it is there."""
    base = next((one for one in methods if one["method"] == reference), None)
    for one in methods:
        for name, kind in (("seconds_per_step_median", "step_time_ratio"), ("peak_memory_bytes", "memory_ratio")):
            below = base[name] if base is not None else None
            one[kind] = one[name] / below if below and one[name] is not None else None


def _ranks(blocks: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> dict[str, Any] | None:
    """Average ranks over the blocks in which every method has a score; None without at least two of them."""
    whole = [one for one in blocks if len(one["methods"]) == len(methods)]
    if len(whole) < 2 or len(methods) < 2:
        return None
    means = [{own["method"]: own["mean"] for own in one["methods"]} for one in whole]
    scores = np.array([[own[name] for name in methods] for own in means])
    ranks = statistics.average_ranks(scores, higher_is_better=[one["higher_is_better"] for one in whole])
    distance = statistics.critical_difference(len(methods), len(whole))
    order = sorted(zip(ranks, methods, strict=True))
    said = [
        f"{one} ranks better than {other}"
        for (a, one), (b, other) in itertools.combinations(order, 2)
        if distance is not None and b - a > distance
    ]
    return {
        "average_rank": {name: rank for rank, name in order},
        "blocks": len(whole),
        "critical_difference": distance,
        "verdicts": said or ["no difference in rank is shown"],
    }
