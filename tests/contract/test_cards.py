"""Every method has its card, its test file and a run file that trains; nothing outside names a method.

Knows no method by name: the registry says which there are.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from promptuary import registry
from promptuary.config import load_run
from promptuary.data.load import load
from promptuary.methods.base import MethodConfig
from promptuary.staging import Staging
from promptuary.talking import Talking
from promptuary.testing import tiny
from promptuary.testing.case import Case, case_of, write_images
from promptuary.training import train
from promptuary.voices import CausalVoice
from talking import Script

ROOT = Path(__file__).parent.parent.parent
METHODS = registry.names("methods")
HEADINGS = ("Idea", "Equation", "Use", "Settings", "Relations", "Cost", "Evidence", "Not known", "Cite")


@pytest.mark.parametrize("name", METHODS)
def test_the_card_has_its_headings_and_every_setting(name: str) -> None:
    card = (ROOT / "docs" / "methods" / f"{name}.md").read_text(encoding="utf-8")
    found = re.findall(r"^## (.+)$", card, flags=re.M)
    assert [heading for heading in HEADINGS if heading not in found] == []
    common = (ROOT / "docs" / "methods" / "index.md").read_text(encoding="utf-8")
    for field in registry.load("methods", name).Config.model_fields:
        page = common if field in MethodConfig.model_fields else card
        assert f"`{field}`" in page or field == "name", field


@pytest.mark.parametrize("name", [name for name in METHODS if registry.load("methods", name).reconstructed])
def test_the_card_of_a_reconstruction_says_so(name: str) -> None:
    card = (ROOT / "docs" / "methods" / f"{name}.md").read_text(encoding="utf-8")
    assert "reconstruct" in card.lower()
    assert "Open questions" in card
    assert not re.search(r"reproduces table", card, flags=re.I)


@pytest.mark.parametrize("name", METHODS)
def test_its_run_file_trains_two_steps(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a model that is talked to, or that a policy speaks with, would have to be downloaded, or paid
    monkeypatch.setattr(Talking, "speaker", lambda self, config, role: Script(lambda question, place: "was it good"))
    monkeypatch.setattr(Staging, "_voice", lambda self, model: CausalVoice(tiny.backbone("causal")))
    monkeypatch.chdir(tmp_path)  # where the run files of images find their folder, `images`
    run: Any = load_run(
        ROOT / "runs" / f"{name}.yaml", ["train.steps=2", "train.batch_size=4"], out=str(tmp_path / "run")
    )
    run = run.model_copy(update={"train": run.train.model_copy(update={"epochs": None})})
    family = "encoder" if run.backbone.family == "auto" else run.backbone.family
    if run.task.image is not None:
        write_images(tmp_path / run.data.source)
    case = case_of(registry.load("methods", name), family, tmp_path)
    run = small(run).model_copy(update={"method": shrunk(run.method, case)})
    result = train(run, backbone=tiny.backbone(family))
    # a search for words ends where nothing more is proposed
    assert result.facts["steps"] == 2 or (result.facts.get("text") and result.facts["steps"] == 1)
    assert (result.dir / "prompt" / "prompt.safetensors").exists()


def small(run: Any) -> Any:
    """A run on a few rows, whose label words are in the tiny vocabulary, which knows other words than the real one."""
    fields = (run.task.image or "text", "label")
    whole = run.data.model_copy(update={"shots": None})
    labels = sorted({row["label"] for row in load(whole, fields, torch.Generator()).train})
    words = dict(zip(labels, tiny.WORDS, strict=False))
    few: dict[str, Any] = {"train_size": 16, "validation_size": 8}
    if run.data.shots is not None:
        few = {"shots": 4}
    return load_run(
        {
            **run.model_dump(),
            "data": {**run.data.model_dump(), **few, "max_length": 24},
            "task": {**run.task.model_dump(), "labels": words},
        }
    )


def shrunk(config: MethodConfig, case: Case) -> MethodConfig:
    """The run file's own method settings, at the size of the tiny models, with earlier prompts where they name some."""
    changes = {"match_length": None, **case.settings}
    if config.origins:
        changes["sources"] = case.config().origins
    return config.model_copy(update=changes)


@pytest.mark.parametrize("name", METHODS)
def test_it_has_a_test_file_of_its_own(name: str) -> None:
    assert (ROOT / "tests" / "unit" / "methods" / f"test_{name}.py").exists()


@pytest.mark.parametrize("name", METHODS)
def test_no_other_source_file_branches_on_it(name: str) -> None:
    source = ROOT / "src" / "promptuary"
    for path in source.rglob("*.py"):
        if path.parent.name == "methods":
            continue
        text = path.read_text(encoding="utf-8")
        assert not re.search(rf"""(==|!=|\bin\b)\s*[("\[']*{name}["']""", text), path
