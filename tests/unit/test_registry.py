"""Names to classes: found without imports, refused with a suggestion, never owned twice.

Knows no method's insides.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import toy
from promptuary import registry
from promptuary.config import load_run
from promptuary.errors import ConfigError
from promptuary.methods.prompt_tuning import PromptTuning

OUTSIDE = """
from typing import Literal
from promptuary.methods.prompt_tuning import PromptTuning, PromptTuningConfig

class OtherConfig(PromptTuningConfig):
    name: Literal["{name}"] = "{name}"

class Other(PromptTuning):
    name = "{name}"
    Config = OtherConfig

NUMBER = 3
"""


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Nothing that a test makes known stays known."""
    before = {kind: dict(found) for kind, found in registry._ADDED.items()}
    registry.load.cache_clear()
    yield
    for kind, found in before.items():
        registry._ADDED[kind].clear()
        registry._ADDED[kind].update(found)
    registry.load.cache_clear()


def refusal(call: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def package(folder: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str, entry: bool = True) -> None:
    """An installed outside package with one method."""
    (folder / f"{module}.py").write_text(OUTSIDE.format(name=name))
    if entry:
        info = folder / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[promptuary.methods]\n{name} = {module}:Other\n")
    monkeypatch.syspath_prepend(str(folder))


def test_the_names_are_the_files() -> None:
    assert registry.names("tasks") == ["choose", "classify", "generate", "regress", "transfer"]
    assert {"prompt_tuning", "dept", "ept", "lamp"} <= set(registry.names("methods"))
    assert {"causal", "seq2seq", "masked", "encoder"} <= set(registry.names("backbones"))
    assert not {"base", "load", "inject", "template"} & {
        name for kind in registry.KINDS for name in registry.names(kind)
    }


def test_listing_names_imports_no_torch_and_no_method() -> None:
    code = (
        "import sys\nfrom promptuary import registry\nassert 'ept' in registry.names('methods')\n"
        "print([n for n in sys.modules if n in ('torch', 'transformers') or n.startswith('promptuary.methods')])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


@pytest.mark.parametrize("kind", registry.KINDS)
def test_every_name_loads_a_class_of_that_name(kind: str) -> None:
    for name in registry.names(kind):
        assert registry.load(kind, name).name == name


def test_an_unknown_name_is_refused_with_the_nearest_and_all_known_ones() -> None:
    text = refusal(lambda: registry.load("methods", "prompt_tunin"))
    assert text.startswith('no such method: "prompt_tunin"; did you mean "prompt_tuning"? (known: ')
    assert "lamp" in text
    assert "did you mean" not in refusal(lambda: registry.load("tasks", "qqqqqq"))


def test_an_added_class_is_found_by_its_name() -> None:
    class Mine(PromptTuning):
        name = "mine_in_this_test"

    registry.add("methods", Mine)
    assert registry.load("methods", "mine_in_this_test") is Mine
    assert "mine_in_this_test" in registry.names("methods")


def test_an_added_class_cannot_take_a_name_of_the_folder() -> None:
    class Thief(PromptTuning):
        name = "ept"

    assert "two owners" in refusal(lambda: registry.add("methods", Thief))
    assert registry.load("methods", "ept") is not Thief


def test_adding_what_is_there_already_changes_nothing() -> None:
    registry.add("methods", PromptTuning)
    assert registry.load("methods", "prompt_tuning") is PromptTuning


def test_an_entry_point_is_a_method_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, monkeypatch, "outside_a", "outsider")
    assert "outsider" in registry.names("methods")
    assert registry.load("methods", "outsider").__module__ == "outside_a"
    values = {**toy.settings(tmp_path), "method": {"name": "outsider", "num_virtual_tokens": 2}}
    assert load_run(values).method.name == "outsider"


def test_an_entry_point_cannot_take_a_name_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, monkeypatch, "outside_b", "lamp")
    text = refusal(lambda: registry.names("methods"))
    assert "two owners" in text
    assert "promptuary.methods.lamp" in text
    assert "outside_b:Other" in text
    assert "two owners" in refusal(lambda: registry.load("methods", "lamp"))


def test_an_entry_point_whose_class_calls_itself_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(tmp_path, monkeypatch, "outside_c", "listed")
    (tmp_path / "outside_c.py").write_text(OUTSIDE.format(name="called"))
    text = refusal(lambda: registry.load("methods", "listed"))
    assert '"called"' in text
    assert '"listed"' in text


def test_a_class_is_found_by_module_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, monkeypatch, "outside_d", "unlisted", entry=False)
    found = registry.load("methods", "outside_d:Other")
    assert found.name == "unlisted"
    # a prompt that it trained remembers the class by its own name
    assert registry.load("methods", "unlisted") is found


def test_a_class_by_module_and_name_cannot_take_a_known_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, monkeypatch, "outside_e", "dept", entry=False)
    assert "two owners" in refusal(lambda: registry.load("methods", "outside_e:Other"))


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("no_such_module_here:Other", "cannot import"),
        ("outside_f:Missing", "cannot import"),
        ("outside_f:NUMBER", "is not a Method"),
        ("pathlib:Path", "is not a Method"),
        ("promptuary.methods.base:Method", "is an abstract Method"),
    ],
)
def test_what_is_behind_module_and_name_must_be_a_method(
    target: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(tmp_path, monkeypatch, "outside_f", "whatever", entry=False)
    text = refusal(lambda: registry.load("methods", target))
    assert reason in text
    assert target in text


def test_a_file_holds_exactly_one_final_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "two_in_one.py").write_text(
        OUTSIDE.format(name="two_in_one") + "\nclass Second(PromptTuning):\n    name = 'second'\n"
    )
    (tmp_path / "none_in_one.py").write_text("from promptuary.methods.prompt_tuning import PromptTuning\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    files = {name: name for name in ("two_in_one", "none_in_one")}
    monkeypatch.setattr(registry, "_folder", lambda kind: files)
    assert "exactly one final Method, found 2" in refusal(lambda: registry.load("methods", "two_in_one"))
    assert "exactly one final Method, found 0" in refusal(lambda: registry.load("methods", "none_in_one"))


def test_a_class_is_found_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "in_a_file.py"
    path.write_text(OUTSIDE.format(name="in_a_file"))
    found = registry.load("methods", f"{path}:Other")
    assert found.name == "in_a_file"
    # read once, and known by its own name from then on
    assert registry.load("methods", f"{path}:Other") is found
    assert registry.load("methods", "in_a_file") is found


@pytest.mark.parametrize(
    ("content", "target", "reason"),
    [
        (None, "gone.py:Other", "gone.py does not exist; give the file of a class as folder/file.py:Class"),
        ("def broken(:\n", "broken.py:Other", "broken.py, line 1: invalid syntax; mend the file"),
        ("X = 1\n", "other.py:Other", 'other.py:Other": module'),
        ("X = 1\n", "number.py:X", "is not a Method"),
    ],
)
def test_a_file_that_holds_no_method_is_named(content: str | None, target: str, reason: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / target.partition(":")[0]).write_text(content)
    assert reason in refusal(lambda: registry.load("methods", f"{tmp_path}/{target}"))


@pytest.mark.parametrize("target", ["{}/evil.py:Evil", "antigravity:Evil"])
def test_a_saved_file_names_no_place_to_run_code_from(target: str, tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    said = refusal(lambda: registry.known("methods", target.format(tmp_path)))
    assert "would run code that a saved file names" in said
    assert not (tmp_path / "ran").exists()
    assert registry.known("methods", "prompt_tuning") is PromptTuning
