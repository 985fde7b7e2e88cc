"""What vLLM is given: the bare model, run on the exported embeddings alone, does what the prompt does here.

vLLM itself is not run: the contract is that its model continues `prompt_embeds` as transformers continues
`inputs_embeds`.
"""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import tiny
import toy
from promptuary import exports, files, registry
from promptuary.building import build_method
from promptuary.config import load_run
from promptuary.errors import (
    ConfigError,
    DataError,
    FileFormatError,
    FingerprintError,
    NotFoldable,
    PromptuaryError,
    StorageError,
)
from promptuary.exports.vllm import PromptEmbedder
from promptuary.hosting import adapt
from promptuary.tuned import Tuned

TEXTS = ["red cat", "blue dog runs , the sea sleeps", "sun", "the old bird eats the small fish"]
METHODS = ["prompt_tuning", "lamp", "ept", "dept"]
DECODERS = ["gpt2", "llama", "qwen3", "gemma3"]


def tuned(
    where: Path, base: str = "llama", task: Any = "generate", method: str = "ept", dtype: str = "float32", **more: Any
) -> Tuned:
    """A prompt whose tensors are all far from their first values."""
    values = toy.settings(where, "causal", "generate")
    wanted = toy.TASKS[task] if isinstance(task, str) else task
    settings = {"name": method, **registry.load("methods", method).tiny, **more}
    run = load_run({**values, "task": wanted, "method": settings})
    backbone = tiny.backbone(base, dtype=dtype)
    made = registry.load("tasks", run.task.name)(run.task, toy.rows(6))
    found = Tuned(backbone, made, build_method(run.method, backbone.shape))
    return shaken(found.initialise(torch.Generator().manual_seed(1)))


def test_words_are_refused_since_a_server_takes_them_as_text(tmp_path: Path) -> None:
    spoken = tuned(tmp_path, method="manual")
    with pytest.raises(NotFoldable, match="this prompt is words, which need no export: write 'was it good' into"):
        exports.vllm.write(spoken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def shaken(found: Tuned) -> Tuned:
    for group in found.trained():
        group.parameter.data += 0.5 * torch.randn(group.parameter.shape, generator=torch.Generator().manual_seed(2))
    return found.train(False)


def bare(base: str, dtype: str = "float32") -> Any:
    """The model as anybody has it, which was never wired."""
    return tiny.model(base).to(getattr(torch, dtype))


def here(made: Tuned, text: str) -> torch.Tensor:
    """Logits of the whole sequence of the prompt in this library."""
    batch = made.batch(made.rows([{"text": text}], labelled=False))
    placed = made.backbone.place(batch, made.prompt(batch))
    with torch.no_grad(), made.backbone.running(placed) as inputs:
        return made.backbone.model(**inputs).logits


def refusal(call: Any, kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return exports.write("vllm", tuned(tmp_path), tmp_path / "out")


def edit(folder: Path, **changes: Any) -> None:
    facts = {**json.loads((folder / "client.json").read_text()), **changes}
    (folder / "client.json").write_text(json.dumps(facts))


# ---- the contract ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", DECODERS)
def test_the_bare_model_continues_the_embeddings_as_the_prompt_does(
    base: str, method: str, dtype: str, tmp_path: Path
) -> None:
    model = bare(base, dtype)
    # a base without a first special token has one place only
    for placement in ("front", "after_bos") if base in ("llama", "gemma3") else ("after_bos",):
        made = tuned(tmp_path, base, method=method, dtype=dtype, placement=placement)
        client = PromptEmbedder(exports.write("vllm", made, tmp_path / placement))
        for text in TEXTS[:2]:
            sent = client.request(text)["prompt_embeds"]
            assert sent.dtype == getattr(torch, dtype)
            with torch.no_grad():
                given = model(inputs_embeds=sent[None]).logits
            torch.testing.assert_close(given, here(made, text), rtol=1e-5, atol=1e-5)
        written = model.generate(inputs_embeds=sent[None], max_new_tokens=3, do_sample=False, pad_token_id=0)
        spoken = made.backbone.tokenizer.decode(written[0], skip_special_tokens=True)
        assert written.shape[1] > 0
        assert client.read(spoken) == made.predict([text])[0]


def test_a_scale_inside_the_embedding_is_in_the_table(tmp_path: Path) -> None:
    client = PromptEmbedder(exports.write("vllm", tuned(tmp_path, "gemma3", method="prompt_tuning"), tmp_path / "out"))
    model = bare("gemma3")
    ids = torch.tensor([7, 8])
    assert torch.equal(client.embeds(ids.tolist())[-2:], model.get_input_embeddings()(ids))
    assert not torch.allclose(client.embeds(ids.tolist())[-2:], model.get_input_embeddings().weight[ids])


@pytest.mark.parametrize("task", ["classify_words", "regress_words"])
def test_label_words_are_read_from_the_log_probabilities(task: str, tmp_path: Path) -> None:
    made = tuned(tmp_path, task=task)
    client = PromptEmbedder(exports.write("vllm", made, tmp_path / "out"))
    model = bare("llama")
    allowed = client.sampling["allowed_token_ids"]
    assert client.sampling == {"temperature": 0.0, "max_tokens": 1, "logprobs": 2, "allowed_token_ids": allowed}
    for text, wanted in zip(TEXTS, made.predict(TEXTS), strict=True):
        with torch.no_grad():
            logits = model(inputs_embeds=client.embeds(text)[None]).logits[0, -1]
        # as vLLM does with --logprobs-mode processed_logprobs: all but the allowed tokens are masked first
        only = torch.full_like(logits, -torch.inf)
        only[allowed] = logits[allowed]
        for kind in (logits, only):
            found = client.read({token: float(torch.log_softmax(kind, -1)[token]) for token in allowed})
            assert found.answer == pytest.approx(wanted.answer, abs=1e-5)
            assert found.scores == pytest.approx(wanted.scores, abs=1e-5)
    assert f'"{made.task.words[0]}"' in refusal(lambda: client.read({-1: 0.0}), DataError)
    assert "by token id" in refusal(lambda: client.read("good"), ConfigError)


def test_a_body_is_one_tensor_and_not_the_table_behind_it(tmp_path: Path, folder: Path) -> None:
    client = PromptEmbedder(folder)
    raw = base64.b64decode(client.body("red cat"), validate=True)
    again = torch.load(io.BytesIO(raw), weights_only=True)
    assert torch.equal(again, client.embeds("red cat"))
    assert len(raw) < again.numel() * 4 + 2000


def test_requests_are_written_in_their_order(tmp_path: Path) -> None:
    made = tuned(tmp_path)
    out = exports.write("vllm", made, tmp_path / "out", [{"text": TEXTS[0], "label": "x"}, *TEXTS[1:]])
    sent = safetensors.torch.load_file(out / "requests.safetensors")
    assert sorted(sent) == ["000000", "000001", "000002", "000003"]
    client = PromptEmbedder(out)
    assert all(torch.equal(sent[f"{n:06d}"], client.embeds(text)) for n, text in enumerate(TEXTS))
    text = refusal(lambda: exports.write("vllm", made, tmp_path / "no", ["red", {"words": "blue"}]), DataError)
    assert "example 2" in text
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("overflow", ["zero", "clamp", "error"])
def test_texts_beyond_the_offset_table_are_treated_as_here(overflow: str, tmp_path: Path) -> None:
    made = tuned(tmp_path, method="dept", max_tokens=4, offset_overflow=overflow)
    client = PromptEmbedder(exports.write("vllm", made, tmp_path / "out"))
    if overflow == "error":
        assert "offset table 4 rows" in refusal(lambda: client.embeds(TEXTS[1]), DataError)
        return
    with pytest.warns(UserWarning, match="the offset table has 4 rows"):
        sent = client.embeds(TEXTS[1])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(bare("llama")(inputs_embeds=sent[None]).logits, here(made, TEXTS[1]))


def test_a_prompt_without_a_task_takes_texts_and_token_ids(tmp_path: Path) -> None:
    held = tiny.model("llama")
    words = tiny.tokenizer(specials="start")
    made = shaken(adapt(held, words, "dept", **registry.load("methods", "dept").tiny))
    client = PromptEmbedder(exports.write("vllm", made, tmp_path / "out"))
    assert client.sampling == {}
    ids = words(TEXTS[1], return_tensors="pt").input_ids
    assert torch.equal(client.embeds(TEXTS[1]), client.embeds(ids[0].tolist()))
    model, other = tiny.model("llama"), tiny.model("llama")
    with made.attach(model):
        wanted = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    sent = client.embeds(ids[0].tolist())
    assert torch.equal(other.generate(inputs_embeds=sent[None], max_new_tokens=5, do_sample=False)[0], wanted)
    assert "no task" in refusal(lambda: client.read("red"), ConfigError)
    for bad in ([], [-1], [10**6]):
        assert "token ids" in refusal(lambda bad=bad: client.embeds(bad), DataError)


def test_several_fields_are_given_as_a_mapping(tmp_path: Path) -> None:
    task = {"name": "generate", "template": "{text} means {label} : {mask}"}
    client = PromptEmbedder(exports.write("vllm", tuned(tmp_path, task=task), tmp_path / "out"))
    assert client.embeds({"text": "red", "label": "good"}).shape == (3 + 1 + 4, 32)
    assert "text, label" in refusal(lambda: client.embeds("red"), ConfigError)
    assert '"label"' in refusal(lambda: client.embeds({"text": "red"}), DataError)


def test_a_client_needs_neither_the_model_nor_its_code(tmp_path: Path, folder: Path) -> None:
    code = f"""
import sys
from promptuary.exports.vllm import PromptEmbedder
sent = PromptEmbedder({str(folder)!r}).embeds("red cat")
print(float(sent.sum()), [name for name in sys.modules if ".modeling_" in name and ".models." in name])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    total, _, loaded = done.stdout.strip().partition(" ")
    assert float(total) == pytest.approx(float(PromptEmbedder(folder).embeds("red cat").sum()))
    assert "llama" not in loaded
    assert "modeling_auto" not in loaded.replace("auto.modeling_auto", "")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own account of memory")
def test_the_table_is_mapped_and_not_read(folder: Path) -> None:
    def held() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    table = torch.zeros(2**18, 32)
    safetensors.torch.save_file({"table": table}, folder / "embedding.safetensors")
    edit(folder, table=[2**18, 32])
    size, before = table.nbytes // 1024, held()
    del table
    clients = [PromptEmbedder(folder) for _ in range(3)]
    assert clients[0].embeds("red cat").isfinite().all()
    assert held() - before < size


# ---- what cannot be served ------------------------------------------------------------------------------------------

LONG = {"name": "classify", "template": "{text} {mask}", "labels": {"a": "very good", "b": "bad"}}
UNSERVED: dict[str, tuple[dict[str, Any], str]] = {
    "masked": ({"base": "bert", "task": "classify_words"}, "of the masked family"),
    "encoder": ({"base": "minilm", "task": "classify_words"}, "of the encoder family"),
    "seq2seq": ({"base": "t5"}, "of the seq2seq family"),
    "head": ({"task": "classify_head"}, "trained head"),
    "choices": ({"task": "choose"}, "its own answers"),
    "long label words": ({"task": LONG}, '"very good" has several tokens'),
    "depends on the input": ({"gate_input": "text"}, "the rows differ from row to row"),
}


def test_keys_and_values_of_every_layer_cannot_be_served(tmp_path: Path) -> None:
    made = tuned(tmp_path)
    config = registry.load("methods", "prefix").Config(num_virtual_tokens=3)
    method = build_method(config, made.backbone.shape)
    prefix = Tuned(made.backbone, made.task, method).initialise(torch.Generator().manual_seed(1))
    assert "keys and values" in refusal(lambda: exports.write("vllm", prefix, tmp_path / "out"), NotFoldable)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("settings", "says"), UNSERVED.values(), ids=UNSERVED.keys())
def test_what_cannot_be_served_is_refused_in_one_line(settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    made = tuned(tmp_path, **settings)
    assert says in refusal(lambda: exports.write("vllm", made, tmp_path / "out"), NotFoldable)
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_prompt_is_not_exported(tmp_path: Path) -> None:
    made = tuned(tmp_path)
    alone = Tuned(made.backbone, made.task)
    assert "no prompt" in refusal(lambda: exports.write("vllm", alone, tmp_path / "out"), NotFoldable)


DAMAGE: dict[str, tuple[Any, type[PromptuaryError], str]] = {
    "rows changed": (
        lambda f: (f / "rows.safetensors").write_bytes(
            files.tensor_bytes({"rows": torch.zeros(3, 32), "offset": torch.zeros(24, 32)})
        ),
        FileFormatError,
        "damaged",
    ),
    "table cut": (
        lambda f: (f / "embedding.safetensors").write_bytes((f / "embedding.safetensors").read_bytes()[:-9]),
        FileFormatError,
        "embedding.safetensors",
    ),
    "table gone": (lambda f: (f / "embedding.safetensors").unlink(), FileFormatError, "embedding.safetensors"),
    "another table": (
        lambda f: safetensors.torch.save_file({"table": torch.zeros(9, 32)}, f / "embedding.safetensors"),
        FileFormatError,
        "is not the table",
    ),
    "facts gone": (lambda f: (f / "client.json").unlink(), FileFormatError, "client.json is missing"),
    "a newer version": (lambda f: edit(f, version=2), FileFormatError, "export the prompt again"),
    "no placement": (lambda f: edit(f, placement=None), FileFormatError, "placement"),
    "a module to import": (lambda f: edit(f, task={"name": "antigravity:x"}), FileFormatError, "module"),
    "another tokenizer": (lambda f: edit(f, tokenizer="0" * 16), FingerprintError, "another tokenizer"),
}


@pytest.mark.parametrize(("damage", "kind", "says"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_export_is_refused(damage: Any, kind: type[PromptuaryError], says: str, folder: Path) -> None:
    damage(folder)
    assert says in refusal(lambda: PromptEmbedder(folder), kind)


# ---- the folder of formats ------------------------------------------------------------------------------------------


def test_formats_are_the_files_of_the_folder() -> None:
    assert "vllm" in exports.names()
    assert all(callable(exports.load(name).write) for name in exports.names())
    assert 'did you mean "vllm"?' in refusal(lambda: exports.load("vlm"), ConfigError)


def test_only_an_older_export_is_overwritten(tmp_path: Path) -> None:
    made, out = tuned(tmp_path), tmp_path / "out"
    out.mkdir()
    exports.write("vllm", made, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "--overwrite" in refusal(lambda: exports.write("vllm", made, out), ConfigError)
    exports.write("vllm", made, out, TEXTS, overwrite=True)
    assert (out / "requests.safetensors").is_file()
    (out / "thesis.txt").write_text("mine")
    for kept in ("requests.safetensors", "thesis.txt"):
        assert kept in refusal(lambda: exports.write("vllm", made, out, overwrite=True), ConfigError)
        assert (out / kept).is_file()
        (out / kept).unlink()
    exports.write("vllm", made, out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(lambda: exports.write("vllm", made, tmp_path / "file", overwrite=True), ConfigError)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "file", "out"]


def test_an_export_that_fails_leaves_the_older_one(tmp_path: Path) -> None:
    made, out = tuned(tmp_path), tmp_path / "out"
    exports.write("vllm", made, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    other = tuned(tmp_path, task="choose")
    refusal(lambda: exports.write("vllm", other, out, overwrite=True), NotFoldable)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    made = tuned(tmp_path)
    assert "cannot be written" in refusal(lambda: exports.write("vllm", made, tmp_path / "file" / "out"), StorageError)
