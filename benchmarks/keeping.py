"""Situations around a model: what training reaches, what a file keeps, and how the model is afterwards.

Knows no library by name. A situation returns a number that is zero, up to rounding, when the library is right.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import promptuary
from libraries import ROWS, Library, alone, ids, model, one, rows, width
from measure import LOGITS, TWO, far, situation

# ---- the model, training and files ----------------------------------------------------------------------------------


@situation("the model is as it was after use", "model", (*TWO, "t5"), "parameters and attributes changed")
def untouched(library: Library, kind: str) -> float:
    base, given = model(kind), one()
    base.generate(**given, max_new_tokens=2)

    def facts() -> tuple[dict[str, bool], set[str], dict[str, Tensor]]:
        weights = {name: value.clone() for name, value in base.state_dict().items()}
        return {name: value.requires_grad for name, value in base.named_parameters()}, set(base.__dict__), weights

    before = facts()
    with library.on(base, rows(base)) as host:
        host.written(given)
        del host
    after = facts()
    assert before[0].keys() == after[0].keys()
    changed = sum(before[0][name] != trained for name, trained in after[0].items())
    moved = sum(not torch.equal(value, after[2][name]) for name, value in before[2].items())
    return changed + len(before[1] ^ after[1]) + moved


@situation("only what is used is trained", "training", ("llama", "t5", "bart"), "trained numbers too many")
def trained_numbers(library: Library, kind: str) -> float:
    base = model(kind)
    with library.on(base, rows(base), train=True) as host:
        return sum(value.numel() for value in host.trained) - ROWS * width(base)


@situation("every trained number gets a gradient", "training", ("llama", "t5", "bart"), "numbers without a gradient")
def gradients(library: Library, kind: str) -> float:
    base, given = model(kind), one()
    with library.on(base, rows(base), train=True) as host:
        host.model(**given, labels=given["input_ids"]).loss.backward()
        return sum(int((value.grad == 0).sum()) for value in host.trained if value.grad is not None)


class Sentences(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Four texts that are to be continued."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        text = torch.tensor(ids(f"{('red', 'blue', 'hot', 'cold')[place]} sky and sea"))
        return {"input_ids": text, "attention_mask": torch.ones_like(text), "labels": text}


def resumed(method: str, library: Library, kind: str) -> float:
    """How far a run that was broken off at half time ends from one that was not."""

    def run(folder: str, resume: bool) -> Tensor:
        settings = transformers.TrainingArguments(
            output_dir=folder, max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=0.05,
            report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no", seed=3,
        )  # fmt: skip
        with library.training(model(kind), method) as (made, prompt):
            trainer = transformers.Trainer(made, settings, train_dataset=Sentences())
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-2" if resume else None)
            return prompt().detach().clone()

    with tempfile.TemporaryDirectory() as folder:
        whole = run(folder, resume=False)
        return far(run(folder, resume=True), whole)


for _method in ("rows", "reparameterised rows", "reparameterised prefix"):
    situation(
        f"resume by transformers' Trainer: {_method}", "training", ("llama",), "largest difference of the prompt"
    )(partial(resumed, _method))


@situation("a saved prompt is loaded to be trained on", "training", TWO, "numbers without a gradient")
def trained_on(library: Library, kind: str) -> float:
    base, given = model(kind), one()
    with tempfile.TemporaryDirectory() as folder:
        library.save(base, rows(base), Path(folder) / "p")
        with library.load(model(kind), Path(folder) / "p", train=True) as host:
            host.model(**given, labels=given["input_ids"]).loss.backward()
            return sum(int((value.grad == 0).sum()) for value in host.trained if value.grad is not None)


@situation("save and load", "files", (*TWO, "t5", "bert"), LOGITS)
@torch.no_grad()
def save_and_load(library: Library, kind: str) -> float:
    raw, prompt, given = model(kind), rows(model(kind)), one()
    more = {"decoder_input_ids": given["input_ids"]} if kind == "t5" else {}
    with tempfile.TemporaryDirectory() as folder:
        library.save(model(kind), prompt, Path(folder) / "p")
        with library.load(model(kind), Path(folder) / "p") as host:
            found = host.model(**given, **more).logits
    expected = alone(raw, ids(), prompt, **more).logits
    length = given["input_ids"].shape[1]
    return far(found[:, -length:], expected[:, -length:])


def accepted(library: Library, folder: Path, base: Any) -> float:
    """1 if a library loads what it should not; 0 if it says no."""
    try:
        with library.load(base, folder):
            return 1.0
    except (promptuary.PromptuaryError, ValueError, RuntimeError, OSError):
        return 0.0


@situation("a prompt of another base model is refused", "files", TWO, "accepted without a word")
def other_base(library: Library, kind: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        library.save(model(kind), rows(model(kind)), Path(folder) / "p")
        return accepted(library, Path(folder) / "p", model(kind, seed=1))


@situation("a file with one flipped bit is refused", "files", TWO, "accepted without a word")
def flipped_bit(library: Library, kind: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        path = library.save(model(kind), rows(model(kind)), Path(folder) / "p")
        content = bytearray(path.read_bytes())
        content[-2] ^= 0x40  # in the last number
        path.write_bytes(content)
        return accepted(library, Path(folder) / "p", model(kind))
