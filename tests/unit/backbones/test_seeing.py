"""Models that see: where rows of a prompt stand, what leaves the model as it was, what is recorded, what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from promptuary.backbones.base import BackboneConfig
from promptuary.backbones.inject import noting
from promptuary.backbones.recompute import layers
from promptuary.backbones.seeing import sight_of
from promptuary.backbones.vision import Vision
from promptuary.errors import ConfigError, SiteError
from promptuary.testing import tiny, tiny_eyes
from promptuary.types import Batch, Piece, Prompt, Sight

KINDS = list(tiny_eyes.KINDS)
BOTH = [*KINDS, "clip", "siglip", "pair"]


def images(backbone: Any, count: int = 3, seed: int = 0) -> Batch:
    pixels = torch.randn(count, 3, *backbone.sight.size, generator=torch.Generator().manual_seed(seed))
    ids = torch.zeros(count, backbone.places, dtype=torch.long)
    return Batch(ids, torch.ones_like(ids), torch.arange(count), pixels=pixels)


def rows(deep: int = 2, count: int = 3, sets: int = 1, seed: int = 5) -> Tensor:
    return torch.randn(sets, deep, count, 32, generator=torch.Generator().manual_seed(seed))


def by_hand(backbone: Any, pixels: Tensor, prompt: Tensor) -> Tensor:
    """The states behind the last layer, from the model's own modules one after the other; only for ViT."""
    eye, size = backbone.model, prompt.shape[2]
    states = eye.embeddings(pixels)
    for number, layer in enumerate(eye.layers):
        if number < prompt.shape[1]:
            own = prompt[:, number].expand(len(states), -1, -1)
            behind = states[:, 1:] if number == 0 else states[:, 1 + size :]
            states = torch.cat([states[:, :1], own, behind], dim=1)
        states = layer(states, None)
    return eye.layernorm(states)


@pytest.mark.parametrize("deep", [1, 2])
def test_rows_stand_between_the_class_token_and_the_patches_and_replace_what_became_of_them(deep: int) -> None:
    backbone, prompt = tiny.backbone("vit"), rows(deep)
    batch = images(backbone)
    with torch.no_grad():
        wanted = by_hand(tiny.backbone("vit"), batch.pixels, prompt)
        found = backbone.hidden(batch, Prompt(layers=prompt))
        pooled = backbone.pooled(batch, Prompt(layers=prompt))
    torch.testing.assert_close(found, torch.cat([wanted[:, :1], wanted[:, 4:]], dim=1), rtol=0, atol=1e-6)
    torch.testing.assert_close(pooled, wanted[:, 0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", BOTH)
def test_every_layer_runs_on_special_tokens_rows_and_patches(kind: str) -> None:
    backbone, lengths = tiny.backbone(kind), list[Tensor]()
    parts = [next(part for part in block.modules() if isinstance(part, nn.LayerNorm)) for block in backbone.blocks]
    batch = images(backbone)
    with noting(parts, lengths):
        backbone.pooled(batch, Prompt(layers=rows(2, 5)))
    assert [states.shape[1] for states in lengths] == 2 * [backbone.lead + 5 + 16]
    assert backbone.lead == {"siglip": 0, "deit": 2, "registers": 5}.get(kind, 1)


@pytest.mark.parametrize("kind", BOTH)
def test_their_order_is_irrelevant_and_each_layer_has_a_part(kind: str) -> None:
    backbone, prompt = tiny.backbone(kind), rows(2, 4).requires_grad_()
    batch = images(backbone)
    found = backbone.pooled(batch, Prompt(layers=prompt))
    found.square().sum().backward()
    permuted = backbone.pooled(batch, Prompt(layers=prompt[:, :, [2, 0, 3, 1]]))
    torch.testing.assert_close(permuted, found, rtol=1e-5, atol=1e-5)
    assert prompt.grad is not None
    weights = torch.arange(1.0, 1 + found.shape[1])
    again = rows(2, 4).requires_grad_()
    (backbone.pooled(batch, Prompt(layers=again)) * weights).sum().backward()
    assert again.grad is not None
    assert bool((again.grad.abs().amax(dim=(0, 2, 3)) > 0).all())


@pytest.mark.parametrize("kind", BOTH)
def test_without_rows_it_is_the_model_itself(kind: str) -> None:
    backbone, plain = tiny.backbone(kind), tiny.model(kind)
    batch = images(backbone)
    with torch.no_grad():
        found = backbone.hidden(batch, Prompt())
        empty = backbone.hidden(batch, Prompt(layers=rows(2, 0)))
        eye = plain if kind in KINDS else plain.vision_model
        wanted = eye(pixel_values=batch.pixels).last_hidden_state
    assert torch.equal(found, wanted)
    torch.testing.assert_close(empty, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["vit", "beit", "clip"])
def test_rows_of_each_image_and_of_several_prompts_are_what_each_is_alone(kind: str) -> None:
    backbone = tiny.backbone(kind)
    batch, own = images(backbone, 4), rows(2, 3, sets=4)
    together = backbone.pooled(batch, Prompt(layers=own))
    alone = [backbone.pooled(batch.rows(torch.tensor([row])), Prompt(layers=own[row : row + 1])) for row in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    several = [Prompt(layers=rows(2, 3)), Prompt(), Prompt(layers=rows(1, 5))]
    mixed = replace(batch, prompt_index=torch.tensor([2, 0, 1, 0]))
    found = backbone.pooled(mixed, several)
    wanted = [backbone.pooled(batch, several[which])[row] for row, which in enumerate([2, 0, 1, 0])]
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_recomputed_layers_have_their_rows_and_norms_again(kind: str) -> None:
    found = []
    for again in (False, True):
        backbone, prompt = tiny.backbone(kind), rows().requires_grad_()
        norms = backbone.norm_values().requires_grad_()
        with backbone.recomputing(again):
            states = backbone.hidden(images(backbone), Prompt(layers=prompt, norms=norms))
        (states * torch.arange(1.0, 33)).sum().backward()
        found.append((prompt.grad, norms.grad))
        assert bool(norms.grad.abs().amax() > 0)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def test_its_own_norms_change_nothing_and_others_do() -> None:
    backbone = tiny.backbone("clip")
    batch, own = images(backbone), backbone.norm_values()
    assert own.shape == (4, 2, 32)
    plain = backbone.pooled(batch, Prompt())
    torch.testing.assert_close(backbone.pooled(batch, Prompt(norms=own)), plain, rtol=0, atol=1e-6)
    assert not torch.allclose(backbone.pooled(batch, Prompt(norms=2 * own)), plain, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_tokens_are_what_enters_each_layer_without_the_special_ones(kind: str) -> None:
    backbone, plain = tiny.backbone(kind), tiny.model(kind)
    batch = images(backbone)
    found = backbone.tokens(batch, position=False)
    with torch.no_grad():
        states = plain(pixel_values=batch.pixels, output_hidden_states=True).hidden_states
        patches = plain.get_input_embeddings()(batch.pixels)
    patches = patches[0] if isinstance(patches, tuple) else patches
    torch.testing.assert_close(found[0], patches, rtol=0, atol=1e-6)
    torch.testing.assert_close(found[1], states[1][:, backbone.lead :], rtol=0, atol=1e-6)
    positioned = backbone.tokens(batch, position=True)
    torch.testing.assert_close(positioned[0], states[0][:, backbone.lead :], rtol=0, atol=1e-6)
    assert len(found) == 2, "what leaves the last layer enters none"
    assert not any(parameter.grad is not None for parameter in backbone.model.parameters())


@pytest.mark.parametrize("kind", ["vit", "dinov2", "beit"])
def test_pooling(kind: str) -> None:
    batch, prompt = images(tiny.backbone(kind)), Prompt(layers=rows())

    def pooled(how: str) -> Tensor:
        return tiny.backbone(kind, pooling=how).pooled(batch, prompt)

    states = tiny.backbone(kind).hidden(batch, prompt)
    torch.testing.assert_close(pooled("first"), states[:, 0])
    torch.testing.assert_close(pooled("mean"), states[:, 1:].mean(1))
    backbone, behind = tiny.backbone(kind, pooling="all"), list[Tensor]()
    with noting([backbone.last_norm], behind):
        found = backbone.pooled(batch, prompt)
    states = next(states for states in behind if states.shape[:2] == (3, 1 + 3 + 16))
    torch.testing.assert_close(found, backbone.last_norm(states[:, 1:].mean(1)))
    with pytest.raises(ConfigError, match="the vision family takes first, mean or all"):
        pooled("last")


@pytest.mark.parametrize("kind", BOTH)
def test_attention_of_rows_over_patches(kind: str) -> None:
    backbone = tiny.backbone(kind)
    batch = images(backbone)
    before = backbone.pooled(batch, Prompt(layers=rows()))
    found = backbone.attention(batch, Prompt(layers=rows()))
    assert found.shape == (3, 2, 3, 16)
    assert backbone.grid == (4, 4)
    assert bool((found >= 0).all())
    assert bool((found.sum(-1) < 1 + 1e-5).all())
    assert torch.equal(backbone.pooled(batch, Prompt(layers=rows())), before), "the model attends as before"
    if backbone.lead:
        assert backbone.attention(batch, Prompt()).shape == (3, 2, 1, 16)
    else:
        with pytest.raises(SiteError, match="neither rows of a prompt nor a class token"):
            backbone.attention(batch, Prompt())


@pytest.mark.parametrize("kind", ["vit", "dinov2", "clip"])
def test_images_of_another_size(kind: str) -> None:
    made, sight = tiny.model(kind), Sight((24, 24), (24, 24))
    reader = sight if kind in KINDS else (tiny.reader(kind)[0], sight)
    family = type(tiny.backbone(kind))
    backbone = family(made, reader, BackboneConfig(model="larger", family=family.name, device="cpu"))
    assert (backbone.patches, backbone.grid) == (36, (6, 6))
    assert backbone.pooled(images(backbone), Prompt(layers=rows())).isfinite().all()


def test_released_it_is_as_it_came() -> None:
    made, plain = tiny.model("beit"), tiny.model("beit")
    backbone = Vision(made, tiny_eyes.sight(), BackboneConfig(model="x", family="vision", device="cpu"))
    backbone.pooled(images(backbone), Prompt(layers=rows()))
    backbone.release()
    for one, other in zip(made.modules(), plain.modules(), strict=True):
        assert vars(one).keys() == vars(other).keys()


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_a_prompt_for_text_is_refused_by_name() -> None:
    backbone = tiny.backbone("vit")
    with pytest.raises(SiteError, match=r"the prompt uses input, for which ViTModel \(vision\) has no place"):
        backbone.pooled(images(backbone), Prompt(rows=torch.zeros(1, 2, 32)))
    with pytest.raises(SiteError, match="has no vocabulary that a prompt could start from"):
        backbone.vocabulary.embed(torch.tensor([0]))


def test_a_model_without_a_sequence_of_patches_is_refused() -> None:
    import transformers

    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4
    )
    settings = BackboneConfig(model="swin", family="vision", device="cpu")
    with pytest.raises(SiteError, match="is no plain transformer over patches"):
        Vision(transformers.SwinModel(config), Sight((32, 32), (32, 32)), settings)
    assert layers(tiny.model("vit"))


def test_patches_must_fill_an_image() -> None:
    settings = BackboneConfig(model="x", family="vision", device="cpu")
    with pytest.raises(ConfigError, match="patches of 4 pixels do not fill an image of 18 x 18; choose a mul"):
        Vision(tiny.model("vit"), Sight((18, 18), (18, 18)), settings)


@pytest.mark.parametrize("pieces", [[Piece("field", "a text")], [Piece("image", "x"), Piece("fixed", " is")], []])
def test_it_sees_one_image_and_reads_no_text(pieces: list[Piece]) -> None:
    with pytest.raises(ConfigError, match="the vision family sees one image and reads no text: set task.image"):
        tiny.backbone("vit").encode(pieces, 10)


def test_features_alone_do_not_do_where_a_prompt_stands_among_patches() -> None:
    backbone = tiny.backbone("vit")
    batch = images(backbone)
    known = replace(batch, pixels=None, features=torch.ones(3, 32))
    assert torch.equal(backbone.pooled(known, Prompt()), torch.ones(3, 32))
    with pytest.raises(SiteError, match="the images themselves are needed"):
        backbone.pooled(known, Prompt(layers=rows()))


# ---- how images are wanted ------------------------------------------------------------------------------------------

MEAN, SIDES = [0.4, 0.5, 0.6], {"height": 224, "width": 224}


@pytest.mark.parametrize(
    ("values", "size", "wanted"),
    [
        ({"size": {"height": 8, "width": 6}, "image_mean": MEAN}, None, Sight((8, 6), (8, 6), (0.4, 0.5, 0.6))),
        (
            {
                "size": {"shortest_edge": 256},
                "crop_size": {"height": 224, "width": 224},
                "do_center_crop": True,
                "resample": 2,
            },
            None,
            Sight((224, 224), 256, resample=2),
        ),
        (
            {"size": {"shortest_edge": 256}, "crop_size": 224, "do_center_crop": True},
            112,
            Sight((112, 112), 128),
        ),
        ({"size": {"shortest_edge": 32}}, None, Sight((32, 32), 32)),
        ({"size": 16, "do_normalize": False}, None, Sight((16, 16), 16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))),
        ({}, None, Sight((48, 48), 48)),
    ],
)
def test_a_processors_settings(values: dict[str, Any], size: int | None, wanted: Sight) -> None:
    assert sight_of(values, {"image_size": 48}, size) == wanted


def test_settings_without_a_size_are_refused() -> None:
    with pytest.raises(ConfigError, match="does not say how large an image is"):
        sight_of({}, {}, None)
