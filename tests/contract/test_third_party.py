"""A method in a package of its own: installed for real, then found, trained and checked through its entry point.

Knows no inside of the library: everything runs in processes of their own, with the package's folder on their path.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
import toy

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "third_party_method"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package installed into `site`, as pip does it, and a copy of its files."""
    folder = tmp_path_factory.mktemp("third_party")
    copy = shutil.copytree(EXAMPLE, folder / "package", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    alone = ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(folder / "site")]
    done = subprocess.run([*pip, *alone, str(copy)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder


def run(place: Path, *words: str) -> str:
    """A command's standard output; the command sees the installed package and not the copy of its source."""
    path = os.pathsep.join([str(place / "site"), *sys.path])
    done = subprocess.run(
        [sys.executable, *words],
        cwd=place,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_only_its_module_and_its_entry_point_are_installed(place: Path) -> None:
    found = {path.name for path in (place / "site").iterdir() if path.name != "__pycache__"}
    assert found == {"promptuary_random_projection.py", "promptuary_random_projection-0.1.dist-info"}
    listed = (place / "site" / "promptuary_random_projection-0.1.dist-info" / "entry_points.txt").read_text()
    assert "random_projection = promptuary_random_projection:RandomProjection" in listed


def test_the_methods_verb_lists_it(place: Path) -> None:
    listed = json.loads(run(place, "-m", "promptuary", "methods", "--json"))["methods"]
    mine = [row for row in listed if row["name"] == "random_projection"]
    assert mine == [
        {
            "name": "random_projection",
            "title": "Random projection",
            "paper": "after arXiv 1804.08838",
            "sites": ["input"],
            "reconstructed": False,
        }
    ]


def test_its_run_file_trains(place: Path) -> None:
    model, data = tiny.save(place / "model", "encoder"), toy.folder(place / "data")
    told = run(
        place, "-m", "promptuary", "train", "package/random_projection.yaml", "--json",
        "--set", f"backbone.model={model}", "--set", "backbone.family=encoder",
        "--set", f"data.source={data}", "--set", "train.steps=2",
    )  # fmt: skip
    result = json.loads(told)
    assert result["method"] == "random_projection"
    assert result["trainable_parameters"] == 10 * 64
    facts = json.loads((place / "out" / "random_projection" / "prompt" / "prompt.json").read_text())
    assert facts["method"] == "random_projection"
    assert facts["method_config"]["projection_seed"] == 0


def test_its_own_tests_pass_where_it_is_installed(place: Path) -> None:
    # one of the four families: the library's own methods run on all of them in this suite
    told = run(
        place, "-m", "pytest", "-q", "-p", "no:cacheprovider", "package/test_random_projection.py",
        "--import-mode=importlib", "-k", "not causal and not seq2seq and not masked",
    )  # fmt: skip
    assert "5 passed, 3 deselected" in told
