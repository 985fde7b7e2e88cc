"""A prompt goes to a hub and comes back as it was, in front of a real HTTP server; every fault is one clear line.

Knows nothing of methods.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import _http

import promptuary
import tiny
import toy
from hub_server import READER, WRITER, Hub
from promptuary import card, checkpoint, files, hub, registry
from promptuary.cli.main import main
from promptuary.errors import ConfigError, FileFormatError, HubError
from promptuary.hosting import adapt
from promptuary.testing import case_of
from promptuary.tuned import Tuned

FILES = {"README.md", "folded.safetensors", "prompt.json", "prompt.safetensors"}
TEXTS = ["a red cat", "the blue dog sleeps"]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub, and a client that may talk to it, with a cache of its own, a token that may write and no waiting."""
    made = Hub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", made.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", made.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    huggingface_hub.close_session()
    yield made
    huggingface_hub.close_session()
    made.close()


def tuned(where: Path, family: str = "masked", method: str = "ept") -> Tuned:
    return case_of(registry.load("methods", method), family, where).tuned()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prompt that was saved once."""
    where = tmp_path_factory.mktemp("hub")
    scores = {"test accuracy": 0.75, "test macro_f1": 0.5}
    return checkpoint.save_prompt(tuned(where), where / "prompt", metrics=scores, data=DATA)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """The test's own copy of it, in a run folder."""
    return Path(shutil.copytree(original, tmp_path / "run" / "prompt"))


@pytest.fixture
def films(server: Hub, original: Path) -> Hub:
    """A hub that holds it as ann/films."""
    server.hold("ann/films", {path.name: path.read_bytes() for path in original.iterdir()})
    return server


DATA = {"source": "nyu-mll/glue", "subset": "sst2", "revision": None, "examples": {"train": 11, "test": 4}}


def refusal(call: Any, kind: type[Exception] = HubError) -> str:
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert "hf_" not in text
    return text


# ---- there and back -------------------------------------------------------------------------------------------------


def test_what_is_pushed_is_pulled_bit_for_bit_and_answers_the_same(server: Hub, folder: Path, tmp_path: Path) -> None:
    done = hub.push_prompt(folder, "ann/films", message="first try")
    assert (done.repo, done.url, set(done.files)) == ("ann/films", f"{server.url}/ann/films", FILES)
    assert done.commit == server.repos["ann/films"].branches["main"]
    assert server.repos["ann/films"].messages[-1] == "first try"
    out = promptuary.pull_prompt("ann/films", out=tmp_path / "pulled")
    for name in FILES - {"README.md"}:
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    assert {path.name for path in out.iterdir()} == FILES
    base = tiny.backbone("masked")
    wanted = checkpoint.load_prompt(folder, base).predict(TEXTS)
    assert checkpoint.load_prompt("ann/films", base).predict(TEXTS) == wanted
    assert checkpoint.load_prompt(out, base).predict(TEXTS) == wanted


def test_a_tuned_prompt_is_pushed_without_a_folder(server: Hub, tmp_path: Path) -> None:
    made = tuned(tmp_path)
    promptuary.push_prompt(made, "ann/films", private=True)
    assert server.repos["ann/films"].private
    again = checkpoint.load_prompt("ann/films", made.backbone)
    assert again.predict(TEXTS) == made.predict(TEXTS)


@pytest.mark.parametrize("method", ["attempt", "bbt"])
def test_constants_travel_and_go_when_the_next_prompt_has_none(method: str, server: Hub, tmp_path: Path) -> None:
    made = tuned(tmp_path, method=method)
    folder = checkpoint.save_prompt(made, tmp_path / "prompt")
    there = {path.name for path in folder.iterdir()}
    assert "constants.safetensors" in there
    hub.push_prompt(folder, "ann/films")
    assert set(server.files("ann/films")) == there
    out = promptuary.pull_prompt("ann/films", out=tmp_path / "pulled")
    assert (out / "constants.safetensors").read_bytes() == (folder / "constants.safetensors").read_bytes()
    assert checkpoint.load_prompt("ann/films", made.backbone).predict(TEXTS) == made.predict(TEXTS)
    hub.push_prompt(tuned(tmp_path), "ann/films")
    assert set(server.files("ann/films")) == FILES
    # the later commit's copy in the cache is its own
    assert {path.name for path in hub.pull_prompt("ann/films").iterdir()} == FILES


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_constants_that_are_not_those_that_were_saved_are_not_sent(damage: str, server: Hub, tmp_path: Path) -> None:
    folder = checkpoint.save_prompt(tuned(tmp_path, method="bbt"), tmp_path / "prompt")
    path = folder / "constants.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink() if damage == "gone" else path.write_bytes(content)
    assert str(path) in refusal(lambda: hub.push_prompt(folder, "ann/films"), FileFormatError)
    assert "ann/films" not in server.repos


def test_only_the_files_of_a_prompt_travel(server: Hub, folder: Path, tmp_path: Path) -> None:
    for extra in (".env", "state.safetensors", "token", "checkpoints/step-2/state.safetensors"):
        (folder / extra).parent.mkdir(parents=True, exist_ok=True)
        (folder / extra).write_text(WRITER)
    hub.push_prompt(folder.parent, "ann/films")
    assert set(server.files("ann/films")) == FILES
    assert not any(WRITER.encode() in content for content in server.files("ann/films").values())
    tree = server.repos["ann/films"].commits[server.repos["ann/films"].branches["main"]]
    tree["pickle.bin"] = (b"x", False)
    tree["model.safetensors"] = (b"x", True)
    found = hub.pull_prompt("ann/films")
    assert {path.name for path in found.iterdir()} == FILES
    assert not any("pickle" in asked or "model.safetensors" in asked for asked in server.asked)


def test_a_branch_is_made_and_a_revision_is_pulled(server: Hub, folder: Path, tmp_path: Path) -> None:
    first = hub.push_prompt(folder, "ann/films").commit
    made = tuned(tmp_path, method="prompt_tuning")
    hub.push_prompt(made, "ann/films", revision="v2")
    base = tiny.backbone("masked")
    methods = {
        name: checkpoint.load_prompt(name, base).method.name  # type: ignore[union-attr]
        for name in ("ann/films", "ann/films@v2", f"ann/films@{first}")
    }
    assert list(methods.values()) == ["ept", "prompt_tuning", "ept"]
    assert "no such branch" in refusal(lambda: hub.pull_prompt("ann/films", revision="v3"))


def test_a_file_that_the_new_prompt_lacks_is_taken_away(server: Hub, folder: Path, tmp_path: Path) -> None:
    hub.push_prompt(folder, "ann/films")
    moved = Path(shutil.copytree(folder, tmp_path / "other"))
    (moved / "folded.safetensors").unlink()
    facts = json.loads((moved / "prompt.json").read_text())
    del facts["sha256"]["folded.safetensors"]
    rest = {name: value for name, value in facts.items() if name != "checksum"}
    (moved / "prompt.json").write_text(json.dumps(files.sealed(rest)))
    hub.push_prompt(moved, "ann/films")
    assert set(server.files("ann/films")) == FILES - {"folded.safetensors"}


def test_a_repository_with_something_else_is_left_alone(server: Hub, folder: Path, tmp_path: Path) -> None:
    hub.push_prompt(folder, "ann/model")
    server.repos["ann/model"].commit("main", {"config.json": (b"{}", False), "README.md": (b"mine", False)})
    assert "something else" in refusal(lambda: hub.push_prompt(folder, "ann/model"))
    assert server.files("ann/model")["README.md"] == b"mine"
    assert "holds no prompt" in refusal(lambda: hub.pull_prompt("ann/model"))


def test_an_earlier_copy_is_used_offline(
    films: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = hub.pull_prompt("ann/films")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(films.asked)
    assert hub.pull_prompt("ann/films") == found
    assert "HF_HUB_OFFLINE is set" in refusal(lambda: hub.pull_prompt("ann/other"))
    assert "HF_HUB_OFFLINE is set" in refusal(lambda: hub.push_prompt(folder, "ann/films"))
    text = refusal(lambda: checkpoint.load_prompt("ann/other", tiny.backbone("masked")))
    assert "no folder ann/other here" in text
    assert len(films.asked) == asked


def test_a_folder_here_comes_before_a_name_on_the_hub(
    server: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert folder == tmp_path / "run" / "prompt"
    monkeypatch.chdir(tmp_path)
    assert checkpoint.find_prompt("run/prompt") == Path("run/prompt")
    # a slip in a local path asks no hub
    assert "holds no prompt" in refusal(lambda: checkpoint.find_prompt("run/promt"), FileFormatError)
    assert not server.asked


# ---- the card -------------------------------------------------------------------------------------------------------


def test_the_card_is_whole_and_valid(server: Hub, folder: Path, tmp_path: Path) -> None:
    hub.push_prompt(folder, "ann/films", license="apache-2.0", language=["en"])
    text = server.files("ann/films")["README.md"].decode()
    assert server.cards == [text]
    found = ModelCard(text)
    data = found.data.to_dict()
    assert data["model-index"][0]["results"][0] == {
        "task": {"type": "text-classification"},
        "dataset": {"name": "nyu-mll/glue", "type": "nyu-mll/glue", "config": "sst2", "split": "test"},
        "metrics": [
            {"type": "accuracy", "value": 0.75, "name": "test accuracy"},
            {"type": "f1", "value": 0.5, "name": "test macro_f1"},
        ],
    }
    del data["model-index"]
    assert data == {
        "library_name": "promptuary",
        "base_model": "tiny-bert-0",
        "base_model_relation": "adapter",
        "pipeline_tag": "text-classification",
        "tags": ["prompt", "ept"],
        "datasets": ["nyu-mll/glue"],
        "license": "apache-2.0",
        "language": ["en"],
    }
    for part in (
        'load_prompt("ann/films")',
        "arXiv 2405.11464",
        "rebuilt from partial sources",
        "an offset for the first 24 positions",
        "test accuracy: 0.7500",
        "nyu-mll/glue, sst2",
        "11 train, 4 test",
        "cut to 40 tokens",
    ):
        assert part in found.text, part
    # what it shows is what runs
    code = found.text.partition("```python\n")[2].partition("```")[0]
    loaded = code.replace('load_prompt("ann/films")', 'load_prompt("ann/films", base)')
    exec(loaded, {"base": tiny.backbone("masked")})


def test_a_card_says_nothing_that_is_not_known(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base", "llama")
    made = adapt(tiny.model("llama"), tiny.tokenizer(specials="start"), "prompt_tuning", num_virtual_tokens=3)
    made.backbone.config = made.backbone.config.model_copy(update={"model": base})
    data = {"source": str(tmp_path / "base"), "subset": None, "revision": None, "examples": {"train": 3}}
    folder = checkpoint.save_prompt(made, tmp_path / "p", metrics={"accuracy": float("nan")}, data=data)
    found = ModelCard.load(folder / "README.md")
    assert found.data.to_dict() == {"library_name": "promptuary", "tags": ["prompt", "prompt_tuning"]}
    assert str(tmp_path) not in found.content
    assert "with tuned.attach(model)" in found.text
    assert "follows the published description" in found.text
    facts = checkpoint.read_facts(folder)
    assert (facts["data"]["source"], facts["data"]["hub"]) == ("base", False)


def test_a_run_states_its_data_and_its_scores(tmp_path: Path) -> None:
    from promptuary.training import train

    base = tiny.save(tmp_path / "base", "llama")
    train(toy.run(tmp_path, f"backbone.model={base}", "backbone.device=cpu"))
    data = ModelCard.load(tmp_path / "run" / "prompt" / "README.md").data.to_dict()
    result = data["model-index"][0]["results"][0]
    assert result["dataset"] == {"name": "data", "type": "custom", "split": "test"}
    assert {one["name"] for one in result["metrics"]} == {"test accuracy", "test macro_f1"}
    assert "datasets" not in data
    assert "base_model" not in data


@pytest.mark.parametrize(
    "front", ["library_name: [", "model-index:\n- name: x\n  results:\n  - {task: {type: y}}"], ids=["yaml", "results"]
)
def test_a_card_with_wrong_metadata_is_not_sent(front: str, server: Hub, folder: Path, tmp_path: Path) -> None:
    (folder / "README.md").write_text(f"---\n{front}\n---\nmine")
    assert "metadata of the card" in refusal(lambda: hub.push_prompt(folder, "ann/films"), FileFormatError)
    assert not server.asked


def test_what_an_owner_wrote_into_the_card_stays(folder: Path, tmp_path: Path) -> None:
    text = (folder / "README.md").read_text().replace("## Limits", "## Limits\n\nMy own words.")
    assert "My own words." in card.for_hub(text, "ann/films", license="mit")


# ---- faults ---------------------------------------------------------------------------------------------------------

PUSH: dict[str, tuple[str, int, str]] = {
    "create 401": ("POST /api/repos/create", 401, "hf auth login"),
    "create 403": ("POST /api/repos/create", 403, "write access"),
    "create 429": ("POST /api/repos/create", 429, "too many requests"),
    "create 500": ("POST /api/repos/create", 500, "has a fault (500"),
    "validate 500": ("POST /api/validate-yaml", 500, "cannot be pushed to the hub"),
    "preupload 403": ("preupload", 403, "write access"),
    "preupload 429": ("preupload", 429, "too many requests"),
    "preupload 503": ("preupload", 503, "has a fault (503"),
    "batch 401": ("objects/batch", 401, "hf auth login"),
    "upload 403": ("PUT /lfs", 403, "write access"),
    "upload 500": ("PUT /lfs", 500, "has a fault (500"),
    "verify 404": ("POST /lfs-verify", 404, "does not exist"),
    "commit 404": ("POST .*/commit/", 404, "does not exist"),
    "commit 412": ("POST .*/commit/", 412, "refused it (412"),
    "commit 500": ("POST .*/commit/", 500, "has a fault (500"),
}


@pytest.mark.parametrize(("where", "status", "says"), PUSH.values(), ids=PUSH.keys())
def test_a_push_that_is_refused_says_so_and_changes_nothing(
    where: str, status: int, says: str, server: Hub, folder: Path, tmp_path: Path
) -> None:
    server.fail(where, status, "" if where.startswith("POST /api/validate") else "because of the test")
    text = refusal(lambda: hub.push_prompt(folder, "ann/films"))
    assert text.startswith("ann/films cannot be pushed to the hub: ")
    assert says in text
    server.faults.clear()
    assert not server.repos or not server.files("ann/films")
    hub.push_prompt(folder, "ann/films")
    assert set(server.files("ann/films")) == FILES


PULL: dict[str, tuple[str, int, dict[str, str], str]] = {
    "info 401": ("GET /api/models", 401, {}, "hf auth login"),
    "info 403": ("GET /api/models", 403, {}, "write access"),
    "info gated": ("GET /api/models", 403, {"X-Error-Code": "GatedRepo"}, "gated"),
    "info 404": ("GET /api/models", 404, {}, "does not exist"),
    "info 429": ("GET /api/models", 429, {}, "too many requests"),
    "info 500": ("GET /api/models", 500, {}, "has a fault (500"),
    "head 429": ("HEAD .*/resolve/", 429, {}, "too many requests"),
    "head 500": ("HEAD .*/resolve/", 500, {}, "has a fault (500"),
    "head 404": ("HEAD .*/resolve/", 404, {"X-Error-Code": "EntryNotFound"}, "does not exist"),
    "get 500": ("GET .*/resolve/", 500, {}, "has a fault (500"),
    "cdn 403": ("GET /cdn/", 403, {}, "write access"),
    "cdn 500": ("GET /cdn/", 500, {}, "has a fault (500"),
}


@pytest.mark.parametrize(("where", "status", "headers", "says"), PULL.values(), ids=PULL.keys())
def test_a_pull_that_is_refused_says_so_and_leaves_nothing(
    where: str, status: int, headers: dict[str, str], says: str, films: Hub, folder: Path, tmp_path: Path
) -> None:
    films.fail(where, status, "because of the test", **headers)
    text = refusal(lambda: hub.pull_prompt("ann/films", out=tmp_path / "out"))
    assert text.startswith("ann/films cannot be pulled from the hub: ")
    assert says in text
    assert not (tmp_path / "out").exists()
    films.faults.clear()
    out = hub.pull_prompt("ann/films", out=tmp_path / "out")
    assert (out / "prompt.safetensors").read_bytes() == (folder / "prompt.safetensors").read_bytes()


def test_who_you_are_decides_what_you_may_do(
    server: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push_prompt(folder, "ann/secret", private=True)
    hub.push_prompt(folder, "ann/open", private=False)
    assert "write access" in refusal(lambda: hub.push_prompt(folder, "ann/open", token=READER))
    assert hub.pull_prompt("ann/secret", token=READER).is_dir()
    assert "not valid" in refusal(lambda: hub.pull_prompt("ann/open", token="hf_nobody"))
    monkeypatch.delenv("HF_TOKEN")
    assert hub.pull_prompt("ann/open").is_dir()
    server.tokens.clear()
    assert "hf auth login" in refusal(lambda: hub.pull_prompt("ann/secret"))
    assert "hf auth login" in refusal(lambda: hub.push_prompt(folder, "ann/open"))
    assert set(server.tokens) == {None}
    assert "does not exist" in refusal(lambda: hub.pull_prompt("ann/nothing", token=READER))


@pytest.mark.parametrize("name", ["prompt.safetensors", "folded.safetensors", "prompt.json", "README.md"])
def test_wrong_bytes_are_refused_and_do_not_stay_in_the_cache(
    name: str, films: Hub, folder: Path, tmp_path: Path
) -> None:
    oids = json.loads((folder / "prompt.json").read_text())["sha256"]
    films.spoil(f"GET .*({oids.get(name, name)})")
    text = refusal(lambda: hub.pull_prompt("ann/films", out=tmp_path / "out"), FileFormatError)
    assert f"ann/films: {name} is damaged" in text
    assert not (tmp_path / "out").exists()
    films.faults.clear()
    out = hub.pull_prompt("ann/films", out=tmp_path / "out")
    assert (out / "prompt.safetensors").read_bytes() == (folder / "prompt.safetensors").read_bytes()


def test_a_hub_that_vouches_for_wrong_tensors_is_not_believed(films: Hub, tmp_path: Path) -> None:
    tree = films.repos["ann/films"].commits[films.repos["ann/films"].branches["main"]]
    content = tree["prompt.safetensors"][0]
    tree["prompt.safetensors"] = (bytes([*content[:-1], content[-1] ^ 1]), True)
    assert "does not match the hash" in refusal(lambda: hub.pull_prompt("ann/films"), FileFormatError)


def test_a_download_that_breaks_off_says_so(films: Hub, tmp_path: Path) -> None:
    films.cut("GET /cdn/")
    text = refusal(lambda: hub.pull_prompt("ann/films", out=tmp_path / "out"))
    assert "the connection failed" in text or "should be of size" in text
    assert not (tmp_path / "out").exists()


def test_sizes_are_bounded_before_a_byte_is_fetched(
    films: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "LARGEST", {**hub.LARGEST, "prompt.safetensors": 100})
    assert "more than the" in refusal(lambda: hub.pull_prompt("ann/films"))
    assert not any("/resolve/" in asked for asked in films.asked)


def test_a_damaged_folder_is_not_pushed(server: Hub, folder: Path, tmp_path: Path) -> None:
    for name in ("folded.safetensors", "prompt.safetensors"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1])
        assert name in refusal(lambda: hub.push_prompt(folder, "ann/films"), FileFormatError)
        (folder / name).write_bytes(content)
    (folder / "README.md").unlink()
    assert "has no card" in refusal(lambda: hub.push_prompt(folder, "ann/films"), FileFormatError)
    assert "holds no prompt" in refusal(lambda: hub.push_prompt(tmp_path, "ann/films"), FileFormatError)
    for name in ("films", "ann/films/x", "-a/b", "ann/"):
        assert "user/name" in refusal(lambda name=name: hub.push_prompt(folder, name), ConfigError)
        assert "user/name" in refusal(lambda name=name: hub.pull_prompt(name), ConfigError)
    assert not server.asked


def test_a_folder_with_other_things_is_not_written_over(films: Hub, tmp_path: Path) -> None:
    out = hub.pull_prompt("ann/films", out=tmp_path / "out")
    asked = len(films.asked)
    assert "--overwrite" in refusal(lambda: hub.pull_prompt("ann/films", out=out), ConfigError)
    (out / "thesis.txt").write_text("mine")
    assert "thesis.txt" in refusal(lambda: hub.pull_prompt("ann/films", out=out, overwrite=True), ConfigError)
    assert "is a file" in refusal(lambda: hub.pull_prompt("ann/films", out=out / "thesis.txt"), ConfigError)
    assert len(films.asked) == asked
    (out / "thesis.txt").unlink()
    (out / "prompt.json").write_text("{}")
    assert hub.pull_prompt("ann/films", out=out, overwrite=True) == out
    assert checkpoint.read_facts(out)["method"] == "ept"


def test_without_a_network_the_line_says_so(
    server: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert _http.get_session() is not None
    for call in (lambda: hub.push_prompt(folder, "ann/films"), lambda: hub.pull_prompt("ann/films")):
        assert "check the network" in refusal(call)


def test_the_verbs_push_and_pull(server: Hub, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = tiny.save(tmp_path / "base", "masked")

    def said(*words: object, code: int = 0) -> Any:
        capfd.readouterr()
        assert main([*map(str, words), "--json"]) == code
        out, err = capfd.readouterr()
        assert err.startswith("error: ") == bool(code)
        return json.loads(out)

    pushed = said("push", folder.parent, "ann/films", "--private", "--license", "mit", "--language", "en")
    assert (pushed["repo"], set(pushed["files"])) == ("ann/films", FILES)
    assert server.repos["ann/films"].private
    assert "license: mit" in server.files("ann/films")["README.md"].decode()
    pulled = said("pull", "ann/films", "--out", tmp_path / "out")
    assert (pulled["out"], set(pulled["files"])) == (str(tmp_path / "out"), FILES)
    where = ("a red cat", "--model", base, "--device", "cpu")
    assert said("predict", "ann/films", *where) == said("predict", folder, *where)
    assert said("inspect", "ann/films@main", *where[1:])["method"] == "ept"
    assert "does not exist" in said("pull", "ann/none", "--out", tmp_path / "none", code=2)["error"]
    assert "holds no prompt" in said("push", tmp_path / "none", "ann/films", code=2)["error"]
