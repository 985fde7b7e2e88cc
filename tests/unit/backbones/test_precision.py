"""One setting for a frozen model in bfloat16: what is trained stays in float32, and its gradient keeps its direction.

Knows no method but the two that are trained here, one with rows and one with a table besides.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tiny
import toy
from clock import saved_bytes
from promptuary import registry
from promptuary.backbones.base import Backbone, BackboneConfig
from promptuary.building import build_method, open_backbone
from promptuary.tasks.classify import Classify, ClassifyConfig
from promptuary.training import Listener, Training, seeded
from promptuary.tuned import Tuned

CLOSE = 0.998
"""Least cosine between the gradients of a model in bfloat16 and in float32."""

COMBINATIONS = [(share, recompute) for share in (True, False) for recompute in (True, False)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model of each family as files in float32.

    T5 does not scale its attention: with the weights of the others, three times as large, its softmax is a choice of
    one, and a rounding chooses another.
    """
    made = {}
    for family, kind in tiny.FAMILIES.items():
        folder = tmp_path_factory.mktemp(family)
        tiny.save(folder, kind)
        if kind == "t5":
            model = tiny.model(kind)
            for parameter in model.parameters():
                parameter.data.div_(3 if parameter.dim() > 1 else 1)
            model.save_pretrained(folder)
        made[family] = str(folder)
    return made


def opened(folder: str, family: str, **settings: Any) -> Backbone:
    """A backbone from its files, as a run opens it."""
    return open_backbone(BackboneConfig(model=folder, family=family, device="cpu", **settings))


def tuned(backbone: Backbone, method: str) -> Tuned:
    """A method with more rows than texts have tokens, and label words to be told apart."""
    found = registry.load("methods", method)
    settings = {**found.tiny, "name": method, "num_virtual_tokens": 12}
    config = found.Config.read(settings, where="method")
    task = Classify(ClassifyConfig(template="{text} it was {mask}", labels={"positive": "good", "negative": "bad"}))
    made = Tuned(backbone, task, build_method(config, backbone.shape), max_length=40).initialise(seeded(0)).train(True)
    source = seeded(1)
    with torch.no_grad():  # so that no factor of a product is zero
        for group in made.trained():
            group.parameter.add_(0.1 * torch.randn(group.parameter.shape, generator=source))
    return made


def step(made: Tuned, recompute: bool) -> None:
    """Forward and backward over texts of one label: what both labels ask for cancels, and would leave the rounding."""
    with made.backbone.recomputing(recompute):
        made.loss(made.batch(made.rows(toy.rows(24)[::2], labelled=True))).total.backward()


def gradients(made: Tuned, recompute: bool = False) -> list[Tensor]:
    """Of every trained tensor."""
    step(made, recompute)
    found = []
    for group in made.trained():
        assert group.parameter.grad is not None, group.name
        found.append(group.parameter.grad)
        group.parameter.grad = None
    return found


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_is_trained_stays_in_float32_with_all_that_belongs_to_it(
    family: str, optimizer: str, folders: dict[str, str], tmp_path: Path
) -> None:
    run = toy.run(
        tmp_path, f"backbone.model={folders[family]}", "backbone.dtype=bfloat16", family=family, optimizer=optimizer
    )
    training = Training(run, Listener())
    weights = list(training.backbone.model.parameters())
    assert {weight.dtype for weight in weights} == {torch.bfloat16}
    assert not any(weight.requires_grad for weight in weights)
    before = training.tuned.state()
    training.run(resume=False, fresh=False)
    assert {weight.dtype for weight in weights} == {torch.bfloat16}
    for group in training.tuned.trained():
        kept = training.solver.optimizer.state[group.parameter]
        slots = [value for value in kept.values() if isinstance(value, Tensor) and value.dim()]
        assert slots, f"{optimizer} keeps nothing of {group.name}"
        assert group.parameter.grad is not None
        assert {value.dtype for value in (group.parameter, group.parameter.grad, *slots)} == {torch.float32}
    saved = load_file(training.folder.prompt / "prompt.safetensors")
    state = load_file(training.folder.path / "checkpoints" / "step-3" / "state.safetensors")
    assert {value.dtype for value in (*saved.values(), *(v for v in state.values() if v.dim()))} == {torch.float32}
    # numbers that bfloat16 does not have: a step counts however small it is
    after = {name: state[f"trained/{name}"] for name in before}
    assert not any(torch.equal(after[name], before[name]) for name in before)
    assert not any(torch.equal(value, value.bfloat16().float()) for value in after.values())


@pytest.mark.parametrize("method", ["prompt_tuning", "ept"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gradients_keep_their_direction_whatever_else_is_switched_on(
    family: str, method: str, folders: dict[str, str]
) -> None:
    exact = tuned(opened(folders[family], family, share_prefix=False), method)
    wanted, counted = gradients(exact), {}
    for share, recompute in COMBINATIONS:
        half = tuned(opened(folders[family], family, share_prefix=share, dtype="bfloat16"), method)
        half.restore(exact.state())
        found = gradients(half, recompute)
        assert {gradient.dtype for gradient in found} == {torch.float32}
        for group, one, other in zip(half.trained(), found, wanted, strict=True):
            cosine = float(torch.cosine_similarity(one.flatten(), other.flatten(), dim=0))
            assert cosine >= CLOSE, (group.name, share, recompute, cosine)
        counted[share, recompute] = saved_bytes(lambda: step(half, recompute), half.backbone.model.parameters())  # noqa: B023
    # each of them was at work, alone and together with the others
    assert all(counted[share, True] < 0.7 * counted[share, False] for share in (True, False))
    if family == "causal":
        assert all(counted[True, recompute] < counted[False, recompute] for recompute in (True, False))
    assert counted[False, False] < 0.75 * saved_bytes(lambda: step(exact, False), exact.backbone.model.parameters())
