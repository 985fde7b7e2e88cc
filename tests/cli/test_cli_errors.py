"""Whatever a user gets wrong: exit code 2, one line that says it, no traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import promptuary.cli.doctor
from cli.cli_user import Place, Said, examples, write_rows
from promptuary.cli.main import main

Make = Callable[[Place, Path], list[Any]]


def train(**parts: Any) -> Make:
    return lambda place, tmp: ["train", place.changed(tmp / "run.yaml", out=str(tmp / "out"), **parts)]


def train_on(rows: list[Any]) -> Make:
    def make(place: Place, tmp: Path) -> list[Any]:
        write_rows(tmp / "data" / "train.jsonl", rows)
        return train(data={"source": str(tmp / "data")})(place, tmp)

    return make


def train_set(*settings: str) -> Make:
    def make(place: Place, tmp: Path) -> list[Any]:
        return [*train()(place, tmp), *(word for setting in settings for word in ("--set", setting))]

    return make


def bad_yaml(place: Place, tmp: Path) -> list[Any]:
    (tmp / "bad.yaml").write_text("task: [classify\nmethod: }")
    return ["train", tmp / "bad.yaml"]


def misspelt_file(place: Place, tmp: Path) -> list[Any]:
    (tmp / "sentiment.yaml").write_text("{}")
    return ["train", tmp / "sentimnt.yaml"]


def evaluate_on(*rows: dict[str, str]) -> Make:
    return lambda place, tmp: [
        "evaluate",
        place.trained,
        "--data",
        write_rows(tmp / "x.jsonl", [*rows, *examples(3, 0)]),
    ]


def occupied(place: Place, tmp: Path) -> list[Any]:
    (tmp / "out").mkdir()
    (tmp / "out" / "thesis.txt").write_text("mine")
    return train()(place, tmp)


def only(folder: str) -> Make:
    return lambda place, tmp: ["predict", place.trained / folder if folder else tmp, "a cat"]


WRONG: list[tuple[str, Make, str]] = [
    ("no_run", lambda place, tmp: ["train"], "which run?"),
    ("missing_run_file", misspelt_file, 'did you mean "sentiment.yaml"?'),
    ("bad_yaml", bad_yaml, "is not YAML"),
    ("misspelt_key", train_set("train.batchsize=4"), 'did you mean "batch_size"?'),
    ("misspelt_method_key", train_set("method.rnk=4"), 'did you mean "rank"?'),
    ("misspelt_part", train_set("backbon.model=x"), 'did you mean "backbone"?'),
    ("bad_set", train_set("train.steps"), '--set takes "a.b=value"'),
    ("bad_set_value", train_set("train.steps=]"), "is not YAML"),
    ("negative_steps", train_set("train.steps=-1"), "train.steps"),
    ("steps_as_text", train_set("train.steps=many"), "train.steps"),
    ("unknown_method", train_set("method.name=etp"), 'did you mean "ept"?'),
    ("unknown_task", train_set("task.name=clasify"), 'did you mean "classify"?'),
    ("unknown_metric", train_set("task.metrics=[acuracy]"), "accuracy"),
    ("no_such_model", train_set("backbone.model=./no/such/model"), "does not exist"),
    ("model_not_on_this_machine", train_set("backbone.model=nobody/nothing"), "cannot load"),
    ("no_such_device", train_set("backbone.device=cuda:99"), "backbone.device"),
    ("no_such_data", train_set("data.source=./no/data.jsonl"), "there is no file"),
    ("resume_and_fresh", lambda place, tmp: ["train", place.run, "--resume", "--fresh"], "choose one"),
    ("out_holds_a_run", lambda place, tmp: ["train", place.run], "--resume"),
    ("out_holds_other_things", occupied, "not empty"),
    ("missing_column", train_on([{"sentence": "a cat", "label": "positive"}] * 4), '"text"'),
    ("empty_file", train_on([]), "empty"),
    ("not_json", train_on(["text"]), "not an object"),
    ("blank_label", train_on([*examples(4, 0), {"text": "a cat", "label": ""}]), "label is missing"),
    ("too_few_of_a_label", train_set("data.shots=40"), "lower data.shots"),
    ("unknown_label", train_on([*examples(4, 0), {"text": "a cat", "label": "neutral"}]), 'unknown label "neutral"'),
    ("unknown_label_in_evaluate", evaluate_on({"text": "a cat", "label": "positve"}), 'did you mean "positive"?'),
    ("missing_column_in_evaluate", evaluate_on({"sentence": "a cat", "label": "positive"}), "text"),
    (
        "other_setting_in_evaluate",
        lambda p, t: ["evaluate", p.trained, "--set", "train.steps=2"],
        "settled in training",
    ),
    ("bad_split", lambda p, t: ["evaluate", p.trained, "--split", "tset"], "--split"),
    ("no_data_in_evaluate", lambda p, t: ["evaluate", _alone(p, t)], "--data SOURCE"),
    ("no_such_prompt", only("nowhere"), "holds no prompt"),
    ("folder_without_prompt", only(""), "holds no prompt"),
    ("wrong_base", lambda p, t: ["predict", p.trained, "a cat", "--model", p.root / "other"], "was trained on"),
    ("no_texts", lambda p, t: ["predict", p.trained], "Give texts"),
    ("blank_text", lambda p, t: ["predict", p.trained, " "], "a text is empty"),
    ("texts_and_data", lambda p, t: ["predict", p.trained, "a cat", "--data", "x.jsonl"], "Give texts"),
    ("picture_without_format", lambda p, t: ["inspect", p.trained, "--picture", t / "picture"], ".png"),
    ("top_zero", lambda p, t: ["inspect", p.trained, "--top", "0"], "--top"),
    ("schema_into_nothing", lambda p, t: ["schema", "--out", "/dev/null/schema.json"], "cannot be written"),
    ("no_such_format", lambda p, t: ["export", p.trained, "--to", "vlm", "--out", t / "x"], 'did you mean "vllm"?'),
    ("not_servable", lambda p, t: ["export", p.trained, "--to", "vllm", "--out", t / "x"], "decoder-only"),
    ("export_onto_a_run", lambda p, t: ["export", p.trained, "--to", "vllm", "--out", p.trained], "not empty"),
    (
        "texts_and_data_in_export",
        lambda p, t: ["export", p.trained, "--to", "vllm", "--out", t / "x", "a cat", "--data", "x.jsonl"],
        "not both",
    ),
    ("push_offline", lambda p, t: ["push", p.trained, "ann/films"], "HF_HUB_OFFLINE is set"),
    ("push_without_user", lambda p, t: ["push", p.trained, "films"], 'written as "user/name"'),
    ("pull_offline", lambda p, t: ["pull", "ann/films", "--out", t / "x"], "HF_HUB_OFFLINE is set"),
    ("predict_with_an_unknown_hub_name", lambda p, t: ["predict", "ann/films", "a cat"], "no folder ann/films here"),
    ("demo_without_words", lambda p, t: ["demo", "--model", t, "--out", t / "out"], "cannot load"),
    ("unknown_verb", lambda p, t: ["trian"], "'train'"),
    ("unknown_option", lambda p, t: ["train", p.run, "--sed", "1"], "--seed"),
    ("option_without_value", lambda p, t: ["train", p.run, "--seed"], "--seed"),
    ("option_of_wrong_kind", lambda p, t: ["train", p.run, "--seed", "x"], "--seed"),
    ("missing_argument", lambda p, t: ["predict"], "PROMPT"),
]


def _alone(place: Place, tmp: Path) -> Path:
    """A prompt folder without its run around it."""
    (tmp / "alone").mkdir()
    for file in (place.trained / "prompt").iterdir():
        (tmp / "alone" / file.name).write_bytes(file.read_bytes())
    return tmp / "alone"


@pytest.mark.parametrize(
    ("make", "says"), [(make, says) for _, make, says in WRONG], ids=[name for name, _, _ in WRONG]
)
def test_wrong_input_is_one_line_and_exit_code_2(
    make: Make, says: str, place: Place, tmp_path: Path, here: Callable[..., Said]
) -> None:
    said = here(*make(place, tmp_path))
    assert said.code == 2, said
    assert said.out == ""
    assert said.err.startswith("error: "), said.err
    assert said.err.count("\n") == 1, said.err
    assert says in said.err
    assert "Traceback" not in said.err


def test_with_json_an_error_is_also_an_object(place: Place, here: Callable[..., Said]) -> None:
    for words in (["predict", place.root / "nowhere", "a cat", "--json"], ["predict", "--json"]):
        said = here(*words)
        assert said.code == 2
        assert said.err == f"error: {said.json['error']}\n"


def test_a_text_behind_two_dashes_is_no_option(place: Place, here: Callable[..., Said]) -> None:
    said = here("predict", place.trained, "--", "--json", "--debug")
    assert said.code == 0, said.err
    assert said.out.endswith("--debug\n")
    assert "--json" in said.out


def test_our_fault_is_exit_code_1_and_debug_shows_it(
    monkeypatch: pytest.MonkeyPatch, here: Callable[..., Said]
) -> None:
    def broken() -> None:
        raise ZeroDivisionError("by us")

    monkeypatch.setattr(promptuary.cli.doctor, "_memory", broken)
    said = here("doctor", "--json")
    assert said.code == 1
    assert said.err.startswith("error: ZeroDivisionError: by us (")
    assert said.err.count("\n") == 1
    assert "--debug" in said.json["error"]
    assert "Traceback" in here("doctor", "--debug").err


def test_interrupt_outside_training(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def stopped() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(promptuary.cli.doctor, "_memory", stopped)
    assert main(["doctor", "--json"]) == 130
    out, err = capfd.readouterr()
    assert err == "interrupted\n"
    assert json.loads(out) == {"error": "interrupted"}
