"""Prompts of words from run file to answer, on this machine and behind an endpoint; what is wrong gets one line.

Knows no method from within; the models are tiny, and the endpoint is a server of the tests.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import promptuary
import speaking_server as server
import tiny
from cli.cli_user import Place, Said
from promptuary.errors import BudgetExceeded, Interrupted, SpeakerError
from promptuary.listening import Listener
from speaking_server import KEY, Chat, chatting

Run = Callable[..., Said]
Write = Callable[..., Path]

TEXTS = ["the cat is", "was it a good dog", "sky sea"]
MANUAL = {"name": "manual", "texts": TEXTS}
RULES = {
    "name": "rewrite",
    "attacker": "rule",
    "explainer": "rule",
    "rounds": 2,
    "sample_num": 2,
    "selection": 2,
    "rewrites": 2,
    "paraphrases": 0,
    "max_tokens": 20,
}


@pytest.fixture(scope="module")
def models(place: Place) -> Path:
    """A folder with models of other families beside the masked ones."""
    for kind in ("llama", "t5", "gpt2"):
        if not (place.root / kind).exists():
            tiny.save(place.root / kind, kind, seed=1)
    return place.root


@pytest.fixture
def write(models: Path, tmp_path: Path) -> Write:
    """A run file on a causal model; parts replace those that are there."""

    def made(name: str = "run", **parts: Any) -> Path:
        values: dict[str, Any] = {
            "task": {
                "name": "classify",
                "template": "{text} . It is {mask}",
                "labels": {"positive": "good", "negative": "bad"},
            },
            "data": {"source": str(models / "data"), "max_length": 48},
            "backbone": {"model": str(models / "llama"), "device": "cpu"},
            "method": MANUAL,
            "train": {"steps": 4, "batch_size": 8, "threads": 1},
            "out": str(tmp_path / name),
        }
        for part, value in parts.items():
            merged = isinstance(value, dict) and part not in ("method", "solver", "backbone")
            values[part] = {**values[part], **value} if merged else value
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(values))
        return file

    return made


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> Iterator[Chat]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with chatting() as running:
        running.script = says
        yield running


def says(request: dict[str, Any]) -> str:
    """A rewriter where it is asked for a prompt; else right, if the prompt asks for care, and else no label at all."""
    said = {one["role"]: one["content"] for one in request["messages"]}
    if request["model"] == "writer":
        return "Be careful and say good or bad."
    if "careful" not in said.get("system", ""):
        return "who knows"
    return "good" if {"good", "great"} & set(said["user"].split()) else "Bad."


def remote(chat: Chat, **endpoint: Any) -> dict[str, Any]:
    settings = {"base_url": chat.url, "retries": 0, **endpoint}
    return {"family": "remote", "model": "reader", "endpoint": settings}


def line(said: Said) -> str:
    """The only line of a mistake."""
    assert said.code == 2, said.err
    assert "Traceback" not in said.err
    errors = [one for one in said.err.splitlines() if one.startswith("error: ")]
    assert len(errors) == 1, said.err
    assert said.err.splitlines()[-1] == errors[0]
    return errors[0]


# ---- on this machine -------------------------------------------------------------------------------------------------


def test_words_from_the_run_file_to_another_family(write: Write, models: Path, tmp_path: Path, here: Run) -> None:
    trained = here("train", write(), "--json").json
    assert trained["text"] in TEXTS
    assert (trained["trainable_parameters"], trained["steps"], trained["forward_calls"]) == (0, 1, 3)

    out = tmp_path / "run"
    evaluated = here("evaluate", out, "--json").json
    assert evaluated["scores"] == trained["metrics"]
    (told,) = here("predict", out, "a good cat", "--json").json["predictions"]
    tuned = promptuary.load_prompt(out)
    assert tuned.text == trained["text"]
    (own,) = tuned.predict(["a good cat"])
    assert (told["answer"], told["scores"]) == (own.answer, pytest.approx(dict(own.scores)))

    inspected = here("inspect", out, "--json").json
    assert inspected["text"] == trained["text"]
    assert inspected["history"][0]["step"] == 0
    assert trained["text"] in here("inspect", out).err
    card = (out / "prompt" / "README.md").read_text(encoding="utf-8")
    assert f"before everything, in a line of its own:\n\n```text\n{trained['text']}\n```" in card
    assert "(none)" not in card
    assert "published" not in card

    for other in ("t5", "gpt2"):
        carried = here("evaluate", out, "--backbone", models / other, "--json")
        assert carried.code == 0, carried.err
        assert set(carried.json["scores"]) == {"accuracy", "macro_f1"}
        answer = here("predict", out, "a good cat", "--backbone", models / other, "--json").json["predictions"][0]
        (same,) = promptuary.load_prompt(out, model=models / other, carry=True).predict(["a good cat"])
        assert answer["scores"] == pytest.approx(dict(same.scores))
        assert answer["scores"] != pytest.approx(told["scores"])

    perturbed = here("evaluate", out, "--perturb", "C1,W2", "--report", tmp_path / "page.html", "--json").json
    assert list(perturbed["robustness"]["perturbed"]) == ["C1", "W2"]
    assert "Robustness" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("method", "solver"),
    [
        ({"name": "demonstrations", "count": 2, "draws": 2}, None),
        (
            {"name": "grips", "init_text": "was it a good dog, or was it a bad cat"},
            {"name": "edits", "rounds": 2, "candidates": 2},
        ),
        ({"name": "rlprompt", "num_tokens": 2}, {"name": "policy"}),
        ({"name": "rlprompt", "num_tokens": 2}, {"name": "proposals", "population": 2}),
    ],
    ids=["demonstrations", "grips", "policy", "random words"],
)
def test_every_search_runs_from_a_run_file(
    method: dict[str, Any], solver: dict[str, Any] | None, write: Write, tmp_path: Path, here: Run
) -> None:
    parts = {"method": method, "train": {"steps": 2}, **({} if solver is None else {"solver": solver})}
    said = here("train", write(**parts), "--json")
    assert said.code == 0, said.err
    assert said.json["forward_calls"] > 0
    assert here("predict", tmp_path / "run", "a good cat").code == 0
    assert here("inspect", tmp_path / "run", "--json").json["text"] == said.json["text"]


def test_what_was_not_better_than_the_start_speaks_of_no_learning_rate(write: Write, here: Run) -> None:
    said = here("train", write(method={"name": "rlprompt", "num_tokens": 2}, train={"steps": 1}))
    assert said.code == 0, said.err
    assert "prompt_lr" not in said.err


LONG = "the cat " * 40


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"solver": {"name": "gradient"}}, "solver gradient makes tensors better, and this method is words: use "),
        (
            {"method": {"name": "prompt_tuning"}, "solver": {"name": "proposals"}},
            "solver proposals makes words better, and this method is tensors: use solver",
        ),
        ({"method": {**MANUAL, "prompt_lr": 0.1}}, "method.prompt_lr: manual is words and has no tensors; leave it "),
        ({"method": {**MANUAL, "textes": []}}, 'unknown field method.textes; did you mean "texts"?'),
        ({"task": {"reading": "head"}}, "nothing would train a head; use task.reading: words"),
        ({"method": {"name": "manual", "texts": [LONG]}, "backbone": "gpt2"}, "exceed the model's 64 positions"),
        (
            {"method": {"name": "demonstrations", "count": 30, "draws": 2}, "backbone": "gpt2"},
            "none of the 2 texts fits into the model together with the examples; shorten them",
        ),
        (
            {"method": {"name": "rlprompt"}, "backbone": "base", "task": {"template": "{text} is {mask} ."}},
            "solver.model: a policy speaks with a causal model, and",
        ),
        ({"method": {"name": "batprompt"}}, "the rewriter has to be played by a model; set solver.model:"),
        ({"backbone": "vit"}, "method manual is for text, and the examples of the vision family are images"),
        (
            {"method": {"name": "prompt_tuning"}, "backbone": "remote"},
            "the prompt uses input, and only words reach reader behind its endpoint; choose a method for prompts of",
        ),
        ({"method": {"name": "rlprompt"}, "backbone": "remote"}, "a policy speaks with a causal model, and reader is"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(
    parts: dict[str, Any], message: str, write: Write, models: Path, here: Run
) -> None:
    backbone = parts.get("backbone")
    if backbone == "remote":
        endpoint = {"base_url": "http://127.0.0.1:9/v1"}
        parts = {**parts, "backbone": {"family": "remote", "model": "reader", "endpoint": endpoint}}
    elif backbone is not None:
        if not (models / backbone).exists():
            tiny.save(models / backbone, backbone, seed=1)
        parts = {**parts, "backbone": {"model": str(models / backbone), "device": "cpu"}}
    assert message in line(here("train", write(**parts)))


def test_a_saved_prompt_of_words_says_what_it_cannot(
    write: Write, place: Place, models: Path, tmp_path: Path, here: Run
) -> None:
    assert here("train", write()).code == 0
    out, other = tmp_path / "run", models / "t5"
    for kind in ("peft", "vllm"):
        assert "this prompt is words" in line(here("export", out, "--to", kind, "--out", tmp_path / kind))
        assert not (tmp_path / kind).exists()
    assert "(dual) has a matrix" in line(here("export", out, "--to", "classes", "--out", tmp_path / "classes"))
    both = here("evaluate", out, "--model", other, "--backbone", other)
    assert "--model says where the base is, --backbone carries words to another one" in line(both)
    tiny.save(tmp_path / "another", "llama", seed=7)
    wrong = line(here("predict", out, "a cat", "--model", tmp_path / "another"))
    assert wrong.endswith("load it with the base it was trained on, or try its words here: --backbone, or carry=True")
    soft = line(here("evaluate", place.trained, "--backbone", models / "other"))
    assert soft.endswith("; only words can be carried to another")
    assert "a text is empty" in line(here("predict", out, " "))
    assert "no such perturbation" in line(here("evaluate", out, "--perturb", "C9"))
    with pytest.raises(promptuary.errors.SiteError, match="is words .* write them into the text, or use predict"):
        promptuary.load_prompt(out).attach().__enter__()


class Stopping(Listener):
    """Asks for a stop once so many steps are taken."""

    def __init__(self, stop: promptuary.training.Stop, after: int) -> None:
        self.stop, self.after = stop, after

    def stepped(self, row: Any) -> None:
        if row["step"] == self.after:
            self.stop.request()


def test_a_run_stopped_twice_ends_as_the_unbroken_one(write: Write, tmp_path: Path) -> None:
    parts = {
        "method": {"name": "manual", "texts": [*TEXTS, "a red plum", "good or bad"]},
        "solver": {"name": "proposals", "population": 1},
        "train": {"steps": 9, "evaluate_every": 2},
    }
    whole = promptuary.train(promptuary.load_run(write("whole", **parts)))
    run = promptuary.load_run(write("stopped", **parts))
    for after in (1, 3):
        stop = promptuary.training.Stop()
        with pytest.raises(Interrupted, match=f"stopped at step {after} of 9; the state is saved"):
            promptuary.train(run, resume=after > 1, stop=stop, listener=Stopping(stop, after))
    ended = promptuary.train(run, resume=True)
    assert whole.facts["steps"] == 6  # the last one finds that there is no further text
    for name in ("text", "texts", "history", "metrics", "validation", "best_step", "forward_calls", "run_hash"):
        assert ended.facts[name] == whole.facts[name], name
    for name in ("prompt/prompt.safetensors", "prompt/prompt.json", "predictions.jsonl"):
        assert (ended.dir / name).read_bytes() == (whole.dir / name).read_bytes(), name
    assert rows(ended.dir) == rows(whole.dir)


def rows(folder: Path) -> list[dict[str, Any]]:
    """What a run wrote down, without times and resumptions."""
    found = [json.loads(one) for one in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [one for one in found if one.get("event") != "resumed"]
    return [{key: value for key, value in one.items() if "second" not in key} for one in kept]


# ---- behind an endpoint ----------------------------------------------------------------------------------------------


def no_key(folder: Path) -> None:
    """The key stands in no file of a run."""
    files = [one for one in folder.rglob("*") if one.is_file()]
    assert {"spending.jsonl", "answers.sqlite", "result.json"} <= {one.name for one in files}
    for file in files:
        assert KEY.encode() not in file.read_bytes(), file


def test_words_are_chosen_for_a_model_behind_an_endpoint(
    chat: Chat, write: Write, models: Path, tmp_path: Path, here: Run
) -> None:
    method = {"name": "manual", "texts": ["Say it.", "Be careful."]}
    said = here("train", write(method=method, backbone=remote(chat)), "--json")
    assert said.code == 0, said.err
    # one text gets no label anywhere, which is wrong for every row, whichever label comes first
    assert (said.json["text"], said.json["metrics"]["accuracy"]) == ("Be careful.", 1.0)
    step = next(row for row in rows(tmp_path / "run") if "parts" in row)
    assert (step["parts"]["reward_mean"], step["parts"]["reward_max"]) == (pytest.approx(0.5), pytest.approx(1.0))
    (spent,) = said.json["spending"]
    assert (spent["role"], spent["calls"]) == ("task", len(chat.asked))
    no_key(tmp_path / "run")

    count = len(chat.asked)
    assert here("train", tmp_path / "run", "--resume").code == 0  # finished: it is left as it is
    assert len(chat.asked) == count
    told = here("predict", tmp_path / "run", "a good cat", "the bad one", "--json").json["predictions"]
    assert [one["answer"] for one in told] == ["positive", "negative"]
    assert here("evaluate", tmp_path / "run", "--backbone", models / "llama").code == 0

    chat.script = lambda request: "who knows"
    page = tmp_path / "page.html"
    lost = here("evaluate", tmp_path / "run", "--perturb", "C1", "--report", page, "--json").json
    assert (lost["scores"]["accuracy"], lost["scores"]["macro_f1"]) == (0.0, 0.0)
    assert "(no label)" in page.read_text(encoding="utf-8")
    (none,) = here("predict", tmp_path / "run", "a good cat", "--json").json["predictions"]
    assert none == {"answer": "", "scores": {"positive": 0.0, "negative": 0.0}}


def test_a_budget_is_never_exceeded_and_more_of_it_goes_on_without_asking_twice(
    chat: Chat, write: Write, tmp_path: Path, here: Run
) -> None:
    method = {"name": "manual", "texts": ["Say it.", "Be careful."]}
    whole = here("train", write("whole", method=method, backbone=remote(chat)), "--json").json
    needed, chat.asked[:] = len(chat.asked), []
    file = write(method=method, backbone=remote(chat, budget_calls=20))
    message = line(here("train", file))
    assert "the budget of 20 calls for reader @" in message
    assert message.endswith("the state of the run is saved, continue with --resume")
    assert len(chat.asked) == 20
    assert "the budget of 20 calls" in line(here("train", file, "--resume"))
    assert len(chat.asked) == 20
    more = here("train", file, "--resume", "--set", f"backbone.endpoint.budget_calls={needed}", "--json")
    assert more.code == 0, more.err
    assert len(chat.asked) == needed
    assert more.json["spending"][0]["calls"] == needed
    for name in ("text", "texts", "metrics", "validation"):
        assert more.json[name] == whole[name]
    no_key(tmp_path / "run")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (server.state(401, "wrong key"), "401"),
        (server.state(500, "broken"), "500"),
        (server.cut_off, "reader at http"),
    ],
    ids=["no key", "broken server", "cut off"],
)
def test_an_endpoint_that_fails_costs_nothing_twice(
    fault: server.Fault, message: str, chat: Chat, write: Write, tmp_path: Path, here: Run
) -> None:
    method = {"name": "manual", "texts": ["Say it.", "Be careful."]}
    file = write(method=method, backbone=remote(chat, parallel=1))
    chat.faults = [*[lambda handler, request: False] * 20, fault]
    said = line(here("train", file))
    assert message in said
    assert said.endswith("the state of the run is saved, continue with --resume")
    before = [one["messages"] for one in chat.asked[:20]]
    ended = here("train", file, "--resume", "--json")
    assert ended.code == 0, ended.err
    again = [one["messages"] for one in chat.asked[21:]]
    assert not [one for one in again if one in before]
    assert ended.json["text"] == "Be careful."


def test_nobody_there_is_one_line(write: Write, here: Run) -> None:
    nobody = {"family": "remote", "model": "reader", "endpoint": {"base_url": "http://127.0.0.1:9/v1", "retries": 0}}
    assert "cannot be reached" in line(here("train", write(backbone=nobody)))


def test_a_rewriter_and_a_victim_behind_endpoints(chat: Chat, write: Write, tmp_path: Path) -> None:
    """The rewriter's answer is the one right prompt; a stopped run asks nothing twice."""
    parts = {
        "method": {"name": "batprompt", "init_text": "Say it."},
        "solver": {**RULES, "model": {"model": "writer", "base_url": chat.url, "retries": 0}},
        "backbone": remote(chat),
        "train": {"steps": 2, "evaluate_every": 1},
    }
    whole = promptuary.train(promptuary.load_run(write("whole", **parts)))
    assert whole.facts["text"] == "Be careful and say good or bad."
    assert whole.metrics["accuracy"] == 1.0
    assert [one["text"] for one in whole.facts["history"]] == ["Say it.", "Be careful and say good or bad."]
    spent = {one["role"]: one["calls"] for one in whole.facts["spending"]}
    assert set(spent) == {"task", "rewriter"}
    assert sum(spent.values()) == len(chat.asked)
    no_key(whole.dir)

    chat.asked.clear()
    run = promptuary.load_run(write("stopped", **parts))
    stop = promptuary.training.Stop()
    with pytest.raises(Interrupted):
        promptuary.train(run, stop=stop, listener=Stopping(stop, 1))
    ended = promptuary.train(run, resume=True)
    asked = [json.dumps([one["model"], one["messages"], one.get("seed")], sort_keys=True) for one in chat.asked]
    assert len(asked) == len(set(asked)) == sum(spent.values())
    assert ended.facts["history"] == whole.facts["history"]
    assert {one["role"]: one["calls"] for one in ended.facts["spending"]} == spent


def test_a_victim_out_of_budget_stops_the_search_with_its_state(chat: Chat, write: Write, tmp_path: Path) -> None:
    parts = {
        "method": {"name": "batprompt", "init_text": "Say it."},
        "solver": {**RULES, "model": {"model": "writer", "base_url": chat.url, "retries": 0}},
        "train": {"steps": 2, "evaluate_every": 1},
    }
    run = promptuary.load_run(write(backbone=remote(chat, budget_calls=30), **parts))
    with pytest.raises(BudgetExceeded, match="the budget of 30 calls"):
        promptuary.train(run)
    assert sum(one["model"] == "reader" for one in chat.asked) == 30
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert issubclass(BudgetExceeded, SpeakerError)
