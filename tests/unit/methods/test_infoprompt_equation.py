"""InfoPrompt: its loss in training against the equation, row by row from the frozen model's states.

Knows no other method.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import cross_entropy, gelu, linear, log_softmax

import tiny
from promptuary.methods.infoprompt import NULL, PREDICTION, REPRESENTATION, InfoPrompt
from promptuary.seeds import Chance
from promptuary.testing import case_of
from promptuary.tuned import Tuned
from promptuary.types import Prompt

SETTINGS: list[dict[str, Any]] = [
    {},
    {"nce_floor": -2.0, "prompt_source": "instance"},
    {"representation": "deterministic", "kl_weight": 0.0},
    {"representation": "deterministic", "kl_weight": 0.0, "prompt_source": "instance"},
]


def by_hand(made: Tuned, batch: Any) -> dict[str, float]:
    """The loss of a step, row by row from the frozen model's states, in another way than the method's."""
    m, frozen = made.method, made.backbone
    assert isinstance(m, InfoPrompt)
    c = m.settings
    t = {name: value.detach().double() for name, value in m.named_parameters()}
    bare = frozen.answer(batch, Prompt()).double()
    rows = torch.stack([t["rows"]] * len(batch)) if c.prompt_source == "static" else None
    if rows is None:
        hidden = gelu(linear(bare, t["down"].T, t["down_bias"]))
        rows = linear(hidden, t["up"].T, t["up_bias"]).reshape(len(batch), -1, tiny.WIDTH)
    prompt = Prompt(rows=rows.float(), placement=tuple((slot, c.num_virtual_tokens) for slot in c.slots))
    under, width = frozen.answer(batch, prompt).double(), tiny.WIDTH

    def posterior(state: Tensor) -> Normal:
        log_std = linear(state, t["spread"].T, t["spread_bias"]).clamp(-2, 10)
        return Normal(linear(state, t["mean"].T, t["mean_bias"]), log_std.exp())

    def share(positive: Tensor, negatives: Tensor) -> float:
        value = -log_softmax(torch.cat([positive.reshape(1), negatives]), dim=0)[0]
        return float(value if c.nce_floor is None else value.clamp(max=-c.nce_floor))

    found = dict.fromkeys(("task", "head", "representation", "prior"), 0.0)
    for i, index in enumerate(batch.index.tolist()):
        assert made.moment is not None
        chance = Chance(*made.moment, torch.tensor([index]))
        words = frozen.table.weight[batch.input_ids[i][batch.attention_mask[i].bool()]].double()
        direction = t["head"].mean(0)
        found["head"] += share(rows[i].mean(0) @ direction / width**0.5, words @ direction / width**0.5)
        context = torch.stack([linear(row, t["critic"].T, t["critic_bias"]) for row in rows[i]]).mean(0)
        if c.representation == "gaussian":
            q, q0 = posterior(under[i]), posterior(bare[i])
            noise = [chance.normal(4, purpose=purpose)[0] for purpose in (PREDICTION, REPRESENTATION)]
            others = chance.normal(c.negatives, 4, purpose=NULL)[0]
            read, seen = (linear(q.mean + q.stddev * one, t["out"].T, t["out_bias"]) for one in noise)
            null = linear(q0.mean + q0.stddev * others, t["out"].T, t["out_bias"])
            standard = Normal(torch.zeros(4).double(), torch.ones(4).double())
            found["prior"] += float(sum(kl_divergence(one, standard).mean() for one in (q, q0)))
        else:
            read = seen = under[i]
            null = bare[i][None]
        found["representation"] += share(seen @ context / width**0.5, null @ context / width**0.5)
        found["task"] += float(cross_entropy(t["head"] @ read, batch.target[i]))
    return {name: value / len(batch) for name, value in found.items()}


@pytest.mark.parametrize("family", ["causal", "seq2seq", "masked", "encoder"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_loss_is_the_equation_row_by_row(settings: dict[str, Any], family: str, tmp_path: Path) -> None:
    weights = {"representation_weight": 0.3, "head_weight": 0.7, "kl_weight": 0.4}
    case = case_of(InfoPrompt, family, tmp_path, {**InfoPrompt.tiny, **weights, **settings})
    made = case.tuned()
    made.moment = (0, 1)
    made.train(True)
    assert made.method is not None
    with torch.no_grad():
        for parameter in made.method.parameters():
            parameter.mul_(2)
        batch = made.batch(case.rows(made))
        loss, wanted = made.loss(batch), by_hand(made, batch)
    kl_weight = settings.get("kl_weight", 0.4)
    if not kl_weight:
        del wanted["prior"]
    assert loss.parts == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    total = wanted["task"] + 0.7 * wanted["head"] + 0.3 * wanted["representation"]
    assert float(loss.total) == pytest.approx(total + kl_weight * wanted.get("prior", 0.0), rel=1e-4)
    assert all(value > 0 for value in wanted.values())
