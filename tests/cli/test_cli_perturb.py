"""`evaluate --perturb`: a table, an object and a picture of clean and perturbed scores; what is wrong gets one line.

Knows no other verb, and not how a text is perturbed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import tiny
from cli.cli_user import Place, Said
from promptuary.testing.case import write_images

Run = Callable[..., Said]


def test_all_nine_stand_in_the_object_and_in_the_table(place: Place, here: Run) -> None:
    said = here("evaluate", place.trained, "--perturb", "all", "--json")
    assert said.code == 0, said.err
    told = said.json["robustness"]
    assert list(told["perturbed"]) == ["C1", "C2", "C3", "W1", "W2", "W3", "S1", "S2", "S3"]
    assert told["clean"]["scores"] == said.json["scores"]
    assert told["clean"]["interval_95"] == said.json["interval_95"]
    scores = {kind: one["scores"]["accuracy"] for kind, one in told["perturbed"].items()}
    for kind, one in told["perturbed"].items():
        low, high = one["interval_95"]
        assert low <= scores[kind] <= high
        assert one["drop"] == pytest.approx(1 - scores[kind] / said.json["scores"]["accuracy"])
        assert (one["closeness"] is None) == (one["changed"] == 0)
    assert told["perturbed"]["S1"]["changed"] == 24
    assert told["mean"]["score"] == pytest.approx(math.fsum(scores.values()) / 9)
    assert told["worst"]["score"] == min(scores.values()) == scores[told["worst"]["kind"]]
    for line in ("S1 a handle", "24 of 24", "mean", "worst: ", "95 % interval"):
        assert line in said.err
    assert "█" in said.err or "\\u2588" in said.err


def test_the_same_seed_gives_the_same_and_the_order_of_names_does_not_matter(place: Place, here: Run) -> None:
    first = here("evaluate", place.trained, "--perturb", "C1,w2", "--perturb-seed", 3, "--json").json["robustness"]
    again = here("evaluate", place.trained, "--perturb", "W2, C1", "--perturb-seed", 3, "--json").json["robustness"]
    other = here("evaluate", place.trained, "--perturb", "C1,W2", "--json").json["robustness"]
    assert first == again
    assert (first["seed"], other["seed"]) == (3, 0)
    assert first["perturbed"]["C1"] != other["perturbed"]["C1"]


def test_without_the_option_nothing_is_perturbed(place: Place, here: Run) -> None:
    assert "robustness" not in here("evaluate", place.trained, "--json").json


def test_the_page_has_a_picture_of_it(place: Place, tmp_path: Path, here: Run) -> None:
    file = tmp_path / "page.html"
    said = here("evaluate", place.trained, "--perturb", "all", "--report", file, "--json").json
    content = file.read_text(encoding="utf-8")
    assert "<h2>Robustness</h2>" in content
    for kind, one in said["robustness"]["perturbed"].items():
        assert f"<title>{kind} {one['title']}: {100 * one['scores']['accuracy']:.1f} %, 95 % interval" in content
    assert content.count('class="whisker"') == 10
    first = file.read_bytes()
    here("evaluate", place.trained, "--perturb", "all", "--report", file)
    assert file.read_bytes() == first
    here("evaluate", place.trained, "--report", file)
    assert "Robustness" not in file.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--perturb", "C4"), 'no such perturbation: "C4"; did you mean "C3"? (all, or some of C1, C2,'),
        (("--perturb", "al"), 'no such perturbation: "al"; did you mean "all"?'),
        (("--perturb", ""), 'no such perturbation: "" (all, or some of C1'),
        (("--perturb", "C1,,W2"), 'no such perturbation: ""'),
        (("--perturb", "c1;c2"), 'no such perturbation: "c1;c2"; did you mean "C'),
        (("--perturb-seed", "1"), "--perturb-seed is of perturbations, and none is asked for; add --perturb all"),
        (("--perturb", "C1", "--perturb-seed", "x"), "invalid value for '--perturb-seed'"),
    ],
)
def test_what_is_wrong_gets_one_line(words: tuple[str, ...], message: str, place: Place, here: Run) -> None:
    said = here("evaluate", place.trained, *words)
    assert said.code == 2
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_a_prompt_for_images_is_refused(tmp_path: Path, here: Run) -> None:
    tiny.save(tmp_path / "base", "vision")
    write_images(tmp_path / "data")
    run = tmp_path / "run.yaml"
    settings = {
        "task": {"name": "classify", "image": "image", "reading": "head"},
        "data": {"source": str(tmp_path / "data")},
        "backbone": {"model": str(tmp_path / "base"), "family": "vision", "device": "cpu"},
        "method": {"name": "vpt", "num_virtual_tokens": 3},
        "train": {"steps": 1, "batch_size": 4, "threads": 1},
        "out": str(tmp_path / "trained"),
    }
    run.write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert here("train", run, "--json").code == 0
    said = here("evaluate", tmp_path / "trained", "--perturb", "all")
    assert said.code == 2
    assert "perturbations are for texts, and this prompt is asked with images (task.image: image)" in said.err
    assert said.err.count("\n") == 1
