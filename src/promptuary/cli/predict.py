"""`promptuary predict`: answers of a saved prompt to texts.

Knows no method, model or data set.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from promptuary.cli import console
from promptuary.errors import ConfigError


def predict(
    prompt: console.Prompt,
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TEXT ...]", help="Texts; - reads them from standard input, one a line."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Examples without labels: .jsonl, .json, .csv, .tsv or .parquet."),
    ] = None,
    model: console.Model = None,
    device: console.Device = None,
    batch_size: console.BatchSize = 32,
    as_json: console.Json = False,
) -> None:
    """Answer texts: a line each with answer, probability and text."""
    if bool(texts) == (data is not None):
        raise ConfigError("what should be answered? Give texts, or - for standard input, or --data FILE")

    from promptuary import checkpoint
    from promptuary.data.load import read_examples

    examples: list[Any]
    if data is not None:
        examples = list(read_examples(data))
    elif texts == ["-"]:
        examples = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    else:
        examples = list(texts or [])
    if not examples:
        raise ConfigError("standard input holds no text; expected one on each line")
    if any(isinstance(example, str) and not example.strip() for example in examples):
        raise ConfigError("a text is empty; give at least one word")
    tuned = checkpoint.load_prompt(prompt, model=model, device=device)
    fields = tuned.task.template.fields
    if isinstance(examples[0], str) and len(fields) != 1:
        raise ConfigError(f"this prompt reads the fields {', '.join(fields)}, not a single text; give --data FILE")
    predictions = tuned.predict(examples, batch_size=batch_size)
    if as_json:
        console.emit({"predictions": [{"answer": one.answer, "scores": dict(one.scores)} for one in predictions]})
        return
    for example, one in zip(examples, predictions, strict=True):
        sure = f"{max(one.scores.values()):.3f}" if one.scores else ""
        print(_line(one.answer), sure, _line(_shown(example, fields)), sep="\t")


def _shown(example: str | Mapping[str, Any], fields: list[str]) -> str:
    return example if isinstance(example, str) else " | ".join(str(example[name]) for name in fields)


def _line(value: Any) -> str:
    return " ".join(str(value).split())
