"""`evaluate --report` writes a page, for texts and for images, or says in one line why it cannot.

Knows no other verb.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import tiny
from cli.cli_user import Place, Said, write_rows
from promptuary.testing.case import write_images

Run = Callable[..., Said]


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file for a prompt among the patches of a tiny model."""
    root = tmp_path_factory.mktemp("seeing")
    tiny.save(root / "base", "vision")
    write_images(root / "data")
    run = root / "run.yaml"
    settings = {
        "task": {"name": "classify", "image": "image", "reading": "head"},
        "data": {"source": str(root / "data")},
        "backbone": {"model": str(root / "base"), "family": "vision", "device": "cpu"},
        "method": {"name": "vpt", "num_virtual_tokens": 3},
        "train": {"steps": 2, "batch_size": 4, "threads": 1},
        "out": str(root / "trained"),
    }
    run.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return run


def test_a_prompt_for_texts_gets_a_page(place: Place, tmp_path: Path, here: Run) -> None:
    file = tmp_path / "new" / "page.html"
    said = here("evaluate", place.trained, "--report", file, "--json").json
    assert said["report"] == str(file)
    content = file.read_text(encoding="utf-8")
    assert content.startswith("<!doctype html>")
    assert f"{100 * said['scores']['accuracy']:.1f} %" in content
    assert "24 test" in content
    assert 12 <= content.count('<li class="card ') <= 24
    first = file.read_bytes()
    assert here("evaluate", place.trained, "--report", file, "--json").json == said
    assert file.read_bytes() == first
    assert [one.name for one in file.parent.iterdir()] == ["page.html"]


def test_without_the_option_there_is_no_page(place: Place, here: Run) -> None:
    assert here("evaluate", place.trained, "--json").json["report"] is None


def test_a_prompt_for_images_gets_a_page_with_pictures_and_maps(seeing: Path, tmp_path: Path, here: Run) -> None:
    assert here("train", seeing, "--json").code == 0
    file = tmp_path / "page.html"
    said = here("evaluate", seeing.parent / "trained", "--report", file)
    assert said.code == 0, said.err
    content = file.read_text(encoding="utf-8")
    assert "Where it looks" in content
    assert content.count('<img src="data:image/jpeg') == 8
    assert 'class="overlay"' in content
    assert "<dd><bdi>vpt</bdi></dd>" in content


def test_a_run_on_base_classes_gets_the_scores_on_new_ones_too(tmp_path: Path, here: Run) -> None:
    tiny.save(tmp_path / "base", "dual")
    write_images(tmp_path / "data")
    for split in ("train", "validation", "test"):
        for old, label in (("positive", "cat"), ("negative", "dog")):
            (tmp_path / "data" / split / old).rename(tmp_path / "data" / split / label)
            shutil.copytree(tmp_path / "data" / split / label, tmp_path / "data" / split / f"{label}fish")
    run = tmp_path / "run.yaml"
    settings = {
        "task": {"name": "classify", "image": "image"},
        "data": {"source": str(tmp_path / "data"), "classes": "base"},
        "backbone": {"model": str(tmp_path / "base"), "device": "cpu"},
        "method": {"name": "coop", "num_virtual_tokens": 2, "init": "random"},
        "train": {"steps": 2, "batch_size": 4, "threads": 1},
        "out": str(tmp_path / "trained"),
    }
    run.write_text(yaml.safe_dump(settings), encoding="utf-8")
    trained = here("train", run, "--json")
    assert trained.code == 0, trained.err
    file = tmp_path / "page.html"
    said = here("evaluate", tmp_path / "trained", "--report", file, "--json").json
    assert said["scores"] == trained.json["metrics"]
    assert "new_accuracy" in said["scores"]
    content = file.read_text(encoding="utf-8")
    assert "Accuracy on new classes" in content
    assert "H = 2 · base · new / (base + new)" in content
    # of other data, or of other rows, nobody knows which classes are new
    changed = here("evaluate", tmp_path / "trained", "--set", "data.max_length=32", "--json").json
    validation = here("evaluate", tmp_path / "trained", "--split", "validation", "--json").json
    assert changed["scores"].keys() == validation["scores"].keys() == {"accuracy", "macro_f1"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--report", "{}"), "--report {} is a folder; give the name of a file"),
        (("--report", "{}/a file/page.html"), "cannot be written: {}/a file is no folder"),
        (("--report", "{}/one", "--predictions", "{}/one"), "--predictions and --report are both {}/one"),
    ],
)
def test_a_place_that_takes_no_page_is_refused_before_the_work(
    words: tuple[str, ...], message: str, place: Place, tmp_path: Path, here: Run
) -> None:
    (tmp_path / "a file").write_text("")
    said = here("evaluate", place.trained, *(word.format(tmp_path) for word in words))
    assert said.code == 2
    assert message.format(tmp_path) in said.err
    assert said.err.count("\n") == 1
    assert [one.name for one in tmp_path.iterdir()] == ["a file"]


def test_labels_and_texts_that_look_like_markup_stay_text(place: Place, tmp_path: Path, here: Run) -> None:
    rows = [{"text": "<script>alert(1)</script> cat", "label": label} for label in ("positive", "negative")]
    file = tmp_path / "page.html"
    said = here("evaluate", place.trained, "--data", write_rows(tmp_path / "<b>.jsonl", rows), "--report", file)
    assert said.code == 0, said.err
    content = file.read_text(encoding="utf-8")
    assert "<script" not in content
    assert "&lt;script&gt;alert(1)" in content
    assert "<b>." not in content
