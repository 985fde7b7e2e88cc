"""Base to new on a small pair of towers: what prompts learn on half of the classes, and what it costs on the others.

Knows no result: every row is written by the command that is noted in it.

    python benchmarks/pair.py --images DIR --vision DIR --out PAIRS           # the models, see there
    python benchmarks/base_to_new.py run --images DIR --pairs PAIRS           # results/base_to_new.jsonl
    python benchmarks/base_to_new.py table

Of each fold the classes that its pair never saw are a data set of their own: prompts learn the first half of them and
are tested on both halves, each half's images among that half's names. Rows that exist already are skipped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import promptuary
from foundation import RESULTS, meta, read, write
from pair import FOLDS, classes_of, fold_of
from promptuary.backbones.base import Backbone, BackboneConfig
from promptuary.base_to_new import NEW, new_classes, with_new
from promptuary.building import open_backbone
from promptuary.data.classes import chosen_classes
from promptuary.data.load import load
from promptuary.evaluation import evaluate
from promptuary.files import to_json
from promptuary.seeds import seeded
from promptuary.tasks.classify import Classify
from promptuary.tuned import Tuned

PATH = RESULTS / "base_to_new.jsonl"
ZERO_SHOT = "zero-shot"
SEEDS, TUNING_SEED, TUNING_FOLD = 2, 100, 0
RATES = (0.02, 0.1, 0.5, 2.0)
TRAIN = {
    "steps": 100, "batch_size": 32, "optimizer": "sgd", "schedule": "cosine", "warmup": 0.05, "evaluate_every": 100,
    "save_every": 100, "eval_batch_size": 256, "threads": 1,
}  # fmt: skip
"""One validation, at the end: what counts is the last step, as in CoOp's protocol."""
METHODS: dict[str, dict[str, Any]] = {
    "coop": {"name": "coop"},
    "lasp": {"name": "lasp"},
    "lasp, virtual classes": {"name": "lasp", "virtual_classes": ()},
    "pre": {"name": "pre"},
    "kgcoop": {"name": "kgcoop"},
    "coop, 16 random rows": {"name": "coop", "init": "random", "num_virtual_tokens": 16},
}
"""As their releases have them, but for the rate; LASP's scale of sentences is the pair's own."""


def settings(method: str, fold: int, seed: int, rate: float, new: list[str], facts: dict[str, Any]) -> dict[str, Any]:
    """One run, with IMAGES, PAIRS and CACHE for the folders; `new` are names of new classes, `facts` of the pair."""
    values: dict[str, Any] = {
        "task": {"name": "classify", "image": "image", "metrics": ["accuracy"], "label_template": "{}."},
        "data": {
            "source": f"IMAGES/fold{fold}", "classes": "base", "shots": 12, "validation_shots": 4, "split_seed": 0,
            "views": 1, "cache": "CACHE",
        },
        "backbone": {"model": f"PAIRS/fold{fold}", "family": "dual", "device": "cpu"},
        "train": TRAIN,
        "seed": seed,
    }  # fmt: skip
    if method == ZERO_SHOT:
        values["task"]["label_template"] = "a photo of a {}."
        return {**values, "method": {"name": "coop"}}
    chosen = {**METHODS[method], "prompt_lr": rate}
    if chosen["name"] == "pre":
        chosen["modules_lr"] = rate
    if chosen["name"] == "lasp":
        chosen["text_scale"] = round(facts["scale"], 2)
    if "virtual_classes" in chosen:
        chosen["virtual_classes"] = new
    return {**values, "method": chosen}


def placed(values: dict[str, Any], folders: dict[str, Path], out: Path) -> promptuary.Run:
    """The run with real folders."""
    text = json.dumps(values)
    for word, folder in folders.items():
        text = text.replace(f'"{word}', f'"{folder}')
    run = promptuary.load_run({**json.loads(text), "out": str(out)})
    assert isinstance(run, promptuary.Run)
    return run


def untrained(run: promptuary.Run, backbone: Backbone) -> dict[str, Any]:
    """Scores of the pair itself on both halves."""
    splits = load(run.data, Classify.required(run.task), seeded(run.seed, 1), Classify.check(run.task))
    tuned = Tuned(backbone, Classify(run.task, splits.train))
    base, new = evaluate(tuned, splits.test, interval=False), new_classes(run, tuned)
    assert new is not None
    both = with_new(base, evaluate(new.tuned, new.examples, interval=False), "accuracy")
    return {"test": both.scores, "steps": 0, "trainable_parameters": 0}


def trained(run: promptuary.Run, backbone: Backbone) -> dict[str, Any]:
    """Scores of a prompt after its last step."""
    facts = promptuary.train(run, backbone=backbone, fresh=True).facts
    kept = ("validation", "trainable_parameters", "steps", "best_step", "examples", "seconds_per_step_median")
    return {"test": facts["metrics"], **{name: facts[name] for name in kept if name in facts}}


class Bench:
    """All runs: rows that exist are not run again."""

    def __init__(self, images: Path, pairs: Path, keep: Path) -> None:
        """The folders; the classes of each fold are copied to one of their own."""
        self.names, self.pairs, self.keep = classes_of(images), pairs, keep
        self.folders = {"IMAGES": keep / "images", "PAIRS": pairs, "CACHE": keep / "features"}
        for fold in range(FOLDS):
            for split in ("train", "test"):
                for name in fold_of(self.names, fold):
                    there = keep / "images" / f"fold{fold}" / split / name
                    if not there.exists():
                        shutil.copytree(images / split / name, there)

    def all(self, folds: list[int]) -> None:
        """A rate for all by CoOp's validation on one fold, then the runs."""
        rate = self._tuned()
        for fold in folds:
            self._row(ZERO_SHOT, fold, 0, 0.0)
        for seed in range(SEEDS):
            for fold in folds:
                for method in METHODS:
                    self._row(method, fold, seed, rate)

    def _tuned(self) -> float:
        """The rate with CoOp's best validation score; the first of equals."""
        rows = [self._row("coop", TUNING_FOLD, TUNING_SEED, rate) for rate in RATES]
        scores = [row["validation"]["accuracy"] for row in rows]
        return RATES[scores.index(max(scores))]

    def _row(self, method: str, fold: int, seed: int, rate: float) -> dict[str, Any]:
        """From the file or new; a trial of a rate has no test scores."""
        cell = [method, fold, seed, rate]
        for row in read(PATH):
            if row["cell"] == cell:
                return row
        facts = json.loads((self.pairs / f"fold{fold}" / "pair.json").read_text(encoding="utf-8"))
        new = [name.replace("_", " ") for name in chosen_classes(fold_of(self.names, fold), "new")]
        values = settings(method, fold, seed, rate, new, facts)
        with tempfile.TemporaryDirectory() as folder:
            run = placed(values, self.folders, Path(folder) / "run")
            found = (untrained if method == ZERO_SHOT else trained)(run, self._backbone(run.backbone))
        if seed == TUNING_SEED:
            del found["test"]
        command = "python benchmarks/base_to_new.py run --images DIR --pairs PAIRS"
        row = {"cell": cell, "run": values, "pair": facts, **json.loads(to_json(found)), **meta("pair", command)}
        write(PATH, row)
        return row

    def _backbone(self, config: BackboneConfig) -> Backbone:
        """Loaded once for each fold."""
        known: tuple[str, Backbone] | None = getattr(self, "_known", None)
        if known is None or known[0] != config.model:
            self._known = known = (config.model, open_backbone(config))
        return known[1]


# ---- the table -------------------------------------------------------------------------------------------------------

SCORES = ("accuracy", f"{NEW}_accuracy", "harmonic_mean")


def spread(values: list[float]) -> str:
    """Mean and standard deviation, in %."""
    over = [100 * value for value in values]
    return f"{statistics.mean(over):.1f} ± {statistics.stdev(over) if len(over) > 1 else 0.0:.1f}"


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Over folds and seeds; differences are between runs of one fold and, to CoOp, of one seed."""
    columns = ["method (runs)", "base", "new", "H", "new - the pair's own", "new - CoOp's", "better, worse", "trained"]
    yield "| " + " | ".join(columns) + " |"
    yield "|---" * len(columns) + "|"
    score = {tuple(row["cell"][:3]): row["test"] for row in rows}
    bare = {fold: score[ZERO_SHOT, fold, 0][SCORES[1]] for fold in range(FOLDS)}
    for method in dict.fromkeys(row["cell"][0] for row in rows):
        own = [row for row in rows if row["cell"][0] == method]
        cells = [spread([row["test"][name] for row in own]) for name in SCORES]
        lost = ahead = signs = "-"
        if method != ZERO_SHOT:
            new = [(row["cell"][1], row["cell"][2], row["test"][SCORES[1]]) for row in own]
            lost = spread([value - bare[fold] for fold, _, value in new])
            apart = [value - score["coop", fold, seed][SCORES[1]] for fold, seed, value in new]
            ahead, signs = spread(apart), f"{sum(one > 0 for one in apart)}, {sum(one < 0 for one in apart)}"
        count = own[0]["trainable_parameters"]
        yield "| " + " | ".join([f"{method} ({len(own)})", *cells, lost, ahead, signs, f"{count:,}"]) + " |"


def table() -> str:
    """Markdown of the rows."""
    return "\n".join(lines([row for row in read(PATH) if "test" in row]))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--images", type=Path)
    parser.add_argument("--pairs", type=Path, default=Path("out/pair"))
    parser.add_argument("--keep", type=Path, default=Path("out/base_to_new"), help="folder of features and copies")
    parser.add_argument("--folds", type=int, nargs="+", default=list(range(FOLDS)))
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.what == "table":
        print(table())
    elif given.images is None:
        parser.error("--images DIR is needed")
    else:
        Bench(given.images, given.pairs, given.keep).all(given.folds)


if __name__ == "__main__":
    main()
