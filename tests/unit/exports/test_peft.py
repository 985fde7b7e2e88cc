"""PEFT's folders both ways, against the installed PEFT: equal logits, equal tokens, and refusals in one line.

Knows no training of ours.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch

import promptuary
import tiny
from promptuary import registry
from promptuary.building import build_method
from promptuary.checkpoint import load_prompt, save_prompt
from promptuary.cli.main import main
from promptuary.errors import ConfigError, FileFormatError, FingerprintError, NotFoldable, PromptuaryError
from promptuary.exports import peft as exports
from promptuary.methods.base import Method
from promptuary.tasks.classify import Classify
from promptuary.testing import case_of
from promptuary.testing.facts import families_of
from promptuary.tuned import Tuned

# PEFT warns of entries that it does not know, of bases that are on no hub, and more
pytestmark = pytest.mark.filterwarnings("ignore")

KINDS = list(tiny.FAMILY)
WRITERS = [kind for kind in KINDS if tiny.FAMILY[kind] in ("causal", "seq2seq")]
TEXT = "the sky is blue and the sea was not green"
TASK_TYPES = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "masked": "FEATURE_EXTRACTION"}
TASK_TYPES["encoder"] = "FEATURE_EXTRACTION"


def adapted(kind: str, method: str = "prompt_tuning", **settings: Any) -> Tuned:
    """A prompt whose rows are far from any token."""
    values = {**registry.load("methods", method).tiny, "placement": "front", **settings}
    made = promptuary.adapt(tiny.model(kind), tiny.tokenizer(), method, seed=3, **values)
    with torch.no_grad():
        for group in made.trained():
            group.parameter.add_(torch.randn(group.parameter.shape, generator=torch.Generator().manual_seed(4)))
    return made.train(False)


def inputs(kind: str, type_: str = "PROMPT_TUNING") -> dict[str, torch.Tensor]:
    ids = tiny.tokenizer()(TEXT, return_tensors="pt")["input_ids"]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if tiny.FAMILY[kind] != "seq2seq":
        return given
    # PEFT's multitask prompts take no decoder_input_ids
    return {**given, "labels" if type_ == "MULTITASK_PROMPT_TUNING" else "decoder_input_ids": ids[:, :4]}


def states(model: Any, given: dict[str, torch.Tensor], length: int, **more: Any) -> torch.Tensor:
    """Logits or hidden states at the text; PEFT leaves prompt positions in front of them."""
    with torch.no_grad():
        output = model(**given, **more)
    found = output["logits"] if "logits" in output else output["last_hidden_state"]
    return found[:, -length:]


def compare(kind: str, theirs: Any, made: Tuned, type_: str = "PROMPT_TUNING", **more: Any) -> None:
    """PEFT's model and ours on the same base: the same numbers, and not those of the bare model."""
    model, given = made.backbone.model, inputs(kind, type_)
    with made.attach():
        mine = states(model, given, 99)
    assert torch.equal(states(theirs, given, mine.shape[1], **more), mine)
    assert not torch.allclose(states(model, given, 99), mine, atol=1e-3)


def refusal(call: Any, kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- ours to PEFT ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_what_we_write_and_gives_the_same_logits(kind: str, tmp_path: Path) -> None:
    made = adapted(kind)
    theirs = peft.PeftModel.from_pretrained(tiny.model(kind), exports.write(made, tmp_path / "peft")).eval()
    assert theirs.active_peft_config.num_virtual_tokens == made.added_tokens
    compare(kind, theirs, made)


@pytest.mark.parametrize("kind", WRITERS)
def test_peft_writes_the_same_tokens(kind: str, tmp_path: Path) -> None:
    made = adapted(kind)
    theirs = peft.PeftModel.from_pretrained(tiny.model(kind), exports.write(made, tmp_path / "peft")).eval()
    given = {name: inputs(kind)[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 9, "do_sample": False, "repetition_penalty": 3.0, "eos_token_id": None}
    options.update(return_dict_in_generate=True, output_logits=True)
    with made.attach() as model:
        mine = model.generate(**given, **options)
    found = theirs.generate(**given, **options)
    assert torch.equal(found.sequences, mine.sequences)
    torch.testing.assert_close(torch.cat(found.logits), torch.cat(mine.logits), atol=1e-5, rtol=1e-5)
    bare = model.generate(**given, **options)
    assert not torch.allclose(bare.logits[0], mine.logits[0], atol=1e-2)


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "BertForSequenceClassification"])
def test_models_with_a_head_of_their_own_go_through_too(name: str, tmp_path: Path) -> None:
    import transformers

    kind = "llama" if name.startswith("Llama") else "bert"
    torch.manual_seed(0)
    model = getattr(transformers, name)(tiny.model(kind).config).eval()
    torch.manual_seed(0)
    other = getattr(transformers, name)(tiny.model(kind).config).eval()
    made = promptuary.adapt(model, tiny.tokenizer(), "prompt_tuning", num_virtual_tokens=3, placement="front")
    theirs = peft.PeftModel.from_pretrained(other, exports.write(made, tmp_path / "peft")).eval()
    with torch.no_grad(), made.attach():
        assert torch.equal(theirs(**inputs(kind)).logits, model(**inputs(kind)).logits)


def test_the_files_are_as_peft_writes_them(tmp_path: Path) -> None:
    folder = exports.write(adapted("t5"), tmp_path / "peft")
    assert sorted(os.listdir(folder)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    with safetensors.safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert list(file.keys()) == ["prompt_embeddings"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["num_transformer_submodules"] == 1
    made = peft.get_peft_model(
        tiny.model("t5"), peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4)
    )
    made.save_pretrained(tmp_path / "theirs")
    assert set(config) - set(json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())) == {"promptuary"}
    facts = config["promptuary"]
    assert (facts["method"], facts["method_config"]["num_virtual_tokens"]) == ("prompt_tuning", 4)
    assert set(facts["identity"]) >= {"architecture", "embedding", "tokenizer"}


@pytest.mark.parametrize("method", registry.names("methods"))
def test_a_method_is_exported_exactly_when_peft_has_a_place_for_it(method: str, tmp_path: Path) -> None:
    found = registry.load("methods", method)
    if found.sites == frozenset() or found.scores is not Method.scores or found.tiny_sources:
        # own readings and sources are refused, and tested, elsewhere
        return
    if "causal" not in families_of(found):
        made = case_of(found, families_of(found)[0], tmp_path).tuned()
        refusal(lambda: exports.write(made, tmp_path / "p"), NotFoldable)
        assert not (tmp_path / "p").exists()
        return
    made = adapted("llama", method)
    assert made.method is not None
    if made.text is not None:
        assert "this prompt is words" in refusal(lambda: exports.write(made, tmp_path / "p"), NotFoldable)
        assert not (tmp_path / "p").exists()
        return
    if made.method.depends:
        assert "depends on the text" in refusal(lambda: exports.write(made, tmp_path / "p"), NotFoldable)
        return
    folded = made.method.fold()
    if folded.kv is not None:
        close("llama", peft.PeftModel.from_pretrained(tiny.model("llama"), exports.write(made, tmp_path / "p")), made)
        return
    if folded.offset is None:
        compare("llama", peft.PeftModel.from_pretrained(tiny.model("llama"), exports.write(made, tmp_path / "p")), made)
        return
    said = refusal(lambda: exports.write(made, tmp_path / "p"), NotFoldable)
    assert method in said
    assert "by position" in said
    assert not (tmp_path / "p").exists()
    # the table is a product, zero with its first factor
    made.restore({name: value * (name != "method.a") for name, value in made.state().items()})
    compare("llama", peft.PeftModel.from_pretrained(tiny.model("llama"), exports.write(made, tmp_path / "p")), made)


def test_what_peft_cannot_hold_is_refused(tmp_path: Path) -> None:
    def write(made: Tuned) -> str:
        return refusal(lambda: exports.write(made, tmp_path / "p"), NotFoldable)

    assert "in front" in write(adapted("llama", placement="after_bos"))
    assert "no prompt" in write(Tuned(tiny.backbone("llama"), None))
    config = Classify.Config.read(
        {"name": "classify", "template": "{text} it was {mask}", "reading": "head"}, where="task"
    )
    rows = [{"text": "red", "label": "a"}, {"text": "blue", "label": "b"}]
    backbone = tiny.backbone("llama")
    method = adapted("llama").method
    assert method is not None
    assert "modules_to_save" in write(
        Tuned(backbone, Classify(config, rows), build_method(method.config, method.shape))
    )
    made = adapted("llama")
    with torch.no_grad():
        made.trained()[0].parameter[0, 0] = torch.nan
    assert "finite" in refusal(lambda: exports.write(made.train(False), tmp_path / "p"), FileFormatError)
    assert os.listdir(tmp_path) == []


def test_only_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    made = adapted("llama")
    prompt = save_prompt(made, tmp_path / "prompt")
    assert "choose a new folder" in refusal(lambda: exports.write(made, prompt), ConfigError)
    theirs = peft.get_peft_model(
        tiny.model("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    theirs.save_pretrained(tmp_path / "theirs")
    refusal(lambda: exports.write(made, tmp_path / "theirs"), ConfigError)
    (tmp_path / "file").write_text("x")
    refusal(lambda: exports.write(made, tmp_path / "file"), ConfigError)
    assert load_prompt(prompt, tiny.backbone("llama")).added_tokens == 4
    first = exports.write(made, tmp_path / "mine")
    assert exports.write(adapted("llama", num_virtual_tokens=5), tmp_path / "mine") == first
    assert json.loads((first / "adapter_config.json").read_text())["num_virtual_tokens"] == 5


# ---- PEFT to ours ---------------------------------------------------------------------------------------------------


def config_of(kind: str, type_: str) -> Any:
    task = {"task_type": TASK_TYPES[tiny.FAMILY[kind]], "num_virtual_tokens": 3}
    if type_ == "P_TUNING":
        return peft.PromptEncoderConfig(**task, encoder_hidden_size=8)
    if type_ == "MULTITASK_PROMPT_TUNING":
        return peft.MultitaskPromptTuningConfig(**task, num_tasks=3, num_ranks=2, num_transformer_submodules=1)
    if type_ == "CPT":
        return peft.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[7, 8, 9], cpt_tokens_type_mask=[1, 2, 3])
    return peft.PromptTuningConfig(**task)


def trained(kind: str, type_: str, folder: Path, **options: Any) -> Path:
    """A checkpoint that PEFT saved after two steps of training."""
    torch.manual_seed(5)
    model = peft.get_peft_model(tiny.model(kind), config_of(kind, type_))
    optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=0.5)
    more = {"task_ids": torch.tensor([1])} if type_ == "MULTITASK_PROMPT_TUNING" else {}
    for _ in range(2):
        output = model(**inputs(kind, type_), **more)
        (output["logits"] if "logits" in output else output["last_hidden_state"]).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder, **options)
    return folder


CASES = [
    *(("PROMPT_TUNING", kind) for kind in ("gpt2", "llama", "qwen3", "gemma3", "t5", "bart", "bert", "minilm")),
    *(("P_TUNING", kind) for kind in ("gpt2", "t5", "bert")),
    *(("MULTITASK_PROMPT_TUNING", kind) for kind in ("llama", "t5")),
    ("CPT", "llama"),
]


@pytest.mark.parametrize(("type_", "kind"), CASES)
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_what_peft_trained_gives_the_same_logits_here(type_: str, kind: str, safe: bool, tmp_path: Path) -> None:
    folder = trained(kind, type_, tmp_path / "peft", safe_serialization=safe)
    assert (folder / ("adapter_model.safetensors" if safe else "adapter_model.bin")).exists()
    theirs = peft.PeftModel.from_pretrained(tiny.model(kind), folder).eval()
    for task in (0, 1, 2) if type_ == "MULTITASK_PROMPT_TUNING" else (None,):
        made = exports.read(folder, tiny.model(kind), tiny.tokenizer(), task=task)
        assert (made.added_tokens, made.has_task) == (3, False)
        compare(kind, theirs, made, type_, **({} if task is None else {"task_ids": torch.tensor([task])}))


@pytest.mark.parametrize("kind", ["llama", "t5", "bert"])
def test_the_round_trip_is_bitwise(kind: str, tmp_path: Path) -> None:
    made = adapted(kind)
    again = exports.read(exports.write(made, tmp_path / "a"), tiny.model(kind), tiny.tokenizer())
    assert list(again.state()) == list(made.state())
    assert all(torch.equal(again.state()[name], value) for name, value in made.state().items())
    exports.write(again, tmp_path / "b")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]
    # and through PEFT's own hands, which drop what they do not know
    peft.PeftModel.from_pretrained(tiny.model(kind), tmp_path / "a").save_pretrained(tmp_path / "c")
    third = exports.read(tmp_path / "c", tiny.model(kind), tiny.tokenizer())
    assert torch.equal(third.state()["method.rows"], made.state()["method.rows"])


def test_an_imported_prompt_can_be_saved_loaded_and_trained_on(tmp_path: Path) -> None:
    model = tiny.model("llama")
    made = exports.read(trained("llama", "PROMPT_TUNING", tmp_path / "peft"), model, tiny.tokenizer())
    before = made.state()["method.rows"]
    # a relative rate is in units of the rows that came in
    scale = float(before.pow(2).mean().sqrt())
    assert made.trained()[0].learning_rate == pytest.approx(0.05 * scale)
    save_prompt(made, tmp_path / "ours")
    again = load_prompt(tmp_path / "ours", model=tiny.model("llama"), tokenizer=tiny.tokenizer())
    assert torch.equal(again.state()["method.rows"], before)
    with again.attach(train=True) as host:
        host(**inputs("llama"), labels=inputs("llama")["input_ids"]).loss.backward()
    assert float(again.trained()[0].parameter.grad.abs().max()) > 0


def test_the_unused_half_of_an_encoder_decoder_is_left_out_and_said(tmp_path: Path) -> None:
    folder = trained("t5", "PROMPT_TUNING", tmp_path / "peft")
    stored = safetensors.torch.load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
    assert len(stored) == 6
    with pytest.warns(UserWarning, match="holds 6 rows, of which PEFT reads the first 3"):
        made = exports.read(folder, tiny.model("t5"), tiny.tokenizer())
    assert torch.equal(made.state()["method.rows"], stored[:3])


def test_multitask_prompts_that_also_stand_in_the_decoder_are_refused(tmp_path: Path) -> None:
    config = peft.MultitaskPromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3, num_tasks=2)
    peft.get_peft_model(tiny.model("t5"), config).save_pretrained(tmp_path / "p")
    assert "in the decoder" in refusal(lambda: exports.load(tmp_path / "p"), ConfigError)


def test_a_trained_head_is_left_out_and_said(tmp_path: Path) -> None:
    import transformers

    base = transformers.BertForSequenceClassification(tiny.model("bert").config)
    peft.get_peft_model(base, peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)).save_pretrained(
        tmp_path / "p"
    )
    with pytest.warns(UserWarning, match=r"set them in your model yourself: .*classifier.weight"):
        exports.read(tmp_path / "p", base, tiny.tokenizer())


def test_one_of_several_tasks_must_be_named(tmp_path: Path) -> None:
    folder = trained("llama", "MULTITASK_PROMPT_TUNING", tmp_path / "p")
    backbone = tiny.backbone("llama")
    assert "each of 3 tasks" in refusal(lambda: exports.read(folder, backbone=backbone), ConfigError)
    assert "no task 3" in refusal(lambda: exports.read(folder, backbone=backbone, task=3), ConfigError)
    rows = [exports.read(folder, backbone=backbone, task=task).state()["method.rows"] for task in range(3)]
    assert not torch.allclose(rows[0], rows[1])


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained("llama", "PROMPT_TUNING", tmp_path_factory.mktemp("saved") / "peft")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "peft"))


@pytest.fixture(scope="module")
def base() -> Any:
    return tiny.backbone("llama")


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("kind", ["LORA", "IA3", "BOFT", None, 7, ["PROMPT_TUNING"]])
def test_an_adapter_that_is_no_prompt_is_refused_by_its_kind(kind: Any, folder: Path) -> None:
    edit(folder, peft_type=kind)
    said = refusal(lambda: exports.load(folder), ConfigError)
    assert f"holds a {kind} adapter" in said


# ---- keys and values ------------------------------------------------------------------------------------------------


def prefix_trained_by_peft(kind: str, folder: Path, **settings: Any) -> Any:
    """PEFT's prefix tuning after a step of training, saved."""
    config = peft.PrefixTuningConfig(task_type=TASK_TYPES[tiny.FAMILY[kind]], num_virtual_tokens=3, **settings)
    theirs = peft.get_peft_model(tiny.model(kind), config)
    given = inputs(kind)
    given["labels"] = given.pop("decoder_input_ids", given["input_ids"])
    optimizer = torch.optim.SGD([value for value in theirs.parameters() if value.requires_grad], lr=1.0)
    theirs(**given).loss.backward()
    optimizer.step()
    theirs.eval().save_pretrained(folder)
    return theirs


def close(kind: str, theirs: Any, made: Tuned) -> None:
    """PEFT's model and ours, forward on one row and greedy."""
    model, given = made.backbone.model, inputs(kind)
    with made.attach():
        mine = states(model, given, 99)
        written = model.generate(given["input_ids"], max_new_tokens=6, do_sample=False)
    torch.testing.assert_close(states(theirs, given, mine.shape[1]), mine, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(states(model, given, 99), mine, atol=1e-3)
    text = {name: given[name] for name in ("input_ids", "attention_mask")}
    found = theirs.generate(**text, max_new_tokens=6, do_sample=False)
    assert torch.equal(found, written)


def three_layers(kind: str) -> Any:
    """An encoder-decoder whose decoder has an odd number of layers, all of which PEFT can tell apart."""
    config = tiny.model(kind).config
    config.update(
        {"t5": {"num_layers": 3, "num_decoder_layers": 3}, "bart": {"encoder_layers": 3, "decoder_layers": 3}}[kind]
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = type(tiny.model(kind))(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3)
    return model.eval()


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_decoder_takes_its_prefix_where_peft_can_hold_it(kind: str, tmp_path: Path) -> None:
    made = promptuary.adapt(three_layers(kind), tiny.tokenizer(), "prefix", num_virtual_tokens=3, seed=3)
    with torch.no_grad():
        made.method.kv.add_(torch.randn(made.method.kv.shape, generator=torch.Generator().manual_seed(4)))
    made.train(False)
    folder = exports.write(made, tmp_path / "peft")
    close(kind, peft.PeftModel.from_pretrained(three_layers(kind), folder).eval(), made)
    again = exports.read(folder, three_layers(kind), tiny.tokenizer())
    assert torch.equal(again.method.kv, made.method.kv)
    even = adapted(kind, "prefix")
    said = refusal(lambda: exports.write(even, tmp_path / "even"), NotFoldable)
    assert "with 2 layers it cannot hold a prefix whose layers differ" in said
    with torch.no_grad():
        even.method.kv[1] = even.method.kv[0]
    folder = exports.write(even.train(False), tmp_path / "even")
    close(kind, peft.PeftModel.from_pretrained(tiny.model(kind), folder).eval(), even)


@pytest.mark.parametrize("kind", [kind for kind in WRITERS if tiny.FAMILY[kind] == "causal"])
def test_peft_loads_a_prefix_that_we_write(kind: str, tmp_path: Path) -> None:
    made = adapted(kind, "prefix")
    folder = exports.write(made, tmp_path / "peft")
    close(kind, peft.PeftModel.from_pretrained(tiny.model(kind), folder).eval(), made)
    again = exports.read(folder, tiny.model(kind), tiny.tokenizer())
    assert all(torch.equal(value, made.state()[name]) for name, value in again.state().items())


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("projection", [False, True])
def test_a_prefix_that_peft_trained_is_read(kind: str, projection: bool, tmp_path: Path) -> None:
    theirs = prefix_trained_by_peft(kind, tmp_path / "p", prefix_projection=projection)
    made = exports.read(tmp_path / "p", tiny.model(kind), tiny.tokenizer())
    assert made.method.name == "prefix"
    close(kind, theirs, made)


def test_a_reparameterised_prefix_is_exported_folded(tmp_path: Path) -> None:
    made = adapted("llama", "prefix", reparameterize=True, encoder_hidden_size=6)
    close(
        "llama", peft.PeftModel.from_pretrained(tiny.model("llama"), exports.write(made, tmp_path / "p")).eval(), made
    )


def test_a_prefix_on_another_shape_is_refused(tmp_path: Path) -> None:
    prefix_trained_by_peft("llama", tmp_path / "p")
    said = refusal(lambda: exports.read(tmp_path / "p", tiny.model("gpt2"), tiny.tokenizer()), FileFormatError)
    assert "the adapter has 64 numbers for each position" in said
    edit(tmp_path / "p", task_type=None)
    said = refusal(lambda: exports.read(tmp_path / "p", tiny.model("deberta"), tiny.tokenizer()), FileFormatError)
    assert "for which DebertaV2ForMaskedLM has no place" in said


def test_our_own_export_knows_its_base_and_its_bytes(tmp_path: Path) -> None:
    folder = exports.write(adapted("llama"), tmp_path / "p")
    other = tiny.model("llama", seed=1)
    refusal(lambda: exports.read(folder, other, tiny.tokenizer()), FingerprintError)
    path = folder / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert "damaged" in refusal(lambda: exports.load(folder), FileFormatError)
    for facts in ({}, [], {"identity": 1, "sha256": "x"}, {"identity": {}, "sha256": 1}):
        edit(folder, promptuary=facts)
        refusal(lambda: exports.load(folder), FileFormatError)


DAMAGE: dict[str, Any] = {
    "no tensor of that name": {"embeddings": torch.zeros(3, 32)},
    "nothing": {},
    "too few rows": {"prompt_embeddings": torch.zeros(2, 32)},
    "too many rows": {"prompt_embeddings": torch.zeros(6, 32)},
    "another width": {"prompt_embeddings": torch.zeros(3, 16)},
    "no width": {"prompt_embeddings": torch.zeros(3, 0)},
    "one dimension": {"prompt_embeddings": torch.zeros(96)},
    "whole numbers": {"prompt_embeddings": torch.zeros(3, 32, dtype=torch.long)},
    "NaN": {"prompt_embeddings": torch.full((3, 32), torch.nan)},
    "infinity": {"prompt_embeddings": torch.full((3, 32), torch.inf)},
}


@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_tensors_that_are_not_what_the_config_says_are_refused(what: str, safe: bool, folder: Path, base: Any) -> None:
    (folder / "adapter_model.safetensors").unlink()
    if safe:
        safetensors.torch.save_file(DAMAGE[what], folder / "adapter_model.safetensors")
    else:
        torch.save(DAMAGE[what], folder / "adapter_model.bin")
    refusal(lambda: exports.read(folder, backbone=base), FileFormatError)


@pytest.mark.parametrize(
    "changes",
    [
        *({"num_virtual_tokens": value} for value in (None, 0, -3, True, "3", 3.0, 4, [3], 10**30)),
        {"task_type": "SEQ_2_SEQ_LM"},
        {"task_type": "SEQ_2_SEQ_LM", "num_transformer_submodules": 1},
        {"task_type": 3},
        {"num_transformer_submodules": 2},
        {"num_transformer_submodules": -1},
        {"base_model_name_or_path": {"a": 1}},
        {"peft_type": "MULTITASK_PROMPT_TUNING"},
        {"peft_type": "MULTITASK_PROMPT_TUNING", "num_tasks": 10**30},
    ],
)
def test_a_config_that_is_not_of_these_tensors_is_refused(changes: dict[str, Any], folder: Path, base: Any) -> None:
    edit(folder, **changes)
    refusal(lambda: exports.read(folder, backbone=base), FileFormatError)


def test_missing_parts_are_refused_by_name(folder: Path, tmp_path: Path, base: Any) -> None:
    shutil.copytree(folder, tmp_path / "outer" / "mine")
    assert "mine" in refusal(lambda: exports.load(tmp_path / "outer"), FileFormatError)
    assert "adapter_config.json" in refusal(lambda: exports.load(tmp_path / "nowhere"), FileFormatError)
    (folder / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors" in refusal(lambda: exports.load(folder), FileFormatError)
    edit(folder, base_model_name_or_path=None)
    for text in ("", "[1]", '"a"', "{", "\x00"):
        (folder / "adapter_config.json").write_text(text)
        refusal(lambda: exports.load(folder), FileFormatError)


def test_a_held_model_needs_its_tokenizer_and_an_unnamed_base_a_name(folder: Path) -> None:
    assert "tokenizer" in refusal(lambda: exports.read(folder, tiny.model("llama")), ConfigError)
    edit(folder, base_model_name_or_path=None)
    assert "--model" in refusal(lambda: exports.read(folder), ConfigError)


class Hostile:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["torch", "torch, old format", "pickle"])
def test_a_pickle_that_wants_code_is_refused_and_not_run(how: str, folder: Path, tmp_path: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    content = {"prompt_embeddings": Hostile(tmp_path / "was here")}
    path = folder / "adapter_model.bin"
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch")
    assert "wants to run code" in refusal(lambda: exports.load(folder), FileFormatError)
    assert not (tmp_path / "was here").exists()
    # the same file does it when it is trusted
    torch.load(path, weights_only=False) if how != "pickle" else pickle.loads(path.read_bytes())
    assert (tmp_path / "was here").exists()


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors", "adapter_config.json"])
def test_bytes_changed_anywhere_give_a_prompt_or_one_line(name: str, saved: Path, folder: Path, base: Any) -> None:
    tensors = safetensors.torch.load_file(saved / "adapter_model.safetensors")
    if name.endswith(".bin"):
        (folder / "adapter_model.safetensors").unlink()
        torch.save(tensors, folder / name)
    path, chance, refused = folder / name, random.Random(name), list[str]()
    whole = path.read_bytes()
    for number in range(400):
        content = bytearray(whole)
        if number % 5 == 0:
            content = content[: chance.randrange(len(content))]
        else:
            for _ in range(chance.choice((1, 1, 8))):
                # where the structure is: at the ends of a zip file, in the header of safetensors
                place = int(chance.random() ** 2 * len(content)) * chance.choice((1, -1))
                content[place] = chance.randrange(256)
        path.write_bytes(content)
        try:
            made = exports.read(folder, backbone=base)
        except PromptuaryError as error:
            refused.append(str(error))
        else:
            assert bool(made.state()["method.rows"].isfinite().all())
    assert len(refused) > 100
    assert [said for said in refused if "\n" in said] == []


# ---- the command line -----------------------------------------------------------------------------------------------


def test_the_verb_writes_prompt_folders(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name = tiny.save(tmp_path / "base", "t5")
    folder = trained("t5", "MULTITASK_PROMPT_TUNING", tmp_path / "peft")
    plain = trained("t5", "PROMPT_TUNING", tmp_path / "plain")
    words = ["import", str(folder), "--model", name, "--device", "cpu", "--json"]
    assert main([*words, "--out", str(tmp_path / "one"), "--task", "1"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert said["prompts"] == [str(tmp_path / "one")]
    assert (said["kind"], said["rows"], said["width"]) == ("MULTITASK_PROMPT_TUNING", 3, 32)
    assert main([*words, "--out", str(tmp_path / "all")]) == 0
    assert json.loads(capfd.readouterr().out)["prompts"] == [str(tmp_path / "all" / f"task-{n}") for n in range(3)]
    for task, path in ((1, tmp_path / "one"), (2, tmp_path / "all" / "task-2")):
        expected = exports.read(folder, backbone=tiny.backbone("t5"), task=task).state()["method.rows"]
        assert torch.equal(load_prompt(path).state()["method.rows"], expected)
    capfd.readouterr()
    assert main(["import", str(plain), "--model", name, "--device", "cpu", "--out", str(tmp_path / "plain-ours")]) == 0
    assert "note: the file holds 6 rows" in capfd.readouterr().err
    assert main([*words, "--out", str(tmp_path / "one")]) == 2
    assert "choose a new folder" in capfd.readouterr().err
    assert main([*words, "--out", str(tmp_path / "new"), "--task", "3"]) == 2
    assert main(["import", str(tmp_path / "base"), "--out", str(tmp_path / "new")]) == 2
    assert not (tmp_path / "new").exists()
