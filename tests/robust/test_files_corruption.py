"""Damage: every cut, flipped bit and foreign content of a saved file is refused by name, in little memory.

Knows no training.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from artefacts import Saved, quick_folder
from promptuary import files
from promptuary.checkpoint import load_prompt, read_facts
from promptuary.errors import FileFormatError
from promptuary.runs import RunFolder

VERSION_1 = Path(__file__).parents[1] / "data" / "prompt-version-1"


@pytest.fixture(scope="module")
def kept() -> Iterator[Saved]:
    with quick_folder() as folder:
        yield Saved(folder)


@pytest.fixture
def saved(kept: Saved) -> Saved:
    kept.restore()
    return kept


def flips(content: bytes, count: int, seed: int) -> Iterator[bytes]:
    pick = random.Random(seed)
    for bit in pick.sample(range(8 * len(content)), count):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)


def cuts(content: bytes, count: int) -> Iterator[bytes]:
    pick = random.Random(5)
    for end in sorted(pick.sample(range(len(content)), count)):
        yield content[:end]


GARBAGE = (
    b"",
    b"\0",
    b"\0" * 8,
    b"\xff" * 64,
    bytes(range(256)) * 4,
    b"PK\3\4" + b"\0" * 100,
    b"\x1f\x8b\x08" + b"\0" * 100,
    b"\x80\x02cposix\nsystem\n.",
    (2**63).to_bytes(8, "little") + b"{}",
    (200 * 2**20).to_bytes(8, "little") + b"{}",
    (2).to_bytes(8, "little") + b"{}",
    (2).to_bytes(8, "little") + b"[]",
)


def tensor_files(content: bytes) -> dict[str, bytes]:
    """Well-formed files that are not the prompt's."""
    whole = safetensors.torch.load(content)
    rows, a, b = whole["method.rows"], whole["method.a"], whole["method.b"]

    def one(**changes: torch.Tensor) -> bytes:
        return files.tensor_bytes({**whole, **{f"method.{name}": value for name, value in changes.items()}})

    def bad(value: float) -> torch.Tensor:
        changed = rows.clone()
        changed[0, 0] = value
        return changed

    made = {
        "swapped shapes": one(a=b, b=a),
        "transposed": one(rows=rows.T.contiguous()),
        "reshaped": one(rows=rows.reshape(-1)),
        "shorter": one(rows=rows[:-1]),
        "longer": one(rows=torch.cat([rows, rows])),
        "nan": one(rows=bad(float("nan"))),
        "inf": one(rows=bad(float("inf"))),
        "-inf": one(rows=bad(-float("inf"))),
        "one missing": files.tensor_bytes({"method.rows": rows, "method.a": a}),
        "one more": one(c=rows.clone()),
        "empty one more": one(c=torch.zeros(0, 32)),
        "other name": files.tensor_bytes({"method.rows": rows, "method.a": a, "head.b": b}),
        "line break in a name": files.tensor_bytes({"method.rows": rows, "method.a": a, "method.b\nx": b}),
    }
    kinds = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)
    kinds += (torch.int8, torch.complex64, torch.float8_e4m3fn, torch.float8_e8m0fnu)
    return made | {f"as {kind}": one(rows=rows.to(kind)) for kind in kinds}


def test_every_damaged_tensor_file_of_a_prompt_is_refused(saved: Saved) -> None:
    content, refused = saved.content["prompt.safetensors"], 0
    for changed in (*cuts(content, 64), *flips(content, 256, 1), *GARBAGE, *tensor_files(content).values()):
        saved.put("prompt.safetensors", changed)
        assert str(saved.path / "prompt.safetensors") in (saved.refusal() or "")
        refused += 1
    print(f"{refused} damaged files, {refused} refused")
    assert refused >= 330


def test_a_hash_that_fits_does_not_help_what_is_not_the_prompt(saved: Saved) -> None:
    content = saved.content["prompt.safetensors"]
    for changed in (*cuts(content, 64), *GARBAGE):
        saved.sign_tensors(changed)
        assert str(saved.path / "prompt.safetensors") in (saved.refusal() or "")
    for what, changed in tensor_files(content).items():
        saved.sign_tensors(changed)
        assert str(saved.path) in (saved.refusal() or ""), what


def test_every_bit_of_the_facts_matters_or_changes_nothing(saved: Saved) -> None:
    content, refused = saved.content["prompt.json"], 0
    for changed in (*cuts(content, 64), *flips(content, 512, 2)):
        saved.put("prompt.json", changed)
        refused += saved.refusal() is not None
    # what is not refused is another way to write the same, such as 1E-05 for 1e-05; that it answers the same is checked
    assert refused >= 64 + 500
    # a letter of a label word, a digit of a length: readable, and wrong
    for old, new in (
        (b'"good"', b'"wood"'),
        (b'"max_length": 40', b'"max_length": 41'),
        (b'"version": 3', b'"version": 2'),
    ):
        assert old in content
        saved.put("prompt.json", content.replace(old, new))
        assert "damaged or was edited" in (saved.refusal() or "")


def test_whitespace_and_order_of_the_facts_do_not_matter(saved: Saved) -> None:
    facts = json.loads(saved.content["prompt.json"])
    saved.put("prompt.json", json.dumps(dict(reversed(facts.items())), separators=(",", ":")).encode())
    assert saved.refusal() is None


def state(step: int) -> dict[str, torch.Tensor]:
    return {"trained/a": torch.full((40,), float(step)), "random/cpu": torch.arange(9, dtype=torch.uint8)}


def test_every_damaged_checkpoint_is_skipped_for_the_one_before(tmp_path: Path) -> None:
    with quick_folder() as where:
        folder = RunFolder(where / "run")
        files.write_json(folder.path / "run.json", {"hash": "h"})
        for step in (1, 2):
            folder.save_state(step, state(step), {"progress": {"step": step, "best": 0.25}, "run_hash": "h"})
        good = folder.load_state()
        assert good is not None
        newest = folder.path / "checkpoints" / "step-2"
        tried = harmless = 0
        for name in ("state.safetensors", "state.json"):
            content = (newest / name).read_bytes()
            for changed in (*cuts(content, 64), *flips(content, 128, 3), *GARBAGE):
                (newest / name).write_bytes(changed)
                found = folder.load_state()
                assert found is not None
                tensors, facts, skipped = found
                if skipped:
                    assert str(newest) in skipped[0]
                    assert "\n" not in skipped[0]
                    assert tensors["trained/a"].tolist() == [1.0] * 40
                    assert facts["progress"] == {"step": 1, "best": 0.25}
                else:
                    assert (facts, tensors["trained/a"].tolist()) == (good[1], [2.0] * 40)
                    harmless += 1
                tried += 1
            (newest / name).write_bytes(content)
        assert tried >= 400
        assert harmless <= 4
        # under another number, or in another run, it is not a checkpoint
        renamed = newest.rename(newest.with_name("step-9"))
        assert "not of the step in its folder's name" in (folder.load_state() or ((), (), [""]))[2][0]
        renamed.rename(newest)
        files.write_json(folder.path / "run.json", {"hash": "other"})
        with pytest.raises(FileFormatError, match="other settings"):
            folder.load_state()


def test_a_checkpoint_of_the_first_format_is_still_read(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    files.write_json(folder.path / "run.json", {"hash": "h"})
    content = files.tensor_bytes(state(3))
    body = {"run_hash": "h", "progress": {"step": 3}, "step": 3, "sha256": files.digest(content)}
    files.write_folder(
        folder.path / "checkpoints" / "step-3", {"state.safetensors": content, "state.json": files.to_json(body)}
    )
    tensors, facts, skipped = folder.load_state() or ({}, {}, ["none"])
    assert (tensors["trained/a"].tolist(), facts, skipped) == ([3.0] * 40, body, [])


def test_what_is_too_large_is_refused_unread(saved: Saved) -> None:
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    for name in ("prompt.safetensors", "prompt.json"):
        saved.restore()
        with (saved.path / name).open("r+b") as file:
            file.truncate(2**33)  # a sparse file: no disk is used
        text = saved.refusal() or ""
        assert f"{name} has 8,589,934,592 bytes" in text
    # as large as the header says, and just as far from the prompt
    saved.restore()
    claim = (200 * 2**20).to_bytes(8, "little") + b'{"a":'
    saved.sign_tensors(claim)
    with (saved.path / "prompt.safetensors").open("r+b") as file:
        file.truncate(201 * 2**20)
    assert "not read" in (saved.refusal() or "")
    assert time.perf_counter() - began < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40 * 1024  # KiB


def test_sizes_in_the_facts_cannot_ask_for_memory(saved: Saved) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = saved.facts["method_config"]
    for changes in (
        {"method_config": {**config, "num_virtual_tokens": 10**12}},
        {"method_config": {**config, "num_virtual_tokens": 10**12}, "trainable_parameters": 10**14},
        {"method_config": {**config, "max_tokens": 10**30, "rank": 10**30}},
        {"method_config": {**config, "match_length": 10**12, "num_virtual_tokens": 10**9}},
        {"width": 10**12},
        {"width": 16},
        {"trainable_parameters": 10**30, "width": 10**30},
        {"trainable_parameters": -1},
        {"max_length": 0},
        {"max_length": True},
    ):
        saved.sign({**saved.facts, **changes})
        assert str(saved.path) in (saved.refusal() or ""), changes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40 * 1024  # KiB


@pytest.fixture(scope="module")
def held() -> Iterator[Saved]:
    """A prompt that holds constants, some of them drawn from a seed."""
    with quick_folder() as folder:
        yield Saved(folder, "bbt")


def test_every_damaged_file_of_constants_is_refused(held: Saved) -> None:
    held.restore()
    content = held.content["constants.safetensors"]
    for changed in (*cuts(content, 64), *flips(content, 256, 6), *GARBAGE):
        held.put("constants.safetensors", changed)
        assert str(held.path / "constants.safetensors") in (held.refusal() or "")
    for changed in (*cuts(content, 64), *GARBAGE):
        held.restore()
        held.sign_tensors(changed, "constants.safetensors")
        assert str(held.path / "constants.safetensors") in (held.refusal() or "")


def test_constants_in_the_facts_cannot_ask_for_memory(held: Saved) -> None:
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    config = held.facts["method_config"]
    for changes in (
        # what is trained stays as large as it is: only drawn and copied numbers grow
        {"method_config": {**config, "num_virtual_tokens": 10**6}},
        {"method_config": {**config, "num_virtual_tokens": 10**12}},
        {"method_config": {**config, "num_virtual_tokens": 10**30}},
        {"method_config": {**config, "num_virtual_tokens": 10**6}, "constants": 32 * 10**6 + 1},
        {"constants": 10**30},
        {"constants": -1},
        {"constants": True},
        {"constants": "97"},
    ):
        held.restore()
        held.sign({**held.facts, **changes})
        assert str(held.path) in (held.refusal() or ""), changes
    held.restore()
    with (held.path / "constants.safetensors").open("r+b") as file:
        file.truncate(2**33)  # a sparse file: no disk is used
    assert "constants.safetensors has 8,589,934,592 bytes" in (held.refusal() or "")
    assert time.perf_counter() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40 * 1024  # KiB


# ---- version 1 ------------------------------------------------------------------------------------------------------


def test_a_committed_folder_of_version_1_is_read(tmp_path: Path) -> None:
    facts = read_facts(VERSION_1)
    assert (facts["version"], facts["task"]["labels"]) == (1, {"positive": "good", "negative": "bad"})
    tensors = files.read_tensors(VERSION_1 / "prompt.safetensors", facts["sha256"]["prompt.safetensors"])
    assert tensors["method.rows"].shape == (4, 32)


def test_version_1_answers_as_later_versions_do(saved: Saved) -> None:
    # the committed prompt on the base of this release's tiny models, whatever their random weights are
    shutil.rmtree(saved.path)
    shutil.copytree(VERSION_1, saved.path)
    facts = {**json.loads((VERSION_1 / "prompt.json").read_text()), "identity": saved.backbone.identity}
    facts["task"]["template"] = "{text} it was {mask}"
    saved.put("prompt.json", files.to_json(facts))
    old = load_prompt(saved.path, saved.backbone)
    assert torch.equal(
        old.state()["method.rows"], safetensors.torch.load_file(VERSION_1 / "folded.safetensors")["rows"]
    )
    saved.put("prompt.json", files.to_json(files.sealed({**facts, "version": 2})))
    assert load_prompt(saved.path, saved.backbone).predict(["red"]) == old.predict(["red"])
    # a checksum in it, wrong or not, means that it is no version 1
    saved.put("prompt.json", files.to_json({**facts, "checksum": "0" * 64}))
    with pytest.raises(FileFormatError, match="checksum"):
        load_prompt(saved.path, saved.backbone)
