"""The verbs on images: from a folder of pictures to answers, on tiny saved models.

Knows no method's mathematics.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny
from cli.cli_user import Said
from promptuary.cli.train import _asked
from promptuary.config import load_run
from promptuary.testing.case import write_images

Run = Callable[..., Said]

METHODS = {"vit": "{name: vpt, num_virtual_tokens: 2}", "clip": "{name: coop, num_virtual_tokens: 2, init: random}"}


@pytest.fixture(params=METHODS)
def kind(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An architecture, whose model, images and run file are in the working folder."""
    kind = str(request.param)
    monkeypatch.chdir(tmp_path)
    tiny.save(tmp_path / "base", kind)
    write_images(tmp_path / "images")
    reading = "head" if kind == "vit" else "words"
    Path("run.yaml").write_text(
        f"task: {{name: classify, image: image, reading: {reading}, labels: {{positive: good, negative: bad}}}}\n"
        f"data: {{source: images}}\nbackbone: {{model: ./base}}\nmethod: {METHODS[kind]}\n"
        "train: {steps: 3, batch_size: 6, threads: 1}\nout: out/run\n",
        encoding="utf-8",
    )
    return kind


def test_from_a_folder_of_images_to_an_answer(kind: str, here: Run) -> None:
    trained = here("train", "run.yaml", "--json")
    assert trained.code == 0, trained.err
    assert trained.json["examples"]["train"] == 30
    assert "promptuary predict out/run image.jpg" in trained.err
    image = "images/test/positive/00.png"
    said = here("predict", "out/run", image, "images/test/negative/01.png")
    assert said.code == 0, said.err
    lines = [line.split("\t") for line in said.out.splitlines()]
    assert [line[2] for line in lines] == [image, "images/test/negative/01.png"]
    first = json.loads(Path("out/run/predictions.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert {line[0] for line in lines} <= set(first["scores"])
    evaluated = here("evaluate", "out/run", "--json")
    assert evaluated.code == 0, evaluated.err
    assert evaluated.json["scores"] == pytest.approx(trained.json["metrics"])


def test_an_image_that_is_missing_is_named(kind: str, here: Run) -> None:
    assert here("train", "run.yaml").code == 0
    said = here("predict", "out/run", "nowhere.png")
    assert (said.code, said.out) == (2, "")
    assert "nowhere.png does not exist" in said.err


def test_of_several_tasks_the_first_says_what_comes_next(kind: str) -> None:
    """Its prompt is the one that the line names."""
    run = load_run("run.yaml")
    assert _asked(run) == "image.jpg"
    texts = run.model_copy(update={"task": run.task.model_copy(update={"image": None})})
    assert _asked(texts) == '"your text"'
