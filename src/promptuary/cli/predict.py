"""`promptuary predict`: answers of a saved prompt to texts or images.

Knows no method, model or data set.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from promptuary.cli import console
from promptuary.errors import ConfigError


def predict(
    prompt: console.Prompt,
    texts: console.Texts = None,
    data: console.Data = None,
    model: console.Model = None,
    backbone: console.Other = None,
    device: console.Device = None,
    batch_size: console.BatchSize = 32,
    as_json: console.Json = False,
) -> None:
    """Answer texts or images: a line each with answer, probability and text or file."""
    if bool(texts) == (data is not None):
        raise ConfigError("what should be answered? Give texts or images, or - for standard input, or --data FILE")

    from promptuary.data.load import read_examples
    from promptuary.weights import find_saved, load_saved

    examples = console.examples(texts, data)
    tuned = load_saved(find_saved(prompt), model=model, device=device, other=backbone)
    task, settings = tuned.task, tuned.task.config
    fields = task.template.fields
    if data is not None:
        # again, now that the task can tell what each row needs: its errors name lines, not examples
        question = partial(task.question, settings)
        examples = list(read_examples(data, required=task.asked(settings), question=question, image=settings.image))
    elif len(task.asked(settings)) != 1:
        names = ", ".join(task.asked(settings))
        raise ConfigError(f"this prompt reads the fields {names}, not a single text or image; give --data FILE")
    predictions = tuned.predict(examples, batch_size=batch_size)
    if as_json:
        console.emit({"predictions": [{"answer": one.answer, "scores": dict(one.scores)} for one in predictions]})
        return
    for example, one in zip(examples, predictions, strict=True):
        sure = f"{max(one.scores.values()):.3f}" if task.gives_scores else ""
        print(_line(one.answer), sure, _line(_shown(example, fields)), sep="\t")


def _shown(example: str | Mapping[str, Any], fields: list[str]) -> str:
    return example if isinstance(example, str) else " | ".join(str(example[name]) for name in fields)


def _line(value: Any) -> str:
    return " ".join(str(value).split())
