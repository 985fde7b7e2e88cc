"""One cell of the contract table: a method on a family, with the models, data and comparisons that a property needs.

Knows no method by name and no property.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from promptuary import registry
from promptuary.backbones.base import Backbone
from promptuary.building import shape_of
from promptuary.checkpoint import save_prompt
from promptuary.config import build
from promptuary.data.collate import Row
from promptuary.methods.base import Method, MethodConfig
from promptuary.run import Run
from promptuary.sources import load_start
from promptuary.tasks.classify import Classify, ClassifyConfig
from promptuary.testing import tiny, tiny_eyes
from promptuary.tuned import Tuned
from promptuary.types import Batch

TEXTS = (
    "a red apple was good",
    "the old dog sleeps in the sun and sings",
    "blue sky",
    "never cold but always very hot",
    "six birds eat one plum",
)


@dataclass(frozen=True)
class Case:
    """One method on one family, with everything a property needs.

    `settings`: the method's settings for tiny models; `folder`: an empty folder of its own; `card`: the method's card.
    """

    method: type[Method]
    family: str
    settings: Mapping[str, Any]
    folder: Path
    card: Path | None = None

    def config(self, **changes: Any) -> MethodConfig:
        """The method's settings for tiny models."""
        values = {"name": self.method.name, **self.settings, **changes}
        if self.method.tiny_sources and "sources" not in values:
            values["sources"] = self.sources()
        made: MethodConfig = self.method.Config.read(values, where="method")
        return made

    def sources(self) -> list[str]:
        """Folders of earlier prompts to start from, where the method has to."""
        folders = []
        for number, settings in enumerate(self.method.tiny_sources):
            folder = self.folder / f"source-{number}"
            if not folder.exists():
                found = registry.load("methods", settings["name"])
                save_prompt(case_of(found, self.family, self.folder, settings).tuned(seed=10 + number), folder)
            folders.append(str(folder))
        return folders

    def backbone(self, seed: int = 0, **settings: Any) -> Backbone:
        """A fresh tiny model of the family."""
        return tiny.backbone(self.family, seed, **settings)

    @property
    def sees(self) -> bool:
        """Whether its examples are images."""
        return tiny.family_name(self.family) in tiny.SEEING

    @property
    def spoken(self) -> bool:
        """Whether its prompt is words."""
        return "text" in self.method.sites

    @property
    def words(self) -> bool:
        """Whether its answers are label words; otherwise a head is trained."""
        return "words" in registry.load("backbones", tiny.family_name(self.family)).abilities

    def task(self) -> Classify:
        """A small classification task, of texts or of images."""
        settings: dict[str, Any] = {"labels": {"positive": "good", "negative": "bad", "neutral": "maybe"}}
        settings |= {"image": "image"} if self.sees else {"template": "{text} it was {mask}"}
        return Classify(ClassifyConfig(**settings, reading="words" if self.words else "head"))

    def examples(self) -> list[dict[str, Any]]:
        """Five examples without labels."""
        if not self.sees:
            return [{"text": text} for text in TEXTS]
        return [{"image": tiny_eyes.picture(number)} for number in range(len(TEXTS))]

    def tuned(self, backbone: Backbone | None = None, seed: int = 0, **changes: Any) -> Tuned:
        """The method on a small classification task, started and slightly moved so that every part matters."""
        backbone = backbone if backbone is not None else self.backbone()
        task = self.task()
        config = self.config(**changes)
        tuned = Tuned(backbone, task, self.method(config, shape_of(backbone, task)), max_length=40)
        start = load_start(config, backbone)
        tuned.initialise(torch.Generator().manual_seed(seed), *start, examples=self.examples())
        generator = torch.Generator().manual_seed(seed + 1)
        if self.spoken:
            tuned = tuned.saying(f"{tuned.text} {' '.join(tiny.WORDS[10 + seed : 14 + seed])}".strip())
        with torch.no_grad():
            for group in tuned.trained():
                group.parameter.add_(0.1 * torch.randn(group.parameter.shape, generator=generator))
        return tuned.train(False)

    def rows(self, tuned: Tuned) -> list[Row]:
        """Encoded examples with labels."""
        labels = itertools.cycle(("positive", "negative", "neutral"))
        return tuned.rows([{**one, "label": next(labels)} for one in self.examples()], labelled=True)

    def run(
        self,
        name: str,
        *,
        steps: int = 12,
        seed: int = 0,
        train: Mapping[str, Any] | None = None,
        method: Mapping[str, Any] | None = None,
    ) -> Run:
        """A run on a toy data set in which the first word decides; its folder is `name`."""
        source = self.folder / "toy"
        if not source.exists():
            (write_images if self.sees else write_toy)(source)
        task = {"image": "image"} if self.sees else {"template": "{text} it was {mask}"}
        return build(
            {
                "task": {
                    "name": "classify",
                    **task,
                    "labels": {"positive": "good", "negative": "bad"},
                    "reading": "words" if self.words else "head",
                },
                "data": {"source": str(source), "max_length": 40},
                "backbone": {
                    "model": f"tiny-{self.family}",
                    "family": tiny.family_name(self.family),
                },
                "method": method if method is not None else self.config().model_dump(),
                **({"solver": {"name": "proposals", "population": 2}} if self.spoken else {}),
                "train": {"steps": steps, "batch_size": 6, "evaluate_every": 5, "save_every": 3, **(train or {})},
                "seed": seed,
                "out": str(self.folder / name),
            }
        )


def case_of(
    method: type[Method],
    family: str,
    folder: Path,
    settings: Mapping[str, Any] | None = None,
    card: Path | None = None,
) -> Case:
    """One cell of the table; the method becomes known in this process by its name, which saved prompts hold."""
    registry.add("methods", method)
    return Case(method, family, method.tiny if settings is None else settings, folder, card)


def write_toy(folder: Path) -> None:
    """A tiny data set: the first word decides the label."""
    folder.mkdir(parents=True)
    words = torch.Generator().manual_seed(5)
    fillers = tiny.WORDS[20:60]
    for name, count in (("train", 30), ("validation", 8), ("test", 8)):
        lines = []
        for number in range(count):
            label = ("positive", "negative")[number % 2]
            length = int(torch.randint(2, 7, (1,), generator=words))
            rest = [fillers[int(place)] for place in torch.randint(len(fillers), (length,), generator=words)]
            lines.append(json.dumps({"text": " ".join([("red", "blue")[number % 2], *rest]), "label": label}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_images(folder: Path) -> None:
    """A tiny set of images, a folder for each class: the colour decides the label."""
    for split, count in (("train", 30), ("validation", 8), ("test", 8)):
        for number in range(count):
            label, colour = (("positive", "red"), ("negative", "blue"))[number % 2]
            file = folder / split / label / f"{number:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(tiny_eyes.picture(100 * len(split) + number, colour=colour))


# ---- comparisons: no `assert`, which python -O leaves out and which has no message outside pytest -------------------


def expect(condition: bool, message: str) -> None:
    """Fail with a message unless the condition holds.

    Raises:
        AssertionError: with the message.
    """
    if not condition:
        raise AssertionError(message)


def expect_close(found: Tensor, wanted: Tensor, what: str, tolerance: float = 1e-5) -> None:
    """Two tensors agree within `tolerance` times the largest finite value (at least one).

    Raises:
        AssertionError: `what` and by how much they differ.
    """
    found, wanted = found.detach(), wanted.detach()
    expect(found.shape == wanted.shape, f"{what}: shape {tuple(found.shape)} instead of {tuple(wanted.shape)}")
    difference = float((found - wanted).abs().max())
    scale = max(1.0, float(wanted[wanted.isfinite()].abs().max()))
    expect(difference <= tolerance * scale, f"{what}: differs by {difference:.1e} on a scale of {scale:.1e}")


def expect_raised(kind: type[Exception], call: Callable[[], Any], what: str) -> str:
    """The message of the error that `call` raises.

    Raises:
        AssertionError: it raises none of that kind; any other error passes through.
    """
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"{what}: {kind.__name__} was not raised")


def gradient(parameter: torch.nn.Parameter, name: str) -> Tensor:
    """The gradient of a tensor.

    Raises:
        AssertionError: it has none.
    """
    if parameter.grad is None:
        raise AssertionError(f"{name} got no gradient")
    return parameter.grad


def logged(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def padded(batch: Batch, left: int = 0, right: int = 0) -> Batch:
    """The batch with more columns of padding."""

    def pad(value: Tensor | None, filling: int) -> Tensor | None:
        return None if value is None else torch.nn.functional.pad(value, (left, right), value=filling)

    return replace(
        batch,
        input_ids=torch.nn.functional.pad(batch.input_ids, (left, right)),
        attention_mask=torch.nn.functional.pad(batch.attention_mask, (left, right)),
        segment_ids=pad(batch.segment_ids, 0),
        plain=pad(batch.plain, False),
        slots={name: at + left for name, at in batch.slots.items()},
    )
