"""Folders made to do harm: refused in one line or without any effect; nothing is imported, nothing outside is opened.

Knows no method.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import socket
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import promptuary
import tiny
from artefacts import Saved, quick_folder
from promptuary import files
from promptuary.checkpoint import find_prompt, load_prompt
from promptuary.errors import PromptuaryError

WATCHED: list[tuple[str, str]] = []
"""What Python said that it opened, imported or started, while STATE is on."""

PYTHON = tuple({sys.prefix, sys.base_prefix, str(Path(promptuary.__file__).parents[1])})

STATE = {"on": False}


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if STATE["on"] and event in (
        "open",
        "import",
        "os.system",
        "subprocess.Popen",
        "os.exec",
        "socket.connect",
    ):
        WATCHED.append((event, str(arguments[0])))


@pytest.fixture(scope="module", autouse=True)
def hook() -> None:
    # there is no way to take it off again: it sleeps unless STATE says otherwise
    sys.addaudithook(_hook)


@pytest.fixture(scope="module")
def kept() -> Iterator[Saved]:
    with quick_folder() as folder:
        saved = Saved(folder)
        assert saved.refusal() is None
        yield saved


class Payload:
    """Unpickling this leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def tensors_named(saved: Saved, name: str) -> None:
    whole = files.read_tensors(saved.path / "prompt.safetensors", None)
    rows = whole.pop("method.rows")
    saved.sign_tensors(files.tensor_bytes({**whole, name: rows}))


def linked(saved: Saved, name: str, target: Path) -> None:
    (saved.path / name).unlink()
    (saved.path / name).symlink_to(target)


def facts(saved: Saved, **changes: Any) -> None:
    saved.sign({**saved.facts, **changes})


def raw_facts(saved: Saved, text: str) -> None:
    saved.put("prompt.json", text.encode())


def pickles_beside(saved: Saved, mark: Path) -> None:
    for name in ("prompt.bin", "prompt.pt", "adapter_model.bin", "pytorch_model.bin", "folded.pkl"):
        torch.save(Payload(mark), saved.path / name)


def pickle_instead(saved: Saved, mark: Path) -> None:
    saved.sign_tensors(pickle.dumps(Payload(mark)))


def only_pickle(saved: Saved, mark: Path) -> None:
    (saved.path / "prompt.safetensors").unlink()
    torch.save(Payload(mark), saved.path / "prompt.pt")


def zipped(saved: Saved, mark: Path) -> None:
    """A small file that would unpack to a gigabyte."""
    with zipfile.ZipFile(saved.path / "prompt.safetensors", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../outside", b"\0" * 10**7)
    saved.sign_tensors((saved.path / "prompt.safetensors").read_bytes())


def code_beside(saved: Saved, mark: Path) -> None:
    for name in ("prompt_tuning.py", "dept.py", "__init__.py", "sitecustomize.py", "json.py"):
        (saved.path / name).write_text(f"import os; os.system('touch {mark}')")


def named(name: str) -> Callable[[Saved, Path], None]:
    return lambda saved, mark: facts(saved, method=name)


def task(saved: Saved, **changes: Any) -> None:
    facts(saved, task={**saved.facts["task"], **changes})


def base(saved: Saved, **changes: Any) -> None:
    facts(saved, backbone={**saved.facts["backbone"], **changes})


def pipe(saved: Saved, name: str) -> None:
    (saved.path / name).unlink()
    os.mkfifo(saved.path / name)


def socketed(saved: Saved, mark: Path) -> None:
    (saved.path / "prompt.json").unlink()
    before = os.getcwd()
    os.chdir(saved.path)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("prompt.json")
    finally:
        os.chdir(before)


def foldered(saved: Saved, mark: Path) -> None:
    (saved.path / "prompt.json").unlink()
    (saved.path / "prompt.json").mkdir()


HARMLESS = {"pickles beside", "code beside", "a base that runs code", "auto_map beside", "auto_map in the facts"}
"""These have no effect on a base that is in memory; all others are refused."""

HOSTILE: dict[str, Callable[[Saved, Path], Any]] = {
    "pickles beside": pickles_beside,
    "a pickle instead of the tensors": pickle_instead,
    "only a pickle": only_pickle,
    "code beside": code_beside,
    "auto_map beside": lambda s, m: s.put("config.json", b'{"auto_map": {"AutoModel": "evil.Model"}}'),
    "auto_map in the facts": lambda s, m: base(s, auto_map={"AutoModel": "evil.Model"}),
    "a base that runs code": lambda s, m: base(s, trust_remote_code=True),
    "a method to import": named("antigravity:Method"),
    "a dotted method to import": named("antigravity"),
    "a method with a path": named("../../evil"),
    "a method that is a private module": named("base"),
    "a task to import": lambda s, m: task(s, name="antigravity:Task"),
    "a class in a setting": lambda s, m: task(s, **{"__class__": "os.system", "!!python/object": "os.system"}),
    "a metric to import": lambda s, m: task(s, metrics=["antigravity.system"]),
    "a template that reaches inside": lambda s, m: task(s, template="{text.__class__.__init__.__globals__}"),
    "linked tensors": lambda s, m: linked(s, "prompt.safetensors", m.parent / "outside.safetensors"),
    "linked facts": lambda s, m: linked(s, "prompt.json", Path("/etc/passwd")),
    "facts from a device": lambda s, m: linked(s, "prompt.json", Path("/dev/zero")),
    "a link to itself": lambda s, m: linked(s, "prompt.json", s.path / "prompt.json"),
    "a pipe as tensors": lambda s, m: pipe(s, "prompt.safetensors"),
    "a pipe as facts": lambda s, m: pipe(s, "prompt.json"),
    "a socket as facts": socketed,
    "a folder as facts": foldered,
    "an absolute tensor name": lambda s, m: tensors_named(s, "/etc/passwd"),
    "a tensor name that climbs": lambda s, m: tensors_named(s, "../../method.rows"),
    "a hash of a file outside": lambda s, m: facts(s, sha256={"../../etc/passwd": "0" * 64}),
    "a million names": lambda s, m: raw_facts(s, json.dumps({f"k{n}": 0 for n in range(10**6)})),
    "many unknown settings": lambda s, m: facts(s, method_config={f"k{n}": 0 for n in range(10**5)}),
    "deep lists": lambda s, m: raw_facts(s, '{"a":' + "[" * 10**5 + "]" * 10**5 + "}"),
    "deep objects": lambda s, m: raw_facts(s, '{"a":' * 10**5 + "0" + "}" * 10**5),
    "a number of a million digits": lambda s, m: raw_facts(
        s, '{"format": "promptuary-prompt", "version": ' + "9" * 10**6
    ),
    "a huge version": lambda s, m: raw_facts(s, '{"format": "promptuary-prompt", "version": ' + "9" * 4000 + "}"),
    "a huge width": lambda s, m: facts(s, width=10**4000),
    "huge numbers": lambda s, m: raw_facts(s, '{"format": "promptuary-prompt", "version": 1e999}'),
    "a name twice": lambda s, m: raw_facts(s, '{"format": "x", "format": "promptuary-prompt"}'),
    "half a surrogate": lambda s, m: raw_facts(s, '{"format": "\\ud800"}'),
    "a zip bomb": zipped,
    "compressed facts": lambda s, m: s.put("prompt.json", gzip.compress(b" " * 10**7)),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_folder_does_nothing(what: str, kept: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(HOSTILE) >= 24
    kept.restore()
    mark = tmp_path / "mark"
    (tmp_path / "outside.safetensors").write_bytes(kept.content["prompt.safetensors"])
    HOSTILE[what](kept, mark)
    modules = set(sys.modules)
    # code that lies about must not be found either
    monkeypatch.chdir(kept.path)
    WATCHED.clear()
    STATE["on"] = True
    try:
        text = kept.refusal()
    finally:
        STATE["on"] = False
    assert (text is None) is (what in HARMLESS), text
    assert not mark.exists()
    assert set(sys.modules) - modules == set()
    # a link is seen before it is refused, under its own name; what it leads to is never opened. Looking for a
    # method reads what the installed packages say of themselves
    fine = (str(kept.path), *PYTHON)
    outside = [seen for seen in WATCHED if seen[0] != "open" or not seen[1].startswith(fine)]
    assert outside == []


def test_the_prompt_of_a_run_folder_is_not_found_through_a_link(kept: Saved, tmp_path: Path) -> None:
    kept.restore()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "prompt").symlink_to(kept.path)
    with pytest.raises(PromptuaryError, match="link"):
        load_prompt(tmp_path / "run", kept.backbone)
    # a link that the user names is the user's own
    assert find_prompt(tmp_path / "run" / "prompt") == tmp_path / "run" / "prompt"


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "prompt.safetensors", "nothing", "nul\0", "n" * 300, "e" * 5000])
def test_what_is_no_folder_is_refused(name: str, tmp_path: Path) -> None:
    if len(name) < 100 and "\0" not in name and name != "nothing":
        (tmp_path / name).write_bytes(b"PK\3\4")
    with pytest.raises(PromptuaryError) as caught:
        load_prompt(tmp_path / name)
    assert "\n" not in str(caught.value)


# ---- the base that a prompt names -----------------------------------------------------------------------------------


def pickled_base(folder: Path, mark: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(Payload(mark), folder / "pytorch_model.bin")


def remote_base(folder: Path, mark: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": names}))
    (folder / "evil.py").write_text(f"import os; os.system('touch {mark}')")


def cut_base(folder: Path, mark: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:1000])


@pytest.mark.parametrize("spoil", [pickled_base, remote_base, cut_base])
def test_a_hostile_base_is_refused_in_one_line(
    spoil: Callable[[Path, Path], None], kept: Saved, tmp_path: Path
) -> None:
    kept.restore()
    kept.sign({**kept.facts, "backbone": {**kept.facts["backbone"], "trust_remote_code": True}})
    folder = Path(tiny.save(tmp_path / "base", "causal"))
    spoil(folder, tmp_path / "mark")
    with pytest.raises(PromptuaryError) as caught:
        load_prompt(kept.path, model=str(folder), device="cpu")
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "mark").exists()
