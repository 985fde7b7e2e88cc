"""What a run says of itself: its plan before the first step, and the facts of result.json after the last.

Changes nothing and knows no files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from promptuary import memory
from promptuary.backbones.causal import Causal
from promptuary.evaluation import Evaluation
from promptuary.joint import JointEvaluation
from promptuary.runs import versions
from promptuary.training_state import Progress

if TYPE_CHECKING:
    from promptuary.training import Training

WRITES = [
    "run.yaml", "environment.json", "metrics.jsonl", "checkpoints/", "prompt/", "result.json", "predictions.jsonl",
]  # fmt: skip
"""What a run writes, for its plan."""


def kept_bytes(training: Training) -> int:
    """About how many bytes a step keeps for its backward pass, right within a factor of two on models of usual shape.

    That is, whose layers are about four times as wide between as outside. Dropout at work keeps more.
    """
    run, backbone, lengths = training.settings, training.backbone, training.feed.lengths
    text, prompt = lengths[int(0.95 * (len(lengths) - 1))], training.tuned.added_tokens
    rows, shape = math.ceil(run.train.batch_size / run.train.accumulation), backbone.shape
    config = backbone.model.config
    # a decoder behind an encoder runs on few positions
    layers = backbone.layers // 2 if config.is_encoder_decoder else backbone.layers
    positions, read = rows * (prompt + text), 0
    if isinstance(backbone, Causal) and backbone.shares and not run.backbone.dropout:
        # the rows behind the prompt keep the keys and values of both
        positions, read = prompt + rows * text, rows * (prompt + text) * 2 * shape.heads * shape.head
    # about 20 values of the hidden width per position and layer (measured: 18 on T5-base, 22 on GPT-2)
    layer = 20 * shape.width * positions + read
    kept = layers * layer
    if training.recompute:  # inputs of all layers, and one of them while it runs again
        kept = layers * shape.width * positions + layer
    if not backbone.narrow and backbone.model.get_output_embeddings() is not None:
        kept += rows * (1 if config.is_encoder_decoder else prompt + text) * config.vocab_size
    return kept * (2 if run.backbone.dtype in ("bfloat16", "float16") else 4)


def plan(training: Training) -> dict[str, Any]:
    """What the run will do, before it does."""
    run, trained, facts = training.settings, training.tuned.trainable_parameters, training.course.facts()
    lengths = training.feed.lengths
    weights = sum(p.numel() * p.element_size() for p in training.backbone.model.parameters())
    return {
        "method": facts["method"],
        "task": facts["task"],
        "backbone": f"{run.backbone.model} ({training.backbone.name}, {training.backbone.device.type})",
        "examples": facts["examples"],
        "split_hash": facts["split_hash"],
        "longest_text": lengths[-1],
        "cut_texts": sum(row.encoded.cut > 0 for row in training.feed.rows["train"]),
        "steps": training.steps,
        "batch_size": run.train.batch_size,
        "trainable_parameters": trained,
        "added_tokens": training.tuned.added_tokens,
        "memory_bytes_estimate": weights + kept_bytes(training) + trained * 16,
        "prompt_bytes": trained * 4,
        "out": str(training.folder.path),
        "writes": WRITES,
    }


def verdict(progress: Progress, rate: str | None) -> list[str]:
    """What the numbers of the result do not say by themselves; `rate` names the setting of a learning rate, if any."""
    notes = list[str]()
    if progress.best_step == 0:
        notes.append(
            "no validation was better than the one before training, so what is saved is untrained; "
            f"train longer, {'' if rate is None else f'change {rate}, '}or validate on more rows"
        )
    if progress.skipped:
        notes.append(f"{progress.skipped} of {progress.step} steps were not finite and were skipped")
    return notes


def result(training: Training, tested: Evaluation | JointEvaluation | None, notes: Sequence[str]) -> dict[str, Any]:
    """Everything in result.json.

    Args:
        training: at its end, with the best tensors put back.
        tested: scores on the test split; None where it was left alone.
        notes: what `verdict` found.
    """
    run, progress, primary = training.settings, training.progress, training.course.primary
    facts = training.course.facts()
    return {
        "method": facts["method"],
        "task": facts["task"],
        "data": facts["data"],
        "backbone": run.backbone.model,
        "seed": run.seed,
        "metrics": {} if tested is None else tested.scores,
        "primary_metric": primary,
        "interval_95": None if tested is None else tested.interval,
        **({"tested": False} if tested is None else {}),
        "validation": {primary: progress.best},
        **{name: value for name, value in facts.items() if name not in ("method", "task", "data")},
        "trainable_parameters": training.tuned.trainable_parameters,
        "added_tokens": training.tuned.added_tokens,
        "steps": progress.step,
        "best_step": progress.best_step,
        "seconds_per_step_median": progress.median,
        "train_seconds": progress.seconds,
        "peak_memory_bytes": memory.peak(training.backbone.device),
        "forward_calls": progress.calls if not training.staging.solver_class.uses_gradients else None,
        "rollbacks": progress.rollbacks,
        "skipped_steps": progress.skipped,
        "micro_batch": progress.micro_batch,
        "gradient_checkpointing": training.recompute,
        "notes": [*training.notes, *notes],
        "versions": versions(),
        "run_hash": run.hash(),
    }
