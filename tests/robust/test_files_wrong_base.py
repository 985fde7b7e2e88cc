"""Another base is refused with both names; the same base stored another way is not.

Knows no method.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tiny
from artefacts import TEXTS
from artefacts import tuned as made_on
from promptuary import registry
from promptuary.backbones.base import Backbone, BackboneConfig
from promptuary.backbones.load import differing
from promptuary.checkpoint import load_prompt, save_prompt
from promptuary.errors import FingerprintError

TRAINED_ON = "tiny-llama-0"


def wrapped(model: Any, tokenizer: Any = None, family: str = "causal", name: str = "the-other") -> Backbone:
    words = tokenizer if tokenizer is not None else tiny.tokenizer(specials="start")
    config = BackboneConfig(model=name, family=family, device="cpu")
    return registry.load("backbones", family)(model.eval(), words, config)


def llama(**changes: Any) -> Any:
    """The same tiny model with other sizes."""
    config = transformers.LlamaConfig(**{**tiny.model("llama").config.to_dict(), **changes})
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def nudged(part: str) -> Any:
    """The same model after a step of fine-tuning in one part."""
    model = tiny.model("llama")
    changed = 0
    for name, value in model.named_parameters():
        if part in name:
            value.data.mul_(1 + 0.02 * torch.rand(value.shape, generator=torch.Generator().manual_seed(1)))
            changed += 1
    assert changed > 0
    return model


def resized() -> Any:
    model = tiny.model("llama")
    model.resize_token_embeddings(tiny.SIZE + 8)
    return model


def other_words() -> Any:
    """A tokenizer of the same size that gives two words each other's number."""
    words = tiny.tokenizer(specials="start")
    text = words.backend_tokenizer.to_str()
    swapped = text.replace('"good"', '"x"').replace('"bad"', '"good"').replace('"x"', '"bad"')
    assert swapped != text
    words._tokenizer = type(words.backend_tokenizer).from_str(swapped)
    return words


def other_specials() -> Any:
    words = tiny.tokenizer(specials="start")
    words.sep_token = "<unk>"
    words.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    return words


def merged() -> Any:
    """A low-rank update merged into one matrix."""
    model = tiny.model("llama")
    value = model.model.layers[1].mlp.down_proj.weight
    left, right = torch.full((32, 1), 0.1), torch.full((1, 64), 0.1)
    value.data.add_(left @ right)
    return model


OTHERS: dict[str, tuple[str, Callable[[], Backbone]]] = {
    "weights": ("embedding", lambda: wrapped(tiny.model("llama", seed=1))),
    "the same name in another revision": (
        "matrices",
        lambda: wrapped(nudged("layers.0.self_attn.q_proj"), name=TRAINED_ON),
    ),
    "one fine-tuned layer": ("matrices", lambda: wrapped(nudged("layers.1.mlp"))),
    "only the norms": ("vectors", lambda: wrapped(nudged("norm"))),
    "only the embeddings": ("embedding", lambda: wrapped(nudged("embed_tokens"))),
    "only the head": ("matrices", lambda: wrapped(nudged("lm_head"))),
    "a merged low-rank update": ("matrices", lambda: wrapped(merged())),
    "width": ("architecture", lambda: wrapped(llama(hidden_size=48, head_dim=12))),
    "depth": ("vectors", lambda: wrapped(llama(num_hidden_layers=3))),
    "resized vocabulary": ("architecture", lambda: wrapped(resized())),
    "tokenizer": ("tokenizer", lambda: wrapped(tiny.model("llama"), other_words())),
    "special tokens": ("tokenizer", lambda: wrapped(tiny.model("llama"), other_specials())),
    "architecture": ("architecture", lambda: wrapped(tiny.model("qwen3"))),
    "another architecture": ("architecture", lambda: wrapped(tiny.model("gpt2"))),
    "family": ("architecture", lambda: wrapped(tiny.model("bert"), family="masked")),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("saved")
    return save_prompt(made_on(where, tiny.backbone("causal")), where / "prompt")


@pytest.mark.parametrize("what", OTHERS)
def test_another_base_is_refused_with_both_names(what: str, saved: Path) -> None:
    part, make = OTHERS[what]
    with pytest.raises(FingerprintError) as caught:
        load_prompt(saved, make())
    text = str(caught.value)
    assert f'trained on "{TRAINED_ON}"' in text
    assert f'does not fit "{TRAINED_ON if "revision" in what else "the-other"}"' in text
    assert part in text
    assert "\n" not in text
    assert len(OTHERS) >= 12


# ---- the same base --------------------------------------------------------------------------------------------------


def plain(folder: Path, model: Any, **options: Any) -> None:
    model.save_pretrained(folder, **options)
    tiny.tokenizer(specials="start").save_pretrained(folder)


def again(folder: Path, model: Any) -> None:
    """Stored in bfloat16, read, and stored in float32."""
    plain(folder.with_name("between"), model.to(torch.bfloat16))
    plain(folder, transformers.AutoModelForCausalLM.from_pretrained(folder.with_name("between"), dtype=torch.float32))


def pickled(folder: Path, model: Any) -> None:
    """The layout of before safetensors."""
    plain(folder, model)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def moved(folder: Path, model: Any) -> None:
    plain(folder.with_name("first"), model)
    shutil.copytree(folder.with_name("first"), folder)


def words_again(folder: Path, model: Any) -> None:
    """A tokenizer that was read and stored again."""
    plain(folder.with_name("first"), model)
    transformers.AutoTokenizer.from_pretrained(folder.with_name("first")).save_pretrained(folder)
    model.save_pretrained(folder)


SAME: dict[str, Callable[[Path, Any], None]] = {
    "bfloat16": lambda folder, model: plain(folder, model.to(torch.bfloat16)),
    "float16": lambda folder, model: plain(folder, model.to(torch.float16)),
    "float32 from bfloat16": again,
    "shards": lambda folder, model: plain(folder, model, max_shard_size="20KB"),
    "a pickled layout": pickled,
    "moved": moved,
    "tokenizer stored again": words_again,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
@pytest.mark.parametrize("how", SAME)
def test_the_same_base_stored_another_way_is_no_false_alarm(how: str, dtype: str, saved: Path, tmp_path: Path) -> None:
    SAME[how](tmp_path / "base", tiny.model("llama"))
    config = BackboneConfig(model=str(tmp_path / "base"), family="causal", device="cpu", dtype=dtype)
    again = registry.load("backbones", "causal").load(config)
    found = load_prompt(saved, again).predict(TEXTS)
    assert len(found) == len(TEXTS)
    if dtype == "float32" and how in ("shards", "a pickled layout", "moved", "tokenizer stored again"):
        assert found == load_prompt(saved, tiny.backbone("causal")).predict(TEXTS)
    if how == "shards":
        assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", tiny.FAMILY)
def test_a_dtype_is_no_other_base(kind: str, dtype: torch.dtype) -> None:
    family = tiny.FAMILY[kind]
    words = tiny.tokenizer()
    whole = wrapped(tiny.model(kind), words, family).identity
    part = wrapped(tiny.model(kind).to(dtype), words, family).identity
    # whichever of the two the prompt was trained on
    assert differing(whole, part) == differing(part, whole) == []
    assert differing(wrapped(tiny.model(kind, seed=1).to(dtype), words, family).identity, whole) != []


@pytest.mark.parametrize("kind", [kind for kind in tiny.FAMILY if tiny.model(kind).config.tie_word_embeddings])
def test_tables_stored_twice_are_no_other_base(kind: str) -> None:
    tied = tiny.model(kind)
    config = copy.deepcopy(tied.config)
    config.tie_word_embeddings = False
    untied = type(tied)(config)
    untied.load_state_dict(tied.state_dict(), strict=kind not in ("t5", "bart"))
    words, family = tiny.tokenizer(), tiny.FAMILY[kind]
    assert wrapped(untied, words, family).identity == wrapped(tied, words, family).identity
    if kind != "minilm":
        assert len(list(untied.parameters())) > len(list(tied.parameters()))
