"""Thousands of changed folders, seeded: each is refused in one line, or answers exactly as the unchanged one.

Knows no particular attack; changes that come with a new checksum may answer otherwise, but never crash.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml

import tiny
import toy
from artefacts import PARTS, TEXTS, Saved, quick_folder
from promptuary import files
from promptuary.checkpoint import load_prompt
from promptuary.config import load_run
from promptuary.errors import PromptuaryError
from promptuary.runs import RunFolder
from promptuary.training import train

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, "", "x", "good", "a b", "\0",
    "{text}", "{mask}", "{", "\u202e", "é" * 50, "x" * 3000, [], ["a"], [[]], [1, 2], {}, {"a": 1}, {"name": "x"},
)  # fmt: skip


def mutated_bytes(content: bytes, pick: random.Random) -> bytes:
    """One to three changes of bytes."""
    body = bytearray(content)
    for _ in range(pick.randint(1, 3)):
        at = pick.randrange(len(body) + 1)
        how = pick.randrange(6)
        if how == 0 and at < len(body):
            body[at] ^= 1 << pick.randrange(8)
        elif how == 1:
            body[at:at] = pick.randbytes(pick.randint(1, 9))
        elif how == 2:
            del body[at : at + pick.randint(1, 20)]
        elif how == 3:
            del body[at:]
        elif how == 4:
            body[at : at + 8] = pick.randbytes(8)
        else:
            body[at:at] = body[pick.randrange(len(body) + 1) :][:30]
    return bytes(body)


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    if path:
        yield path
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inside:
        yield from places(value, (*path, key))


def mutated_json(content: Any, pick: random.Random) -> Any:
    """A value replaced, a key renamed, removed or added somewhere."""
    changed = json.loads(json.dumps(content))
    *way, last = pick.choice(list(places(changed)))
    where = changed
    for step in way:
        where = where[step]
    old, how = where[last], pick.randrange(6)
    if how == 0:
        del where[last]
    elif how == 1 and isinstance(where, dict):
        where[pick.choice(("x", "name", str(last) + "s", ""))] = where.pop(last)
    elif how == 2 and isinstance(where, dict):
        where[pick.choice(("extra", "__class__", "trust_remote_code", "name", "checksum"))] = pick.choice(VALUES)
    elif how == 3 and isinstance(old, int | float) and not isinstance(old, bool):
        where[last] = pick.choice((old + 1, -old, old * 10, old / 3, str(old), 10**20 * int(old or 1)))
    elif how == 4 and isinstance(old, str) and old:
        at = pick.randrange(len(old))
        where[last] = pick.choice(
            (old[:at] + old[at + 1 :], old.upper(), old + " ", old[::-1], old[:at] + "z" + old[at + 1 :])
        )
    else:
        where[last] = pick.choice(VALUES)
    return changed


def mutated_tensors(content: bytes, pick: random.Random) -> bytes:
    """Other names, shapes, types or values in a well-formed file; or another header over the same bytes."""
    if pick.random() < 0.4:
        size = int.from_bytes(content[:8], "little")
        header = mutated_json(json.loads(content[8 : 8 + size]), pick)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + size :]
    tensors = dict(safetensors.torch.load(content))
    name = pick.choice(sorted(tensors))
    value = tensors[name]
    how = pick.randrange(7)
    if how == 0:
        tensors[name] = value.to(pick.choice((torch.float16, torch.float64, torch.int8, torch.bool, torch.complex64)))
    elif how == 1:
        tensors[name] = value.flatten()[: pick.randrange(value.numel() + 1)].clone()
    elif how == 2:
        tensors[name] = value.flatten()
    elif how == 3:
        tensors[pick.choice(("method.x", "rows", "head.weight", "", "é\n"))] = tensors.pop(name)
    elif how == 4:
        tensors["method." + pick.choice("xyz")] = value.clone()
    elif how == 5:
        value.view(-1)[pick.randrange(value.numel())] = pick.choice((torch.nan, torch.inf, 1e38, -1e-45))
    else:
        tensors[name] = value.mT.contiguous() if value.dim() == 2 else value[None].clone()
    return files.tensor_bytes(tensors)


def shuffled(path: Path, pick: random.Random, names: tuple[str, ...]) -> None:
    """Files that are gone, more, elsewhere, links, folders, or each other."""
    name, other = pick.sample(names, 2)
    file = path / name
    how = pick.randrange(9)
    if how == 0:
        file.unlink()
    elif how == 1:
        file.rename(path / pick.choice(("x", other, name + ".bak", name.upper())))
    elif how == 2:
        file.rename(path / "real")
        file.symlink_to(pick.choice(("real", path / "real", "../prompt/real", "/dev/null", "/dev/zero", name, ".")))
    elif how == 3:
        file.unlink()
        file.mkdir()
    elif how == 4:
        file.unlink()
        os.mkfifo(file)
    elif how == 5:
        (path / pick.choice(("model.bin", ".tmp-x-1", "prompt.pt", ".git", "prompt.json~"))).write_bytes(
            pick.randbytes(50)
        )
    elif how == 6:
        one, two = file.read_bytes(), (path / other).read_bytes()
        file.write_bytes(two)
        (path / other).write_bytes(one)
    elif how == 7:
        (path / name).write_bytes((path / other).read_bytes())
    else:
        file.write_bytes(pick.choice((b"", b"{}", b"[]", b"null", b"\xef\xbb\xbf{}", b"\xff\xfe{\0}\0", b"0" * 5000)))


def refused(call: Callable[[], Any]) -> str | None:
    """The line of a typed refusal; None if nothing was refused. Anything else is a crash."""
    try:
        call()
    except PromptuaryError as error:
        text = str(error)
        assert text
        assert "\n" not in text
        assert len(text) < 1500
        return text
    return None


@pytest.mark.parametrize(("task", "method"), [("classify_words", "dept"), ("classify_head", "prompt_tuning")])
def test_a_changed_prompt_is_refused_or_answers_as_before(task: str, method: str) -> None:
    pick, seen = random.Random(f"{task} {method}"), Counter[str]()
    with quick_folder() as folder:
        saved = Saved(folder, method, task)
        for number in range(1000):
            saved.restore()
            kind = ("bytes", "json", "tensors", "files")[number % 4]
            if kind == "bytes":
                name = pick.choice(PARTS)
                saved.put(name, mutated_bytes(saved.content[name], pick))
            elif kind == "json":
                saved.put("prompt.json", files.to_json(mutated_json(saved.facts, pick)))
            elif kind == "tensors":
                saved.put("prompt.safetensors", mutated_tensors(saved.content["prompt.safetensors"], pick))
            else:
                shuffled(saved.path, pick, PARTS)
            seen[f"{kind}: {'the same' if saved.refusal() is None else 'refused'}"] += 1
    print(dict(seen))
    # not everything matters (the card, a file more), but what matters is noticed
    assert sum(seen.values()) == 1000
    assert seen["json: refused"] > 220
    assert seen["tensors: refused"] > 220
    assert seen["bytes: the same"] > 30
    assert seen["files: the same"] > 30


@pytest.mark.parametrize(("task", "method"), [("classify_words", "dept"), ("choose", "ept"), ("generate", "lamp")])
def test_a_changed_prompt_with_a_checksum_that_fits_never_crashes(task: str, method: str) -> None:
    pick, seen = random.Random(f"{task} {method}"), Counter[str]()
    examples = toy.rows(3)
    with quick_folder() as folder:
        saved = Saved(folder, method, "classify_words") if task == "classify_words" else signed(folder, method, task)
        for number in range(210):
            saved.restore()
            if number % 3 < 2:
                saved.sign(mutated_json(saved.facts, pick))
            else:
                saved.sign_tensors(mutated_tensors(saved.content["prompt.safetensors"], pick))

            def use() -> None:
                assert len(load_prompt(saved.path, saved.backbone).predict(examples)) == 3

            seen["answers" if refused(use) is None else "refused"] += 1
    print(dict(seen))
    assert min(seen["answers"], seen["refused"]) > 30


def signed(folder: Path, method: str, task: str) -> Saved:
    """As `Saved`, for a task whose examples have more than a text."""

    class Other(Saved):
        def ask(self) -> Any:
            return load_prompt(self.path, self.backbone).predict(toy.rows(2))

    return Other(folder, method, task)


# ---- run folders ----------------------------------------------------------------------------------------------------

STATE = ("state.json", "state.safetensors")


def test_a_changed_checkpoint_is_skipped_or_is_the_same() -> None:
    pick, seen = random.Random(9), Counter[str]()
    with quick_folder() as where:
        backbone = tiny.backbone("causal")
        run = toy.run(where, "method.prompt_lr=0.5", steps=4, save_every=2, evaluate_every=2)
        train(run, backbone=backbone)
        folder = RunFolder(run.out)
        newest, kept = folder.path / "checkpoints" / "step-4", where / "kept"
        shutil.copytree(newest, kept)
        whole, contents = folder.load_state(), {name: (newest / name).read_bytes() for name in STATE}
        assert whole is not None
        facts = json.loads(contents["state.json"])
        for number in range(400):
            shutil.rmtree(newest)
            shutil.copytree(kept, newest)
            kind = ("bytes", "json", "tensors", "files")[number % 4]
            if kind == "bytes":
                name = pick.choice(STATE)
                (newest / name).write_bytes(mutated_bytes(contents[name], pick))
            elif kind == "json":
                (newest / "state.json").write_bytes(files.to_json(mutated_json(facts, pick)))
            elif kind == "tensors":
                (newest / "state.safetensors").write_bytes(mutated_tensors(contents["state.safetensors"], pick))
            else:
                shuffled(newest, pick, STATE)
            tensors, found, skipped = folder.load_state() or ({}, {}, [])
            if skipped:
                assert (found["step"], len(skipped)) == (2, 1)
                assert "\n" not in skipped[0]
            else:
                assert found == whole[1]
                assert all(torch.equal(tensors[name], value) for name, value in whole[0].items())
            seen["skipped" if skipped else "the same"] += 1
    print(dict(seen))
    assert seen["skipped"] > 300


NAMES = ("run.yaml", "run.json", "metrics.jsonl", "result.json", "environment.json", "predictions.jsonl")


def test_a_run_folder_with_a_changed_file_is_resumed_or_refused() -> None:
    pick, seen = random.Random(11), Counter[str]()
    with quick_folder() as where:
        backbone = tiny.backbone("causal")
        run = toy.run(where, "method.prompt_lr=0.5", steps=4, save_every=2, evaluate_every=4)
        prompt = (train(run, backbone=backbone).dir / "prompt" / "prompt.safetensors").read_bytes()
        folder, kept = Path(run.out), where / "kept"
        shutil.copytree(folder, kept)
        for number in range(72):
            shutil.rmtree(folder)
            shutil.copytree(kept, folder)
            name = NAMES[number % len(NAMES)]
            content = (folder / name).read_bytes()
            if name == "run.yaml" and pick.random() < 0.7:
                changed = yaml.safe_dump(mutated_json(yaml.safe_load(content), pick)).encode()
            else:
                changed = mutated_bytes(content, pick)
            (folder / name).write_bytes(changed)
            # as the command line does with a run folder; the settings of this run are those in its run.yaml
            text = refused(lambda: load_run(folder / "run.yaml", out=str(folder)))
            if text is None and name != "run.yaml":
                text = refused(lambda: train(run, resume=True, backbone=backbone))
                if text is None:
                    assert (folder / "prompt" / "prompt.safetensors").read_bytes() == prompt
            seen[f"{name}: {'done' if text is None else 'refused'}"] += 1
    print(dict(seen))
    assert seen["run.json: refused"] > 3
    assert seen["metrics.jsonl: done"] == seen["result.json: done"] == 12


def test_the_answers_compared_above_do_depend_on_the_prompt() -> None:
    with quick_folder() as folder:
        saved = Saved(folder)
        other = saved.tuned.restore({name: value + 0.5 for name, value in saved.tuned.state().items()})
        assert other is None
        assert saved.tuned.predict(TEXTS) != saved.answers
