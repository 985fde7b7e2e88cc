"""Models that see, from folders: the family is found, settings of images are read, what lacks is said in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import pictures
import tiny
from promptuary import checkpoint
from promptuary.backbones import load
from promptuary.backbones.base import BackboneConfig
from promptuary.building import hold_backbone, open_backbone
from promptuary.course import Course
from promptuary.errors import ConfigError, FingerprintError, SiteError
from promptuary.testing import tiny_eyes, tiny_pairs
from promptuary.types import Batch, Prompt

SEEING = {**dict.fromkeys(tiny_eyes.KINDS, "vision"), **dict.fromkeys(("clip", "siglip", "pair"), "dual")}


def images(backbone: Any) -> Batch:
    pixels = torch.randn(2, 3, *backbone.sight.size, generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(2, backbone.places, dtype=torch.long)
    return Batch(ids, torch.ones_like(ids), torch.arange(2), pixels=pixels)


@pytest.mark.parametrize(("kind", "family"), SEEING.items())
def test_a_folder_is_the_model_in_memory(kind: str, family: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path, kind)
    assert load.guess_family(folder) == family
    found = open_backbone(BackboneConfig(model=folder, device="cpu"))
    held = tiny.backbone(kind)
    assert found.name == family
    assert found.sight == held.sight
    assert found.identity == held.identity
    batch = images(found)
    torch.testing.assert_close(found.pooled(batch, Prompt()), held.pooled(batch, Prompt()), rtol=1e-5, atol=1e-6)


def test_what_mae_trained_is_read_as_a_vit_that_hides_nothing(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    more = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    config = transformers.ViTMAEConfig(**sizes, **more, image_size=16, patch_size=4, decoder_intermediate_size=16)
    transformers.ViTMAEForPreTraining(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(tiny_eyes.PROCESSOR))
    found = open_backbone(BackboneConfig(model=str(tmp_path), device="cpu", pooling="all"))
    batch = images(found)
    first, second = (found.pooled(batch, Prompt()) for _ in range(2))
    assert torch.equal(first, second)
    assert found.patches == 16


def test_a_model_that_is_held_needs_its_processor() -> None:
    processor = transformers.ViTImageProcessorPil(**tiny_eyes.PROCESSOR)
    held = hold_backbone(tiny.model("vit"), processor)
    assert (held.name, held.sight) == ("vision", tiny_eyes.sight())
    both = hold_backbone(tiny.model("clip"), (tiny_pairs.tokenizer("clip"), processor))
    assert (both.name, both.sight) == ("dual", tiny_eyes.sight())


@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_without_settings_of_images_one_line_says_what_lacks(kind: str, tmp_path: Path) -> None:
    folder = Path(tiny.save(tmp_path, kind))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(
        ConfigError, match=r"cannot read how .* wants its images: .*put its preprocessor_config.json"
    ) as caught:
        open_backbone(BackboneConfig(model=str(folder), device="cpu"))
    assert "\n" not in str(caught.value)
    (folder / "preprocessor_config.json").write_text("[1]")
    with pytest.raises(ConfigError, match="should be an object"):
        open_backbone(BackboneConfig(model=str(folder), device="cpu"))
    (folder / "preprocessor_config.json").write_text("{broken")
    with pytest.raises(ConfigError, match="cannot read how"):
        open_backbone(BackboneConfig(model=str(folder), device="cpu"))


@pytest.mark.parametrize(("family", "kind"), [("vision", "vit"), ("dual", "clip")])
def test_a_prompt_comes_back_on_its_base_and_on_no_other(family: str, kind: str, tmp_path: Path) -> None:
    source = pictures.write(tmp_path / "images", train=2, validation=1, test=1)
    folder = tiny.save(tmp_path / "base", kind)
    run = pictures.run(source, tmp_path / "run", family, backbone={"model": folder})
    learner = Course(run, open_backbone(run.backbone)).learner
    checkpoint.save_prompt(learner, tmp_path / "prompt")
    asked = [{"image": str(path)} for path in sorted(source.glob("test/*/*.png"))]
    again = checkpoint.load_prompt(tmp_path / "prompt")
    assert again.predict(asked) == learner.predict(asked)
    assert again.predict([path["image"] for path in asked]) == learner.predict(asked)
    other = tiny.save(tmp_path / "other", kind, seed=4)
    with pytest.raises(FingerprintError, match="does not fit"):
        checkpoint.load_prompt(tmp_path / "prompt", model=other)
    # images prepared in another way are another base too
    settings = {**tiny_eyes.PROCESSOR, "image_mean": [0.4, 0.4, 0.4]}
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(FingerprintError, match="preparation of images differs"):
        checkpoint.load_prompt(tmp_path / "prompt")


def test_a_reader_of_another_kind_is_refused_before_the_model_is_touched() -> None:
    for kind, message in (("vit", "needs its image processor"), ("clip", "as a pair; .* is neither")):
        model = tiny.model(kind)
        with pytest.raises(SiteError, match=message):
            hold_backbone(model, tiny.tokenizer())
        assert all(parameter.requires_grad for parameter in model.parameters())
