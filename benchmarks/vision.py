"""SPT against VPT on real images and a real frozen vision model: the start, the way, the end, and the starts apart.

Knows no result: every row is written by the command that is noted in it.

    python benchmarks/vision.py run --images IMAGES --model MODEL     # resumable: rows that exist are skipped
    python benchmarks/vision.py table                                 # benchmarks/results/vision.jsonl -> markdown

IMAGES holds one folder of images for each class (Sign Language Digits, 10 classes), MODEL is DINOv2-small. For each
seed 8 images of a class are trained on, 8 validated on and 30 tested on, the same ones for every method. The rates are
those that are best for VPT deep, on the validation images of a seed that is not used again.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import promptuary
from foundation import RESULTS, meta, read, write
from promptuary.backbones.base import Backbone, BackboneConfig
from promptuary.building import open_backbone
from promptuary.files import to_json
from promptuary.seeds import seeded
from promptuary.training import Listener, Training

PATH = RESULTS / "vision.jsonl"
MODEL, SET = "dinov2_small", "signdigits"
SIZES = {"train": 8, "validation": 8, "test": 30}
"""Images of a class."""
SEEDS = 3
ROWS = {"num_virtual_tokens": 10}
EPOCHS, BATCH, EPOCH = 8, 8, 10
"""The last are the steps of an epoch: 80 images, 8 at a time."""
TUNED, TUNING_SEED = "vpt, deep", 100
GRID = ((5e-3, 1e-3), (5e-3, 5e-3), (5e-2, 1e-3), (1e-3, 1e-3), (5e-3, 3e-4))
"""Rates of the rows and of the head, tried with VPT deep alone; the best pair is everybody's."""


@dataclass(frozen=True)
class Contender:
    """One side: what stands in the run file, and whose final score it is asked to reach."""

    part: dict[str, Any]
    rival: str = TUNED


def _all(deep: bool) -> dict[str, Contender]:
    """VPT, and SPT with each of its starts."""
    depth = "deep" if deep else "shallow"
    vpt = f"vpt, {depth}"
    found = {vpt: Contender({"method": {"name": "vpt", "deep": deep, **ROWS}}, vpt)}
    for way in ("random", "kmeans", "mean", "max"):
        method = {"name": "spt", "deep": deep, "prototypes": way, **ROWS}
        found[f"spt {way}, {depth}"] = Contender({"method": method}, vpt)
    return found


CONTENDERS: dict[str, Contender] = {
    **_all(True),
    **_all(False),
    "vpt, deep, frozen rows": Contender({"method": {"name": "vpt", "frozen": True, **ROWS}}),
    "spt random, deep, frozen rows": Contender({"method": {"name": "spt", "frozen": True, **ROWS}}),
    "linear probe": Contender({"baseline": {"name": "linear_probe"}}),
}


# ---- runs ------------------------------------------------------------------------------------------------------------


def lists(images: Path, folder: Path, seed: int) -> Path:
    """The images of a seed, as a list for each split.

    Raises:
        SystemExit: a class has too few images.
    """
    splits: dict[str, list[tuple[str, str]]] = {name: [] for name in SIZES}
    for place, one in enumerate(sorted(path for path in images.iterdir() if path.is_dir())):
        files = sorted(path for path in one.iterdir() if path.is_file() and not path.name.startswith("."))
        if len(files) < sum(SIZES.values()):
            raise SystemExit(f"{one} holds {len(files)} images; {sum(SIZES.values())} are needed")
        order = iter(torch.randperm(len(files), generator=seeded(seed, 1, place)).tolist())
        for name, count in SIZES.items():
            splits[name] += [(str(files[next(order)].resolve()), one.name) for _ in range(count)]
    folder = folder / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("image", "label"), *rows])
    return folder


def backbone_of(model: Path) -> dict[str, Any]:
    """25 patches of an image, so that a step fits a small machine."""
    return {"model": str(model), "family": "vision", "image_size": 70}


def settings(name: str, seed: int, rates: tuple[float, float], source: Path, model: Path) -> dict[str, Any]:
    """One run as a mapping, without its folder."""
    part = {kind: dict(values) for kind, values in CONTENDERS[name].part.items()}
    if "method" in part:
        part["method"]["prompt_lr"] = rates[0]
    return {
        "task": {
            "name": "classify",
            "image": "image",
            "reading": "head",
            "metrics": ["accuracy"],
            "head_lr": rates[1],
        },
        "data": {"source": str(source)},
        "backbone": backbone_of(model),
        **part,
        "train": {
            "steps": EPOCHS * EPOCH,
            "batch_size": BATCH,
            "schedule": "cosine",
            "warmup": 0.1,
            "evaluate_every": EPOCH,
            "save_every": EPOCHS * EPOCH,
        },
        "seed": seed,
    }


class Curves(Listener):
    """The loss of each step, and the validation score of each epoch."""

    def __init__(self) -> None:
        """Empty."""
        self.losses: list[float] = []
        self.scores: list[tuple[int, float]] = []

    def stepped(self, row: Any) -> None:
        """Note the loss."""
        self.losses.append(round(row["loss"], 4))

    def validated(self, row: Any) -> None:
        """Note the score."""
        self.scores.append((row["step"] // EPOCH, row["accuracy"]))


def trained(values: dict[str, Any], backbone: Backbone, *, tested: bool) -> dict[str, Any]:
    """One run in a folder that is thrown away."""
    curves = Curves()
    with tempfile.TemporaryDirectory() as folder:
        run = promptuary.load_run({**values, "out": f"{folder}/run"})
        training = Training(run, curves, None if isinstance(run, promptuary.BaselineRun) else backbone)
        if not tested:
            for test in (training.course.splits.test, training.feed.rows["test"]):
                del test[1:]
        facts = training.run(resume=False, fresh=False).facts
    kept = ("trainable_parameters", "added_tokens", "best_step", "steps", "split_hash", "seconds_per_step_median")
    row = {
        "run": run.model_dump(mode="json", exclude={"out"}),
        "validation": facts["validation"],
        "curve": curves.scores,
        "losses": curves.losses,
        **{name: facts[name] for name in kept},
    }
    return {**row, "test": facts["metrics"], "examples": facts["examples"]} if tested else row


@dataclass(frozen=True)
class Bench:
    """All runs on one model; rows that exist are not run again."""

    images: Path
    model: Path
    backbone: Backbone
    command: str
    folder: Path

    def all(self, names: list[str]) -> None:
        """The trials of VPT, and then every contender with each seed."""
        scores = [self._row(TUNED, TUNING_SEED, pair, tested=False)["validation"]["accuracy"] for pair in GRID]
        best, effort = GRID[scores.index(max(scores))], {"tried": GRID, "seed": TUNING_SEED, "validation": scores}
        for name in names:
            for seed in range(SEEDS):
                self._row(name, seed, best, tested=True, tuning=effort)

    def _row(self, name: str, seed: int, rates: tuple[float, float], *, tested: bool, **more: Any) -> dict[str, Any]:
        """The row of a run, from the file or new; the folders of this machine do not stand in it."""
        cell = (SET, name, seed, *rates)
        for row in read(PATH):
            if tuple(row["cell"]) == cell:
                return row
        values = settings(name, seed, rates, lists(self.images, self.folder, seed), self.model)
        found = {**trained(values, self.backbone, tested=tested), **more}
        text = to_json(found).decode().replace(str(self.folder), "LISTS").replace(str(self.model), "MODEL")
        row = {"cell": cell, **json.loads(text), **meta(MODEL, self.command)}
        write(PATH, row)
        return row


# ---- tables ----------------------------------------------------------------------------------------------------------


def epoch_of(curve: list[list[float]], score: float) -> float:
    """The first epoch after which the validation score is reached; infinite if there is none."""
    return next((epoch for epoch, value in curve if value >= score), float("inf"))


def _spread(values: list[float], digits: int) -> str:
    more = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{more}"


def _ahead(mine: Mapping[int, float], theirs: Mapping[int, float]) -> str:
    """Difference of the means over seeds that both have, and in how many it is above zero."""
    gaps = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
    return f"{statistics.mean(gaps):+.1f}, {sum(gap > 0 for gap in gaps)} of {len(gaps)}"


def lines(found: list[dict[str, Any]]) -> Iterator[str]:
    """The table of all contenders, in their order."""
    columns = (
        "method",
        "loss at the start",
        "mean loss of epoch 1",
        "last validation accuracy in %",
        "epochs to VPT's last validation score, by seed",
        "test accuracy in % (seeds)",
        "ahead of VPT (points, seeds)",
        "parameters",
    )
    yield "| " + " | ".join(columns) + " |"
    yield "|---" * len(columns) + "|"
    groups = {name: {row["cell"][2]: row for row in found if row["cell"][1] == name} for name in CONTENDERS}
    tests = {name: {seed: 100 * row["test"]["accuracy"] for seed, row in rows.items()} for name, rows in groups.items()}
    for name, rows in groups.items():
        if not rows:
            continue
        rival = CONTENDERS[name].rival
        goals = {seed: row["curve"][-1][1] for seed, row in groups[rival].items()}
        epochs = [epoch_of(row["curve"], goals[seed]) for seed, row in rows.items() if seed in goals]
        cells = [
            name,
            _spread([row["losses"][0] for row in rows.values()], 2),
            _spread([statistics.mean(row["losses"][:EPOCH]) for row in rows.values()], 2),
            _spread([100 * row["curve"][-1][1] for row in rows.values()], 1),
            ", ".join(f"{epoch:g}" if epoch < float("inf") else "never" for epoch in epochs),
            f"{_spread(list(tests[name].values()), 1)} ({len(rows)})",
            "-" if name == rival else _ahead(tests[name], tests[rival]),
            f"{next(iter(rows.values()))['trainable_parameters']:,}",
        ]
        yield "| " + " | ".join(cells) + " |"


def table() -> str:
    """Markdown of the rows."""
    return "\n".join(lines([row for row in read(PATH) if "tuning" in row]))


def command_of(threads: int) -> str:
    """The command of a row."""
    return f"python benchmarks/vision.py run --images IMAGES --model MODEL --threads {threads}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--images", type=Path, help="folder with a folder of images for each class")
    parser.add_argument("--model", type=Path, help="folder of the model")
    parser.add_argument("--methods", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.what == "table":
        print(table())
    elif given.images is None or given.model is None:
        parser.error("--images FOLDER and --model FOLDER are needed")
    else:
        backbone = open_backbone(BackboneConfig.read(backbone_of(given.model), where="backbone"))
        with tempfile.TemporaryDirectory() as folder:
            Bench(given.images, given.model, backbone, command_of(given.threads), Path(folder)).all(given.methods)


if __name__ == "__main__":
    main()
