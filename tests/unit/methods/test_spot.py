"""SPoT: where its rows come from, and how sources are compared.

Knows no other method but prompt tuning, which it is from its second stage on.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from promptuary.errors import ConfigError, NotFoldable
from promptuary.methods.prompt_tuning import PromptTuning, PromptTuningConfig
from promptuary.methods.spot import Spot, SpotConfig, likeness
from promptuary.prompts.init import Saved, Starting
from promptuary.types import Prompt, Shape, View

D = tiny.WIDTH


def noise(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def source(rows: Tensor | None, name: str = "earlier") -> Saved:
    prompt = None if rows is None else Prompt(rows=rows[None])
    return Saved(name, "prompt_tuning", {}, {}, prompt, {})


def made(sources: list[Saved], **settings: Any) -> tuple[Spot, Starting]:
    config = SpotConfig(num_virtual_tokens=4, sources=tuple(one.name for one in sources), **settings)
    start = Starting(tiny.backbone("bert").vocabulary, torch.Generator().manual_seed(0), sources=sources)
    method = Spot(config, Shape(D))
    method.initialise(start)
    return method, start


@pytest.mark.parametrize("choose", ["nearest", "average"])
def test_a_single_source_is_where_it_starts(choose: str) -> None:
    rows = noise(4, D)
    method, _ = made([source(rows)], choose=choose)
    assert torch.equal(method.rows, rows)
    assert len(method.stages()) == 1


def test_the_average_of_all_sources() -> None:
    several = [noise(4, D, seed=seed) for seed in range(3)]
    method, _ = made([source(rows, str(number)) for number, rows in enumerate(several)], choose="average")
    torch.testing.assert_close(method.rows.detach(), torch.stack(several).mean(0))
    assert len(method.stages()) == 1


@pytest.mark.parametrize("similarity", ["mean", "rows"])
def test_retrieval_takes_the_nearest(similarity: str) -> None:
    several = [noise(4, D, seed=seed) for seed in range(3)]
    method, start = made([source(rows, f"s{n}") for n, rows in enumerate(several)], similarity=similarity)
    assert [stage.name for stage in method.stages()] == ["probe", "transfer"]
    assert sum(stage.share for stage in method.stages()) == pytest.approx(1)
    with torch.no_grad():
        method.rows.copy_(several[1] + 0.1 * noise(4, D, seed=9))
    told = method.go_on(1, start)
    assert torch.equal(method.rows.detach(), several[1])
    assert max(told, key=lambda name: told[name]) == "likeness of s1"
    assert method.start_scale["rows"] == pytest.approx(float(several[1].pow(2).mean().sqrt()))


def test_the_best_few_are_weighted_by_their_likeness() -> None:
    several = [noise(4, D, seed=seed) for seed in range(3)]
    method, start = made([source(rows, str(n)) for n, rows in enumerate(several)], top=2)
    with torch.no_grad():
        method.rows.copy_(2 * several[0] + several[2])
    found = likeness(method.rows.detach(), torch.stack(several), "mean")
    method.go_on(1, start)
    weights = found[[0, 2]] / found[[0, 2]].sum()
    torch.testing.assert_close(method.rows.detach(), weights[0] * several[0] + weights[1] * several[2])


def test_sources_that_all_point_away_leave_the_least_unlike() -> None:
    away = noise(4, D)
    method, start = made([source(-away, "a"), source(-away - 0.5 * noise(4, D, seed=1), "b")], top=2)
    with torch.no_grad():
        method.rows.copy_(away)
    told = method.go_on(1, start)
    best = max(told, key=lambda name: told[name])
    wanted = -away if best.endswith("a") else -away - 0.5 * noise(4, D, seed=1)
    assert max(told.values()) < 0
    torch.testing.assert_close(method.rows.detach(), wanted)


def test_both_similarities_are_the_cosines_that_they_are_called() -> None:
    rows, sources = noise(4, D), noise(2, 4, D, seed=1)
    for number in range(2):
        mean = torch.cosine_similarity(rows.mean(0), sources[number].mean(0), dim=0)
        pairs = torch.stack([torch.cosine_similarity(a, b, dim=0) for a in rows for b in sources[number]]).mean()
        assert float(likeness(rows, sources, "mean")[number]) == pytest.approx(float(mean), abs=1e-6)
        assert float(likeness(rows, sources, "rows")[number]) == pytest.approx(float(pairs), abs=1e-6)
    assert float(likeness(rows, rows[None], "mean")[0]) == pytest.approx(1)


def test_it_is_prompt_tuning_from_there() -> None:
    rows = noise(4, D)
    method, start = made([source(rows)])
    tuning = PromptTuning(PromptTuningConfig(num_virtual_tokens=4, init="saved"), Shape(D))
    tuning.initialise(Starting(start.vocabulary, torch.Generator(), rows))
    assert torch.equal(method.prompt(View()).rows, tuning.prompt(View()).rows)
    assert [(g.learning_rate, g.weight_decay) for g in method.trained()] == [
        (g.learning_rate, g.weight_decay) for g in tuning.trained()
    ]
    assert Spot.count(method.config, Shape(D)) == PromptTuning.count(tuning.config, Shape(D))


@pytest.mark.parametrize(
    ("sources", "error", "message"),
    [
        ([], ConfigError, r"name their folders in method\.sources"),
        ([source(noise(3, D))], ConfigError, r"earlier has 3 rows, and method\.num_virtual_tokens is 4"),
        ([source(None)], NotFoldable, "depends on the input"),
    ],
)
def test_sources_that_do_not_fit_are_refused(sources: list[Saved], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        made(sources)
    assert "\n" not in str(caught.value)


def test_the_length_is_that_of_the_sources() -> None:
    config = SpotConfig(num_virtual_tokens=4)
    assert Spot.match_budget(config, 6, Shape(D)) == config
    with pytest.raises(ConfigError, match="shorter sources"):
        Spot.match_budget(config, 3, Shape(D))
