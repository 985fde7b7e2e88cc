"""What the text methods claim of themselves, each tested as it is claimed, with equal steps, on real frozen models.

Knows no result: every row is written by the command that is noted in it.

    python benchmarks/claims.py faster --data DIR       # InfoPrompt: prompt tuning's final score in fewer steps
    python benchmarks/claims.py steadier --data DIR     # StablePT: less spread over starts at 16 shots
    python benchmarks/claims.py transfer --data DIR     # MP2: pre-trained modules beat prompts from scratch at 16 shots
    python benchmarks/claims.py table                   # benchmarks/results/claims.jsonl -> markdown

DIR holds one folder per data set with train, validation and test files. Rows that exist already are skipped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promptuary
from foundation import BACKBONES, RESULTS, SETS, meta, read, write
from promptuary.backbones.base import Backbone, BackboneConfig
from promptuary.building import open_backbone
from promptuary.course import Course
from promptuary.files import to_json
from promptuary.training import Listener, Training

PATH = RESULTS / "claims.jsonl"
TEST_ROWS = 400

WORDS: dict[str, dict[str, Any]] = {
    "sst2": SETS["sst2"]["masked"],
    "subj": SETS["subj"]["masked"],
    "agnews": {
        "template": "{text} this is news about {mask} .",
        "labels": {"politics": "politics", "sports": "sports", "business": "business", "technology": "technology"},
    },
    "mrpc": {
        "template": "{sentence1} {mask} , {sentence2}",
        "labels": {"equivalent": "yes", "not_equivalent": "no"},
    },
    "rte": {
        "template": "{premise} {mask} , {hypothesis}",
        "labels": {"entailment": "yes", "not_entailment": "no"},
    },
    "cb": {
        "template": "{premise} {mask} , {hypothesis}",
        "labels": {"entailment": "yes", "contradiction": "no", "neutral": "maybe"},
    },
}
"""A wording of each set for masked models; words of one token."""

LEARNT_ON, HELD_OUT = ("sst2", "mrpc", "rte", "cb"), ("subj", "agnews")
"""What modules are pre-trained on, and sets of other kinds that they never see."""


def run_of(task: str, data: Path, method: dict[str, Any], *, seed: int, steps: int, **changes: Any) -> dict[str, Any]:
    """One run on the small masked model, as a mapping."""
    train = {"steps": steps, "batch_size": 16, "evaluate_every": max(1, steps // 10), **changes.pop("train", {})}
    return {
        "task": {"name": "classify", "metrics": ["accuracy"], **WORDS[task]},
        "data": {"source": str(data / task), "max_length": 64, **changes.pop("rows", {})},
        "backbone": BACKBONES["splade_tiny"]["backbone"],
        "method": method,
        "train": train,
        "seed": seed,
        **changes,
    }


class Curve(Listener):
    """The validation score after each validation."""

    def __init__(self) -> None:
        """Empty."""
        self.points: list[tuple[int, float]] = []

    def validated(self, row: Any) -> None:
        """Note it."""
        self.points.append((row["step"], row["accuracy"]))


def trained(values: dict[str, Any], backbone: Backbone, folder: Path) -> dict[str, Any]:
    """The facts of one run with its validation curve; tested on the first `TEST_ROWS` rows."""
    curve = Curve()
    run = promptuary.load_run({**values, "out": str(folder)})
    training = Training(run, curve, backbone)
    if isinstance(training.course, Course):
        for test in (training.course.splits.test, training.feed.rows["test"]):
            del test[TEST_ROWS:]
    facts = training.run(resume=False, fresh=False).facts
    kept = ("trainable_parameters", "added_tokens", "best_step", "steps", "forward_calls", "seconds_per_step_median")
    return {
        "run": {**run.model_dump(mode="json", exclude={"out"})},
        "validation": facts["validation"],
        "curve": curve.points,
        "test": facts["metrics"],
        **{name: facts[name] for name in kept},
    }


def cells(claim: str, data: Path) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The runs of a claim: name of the cell, settings."""
    if claim == "faster":
        rows, common = {"train_size": 500, "validation_size": 200}, {"num_virtual_tokens": 4}
        methods = {
            "prompt_tuning": {"name": "prompt_tuning", **common},
            "infoprompt": {"name": "infoprompt", "num_virtual_tokens": 2, "rank": 16},
            "infoprompt without its losses": {
                "name": "infoprompt", "num_virtual_tokens": 2, "rank": 16,
                "representation_weight": 0.0, "head_weight": 0.0, "kl_weight": 0.0,
            },
        }  # fmt: skip
        for task in ("sst2", "subj"):
            for name, method in methods.items():
                for seed in range(5):
                    values = run_of(
                        task, data, method, seed=seed, steps=200, rows={**rows, "split_seed": 0},
                        train={"evaluate_every": 10},
                    )  # fmt: skip
                    yield (claim, task, name, seed), values
    if claim == "steadier":
        methods = {
            "prompt_tuning": {"name": "prompt_tuning", "num_virtual_tokens": 10},
            "stablept": {"name": "stablept", "heads": 4, "modules_lr": 1e-3},
            "stablept, release": {"name": "stablept", "preset": "release", "heads": 4, "modules_lr": 1e-3},
        }
        for task in ("sst2", "subj"):
            for name, method in methods.items():
                for seed in range(10):
                    # the same rows each time: what differs is where the run starts
                    values = run_of(
                        task, data, method, seed=seed, steps=100, rows={"shots": 16, "split_seed": 0},
                        train={"clip": 15.0, "batch_size": 8},
                    )  # fmt: skip
                    yield (claim, task, name, seed), values
    if claim == "transfer":
        sizes = {"num_virtual_tokens": 10, "modules": 4, "intrinsic_dimension": 32}
        sources = {"sources": ["MODULES"]}
        few = {"rows": {"shots": 16}}
        methods = {
            "prompt_tuning": ({"name": "prompt_tuning", "num_virtual_tokens": 10}, {}),
            "mp2, gradient": ({"name": "mp2", "phase": "gradient", **sizes, **sources, "router_lr": 0.05}, {}),
            "mp2, gradient, from scratch": ({"name": "mp2", "phase": "gradient", **sizes, "router_lr": 0.05}, {}),
            "mp2, black-box": (
                {"name": "mp2", "phase": "blackbox", **sizes, **sources, "router_share": 0.1},
                {"solver": {"name": "evolution", "population": 20}},
            ),
            "bbt": ({"name": "bbt", "num_virtual_tokens": 10, "intrinsic_dimension": 32}, {}),
        }
        for task in HELD_OUT:
            for name, (method, more) in methods.items():
                for seed in range(5):
                    yield (claim, task, name, seed), run_of(task, data, method, seed=seed, steps=100, **few, **more)


def modules(data: Path, backbone: Backbone, folder: Path, command: str) -> None:
    """Pre-train MP2's modules on the sets that are not held out."""
    values = run_of(
        "sst2", data, {"name": "mp2", "num_virtual_tokens": 10, "modules": 4, "intrinsic_dimension": 32,
                       "router_lr": 0.05, "modules_lr": 5e-3},
        seed=0, steps=2000, train={"evaluate_every": 200, "batch_size": 32},
    )  # fmt: skip
    tasks = {
        name: {
            "task": {"name": "classify", "metrics": ["accuracy"], **WORDS[name]},
            "data": {"source": str(data / name), "max_length": 64, "validation_size": 100 if name != "cb" else None},
        }
        for name in LEARNT_ON
    }
    joint = {key: value for key, value in values.items() if key not in ("task", "data")} | {"tasks": tasks}
    row = trained(joint, backbone, folder)
    write(
        PATH, {"cell": ("transfer", "+".join(LEARNT_ON), "mp2, pre-training", 0), **row, **meta("splade_tiny", command)}
    )


def claim(name: str, data: Path, command: str) -> None:
    """Run what is missing of a claim."""
    done = {tuple(row["cell"]) for row in read(PATH)}
    missing = [(cell, values) for cell, values in cells(name, data) if cell not in done]
    if not missing:
        return
    config = BackboneConfig.read(BACKBONES["splade_tiny"]["backbone"], where="backbone")
    backbone = open_backbone(config)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "modules"
        if any(values["method"].get("sources") for _, values in missing):
            modules(data, backbone, source, command)
        for number, (cell, values) in enumerate(missing):
            if values["method"].get("sources"):
                values["method"] = {**values["method"], "sources": [str(source)]}
            row = trained(values, backbone, Path(folder) / str(number))
            text = to_json(row).decode().replace(str(data), "DIR").replace(str(source), "MODULES")
            write(PATH, {"cell": cell, **json.loads(text), **meta("splade_tiny", command)})


def steps_to(curve: list[list[float]], score: float) -> float:
    """The first step at which a validation reaches a score; infinite if none does."""
    return next((step for step, value in curve if value >= score), float("inf"))


def table() -> str:
    """Markdown of all rows."""
    rows, out = read(PATH), list[str]()
    for name in ("faster", "steadier", "transfer"):
        own = [row for row in rows if row["cell"][0] == name and not row["cell"][2].endswith("pre-training")]
        if not own:
            continue
        out.append(f"\n### {name}\n")
        out.append(
            "| data | method | test accuracy in %, mean ± standard deviation (seeds) | parameters |"
            + (" median steps to prompt tuning's final validation score |" if name == "faster" else "")
        )
        out.append("|---" * (5 if name == "faster" else 4) + "|")
        for task in dict.fromkeys(row["cell"][1] for row in own):
            goal = statistics.mean(row["curve"][-1][1] for row in own if row["cell"][1:3] == [task, "prompt_tuning"])
            for method in dict.fromkeys(row["cell"][2] for row in own):
                found = [row for row in own if row["cell"][1:3] == [task, method]]
                scores = [100 * row["test"]["accuracy"] for row in found]
                spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
                line = f"| {task} | {method} | {statistics.mean(scores):.1f} ± {spread:.1f} ({len(scores)}) "
                line += f"| {found[0]['trainable_parameters']:,} |"
                if name == "faster":
                    line += f" {statistics.median(steps_to(row['curve'], goal) for row in found)} |"
                out.append(line)
    return "\n".join(out)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("faster", "steadier", "transfer", "table"))
    parser.add_argument("--data", type=Path)
    given = parser.parse_args()
    if given.what == "table":
        print(table())
    elif given.data is None:
        parser.error("--data DIR is needed")
    else:
        claim(given.what, given.data, f"python benchmarks/claims.py {given.what} --data DIR")


if __name__ == "__main__":
    sys.exit(main())
