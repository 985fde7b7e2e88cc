"""P-tuning: its encoder against PEFT's, places in the template, counts, and what folds.

Knows no other method.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny
from promptuary.building import shape_of
from promptuary.errors import ConfigError, SiteError
from promptuary.methods.p_tuning import PTuning, PTuningConfig
from promptuary.prompts.init import Starting
from promptuary.tasks.classify import Classify, ClassifyConfig
from promptuary.tuned import Tuned
from promptuary.types import Shape, View

D = tiny.WIDTH


def made(seed: int = 0, **settings: Any) -> PTuning:
    method = PTuning(PTuningConfig(**{"num_virtual_tokens": 4, "hidden": 8, **settings}), Shape(D))
    method.initialise(Starting(tiny.backbone("bert").vocabulary, torch.Generator().manual_seed(seed)))
    return method


def peft_encoder(method: PTuning) -> Any:
    """PEFT's prompt encoder with the same weights."""
    peft = pytest.importorskip("peft")
    c = method.settings
    encoder = peft.PromptEncoder(
        peft.PromptEncoderConfig(
            num_virtual_tokens=c.num_virtual_tokens, token_dim=D, num_transformer_submodules=1,
            encoder_reparameterization_type=c.encoder.upper(), encoder_hidden_size=c.hidden,
            encoder_num_layers=c.layers, encoder_dropout=0.0,
        )
    )  # fmt: skip
    with torch.no_grad():
        encoder.embedding.weight.copy_(method.inputs)
        maps = [layer for layer in encoder.mlp_head if isinstance(layer, torch.nn.Linear)]
        for number, layer in enumerate(maps):
            layer.weight.copy_(getattr(method, f"map_{number}").T)
            layer.bias.copy_(getattr(method, f"map_{number}_bias"))
        if c.encoder == "lstm":
            own = [value for name, value in method.named_parameters() if name.startswith("lstm_")]
            for theirs, mine in zip(encoder.lstm_head.parameters(), own, strict=True):
                theirs.copy_(mine)
    return encoder.eval()


@pytest.mark.parametrize("settings", [{}, {"layers": 1}, {"encoder": "mlp"}])
def test_the_encoder_is_pefts_with_the_same_weights(settings: dict[str, Any]) -> None:
    method = made(**settings)
    encoder = peft_encoder(method)
    with torch.no_grad():
        wanted = encoder(torch.arange(4)[None])[0]
    torch.testing.assert_close(method.fold().as_rows(), wanted, rtol=1e-5, atol=1e-6)
    assert PTuning.count(method.config, Shape(D)) == sum(value.numel() for value in encoder.parameters())


@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
def test_every_tensor_learns_and_only_the_lstm_ties_rows_together(encoder: str) -> None:
    method = made(encoder=encoder)
    method.prompt(View()).rows[0, 0].pow(2).sum().backward()
    others = method.inputs.grad[1:].abs().max()
    assert (float(others) > 0) == (encoder == "lstm")
    method = made(encoder=encoder)
    method.prompt(View()).rows.pow(2).sum().backward()
    assert all(value.grad is not None and bool(value.grad.any()) for value in method.parameters())


def placed(template: str, **settings: Any) -> tuple[list[int], list[str]]:
    """Positions of the prompt, and the tokens of one text with it."""
    backbone = tiny.backbone("masked")
    task = Classify(ClassifyConfig(template=template, labels={"a": "good", "b": "bad"}))
    config = PTuningConfig(**{"hidden": 4, **settings})
    tuned = Tuned(backbone, task, PTuning(config, shape_of(backbone, task)), max_length=40)
    tuned.initialise(torch.Generator().manual_seed(0))
    batch = tuned.batch(tuned.rows([{"text": "red cat runs", "label": "a"}], labelled=True))
    ids = backbone.place(batch, tuned.prompt(batch)).input_ids[0].tolist()
    vocabulary = backbone.table.weight.shape[0]
    words = [backbone.tokenizer.convert_ids_to_tokens(token) if token < vocabulary else "*" for token in ids]
    return [place for place, token in enumerate(ids) if token >= vocabulary], words


def test_rows_go_where_the_template_says() -> None:
    at, words = placed("{prompt_a} {text} {prompt_b} {mask} .", slots={"prompt_a": 2, "prompt_b": 3})
    assert len(at) == 5
    text, mask = words.index("red"), words.index(tiny.backbone("masked").tokenizer.mask_token)
    assert at[:2] == [text - 2, text - 1]
    assert at[2:] == [mask - 3, mask - 2, mask - 1]
    assert PTuningConfig(slots={"prompt_a": 2, "prompt_b": 3}).num_virtual_tokens == 5


def test_without_places_it_stands_where_every_prompt_does() -> None:
    assert placed("{text} {mask} .", num_virtual_tokens=3)[0] == [0, 1, 2]
    assert placed("{text} {mask} .", num_virtual_tokens=3, placement="after_bos")[0] == [1, 2, 3]


def test_a_place_that_the_template_lacks_is_refused() -> None:
    with pytest.raises(SiteError, match=r"\{prompt_x\}.*add it"):
        placed("{text} {mask} .", slots={"prompt_x": 2})


def test_it_folds_to_rows_and_the_encoder_is_gone() -> None:
    folded = made().fold()
    assert folded.as_rows().shape == (4, D)
    assert folded.sites == {"input"}


@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
def test_a_budget_is_kept_and_used(encoder: str) -> None:
    config = PTuning.match_budget(PTuningConfig(num_virtual_tokens=4, encoder=encoder), 80, Shape(D))
    more = config.model_copy(update={"hidden": config.hidden + 1})
    assert PTuning.count(config, Shape(D)) <= 80 * D < PTuning.count(more, Shape(D))
    with pytest.raises(ConfigError, match=r"lower method\.num_virtual_tokens"):
        PTuning.match_budget(PTuningConfig(num_virtual_tokens=4, encoder=encoder), 4, Shape(D))
