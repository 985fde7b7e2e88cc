"""The prompt folder: what is saved comes back; what is damaged, foreign or incomplete is refused by name.

Knows no training.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml

import tiny
import toy
from promptuary import checkpoint, files, registry
from promptuary.building import build_method
from promptuary.checkpoint import find_prompt, load_prompt, save_prompt
from promptuary.config import load_run
from promptuary.errors import ConfigError, FileFormatError, FingerprintError, NotFoldable
from promptuary.methods.bbt import BBT
from promptuary.methods.dept import DePT
from promptuary.methods.prompt_tuning import PromptTuning
from promptuary.sources import load_source
from promptuary.testing import case_of
from promptuary.testing.facts import families_of
from promptuary.tuned import Tuned

EXAMPLES = toy.rows(6, seed=2)


def tuned(where: Path, family: str = "masked", task: str = "classify_words", method: str = "prompt_tuning") -> Tuned:
    values = toy.settings(where, family, task)
    run = load_run({**values, "method": {"name": method, **registry.load("methods", method).tiny}})
    backbone = tiny.backbone(family)
    made = registry.load("tasks", run.task.name)(run.task, EXAMPLES)
    return Tuned(backbone, made, build_method(run.method, backbone.shape)).initialise(torch.Generator().manual_seed(1))


def refusal(call: Any, kind: type[Exception] = FileFormatError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_prompt(tuned(tmp_path), tmp_path / "prompt")


def edit(folder: Path, **changes: Any) -> None:
    """Facts replaced, with a checksum that fits; None takes one out."""
    facts = {**json.loads((folder / "prompt.json").read_text()), **changes}
    kept = {name: value for name, value in facts.items() if value is not None and name != "checksum"}
    (folder / "prompt.json").write_text(json.dumps(files.sealed(kept)))


# ---- what comes back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", toy.TASKS)
def test_a_saved_prompt_answers_the_same_without_data(task: str, tmp_path: Path) -> None:
    made = tuned(tmp_path, "seq2seq", task)
    if made.head is not None:
        torch.nn.init.normal_(made.head.bias)
    save_prompt(made, tmp_path / "p")
    again = load_prompt(tmp_path / "p", tiny.backbone("seq2seq"))
    assert again.predict(EXAMPLES) == made.predict(EXAMPLES)
    assert again.state().keys() == made.state().keys()
    assert all(torch.equal(again.state()[name], value) for name, value in made.state().items())
    assert (again.max_length, again.trainable_parameters) == (made.max_length, made.trainable_parameters)


@pytest.mark.parametrize("method", registry.names("methods"))
def test_the_folded_copy_is_the_folded_prompt(method: str, tmp_path: Path) -> None:
    found = registry.load("methods", method)
    made = case_of(found, families_of(found)[0], tmp_path).tuned()
    with torch.no_grad():
        for group in made.trained():
            group.parameter.add_(0.1)
    assert made.method is not None
    save_prompt(made, tmp_path / "p")
    if made.method.depends:
        assert not (tmp_path / "p" / "folded.safetensors").exists()
        return
    folded, parts = made.method.fold(), safetensors.torch.load_file(tmp_path / "p" / "folded.safetensors")
    for name in ("rows", "kv", "layers", "context", "norms"):
        part = getattr(folded, name)
        assert (name in parts) is (part is not None)
        assert part is None or torch.equal(parts[name], part if name in ("context", "norms") else part[0])
    assert len(parts) >= len(folded.tensors)
    assert ("offset.left" in parts) is (folded.offset is not None)
    if folded.offset is not None:
        assert torch.equal(parts["offset.left"] @ parts["offset.right"], folded.offset.table())


def test_saving_twice_gives_the_same_bytes_and_leaves_nothing_else(tmp_path: Path) -> None:
    made = tuned(tmp_path)
    (tmp_path / "around").mkdir()
    contents = []
    for _ in range(2):
        save_prompt(made, tmp_path / "around" / "p", metrics={"accuracy": 0.5})
        contents.append({path.name: path.read_bytes() for path in (tmp_path / "around" / "p").iterdir()})
    assert contents[0] == contents[1]
    assert set(contents[0]) == {"prompt.safetensors", "folded.safetensors", "prompt.json", "README.md"}
    assert [path.name for path in (tmp_path / "around").iterdir()] == ["p"]


def test_the_facts_say_what_is_there(saved: Path) -> None:
    facts = json.loads((saved / "prompt.json").read_text())
    wanted = {
        "method": "prompt_tuning",
        "added_tokens": 4,
        "trainable_parameters": 128,
        "width": 32,
        "sites": ["input"],
    }
    assert facts.items() >= wanted.items()
    assert facts["task"]["labels"] == {"positive": "good", "negative": "bad"}
    assert facts["task"]["template"] == "{text} it was {mask}"
    assert facts["backbone"]["model"] == "tiny-bert-0"
    assert {"embedding", "vectors", "matrices", "tokenizer", "architecture"} <= set(facts["identity"])


def test_the_card_is_there(tmp_path: Path) -> None:
    save_prompt(tuned(tmp_path), tmp_path / "p", metrics={"test accuracy": 0.75})
    text = (tmp_path / "p" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front == {
        "library_name": "promptuary",
        "base_model": "tiny-bert-0",
        "base_model_relation": "adapter",
        "pipeline_tag": "text-classification",
        "tags": ["prompt", "prompt_tuning"],
    }
    for part in (
        "arXiv 2104.08691",
        "128 trained numbers",
        "{text} it was {mask}",
        "`good`",
        "test accuracy: 0.7500",
        "load_prompt",
    ):
        assert part in text


def test_a_prompt_loads_fast_once_its_base_is_in_memory(saved: Path) -> None:
    backbone = tiny.backbone("masked")
    load_prompt(saved, backbone)
    began = time.perf_counter()
    load_prompt(saved, backbone)
    seconds = time.perf_counter() - began
    print(f"loaded in {1000 * seconds:.1f} ms")
    assert seconds < 0.5


def test_the_run_folder_around_a_prompt_is_as_good(tmp_path: Path, saved: Path) -> None:
    assert find_prompt(tmp_path) == saved == find_prompt(str(saved))
    assert load_prompt(tmp_path, tiny.backbone("masked")).predict(["a cat"])


def test_a_prompt_that_moves_aside_between_two_looks_is_found(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a process does that replaces it where two names cannot be swapped in one step."""
    aside, looked = saved.with_name(f".old-{saved.name}-1-00000000"), list[Path]()

    def moving(path: Path) -> Path:
        looked.append(path)
        if len(looked) == 1:
            saved.rename(aside)
            return path
        return look(path)

    look = files.standing
    monkeypatch.setattr(files, "standing", moving)
    assert find_prompt(saved) == aside


def test_a_base_is_loaded_by_name_or_from_elsewhere(tmp_path: Path) -> None:
    kept = tiny.save(tmp_path / "base", "bert")
    save_prompt(tuned(tmp_path), tmp_path / "p")
    again = load_prompt(tmp_path / "p", model=kept, device="cpu")
    assert again.backbone.config.model == kept
    assert again.predict(EXAMPLES) == tuned(tmp_path).predict(EXAMPLES)
    other = tiny.save(tmp_path / "other", "bert", seed=3)
    text = refusal(lambda: load_prompt(tmp_path / "p", model=other, device="cpu"), FingerprintError)
    assert "tiny-bert-0" in text
    assert other in text


def test_rows_of_a_prompt_for_another_one(tmp_path: Path, saved: Path) -> None:
    assert torch.equal(load_source(saved, tiny.backbone("masked")).rows(), tuned(tmp_path).state()["method.rows"])
    made = case_of(DePT, "masked", tmp_path).tuned()
    save_prompt(made, tmp_path / "dept")
    assert "table" in refusal(load_source(tmp_path / "dept", made.backbone).rows, NotFoldable)


def test_there_is_nothing_to_save_without_a_method(tmp_path: Path) -> None:
    made = tuned(tmp_path)
    refusal(lambda: save_prompt(Tuned(made.backbone, made.task), tmp_path / "p"), NotFoldable)
    assert not (tmp_path / "p").exists()


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_saved_and_the_old_prompt_stays(bad: float, tmp_path: Path, saved: Path) -> None:
    before = (saved / "prompt.safetensors").read_bytes()
    made = tuned(tmp_path)
    made.trained()[0].parameter.data[1, 2] = bad
    assert "method.rows" in refusal(lambda: save_prompt(made, saved))
    assert (saved / "prompt.safetensors").read_bytes() == before


def test_what_is_not_finite_is_not_loaded(saved: Path) -> None:
    rows = torch.ones(4, 32)
    rows[0, 0] = torch.nan
    body = files.tensor_bytes({"method.rows": rows})
    (saved / "prompt.safetensors").write_bytes(body)
    edit(saved, sha256={"prompt.safetensors": files.digest(body)})
    text = refusal(lambda: load_prompt(saved, tiny.backbone("masked")))
    assert "prompt.safetensors" in text
    assert "not finite" in text


DAMAGE = {
    "a flipped bit": lambda folder: flip(folder / "prompt.safetensors"),
    "cut": lambda folder: (folder / "prompt.safetensors").write_bytes(
        (folder / "prompt.safetensors").read_bytes()[:50]
    ),
    "empty": lambda folder: (folder / "prompt.safetensors").write_bytes(b""),
    "gone": lambda folder: (folder / "prompt.safetensors").unlink(),
}


def flip(path: Path) -> None:
    body = bytearray(path.read_bytes())
    body[-1] ^= 4
    path.write_bytes(body)


@pytest.mark.parametrize("how", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_tensors_are_refused_by_name(how: Any, saved: Path) -> None:
    how(saved)
    assert str(saved / "prompt.safetensors") in refusal(lambda: load_prompt(saved, tiny.backbone("masked")))


FACTS: dict[str, tuple[dict[str, Any], str]] = {
    "another format": ({"format": "peft"}, "not a prompt of this project (format 'peft')"),
    "no format": ({"format": None}, "not a prompt of this project"),
    "a newer version": ({"version": 4}, "format version 4, this release reads 1 to 3; upgrade promptuary"),
    "no version": ({"version": None}, "format version None"),
    "no method": ({"method": None}, "incomplete: method"),
    "no width": ({"width": "32"}, "incomplete: width"),
    "nothing to check": ({"sha256": {}}, "incomplete: sha256"),
    "no task name": ({"task": {}}, "incomplete: task.name"),
    "no base": ({"backbone": {"device": "cpu"}}, "incomplete: backbone.model"),
    "a field of the future": ({"method_config": {"name": "prompt_tuning", "newer": 1}}, "unknown field method.newer"),
    "a wrong task": ({"task": {"name": "classify", "labels": 3}}, "task.labels"),
    "other sizes": ({"method_config": {"name": "prompt_tuning", "num_virtual_tokens": 7}}, "needs"),
    "another method": ({"method": "lamp", "method_config": {"name": "lamp", "length": 8, "rank": 3}}, "needs"),
}


@pytest.mark.parametrize(("changes", "message"), FACTS.values(), ids=FACTS.keys())
def test_wrong_facts_are_refused_by_name(changes: dict[str, Any], message: str, saved: Path) -> None:
    edit(saved, **changes)
    text = refusal(lambda: load_prompt(saved, tiny.backbone("masked")))
    assert str(saved) in text
    assert message in text


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_facts_that_are_no_json_object_are_refused_by_name(content: bytes, saved: Path) -> None:
    (saved / "prompt.json").write_bytes(content)
    assert str(saved / "prompt.json") in refusal(lambda: load_prompt(saved, tiny.backbone("masked")))


def test_a_folder_without_a_prompt_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        text = refusal(lambda f=folder: load_prompt(f, tiny.backbone("masked")))
        assert str(folder) in text
        assert "prompt.json" in text


def test_a_method_that_is_not_installed_is_named(saved: Path) -> None:
    edit(saved, method="prompt_tunin")
    assert 'no such method: "prompt_tunin"' in refusal(lambda: load_prompt(saved, tiny.backbone("masked")), ConfigError)


def test_a_prompt_file_cannot_name_a_module_to_import(saved: Path) -> None:
    edit(saved, method="antigravity:Method")
    assert "'antigravity:Method'" in refusal(lambda: load_prompt(saved, tiny.backbone("masked")))


def test_a_saved_base_never_runs_remote_code_by_itself(tmp_path: Path, saved: Path) -> None:
    facts = json.loads((saved / "prompt.json").read_text())
    edit(saved, backbone={**facts["backbone"], "trust_remote_code": True})
    kept = tiny.save(tmp_path / "base", "bert")
    assert load_prompt(saved, model=kept, device="cpu").backbone.config.trust_remote_code is False


def test_another_base_is_refused_with_both_names(saved: Path) -> None:
    text = refusal(lambda: load_prompt(saved, tiny.backbone("masked", seed=4)), FingerprintError)
    assert "tiny-bert-0" in text
    assert "tiny-bert-4" in text


def test_an_outside_class_is_saved_under_its_own_name(tmp_path: Path) -> None:
    values = toy.settings(tmp_path, "masked")
    run = load_run({**values, "method": {"name": "promptuary.methods.prompt_tuning:PromptTuning"}})
    backbone = tiny.backbone("masked")
    made = Tuned(backbone, tuned(tmp_path).task, build_method(run.method, backbone.shape))
    save_prompt(made.initialise(torch.Generator().manual_seed(0)), tmp_path / "p")
    assert isinstance(load_prompt(tmp_path / "p", backbone).method, PromptTuning)
    assert checkpoint.read_facts(tmp_path / "p")["method"] == "prompt_tuning"


# ---- constants ------------------------------------------------------------------------------------------------------


@pytest.fixture
def held(tmp_path: Path) -> Path:
    """A prompt with a matrix that is drawn, and rows and a scale that are copied."""
    return save_prompt(constant(tmp_path), tmp_path / "held")


def constant(where: Path, seed: int = 0, **settings: Any) -> Tuned:
    return case_of(BBT, "masked", where, {**BBT.tiny, **settings}).tuned(seed=seed)


def test_constants_come_back_bit_for_bit_and_a_drawn_one_takes_no_room(tmp_path: Path, held: Path) -> None:
    made = constant(tmp_path)
    again = load_prompt(held, tiny.backbone("masked"))
    assert made.method is not None
    assert again.method is not None
    for drawn, names in ((False, {"base", "scale"}), (True, {"matrix"})):
        found, wanted = again.method.constants(drawn=drawn), made.method.constants(drawn=drawn)
        assert set(found) == set(wanted) == names
        assert all(torch.equal(found[name], value) and bool(value.any()) for name, value in wanted.items())
    assert again.predict(EXAMPLES) == made.predict(EXAMPLES)
    kept = safetensors.torch.load_file(held / "constants.safetensors")
    assert set(kept) == {"method.base", "method.scale"}
    facts = json.loads((held / "prompt.json").read_text())
    assert (facts["version"], facts["constants"], facts["trainable_parameters"]) == (
        3, BBT.tiny["num_virtual_tokens"] * tiny.WIDTH + 1, BBT.tiny["intrinsic_dimension"],
    )  # fmt: skip
    assert facts["drawn"]["seed"] == made.method.draw_seed
    # saved again, it is the same folder
    save_prompt(again, tmp_path / "again")
    for name in ("prompt.safetensors", "constants.safetensors", "folded.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (held / name).read_bytes()
    assert json.loads((tmp_path / "again" / "prompt.json").read_text())["drawn"] == facts["drawn"]


def test_what_is_drawn_follows_from_the_seed_alone(tmp_path: Path) -> None:
    one, same, other = (constant(tmp_path, seed).method for seed in (0, 0, 1))
    assert one is not None
    assert same is not None
    assert other is not None
    torch.manual_seed(7)
    assert torch.equal(one.matrix, same.matrix)
    assert not torch.equal(one.matrix, other.matrix)
    assert torch.equal(other.redraw(one.draw_seed).matrix, one.matrix)


def test_a_prompt_without_constants_has_no_such_file(saved: Path) -> None:
    assert not (saved / "constants.safetensors").exists()
    facts = json.loads((saved / "prompt.json").read_text())
    assert (facts["constants"], facts["drawn"]) == (0, None)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"sha256": "0" * 64}, {"sha256": ""}], ids=["another seed", "another hash", "no hash"]
)
def test_drawn_numbers_that_are_not_those_of_training_are_refused(change: dict[str, Any], held: Path) -> None:
    edit(held, drawn={**json.loads((held / "prompt.json").read_text())["drawn"], **change})
    text = refusal(lambda: load_prompt(held, tiny.backbone("masked")))
    assert str(held) in text
    assert "folded.safetensors" in text


DRAWN: dict[str, Any] = {
    "no seed": {"sha256": "0"},
    "a seed that is no number": {"seed": "1", "sha256": "0"},
    "a seed below zero": {"seed": -1, "sha256": "0"},
    "a seed that no generator takes": {"seed": 2**64, "sha256": "0"},
    "a list": [1, "0"],
}


@pytest.mark.parametrize("drawn", DRAWN.values(), ids=DRAWN.keys())
def test_drawn_facts_of_the_wrong_kind_are_refused_by_name(drawn: Any, held: Path) -> None:
    edit(held, drawn=drawn)
    assert "drawn" in refusal(lambda: load_prompt(held, tiny.backbone("masked")))


def test_a_prompt_that_says_nothing_of_what_it_drew_is_refused(held: Path) -> None:
    edit(held, drawn=None)
    assert str(held) in refusal(lambda: load_prompt(held, tiny.backbone("masked")))


@pytest.mark.parametrize("how", ["a flipped bit", "cut", "empty", "gone"])
def test_damaged_constants_are_refused_by_name(how: str, held: Path) -> None:
    path = held / "constants.safetensors"
    content = path.read_bytes()
    path.unlink()
    if how != "gone":
        path.write_bytes({"cut": content[:50], "empty": b"", "a flipped bit": content}[how])
    if how == "a flipped bit":
        flip(path)
    assert str(path) in refusal(lambda: load_prompt(held, tiny.backbone("masked")))


def test_constants_that_are_not_the_methods_are_refused_by_name(held: Path) -> None:
    whole = safetensors.torch.load_file(held / "constants.safetensors")
    facts = json.loads((held / "prompt.json").read_text())
    base = whole["method.base"]
    for changed in (
        {**whole, "method.base": base.T.contiguous()},
        {**whole, "method.base": base[:2]},
        {**whole, "method.base": base.double()},
        {**whole, "method.base": base.clone().fill_(torch.nan)},
        {"method.scale": whole["method.scale"], "method.other": base},
        {**whole, "method.other": base.clone()},
    ):
        body = files.tensor_bytes(changed)
        (held / "constants.safetensors").write_bytes(body)
        hashes = {**facts["sha256"], "constants.safetensors": files.digest(body)}
        for count in (facts["constants"], sum(value.numel() for value in changed.values())):
            edit(held, sha256=hashes, constants=count)
            assert "constants.safetensors" in refusal(lambda: load_prompt(held, tiny.backbone("masked")))


def test_constants_cannot_be_left_out(held: Path) -> None:
    edit(held, constants=0)
    assert "constants.safetensors holds 0 numbers" in refusal(lambda: load_prompt(held, tiny.backbone("masked")))
    edit(held, constants=None)
    assert "incomplete: constants" in refusal(lambda: load_prompt(held, tiny.backbone("masked")))


def test_constants_that_are_not_finite_are_not_saved(tmp_path: Path, held: Path) -> None:
    before = (held / "constants.safetensors").read_bytes()
    made = constant(tmp_path)
    assert made.method is not None
    made.method.base[1, 1] = torch.inf
    assert "method.base" in refusal(lambda: save_prompt(made, held))
    assert (held / "constants.safetensors").read_bytes() == before


def test_a_prompt_without_constants_takes_the_place_of_one_with_them(tmp_path: Path, held: Path) -> None:
    save_prompt(tuned(tmp_path), held)
    assert not (held / "constants.safetensors").exists()
    assert load_prompt(held, tiny.backbone("masked")).predict(EXAMPLES) == tuned(tmp_path).predict(EXAMPLES)


@pytest.mark.parametrize("version", [1, 2])
def test_versions_before_constants_are_still_read(version: int, saved: Path, tmp_path: Path) -> None:
    facts = json.loads((saved / "prompt.json").read_text())
    old = {name: value for name, value in facts.items() if name not in ("constants", "drawn", "checksum")}
    old["version"] = version
    (saved / "prompt.json").write_text(json.dumps(old if version == 1 else files.sealed(old)))
    assert load_prompt(saved, tiny.backbone("masked")).predict(EXAMPLES) == tuned(tmp_path).predict(EXAMPLES)
