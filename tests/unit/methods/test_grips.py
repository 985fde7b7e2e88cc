"""GrIPS: whole runs on a tiny model, with and without a model for paraphrases, and an end before the last step.

Knows no other method; the search itself is tested with the solver.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tiny
import toy
from promptuary.checkpoint import load_prompt
from promptuary.config import load_run
from promptuary.errors import ConfigError
from promptuary.methods.grips import Grips, GripsConfig
from promptuary.solvers.rewriting.phrases import phrases
from promptuary.talking import Talking
from promptuary.training import Listener, Training, train
from talking import Script

START = "was it very good, or is the big sky bad, and what is true"


def settings(where: Path, name: str = "run", **solver: Any) -> dict[str, Any]:
    values = toy.settings(where, name=name)
    values["method"] = {"name": "grips", "init_text": START}
    values["solver"] = {"name": "edits", "measure": "reward", **solver}
    values["train"] = {"steps": 30, "batch_size": 4, "evaluate_every": 1}
    return values


def test_it_starts_with_the_words_of_the_settings_and_has_no_tensors(tmp_path: Path) -> None:
    training = Training(load_run(settings(tmp_path)), Listener(), tiny.backbone("causal"))
    assert training.tuned.text == START
    assert training.solver.name == Grips.solver == "edits"
    assert training.tuned.trained() == []
    assert training.steps == 10
    assert len(phrases(str(GripsConfig().init_text), "phrase")) > 3


def test_a_run_edits_the_words_and_ends_when_its_patience_does(tmp_path: Path) -> None:
    result = train(load_run(settings(tmp_path, patience=3, rounds=30)), backbone=tiny.backbone("causal"))
    rows = [row for row in toy.metric_rows(result.dir) if "parts" in row]
    assert 3 < len(rows) < 30
    assert [row["parts"]["accepted"] for row in rows[-3:]] == [0, 0, 0]
    assert sum(row["parts"]["accepted"] for row in rows) >= 1
    losses = [row["loss"] for row in rows]
    assert losses == sorted(losses, reverse=True)
    known = set(START.replace(",", " ,").split())
    assert result.facts["text"] != START
    assert set(result.facts["text"].replace(",", " ,").split()) <= known
    assert load_prompt(result.dir, backbone=tiny.backbone("causal")).text == result.facts["text"]


def test_paraphrases_come_from_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(lambda question, place: "never cold")

    def speaker(self: Talking, config: Any, role: str) -> Script:
        assert (config.model, role) == ("small", "paraphraser")
        return script

    monkeypatch.setattr(Talking, "speaker", speaker)
    run = load_run(settings(tmp_path, model={"model": "small"}, operations=["paraphrase"], patience=5, rounds=8))
    result = train(run, backbone=tiny.backbone("causal"))
    assert script.calls >= 5 * 5
    assert "never cold" in result.facts["text"]


def test_an_empty_start_is_refused_in_one_line(tmp_path: Path) -> None:
    values = settings(tmp_path)
    values["method"]["init_text"] = ""
    with pytest.raises(ConfigError, match="mend method.init_text") as error:
        train(load_run(values), backbone=tiny.backbone("causal"))
    assert "\n" not in str(error.value)
