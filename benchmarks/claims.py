"""What the text methods claim of themselves, each tested as it is claimed, with equal steps, on a real frozen model.

Knows no result: every row is written by the command that is noted in it.

    python benchmarks/claims.py faster --data DIR       # InfoPrompt: prompt tuning's final score in fewer steps
    python benchmarks/claims.py instance --data DIR     # IPT: better than a static prompt of the same length
    python benchmarks/claims.py steadier --data DIR     # StablePT: less spread over starts at 16 shots
    python benchmarks/claims.py transfer --data DIR     # MP2: pre-trained modules beat prompts from scratch at 16 shots
    python benchmarks/claims.py table                   # benchmarks/results/claims.jsonl -> markdown

DIR holds one folder per data set with train, validation and test files. Rows that exist already are skipped, and so is
what was pre-trained already, in the folder of --keep, which rows call KEEP. Scores are of 400 test rows, evenly taken
from the whole split.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import promptuary
from foundation import BACKBONES, RESULTS, SETS, meta, read, write
from promptuary.backbones.base import Backbone, BackboneConfig
from promptuary.building import open_backbone
from promptuary.course import Course
from promptuary.files import to_json
from promptuary.training import Listener, Training

PATH = RESULTS / "claims.jsonl"
MODEL = "splade_tiny"
TEST_ROWS = 400
EARLIER = "pre-training"

PAIR = {"template": "{premise} {mask} , {hypothesis}"}
TOPICS = {"world": "world", "sports": "sports", "business": "business", "technology": "technology"}
WORDS: dict[str, dict[str, Any]] = {
    "sst2": SETS["sst2"]["masked"],
    "subj": SETS["subj"]["masked"],
    "cr": {"template": "{text} all in all , it is {mask} .", "labels": {"0": "bad", "1": "good"}},
    "agnews": {"template": "{text} this is news about {mask} .", "labels": TOPICS},
    "mrpc": {
        "template": "{sentence1} {mask} , {sentence2}",
        "labels": {"equivalent": "yes", "not_equivalent": "no"},
    },
    "rte": {**PAIR, "labels": {"entailment": "yes", "not_entailment": "no"}},
    "cb": {**PAIR, "labels": {"entailment": "yes", "contradiction": "no", "neutral": "maybe"}},
}
"""A wording of each set for masked models; words of one token."""

CR_SPLITS = (13, 21, 42, 87, 100)


@dataclass(frozen=True)
class Contender:
    """One side of a comparison: what stands in the run file, and what its trials vary.

    `part` has `method` or `baseline`, and perhaps `solver`; `rates` maps dotted settings to their multiple of a trial.
    """

    part: dict[str, Any]
    rates: dict[str, float]
    trials: tuple[float, ...]


@dataclass(frozen=True)
class Claim:
    """The runs of a claim. The first set is the one that every contender is tuned on, with the seeds `tuned_with`."""

    sets: tuple[str, ...]
    seeds: int
    tuned_with: tuple[int, ...]
    common: dict[str, Any]
    contenders: dict[str, Contender]
    earlier: dict[str, dict[str, Any]] = field(default_factory=dict)


def prompt(name: str, trials: tuple[float, ...] = (0.05, 0.2, 0.5), **settings: Any) -> Contender:
    """A method whose trials are relative rates of its rows."""
    return Contender({"method": {"name": name, **settings}}, {"method.prompt_lr": 1}, trials)


def infoprompt(**settings: Any) -> Contender:
    """InfoPrompt with five rows at each of its two places; maps and head at a fiftieth of the rows' relative rate."""
    rates = {"method.prompt_lr": 1, "method.modules_lr": 0.02}
    part = {"method": {"name": "infoprompt", "num_virtual_tokens": 5, **settings}}
    return Contender(part, rates, (0.05, 0.2, 0.5))


def ipt(earlier: str | None = None, **settings: Any) -> Contender:
    """IPT; the table at 0.6 of the rows' rate as its defaults have it."""
    if earlier is not None:
        settings |= {"table_init": "saved", "sources": [earlier]}
    rates = {"method.prompt_lr": 1.0, "method.table_lr": 0.6}
    return Contender({"method": {"name": "ipt", **TEN, **settings}}, rates, (0.05, 0.2, 0.5))


def mp2(**settings: Any) -> dict[str, Any]:
    """MP2 of the sizes used here."""
    return {"name": "mp2", **TEN, "modules": 4, "intrinsic_dimension": 32, "router_lr": 0.05, **settings}


TEN = {"num_virtual_tokens": 10}
SILENT = {"representation_weight": 0.0, "head_weight": 0.0, "kl_weight": 0.0}
STABLE_RATES = ({"method.modules_lr": 1.0}, (3e-4, 1e-3, 3e-3))
MODULES, LONGER, LEARNT_ON = "mp2", "mp2_longer", ("sst2", "agnews", "mrpc", "rte", "cb")
EVOLVED = {"solver": {"name": "evolution", "population": 20, "budget": 400}}

CLAIMS: dict[str, Claim] = {
    "faster": Claim(
        sets=("sst2", "subj"),
        seeds=5,
        tuned_with=(100,),
        common={
            "data": {"train_size": 500, "validation_size": 300, "split_seed": 0},
            "train": {"steps": 200, "batch_size": 16, "evaluate_every": 10, "save_every": 200},
        },
        contenders={
            "prompt_tuning": prompt("prompt_tuning", **TEN),
            "infoprompt": infoprompt(),
            "infoprompt without its losses": infoprompt(**SILENT),
            "infoprompt, deterministic": infoprompt(representation="deterministic"),
            "infoprompt, deterministic, without its losses": infoprompt(representation="deterministic", **SILENT),
        },
    ),
    "instance": Claim(
        sets=("sst2", "subj"),
        seeds=3,
        tuned_with=(100,),
        common={
            "data": {"validation_size": 300},
            "train": {"steps": 200, "batch_size": 16, "evaluate_every": 40, "save_every": 200},
        },
        contenders={
            "prompt_tuning": prompt("prompt_tuning", **TEN),
            "ipt": ipt(),
            "ipt, pretrained": ipt("ipt_prompt"),
            "prefix": prompt("prefix", **TEN),
            "ipt on prefix": ipt(mode="prefix"),
            "ipt on prefix, pretrained": ipt("ipt_prefix", mode="prefix"),
            # ten times the release's scale of what the instance adds
            "ipt on prefix, scale 0.5": ipt(mode="prefix", instance_scale=0.5),
        },
        earlier={
            f"ipt_{mode}": {
                "set": "agnews",
                "method": {"name": "ipt", **TEN, "mode": mode, "prompt_lr": 0.2, "table_lr": 0.12},
                "train": {"steps": 400, "batch_size": 16, "evaluate_every": 100, "save_every": 400},
            }
            for mode in ("prompt", "prefix")
        },
    ),
    "steadier": Claim(
        sets=("sst2", "subj"),
        seeds=10,
        tuned_with=(100, 101, 102),
        common={
            # the same rows each time, all of them in each step: what differs is the start
            "data": {"shots": 16, "split_seed": 0},
            "train": {"steps": 100, "batch_size": 32, "clip": 15.0},
        },
        contenders={
            # with the template: a soft and a hard prompt in one sequence
            "prompt_tuning": prompt("prompt_tuning", **TEN),
            # ordinary prompt-based tuning: the hard prompt, and every weight; what differs is the dropout of the model
            "full fine-tuning": Contender(
                {"baseline": {"name": "full"}, "backbone": {**BACKBONES[MODEL]["backbone"], "dropout": True}},
                {"baseline.learning_rate": 1.0},
                (1e-4, 3e-4, 1e-3),
            ),
            "stablept": Contender({"method": {"name": "stablept", **TEN, "heads": 4}}, *STABLE_RATES),
            "stablept, release": Contender(
                {"method": {"name": "stablept", "preset": "release", **TEN, "heads": 4}}, *STABLE_RATES
            ),
        },
    ),
    "transfer": Claim(
        sets=("subj", "cr"),
        seeds=5,
        tuned_with=(100, 101),
        common={"data": {"shots": 16}, "train": {"steps": 160, "batch_size": 16}},
        contenders={
            "prompt_tuning": prompt("prompt_tuning", **TEN),
            "mp2": Contender(
                {"method": mp2(phase="gradient", sources=[MODULES])}, {"method.modules_lr": 1}, (1e-3, 4e-3, 1e-2)
            ),
            "mp2 from scratch": Contender(
                {"method": mp2(phase="gradient")}, {"method.modules_lr": 1}, (1e-3, 4e-3, 1e-2)
            ),
            "bbt": Contender(
                {"method": {"name": "bbt", **TEN, "intrinsic_dimension": 32}, **EVOLVED},
                {"method.alpha": 1},
                (1.0, 4.0),
            ),
            "mp2, black-box": Contender(
                {"method": mp2(phase="blackbox", sources=[MODULES]), **EVOLVED},
                {"method.router_share": 1},
                (0.2, 0.5),
            ),
            "mp2, longer": Contender(
                {"method": mp2(phase="gradient", sources=[LONGER])}, {"method.modules_lr": 1}, (1e-3, 4e-3, 1e-2)
            ),
            "mp2, longer, black-box": Contender(
                {"method": mp2(phase="blackbox", sources=[LONGER]), **EVOLVED},
                {"method.router_share": 1},
                (0.2, 0.5),
            ),
        },
        earlier={
            MODULES: {
                "sets": LEARNT_ON,
                "method": mp2(modules_lr=1e-2),
                "train": {"steps": 2000, "batch_size": 16, "evaluate_every": 500, "save_every": 2000},
            },
            # tried after the others were seen
            LONGER: {
                "sets": LEARNT_ON,
                "method": mp2(modules_lr=1e-2),
                "train": {"steps": 8000, "batch_size": 16, "evaluate_every": 1000, "save_every": 8000},
            },
        },
    ),
}


# ---- runs ------------------------------------------------------------------------------------------------------------


def source(name: str, data: Path, seed: int) -> dict[str, Any]:
    """Where a set lies; that of customer reviews has its few-shot splits as files."""
    if name != "cr":
        return {"source": str(data / name)}
    split = CR_SPLITS[seed % len(CR_SPLITS)]
    files = {"train": f"16-{split}/train.tsv", "validation": f"16-{split}/dev.tsv", "test": "test.tsv"}
    return {
        "source": str(data / "fewshot16" / name), **files, "rename": {"sentence": "text"}, "on_bad_row": "skip"
    }  # fmt: skip


def task_of(name: str, data: Path, seed: int, rows: Mapping[str, Any]) -> dict[str, Any]:
    """The task and data of a run."""
    few = {key: value for key, value in rows.items() if name != "cr" or key != "shots"}
    return {
        "task": {"name": "classify", "metrics": ["accuracy"], **WORDS[name]},
        "data": {**source(name, data, seed), "max_length": 64, **few},
    }


def settings(
    claim: Claim, contender: Contender, name: str, seed: int, trial: float, data: Path, keep: Path
) -> dict[str, Any]:
    """One run as a mapping, without its folder; `keep` is the folder of earlier runs."""
    rows = claim.common["data"] | ({} if seed < claim.seeds else {"split_seed": seed})
    values = {
        **task_of(name, data, seed, rows),
        "backbone": BACKBONES[MODEL]["backbone"],
        **deepcopy(contender.part),
        "train": claim.common["train"],
        "seed": seed,
    }
    for path, factor in contender.rates.items():
        part, key = path.split(".")
        values[part] = {**values[part], key: round(factor * trial, 8)}
    method = values.get("method", {})
    if "sources" in method:
        method["sources"] = [str(keep / one) for one in method["sources"]]
    return values


class Curve(Listener):
    """The validation score after each validation."""

    def __init__(self) -> None:
        """Empty."""
        self.points: list[tuple[int, float]] = []

    def validated(self, row: Any) -> None:
        """Note it."""
        self.points.append((row["step"], row.get("accuracy", row.get("mean"))))


def trained(values: dict[str, Any], backbone: Backbone, folder: Path, *, tested: bool = True) -> dict[str, Any]:
    """One run: its settings, the best validation score and all of them, and the test score if it is asked for."""
    curve = Curve()
    run = promptuary.load_run({**values, "out": str(folder)})
    training = Training(run, curve, None if isinstance(run, promptuary.BaselineRun) else backbone)
    if isinstance(training.course, Course):
        for test in (training.course.splits.test, training.feed.rows["test"]):
            count = TEST_ROWS if tested else 1
            test[:] = [test[place * len(test) // count] for place in range(count)] if len(test) > count else test
    facts = training.run(resume=False, fresh=True).facts
    kept = ("trainable_parameters", "added_tokens", "best_step", "steps", "forward_calls", "seconds_per_step_median")
    row = {
        "run": run.model_dump(mode="json", exclude={"out"}),
        "validation": facts["validation"],
        "curve": curve.points,
        **{name: facts[name] for name in kept if name in facts},
    }
    return {**row, "test": facts["metrics"], "examples": facts["examples"]} if tested else row


@dataclass(frozen=True)
class Bench:
    """The runs of one claim on one model: rows that exist are not run again."""

    name: str
    data: Path
    keep: Path
    backbone: Backbone
    command: str

    @property
    def claim(self) -> Claim:
        """The claim."""
        return CLAIMS[self.name]

    def all(self) -> None:
        """What is pre-trained, the trials of each contender, and its runs."""
        for name, values in self.claim.earlier.items():
            self._earlier(name, values)
        for name, contender in self.claim.contenders.items():
            chosen, effort = self._tuned(name, contender)
            for task in self.claim.sets:
                for seed in range(self.claim.seeds):
                    self._row(task, name, contender, seed, chosen, tuning=effort)

    def _earlier(self, name: str, values: dict[str, Any]) -> None:
        """Pre-train what later runs start from, and keep its folder."""
        folder = self.keep / name
        if (folder / "result.json").exists():
            return
        rows = {"validation_size": 100}
        run: dict[str, Any] = {"backbone": BACKBONES[MODEL]["backbone"], "method": values["method"], "seed": 0}
        if "set" in values:
            run |= task_of(values["set"], self.data, 0, rows)
        else:
            run["tasks"] = {one: task_of(one, self.data, 0, {} if one == "cb" else rows) for one in values["sets"]}
        found = trained(run | {"train": values["train"]}, self.backbone, folder)
        cell = (self.name, values.get("set") or "+".join(values["sets"]), EARLIER, name, 0.0)
        if not any(tuple(row["cell"]) == cell for row in read(PATH)):
            self._write(cell, found)

    def _tuned(self, name: str, contender: Contender) -> tuple[float, dict[str, Any]]:
        """The trial with the best mean validation score on the first set, and what was tried; the first of equals."""
        scores = []
        for trial in contender.trials:
            task = self.claim.sets[0]
            rows = [self._row(task, name, contender, seed, trial, tested=False) for seed in self.claim.tuned_with]
            scores.append(statistics.mean(row["validation"]["accuracy"] for row in rows))
        effort = {"set": self.claim.sets[0], "trials": contender.trials, "seeds": self.claim.tuned_with}
        return contender.trials[scores.index(max(scores))], {**effort, "validation": scores}

    def _row(
        self, task: str, name: str, contender: Contender, seed: int, trial: float, *, tested: bool = True, **more: Any
    ) -> dict[str, Any]:
        """The row of a run, from the file or new."""
        cell = (self.name, task, name, seed, trial)
        for row in read(PATH):
            if tuple(row["cell"]) == cell:
                return row
        values = settings(self.claim, contender, task, seed, trial, self.data, self.keep)
        with tempfile.TemporaryDirectory() as folder:
            found = trained(values, self.backbone, Path(folder) / "run", tested=tested)
        return self._write(cell, {**found, **more})

    def _write(self, cell: tuple[Any, ...], found: dict[str, Any]) -> dict[str, Any]:
        """Add a row; the folders of this machine do not stand in it."""
        text = to_json(found).decode().replace(str(self.data), "DIR").replace(str(self.keep), "KEEP")
        row: dict[str, Any] = {"cell": cell, **json.loads(text), **meta(MODEL, self.command)}
        write(PATH, row)
        return row


# ---- tables ----------------------------------------------------------------------------------------------------------


def steps_to(curve: list[list[float]], score: float) -> float:
    """The first step at which a validation reaches a score; infinite if none does."""
    return next((step for step, value in curve if value >= score), float("inf"))


def speed(rows: list[dict[str, Any]], rivals: list[dict[str, Any]]) -> list[str]:
    """Steps to the score that prompt tuning of the same seed has at its end."""
    goals = {row["cell"][3]: row["curve"][-1][1] for row in rivals}
    mine = [steps_to(row["curve"], goals[row["cell"][3]]) for row in rows]
    theirs = [steps_to(row["curve"], goals[row["cell"][3]]) for row in rivals]
    median = statistics.median(mine)
    sooner = sum(a < b for a, b in zip(mine, theirs, strict=True))
    return [f"{median:g}" if median < float("inf") else "not reached", f"{sooner} of {len(mine)}"]


def span(rows: list[dict[str, Any]], rivals: list[dict[str, Any]]) -> list[str]:
    """The lowest and the highest test score."""
    scores = [100 * row["test"]["accuracy"] for row in rows]
    return [f"{min(scores):.1f} to {max(scores):.1f}"]


def effort(rows: list[dict[str, Any]], rivals: list[dict[str, Any]]) -> list[str]:
    """Steps, or calls of the model on all training rows."""
    calls = rows[0].get("forward_calls")
    return [f"{calls:,} calls" if calls else f"{rows[0]['steps']} steps"]


EXTRA: dict[str, tuple[list[str], Callable[..., list[str]]]] = {
    "faster": (["median steps to prompt tuning's final validation score", "sooner than prompt tuning"], speed),
    "instance": ([], lambda rows, rivals: []),
    "steadier": (["lowest to highest"], span),
    "transfer": (["spent"], effort),
}


def lines(name: str, found: list[dict[str, Any]]) -> Iterator[str]:
    """The table of one claim."""
    headers, extra = EXTRA[name]
    columns = [
        "data",
        "method",
        "test accuracy in %, mean ± standard deviation (seeds)",
        *headers,
        "rate",
        "parameters",
    ]
    yield f"### {name}\n"
    yield "| " + " | ".join(columns) + " |"
    yield "|---" * len(columns) + "|"
    for task in dict.fromkeys(row["cell"][1] for row in found):
        own = [row for row in found if row["cell"][1] == task]
        rivals = [row for row in own if row["cell"][2] == "prompt_tuning"]
        for method in dict.fromkeys(row["cell"][2] for row in own):
            rows = [row for row in own if row["cell"][2] == method]
            scores = [100 * row["test"]["accuracy"] for row in rows]
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            cells = [
                task,
                method,
                f"{statistics.mean(scores):.1f} ± {spread:.1f} ({len(scores)})",
                *extra(rows, rivals),
            ]
            cells += [f"{rows[0]['cell'][4]:g}", f"{rows[0]['trainable_parameters']:,}"]
            yield "| " + " | ".join(cells) + " |"


def tables() -> dict[str, str]:
    """Markdown of the rows of each claim."""
    rows = [row for row in read(PATH) if "tuning" in row]
    groups = {name: [row for row in rows if row["cell"][0] == name] for name in CLAIMS}
    return {name: "\n".join(lines(name, found)) for name, found in groups.items() if found}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(*CLAIMS, "table"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--keep", type=Path, default=Path("out/claims"), help="folder of what is pre-trained")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.what == "table":
        print("\n\n".join(tables().values()))
    elif given.data is None:
        parser.error("--data DIR is needed")
    else:
        backbone = open_backbone(BackboneConfig.read(BACKBONES[MODEL]["backbone"], where="backbone"))
        command = f"python benchmarks/claims.py {given.what} --data DIR"
        Bench(given.what, given.data, given.keep, backbone, command).all()


if __name__ == "__main__":
    main()
