"""What a tiny run of style transfer needs: sentences, a task model, an encoder, and two classifiers that were saved.

Knows no test.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import tiny
import toy
from promptuary.backbones.base import BackboneConfig
from promptuary.building import build_method, open_backbone, shape_of
from promptuary.checkpoint import save_prompt
from promptuary.methods.prompt_tuning import PromptTuningConfig
from promptuary.tasks.classify import Classify, ClassifyConfig
from promptuary.tuned import Tuned

STYLES = {"happy": "good", "sad": "bad"}


def classifier(
    folder: Path,
    model: str,
    labels: dict[str, str] = STYLES,
    seed: int = 0,
    template: str = "{text} it was {mask}",
) -> str:
    """A saved prompt that tells labels apart, somehow."""
    backbone = open_backbone(BackboneConfig(model=model, device="cpu"))
    task = Classify(ClassifyConfig.read({"template": template, "labels": labels}, where="task"))
    method = build_method(PromptTuningConfig(num_virtual_tokens=2), shape_of(backbone, task))
    tuned = Tuned(backbone, task, method).initialise(torch.Generator().manual_seed(seed))
    return str(save_prompt(tuned, folder))


def sentences(count: int, seed: int = 0) -> list[dict[str, Any]]:
    return [{"text": row["text"]} for row in toy.rows(count, seed)]


def settings(where: Path, **changes: Any) -> dict[str, Any]:
    """A whole run as a mapping; everything that it names is there."""
    model, other = where / "model", where / "other"
    if not model.exists():
        tiny.save(model, "causal", seed=3)
        tiny.save(other, "causal", seed=4)
        tiny.save(where / "encoder", "encoder", seed=5)
        classifier(where / "style", str(model), seed=1)
        classifier(where / "held", str(other), seed=2)
        classifier(where / "fluent", str(other), {"acceptable": "good", "broken": "bad"}, seed=3)
        for seed, (split, count) in enumerate({"train": 4, "validation": 1, "test": 2}.items()):
            toy.jsonl(where / "data" / f"{split}.jsonl", sentences(count, seed))
    task = {
        "name": "transfer", "content": str(where / "encoder"), "style": str(where / "style"), "style_label": "happy",
        "samples": 4, "bootstraps": 2, **changes.pop("task", {}),
    }  # fmt: skip
    solver = {
        "name": "policy", "rows": "batch", "dealt": True, "prompts": 4, "top_k": 50, "logit_bias": -10.0,
        "shape": [-20, 80], "hidden": 16, "learning_rate": 1e-3, **changes.pop("solver", {}),
    }  # fmt: skip
    return {
        "task": task,
        "data": {"source": str(where / "data"), "max_length": 40},
        "backbone": {"model": str(model), "device": "cpu"},
        "method": {"name": "rlprompt", "num_tokens": 2},
        "solver": solver,
        "train": {"steps": 2, "batch_size": 2, "evaluate_every": 2},
        "out": str(where / "run"),
        **changes,
    }
