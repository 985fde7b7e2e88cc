"""BATprompt: whole runs on a tiny model with a scripted rewriter, what they keep, exact resuming, and transfer.

Knows no other method; the loop itself is tested with the solver.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import tiny
import toy
from promptuary.checkpoint import load_prompt
from promptuary.config import load_run
from promptuary.errors import ConfigError, Interrupted
from promptuary.methods.batprompt import BATprompt, BATpromptConfig
from promptuary.perturbing.perturb import perturbed
from promptuary.seeds import seeded
from promptuary.talking import Talking
from promptuary.training import Listener, Training, train
from promptuary.wording import Wording
from talking import Script

START = "was it good"
KINDS = ("C1", "C2", "C3", "S1")


def said(question: str, place: int) -> str:
    """A few words of the tiny vocabulary, which follow from the question."""
    chance = random.Random(f"{question}{place}")
    return f"<prompt>{' '.join(chance.sample(tiny.WORDS[:40], 4))}</prompt>"


@pytest.fixture(autouse=True)
def speakers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Script]:
    """Every role is played by a script."""
    opened: dict[str, Script] = {}

    def speaker(self: Talking, config: Any, role: str) -> Script:
        return opened.setdefault(role, Script(said))

    monkeypatch.setattr(Talking, "speaker", speaker)
    return opened


def settings(where: Path, name: str = "run", **solver: Any) -> dict[str, Any]:
    values = toy.settings(where, name=name)
    values["method"] = {"name": "batprompt", "init_text": START}
    values["solver"] = {
        "name": "rewrite", "model": {"model": "scripted"}, "attacker": "rule", "explainer": "rule", "selection": 5,
        "measure": "reward", "attack_objective": "reward", **solver,
    }  # fmt: skip
    values["train"] = {"steps": 4, "batch_size": 4, "evaluate_every": 1, "save_every": 1}
    return values


def test_it_starts_with_the_words_of_the_settings_and_has_no_tensors(tmp_path: Path) -> None:
    run = load_run(settings(tmp_path))
    training = Training(run, Listener(), tiny.backbone("causal"))
    assert training.tuned.text == START
    assert training.solver.name == BATprompt.solver == "rewrite"
    assert training.tuned.trained() == []
    assert BATpromptConfig().init_text is not None


def test_a_run_keeps_what_does_best_on_held_out_examples_clean_and_perturbed(
    tmp_path: Path, speakers: dict[str, Script]
) -> None:
    run = load_run(settings(tmp_path, clean_weight=0.5))
    backbone = tiny.backbone("causal")
    result = train(run, backbone=backbone)
    rows = [row for row in toy.metric_rows(result.dir) if "parts" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    worth = [row["parts"]["held_out"] for row in rows]
    assert worth == sorted(worth)
    assert speakers["rewriter"].calls == 4
    assert result.prompt.text == result.facts["text"] != START

    def objective(text: str) -> float:
        """Half the clean examples, half the mean over kinds, by hand."""
        training = Training(load_run(settings(tmp_path, name="again")), Listener(), backbone)
        words = Wording.of(training.tuned, training.course.splits)
        assert words is not None
        seed = seeded(run.seed, 8, 0).initial_seed()
        parts = [words.tried([text], words.held_out).reward.mean().item()]
        for kind in KINDS:
            found = [(one, perturbed(one["text"], kind, seed=seed)) for one in words.held_out]
            changed = [{**one, "text": new.text} for one, new in found if new.changed]
            parts.append(words.tried([text], changed).reward.mean().item())
        return 0.5 * parts[0] + 0.5 * sum(parts[1:]) / 4

    history = result.facts["history"]
    assert [entry["from"] == "start" for entry in history] == [True] + [False] * (len(history) - 1)
    assert max(entry["held_out"]["total"] for entry in history) == worth[-1]
    assert result.facts["text"] in [entry["text"] for entry in history]
    assert objective(result.facts["text"]) == pytest.approx(worth[-1], abs=1e-5)
    assert objective(result.facts["text"]) > objective(START)


def test_a_resumed_run_ends_as_the_unbroken_one(tmp_path: Path) -> None:
    class Stop(Listener):
        training: Any = None

        def begun(self, training: Any) -> None:
            self.training = training

        def stepped(self, row: Any) -> None:
            if row["step"] == 2:
                self.training.stop.request()

    whole = train(load_run(settings(tmp_path, "whole")), backbone=tiny.backbone("causal"))
    broken = load_run(settings(tmp_path, "broken"))
    with pytest.raises(Interrupted):
        train(broken, backbone=tiny.backbone("causal"), listener=Stop())
    resumed = train(broken, backbone=tiny.backbone("causal"), resume=True)
    assert resumed.facts["text"] == whole.facts["text"] != START
    parts = [[row["parts"] for row in toy.metric_rows(one.dir) if "parts" in row] for one in (whole, resumed)]
    assert len(parts[0]) == 4
    # an answer that was remembered before the stop comes from another batch after it
    assert [pytest.approx(one, abs=1e-6) for one in parts[0]] == parts[1]


def test_the_words_are_saved_and_carried_to_another_model(tmp_path: Path) -> None:
    result = train(load_run(settings(tmp_path)), backbone=tiny.backbone("causal"))
    loaded = load_prompt(result.dir, backbone=tiny.backbone("causal"))
    assert loaded.text == result.facts["text"]
    texts = ["red cat sleeps", "blue dog sings"]
    assert [one.answer for one in loaded.predict(texts)] == [one.answer for one in result.prompt.predict(texts)]


def test_without_a_model_the_run_is_refused_in_one_line(tmp_path: Path) -> None:
    values = settings(tmp_path)
    del values["solver"]
    with pytest.raises(ConfigError, match="has to be played by a model; set solver.model") as error:
        train(load_run(values), backbone=tiny.backbone("causal"))
    assert "\n" not in str(error.value)
