"""Black-box tuning: its map against a small computation of our own, the scale of A, its sizes, and what is saved.

Knows no other method but prompt tuning, which it starts as, and no solver.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from promptuary.backbones.base import Backbone
from promptuary.checkpoint import load_prompt, save_prompt
from promptuary.errors import ConfigError
from promptuary.methods.bbt import BBT, BBTConfig
from promptuary.methods.prompt_tuning import PromptTuning, PromptTuningConfig
from promptuary.prompts.init import Starting
from promptuary.tasks.classify import Classify, ClassifyConfig
from promptuary.testing.case import TEXTS
from promptuary.tuned import Tuned
from promptuary.types import Batch, Shape, View

D, N, K = tiny.WIDTH, 4, 6
TASK = ClassifyConfig(template="{text} it was {mask}", labels={"yes": "good", "no": "bad", "else": "maybe"})


def made(backbone: Backbone, seed: int = 0, **settings: Any) -> BBT:
    config = BBTConfig(**{"num_virtual_tokens": N, "intrinsic_dimension": K, **settings})
    return BBT(config, backbone.shape).initialise(Starting(backbone.vocabulary, torch.Generator().manual_seed(seed)))


def moved(method: BBT, seed: int = 3) -> BBT:
    with torch.no_grad():
        method.vector.copy_(torch.randn(method.vector.shape, generator=torch.Generator().manual_seed(seed)))
    return method


def tuned(backbone: Backbone, method: Any) -> tuple[Tuned, Batch]:
    whole = Tuned(backbone, Classify(TASK), method, max_length=40)
    return whole, whole.batch(whole.rows([{"text": text, "label": "yes"} for text in TEXTS], labelled=True))


# ---- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [8, 768, 1024])
def test_what_is_searched_is_the_vector_alone(width: int) -> None:
    """500 numbers for 50 rows of any width; A and P_0 are constants."""
    config = BBTConfig()
    assert BBT.count(config, Shape(width)) == 500
    with torch.device("meta"):
        method = BBT(config, Shape(width))
    assert {name: value.numel() for name, value in method.named_parameters()} == {"vector": 500}
    assert method.constants(drawn=True)["matrix"].shape == (500, 50 * width)
    assert {name: value.numel() for name, value in method.constants(drawn=False).items()} == {
        "base": 50 * width,
        "scale": 1,
    }


def test_a_budget_bounds_the_vector() -> None:
    assert BBT.match_budget(BBTConfig(), 40, Shape(384)).intrinsic_dimension == 500
    assert BBT.match_budget(BBTConfig(), 10, Shape(16)).intrinsic_dimension == 160


@pytest.mark.parametrize("settings", [{"num_virtual_tokens": 10**9}, {"intrinsic_dimension": 10**9}])
def test_a_matrix_that_no_memory_holds_is_refused_in_one_line(settings: dict[str, int]) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match="at most 268,435,456 numbers") as caught:
        BBT(BBTConfig(**{"intrinsic_dimension": 500, **settings}), Shape(1024))
    assert "\n" not in str(caught.value)


# ---- the map --------------------------------------------------------------------------------------------------------


def test_prompt_is_the_start_and_the_vector_through_the_matrix() -> None:
    method = moved(made(tiny.backbone("bert")))
    rows = method.prompt(View()).rows
    assert rows is not None
    a, v = (method.scale * method.matrix).double().view(K, N, D), method.vector.tolist()
    for row in range(N):
        for entry in range(0, D, 7):
            wanted = float(method.base[row, entry]) + sum(v[k] * float(a[k, row, entry]) for k in range(K))
            assert float(rows[0, row, entry].detach()) == pytest.approx(wanted, abs=1e-5)
    assert torch.equal(method.fold().as_rows(), rows[0])


@pytest.mark.parametrize("kind", ["t5", "llama", "bert", "minilm"])
def test_a_vector_of_zeros_is_the_start(kind: str) -> None:
    """It begins as prompt tuning from the same rows does, and the vector's gradient is that of the rows through A."""
    backbone = tiny.backbone(kind)
    method = made(backbone)
    assert not bool(method.vector.any())
    assert torch.equal(method.fold().as_rows(), method.base)
    tuning = PromptTuning(PromptTuningConfig(num_virtual_tokens=N), backbone.shape)
    with torch.no_grad():
        tuning.rows.copy_(method.base)
    (one, batch), (two, _) = tuned(backbone, method), tuned(backbone, tuning)
    assert torch.equal(one.scores(batch), two.scores(batch))
    one.train(True).loss(batch).total.backward()
    two.train(True).loss(batch).total.backward()
    wanted = method.scale * method.matrix @ tuning.rows.grad.reshape(-1)
    torch.testing.assert_close(method.vector.grad, wanted, rtol=1e-4, atol=1e-6)
    assert method.matrix.grad is None


def test_the_start_is_vocabulary_rows() -> None:
    weight = tiny.model("bert").get_input_embeddings().weight.detach()
    method = made(tiny.backbone("bert"))
    assert all(float((weight - row).abs().amax(1).min()) < 1e-6 for row in method.base)


@pytest.mark.parametrize(("alpha", "sigma", "k"), [(1.0, 1.0, 500), (0.2, 1.0, 500), (1.0, 0.2, 500), (2.0, 0.5, 100)])
def test_the_entries_of_a_have_the_published_scale(alpha: float, sigma: float, k: int) -> None:
    """Their standard deviation is alpha std(E) / (sqrt(k) sigma)."""
    backbone = tiny.backbone("bert")
    method = made(backbone, intrinsic_dimension=k, alpha=alpha, sigma=sigma)
    a = method.scale * method.matrix
    # of the ordinary tokens, which are all but the special ones
    spread = tiny.model("bert").get_input_embeddings().weight.detach()[len(tiny.SPECIAL) :].std()
    assert float(a.std()) == pytest.approx(alpha * float(spread) / (math.sqrt(k) * sigma), rel=0.03)
    assert float(a.mean()) == pytest.approx(0, abs=3 * float(a.std()) / math.sqrt(a.numel()))


def test_a_step_of_the_search_moves_the_prompt_by_the_scale_of_the_vocabulary() -> None:
    """For v of normal numbers times sigma, v A is as large as alpha times an embedding, whatever k and sigma."""
    backbone = tiny.backbone("bert")
    for k, sigma in ((100, 1.0), (400, 0.3)):
        method = made(backbone, intrinsic_dimension=k, sigma=sigma)
        with torch.no_grad():
            moved(method).vector.mul_(sigma)
        step = method.fold().as_rows() - method.base
        assert float(step.pow(2).mean().sqrt()) == pytest.approx(backbone.vocabulary.rms(), rel=0.25)


# ---- the seed -------------------------------------------------------------------------------------------------------


def test_the_same_matrix_after_loading(tmp_path: Path) -> None:
    backbone = tiny.backbone("bert")
    whole, batch = tuned(backbone, moved(made(backbone, seed=4)))
    save_prompt(whole, tmp_path / "p")
    torch.manual_seed(11)
    again = load_prompt(tmp_path / "p", backbone)
    assert again.method is not None
    assert whole.method is not None
    assert torch.equal(again.method.matrix, whole.method.matrix)
    assert torch.equal(again.scores(batch), whole.scores(batch))
    size = (tmp_path / "p" / "constants.safetensors").stat().st_size
    assert size < 4 * (N * D + 1) + 400  # P_0, the scale and a header: the matrix takes no room


def test_each_seed_has_its_own_matrix_and_one_seed_has_one() -> None:
    backbone = tiny.backbone("bert")
    one, same, other = (made(backbone, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.matrix, same.matrix)
    assert float((one.matrix - other.matrix).abs().max()) > 0.1


def test_training_leaves_matrix_and_start_alone() -> None:
    whole, batch = tuned(tiny.backbone("bert"), made(tiny.backbone("bert")))
    method = whole.method
    assert method is not None
    before = {name: value.clone() for name, value in method.named_buffers()}
    whole.train(True).loss(batch).total.backward()
    torch.optim.SGD(method.parameters(), lr=1.0).step()
    assert bool(method.vector.any())
    assert all(torch.equal(value, before[name]) for name, value in method.named_buffers())
