"""Files: a reader finds the old or the new content and never a half; damage is named.

Knows no meaning of what is written.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from promptuary import files
from promptuary.errors import FileFormatError, StorageError

OLD = {"a.bin": b"old a", "b.bin": b"old b"}
NEW = {"a.bin": b"new a", "c.bin": b"new c"}


class Breaking:
    """`os.fsync` that fails at its n-th call, as a full disk does."""

    def __init__(self, at: int) -> None:
        self.at, self.calls, self.real = at, 0, os.fsync

    def __call__(self, handle: int) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise OSError(28, "No space left on device")
        self.real(handle)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refusal(call: Any) -> str:
    with pytest.raises(FileFormatError) as caught:
        call()
    return str(caught.value)


def test_a_file_is_replaced_as_a_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    files.write_file(path, b"one")
    files.write_file(path, b"two")
    assert content(path.parent) == {"a.txt": b"two"}


def test_a_file_keeps_its_old_content_if_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_file(tmp_path / "a.txt", b"old")
    monkeypatch.setattr(os, "fsync", Breaking(1))
    with pytest.raises(StorageError, match="No space"):
        files.write_file(tmp_path / "a.txt", b"new")
    monkeypatch.setattr(os, "fsync", Breaking(1))
    with pytest.raises(StorageError, match="No space"):
        files.write_file(tmp_path / "b.txt", b"new")
    assert content(tmp_path) == {"a.txt": b"old"}


def test_a_folder_is_replaced_as_a_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "folder"
    files.write_folder(folder, OLD)
    files.write_folder(folder, NEW)
    assert content(folder) == NEW
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]


def test_everything_is_synced_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Breaking(0)
    monkeypatch.setattr(os, "fsync", counting)
    files.write_file(tmp_path / "a.txt", b"x")
    assert counting.calls == 2
    files.write_folder(tmp_path / "folder", NEW)
    # two files, the folder itself, and the one around it
    assert counting.calls == 2 + 4


@pytest.mark.parametrize("at", range(1, 5))
def test_a_folder_is_old_or_new_wherever_writing_fails(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write_folder(tmp_path / "folder", OLD)
    monkeypatch.setattr(os, "fsync", Breaking(at))
    with pytest.raises(StorageError, match="No space"):
        files.write_folder(tmp_path / "folder", NEW)
    # the last sync comes after the new folder got its name
    assert content(tmp_path / "folder") == (OLD if at < 4 else NEW)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_folder_keeps_its_old_content_if_renaming_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_folder(tmp_path / "folder", OLD)
    rename = Path.rename
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)

    def refuse(self: Path, target: Path) -> Path:
        if self.name.startswith(".tmp-"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StorageError, match="Input/output"):
        files.write_folder(tmp_path / "folder", NEW)
    assert content(tmp_path / "folder") == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_a_dead_process_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / f".tmp-folder-{os.getpid()}").mkdir()
    (tmp_path / f".tmp-folder-{os.getpid()}" / "half").write_bytes(b"x")
    files.write_folder(tmp_path / "folder", NEW)
    assert content(tmp_path / "folder") == NEW


# ---- lines ----------------------------------------------------------------------------------------------------------


def test_lines_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    for number in range(3):
        files.append_line(path, {"n": number, "text": "zwölf\u2028\n"})
    assert [json.loads(line)["n"] for line in path.read_bytes().splitlines()] == [0, 1, 2]
    assert json.loads(path.read_bytes().splitlines()[0])["text"] == "zwölf\u2028\n"


@pytest.mark.parametrize("half", [b'{"n": 1', b"{", b'{"n": 1}'])
@pytest.mark.parametrize("before", [b"", b'{"n": 0}\n'])
def test_a_half_written_last_line_is_cut_off(before: bytes, half: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(before + half)
    files.append_line(path, {"n": 2})
    files.append_line(path, {"n": 3})
    assert path.read_bytes() == before + b'{"n": 2}\n{"n": 3}\n'


def test_what_is_not_finite_is_written_as_null(tmp_path: Path) -> None:
    values = {"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": (-float("inf"), 2)}}
    plain = {"a": None, "b": [None, 1.5], "c": {"d": [None, 2]}}
    files.append_line(tmp_path / "rows.jsonl", values)
    files.write_json(tmp_path / "one.json", values)
    assert json.loads((tmp_path / "rows.jsonl").read_text()) == plain
    assert files.read_json(tmp_path / "one.json") == plain


# ---- reading --------------------------------------------------------------------------------------------------------


def test_json_is_read_as_it_was_written(tmp_path: Path) -> None:
    values = {"a": 0.1 + 0.2, "b": "größer", "c": [1, None, True]}
    files.write_json(tmp_path / "a.json", values)
    assert files.read_json(tmp_path / "a.json") == values


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        (b"", "cannot be read as JSON"),
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read"),
        (b"[1]", "JSON object"),
    ],
)
def test_json_that_is_no_object_is_refused_by_name(written: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(written)
    text = refusal(lambda: files.read_json(tmp_path / "a.json"))
    assert str(tmp_path / "a.json") in text
    assert reason in text


def test_missing_files_are_named(tmp_path: Path) -> None:
    assert "a.json is missing" in refusal(lambda: files.read_json(tmp_path / "a.json"))
    assert "a.safetensors is missing" in refusal(lambda: files.read_tensors(tmp_path / "a.safetensors", None))


def tensors(path: Path, **values: torch.Tensor) -> str:
    body = files.tensor_bytes(values)
    path.write_bytes(body)
    return files.digest(body)


def test_tensors_round_trip_bit_for_bit_whatever_their_layout(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    values = {
        "b": torch.randn(3, 4).T,
        "a": torch.arange(3),
        "half": torch.randn(5).bfloat16(),
        "none": torch.zeros(0, 4),
        "mask": torch.tensor([True, False]),
    }
    found = files.read_tensors(path, tensors(path, **values))
    assert found.keys() == values.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in values.items())


def test_the_same_tensors_give_the_same_bytes_in_any_order() -> None:
    one, two = torch.ones(2), torch.zeros(3)
    assert files.tensor_bytes({"a": one, "b": two}) == files.tensor_bytes({"b": two, "a": one})


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    sha256 = tensors(path, a=torch.ones(100))
    body = bytearray(path.read_bytes())
    body[-3] ^= 1
    path.write_bytes(body)
    assert "is damaged" in refusal(lambda: files.read_tensors(path, sha256))


@pytest.mark.parametrize("keep", [0, 7, 30, -1])
def test_a_cut_file_is_refused_also_without_a_hash(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors(path, a=torch.ones(100))
    path.write_bytes(path.read_bytes()[:keep])
    text = refusal(lambda: files.read_tensors(path, None))
    assert str(path) in text
    assert "not a safetensors file" in text


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_tensors_that_are_not_finite_are_refused_by_name(bad: float, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    sha256 = tensors(path, fine=torch.ones(2), broken=torch.tensor([1.0, bad]))
    assert 'tensor "broken"' in refusal(lambda: files.read_tensors(path, sha256))
