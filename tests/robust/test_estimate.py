"""The plan's estimate of memory follows what is switched on: within a factor of two of the bytes that a step keeps.

Knows no formula.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

import tiny
import toy
from clock import saved_bytes
from promptuary.training import Listener, Training
from promptuary.training_facts import kept_bytes

DEEP = {"vocab_size": 4096, "n_embd": 32, "n_layer": 12, "n_head": 4, "n_positions": 120}
SWITCHES: dict[str, dict[str, bool]] = {
    "default": {},
    "not shared": {"share_prefix": False},
    "wide head": {"narrow_head": False},
}


def deep(**settings: Any) -> Any:
    """A GPT-2 of twelve layers, whose vocabulary is large beside them."""
    other = tiny.backbone("gpt2", **settings)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**DEEP, eos_token_id=2)).eval()
    return type(other)(model, other.tokenizer, other.config)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("switch", SWITCHES)
def test_the_estimate_follows_every_switch(switch: str, recompute: bool, tmp_path: Path) -> None:
    run = toy.run(
        tmp_path, "method.num_virtual_tokens=24", family="gpt2", batch_size=8, gradient_checkpointing=recompute
    )
    training = Training(run, Listener(), deep(**SWITCHES[switch]))
    made = training.tuned.train(True)
    batch = made.batch(max((training.feed.at(step) for step in range(2)), key=len))
    made.loss(batch)  # whatever is tried once is tried now

    def kept(again: bool) -> int:
        def step() -> None:
            with training.backbone.recomputing(again):
                made.loss(batch).total.backward()

        return saved_bytes(step, training.backbone.model.parameters())

    # one layer that runs again is not among the bytes that wait
    measured = kept(recompute) + (kept(False) // DEEP["n_layer"] if recompute else 0)
    assert 0.5 <= kept_bytes(training) / measured <= 2
    assert training.plan()["memory_bytes_estimate"] > kept_bytes(training)


def usual(kind: str, **settings: Any) -> Any:
    """A tiny model that is four times as wide between as outside, as most large ones are."""
    other = tiny.backbone(kind, **settings)
    config = tiny.model(kind).config
    setattr(config, "d_ff" if kind == "t5" else "intermediate_size", 4 * tiny.WIDTH)
    model = type(tiny.model(kind))(config).to(other.model.dtype).eval()
    return type(other)(model, other.tokenizer, other.config)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "t5", "bert", "minilm"])
def test_the_estimate_holds_for_every_family(kind: str, dtype: str, tmp_path: Path) -> None:
    run = toy.run(tmp_path, f"backbone.dtype={dtype}", family=kind, batch_size=8)
    training = Training(run, Listener(), usual(kind, dtype=dtype))
    made = training.tuned.train(True)
    batch = made.batch(max((training.feed.at(step) for step in range(2)), key=len))
    made.loss(batch)
    measured = saved_bytes(lambda: made.loss(batch).total.backward(), training.backbone.model.parameters())
    assert 0.5 <= kept_bytes(training) / measured <= 2
