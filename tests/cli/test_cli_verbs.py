"""Each verb does its work, and with --json says it as one object on standard output."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import AddedToken

import tiny
import toy
from cli.cli_user import Place, Said, as_user, environment, examples, write_rows
from promptuary.cli import console, doctor
from promptuary.demo import settings
from promptuary.exports.vllm import PromptEmbedder
from promptuary.listening import Listener
from promptuary.training import train

VERBS = (
    "demo", "train", "evaluate", "predict", "report", "inspect", "import", "export", "push", "pull",
    "methods", "schema", "doctor",
)  # fmt: skip
Run = Callable[..., Said]


def test_train_tells_the_plan_the_scores_and_what_comes_next(place: Place) -> None:
    said, err = place.result["said"], place.result["err"]
    assert said == {**json.loads((place.trained / "result.json").read_text()), "dir": str(place.trained)}
    for part in (
        "trainable parameters  530",
        "48 train, 16 validation, 24 test",
        "MiB",
        "step 20/20",
        "promptuary predict",
    ):
        assert part in err, err
    assert "\x1b" not in err


def test_train_takes_seed_out_and_settings(place: Place, tmp_path: Path, here: Run) -> None:
    words = (
        "train",
        place.run,
        "--seed",
        5,
        "--out",
        tmp_path / "out",
        "--set",
        "train.steps=2",
        "--set",
        "method.rank=1",
    )
    found = here(*words, "--json").json
    assert (found["seed"], found["steps"], found["dir"]) == (5, 2, str(tmp_path / "out"))
    assert here(*words).code == 2
    again = here(*words, "--fresh", "--json").json
    assert again["metrics"] == found["metrics"]


def test_train_takes_several_runs_at_once(place: Place, tmp_path: Path, here: Run) -> None:
    files = [tmp_path / f"{name}.yaml" for name in ("one", "two")]
    for seed, file in enumerate(files, start=1):
        changes = f"seed: {seed}\nout: {tmp_path / file.stem}\ntrain: {{steps: 3}}\n"
        file.write_text(f"extends: {place.run}\n{changes}", encoding="utf-8")
    said = here("train", *files, "--json")
    assert [(run["seed"], run["dir"]) for run in said.json["runs"]] == [
        (1, str(tmp_path / "one")), (2, str(tmp_path / "two"))
    ]  # fmt: skip
    for part in ("one: ept, 530 trained numbers, 3 steps", "two: step 3  accuracy", "best step"):
        assert part in said.err, said.err
    assert "trained together with another run" in said.err
    again = here("train", *files, "--resume", "--json")
    assert again.json == said.json
    for words, message in (
        (("--seed", 3), "--out and --seed belong to a single run; several run files name their own"),
        (("--set", "out=elsewhere"), "runs 1 and 2 have the same folder elsewhere; give each its own `out`"),
        ((), "--resume"),
    ):
        refused = here("train", *files, *words)
        assert refused.code == 2
        assert message in refused.err
        assert refused.err.count("\n") == 1


def test_evaluate_repeats_the_scores_of_the_run(place: Place, tmp_path: Path, here: Run) -> None:
    said = here("evaluate", place.trained, "--predictions", tmp_path / "p.jsonl", "--json")
    found = said.json
    assert found["scores"] == place.result["said"]["metrics"]
    assert found["interval_95"] == place.result["said"]["interval_95"]
    assert found["examples"] == 24
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 24
    assert "accuracy" in said.err


def test_evaluate_scores_every_row_of_a_file(place: Place, tmp_path: Path, here: Run) -> None:
    rows = [{"words": row["text"], "label": row["label"]} for row in examples(10, 7)]
    file = write_rows(tmp_path / "mine.jsonl", rows)
    found = here(
        "evaluate",
        place.trained / "prompt",
        "--data",
        file,
        "--set",
        "data.rename={words: text}",
        "--batch-size",
        3,
        "--json",
    ).json
    assert found["examples"] == 10


def test_predict_reads_standard_input(place: Place) -> None:
    said = as_user("predict", place.trained, "-", "--json", text="a good cat\n\nthe bad sea\n")
    assert said.err == ""
    answers = said.json["predictions"]
    assert [set(one["scores"]) for one in answers] == [{"positive", "negative"}] * 2
    assert all(one["answer"] == max(one["scores"], key=one["scores"].get) for one in answers)


def test_predict_prints_a_line_for_each_text_or_example(place: Place, tmp_path: Path, here: Run) -> None:
    texts = ["a good cat", "the bad sea"]
    given = here("predict", place.trained, *texts)
    file = write_rows(tmp_path / "x.jsonl", [{"text": text} for text in texts])
    assert here("predict", place.trained / "prompt", "--data", file).out == given.out
    lines = [line.split("\t") for line in given.out.splitlines()]
    assert [line[2] for line in lines] == texts
    assert all(line[0] in ("positive", "negative") and 0.5 <= float(line[1]) <= 1 for line in lines)


def test_inspect_names_the_tokens_that_the_rows_came_from(place: Place, tmp_path: Path, here: Run) -> None:
    said = here("inspect", place.trained, "--top", 2, "--picture", tmp_path / "look.png", "--json")
    found = said.json
    assert [len(row["nearest"]) for row in found["rows"]] == [2, 2, 2]
    assert all(row["nearest"][0]["cosine"] > 0.9 and row["nearest"][0]["token"] in tiny.WORDS for row in found["rows"])
    assert len(found["offset"]["norms"]) == 10
    assert sum(found["insight"]["gate"]["values"]) == pytest.approx(1, abs=1e-3)
    assert [len(row) for row in found["insight"]["fusion attention"]["largest"]] == [2, 2, 2]
    assert (tmp_path / "look.png").read_bytes().startswith(b"\x89PNG")
    assert "nearest tokens" in said.err


def test_export_writes_a_folder_that_a_client_opens(tmp_path: Path, here: Run) -> None:
    base = tiny.save(tmp_path / "base", "llama")
    run = toy.run(tmp_path, f"backbone.model={base}", "backbone.device=cpu", task="generate")
    train(run)
    file = write_rows(tmp_path / "x.jsonl", [{"text": "a red cat"}, {"text": "blue"}])
    out = tmp_path / "out"
    said = here("export", tmp_path / "run", "--to", "vllm", "--out", out, "--data", file, "--json")
    assert (said.code, said.json["examples"]) == (0, 2)
    assert said.json["files"].keys() == {path.name for path in out.iterdir()}
    assert "requests.safetensors" in said.err
    client = PromptEmbedder(out)
    assert client.embeds("blue").shape == (3 + 4, 32)
    before = (out / "client.json").read_bytes()
    assert "--overwrite" in here("export", tmp_path / "run", "--to", "vllm", "--out", out).err
    again = here("export", tmp_path / "run", "--to", "vllm", "--out", out, "--overwrite", "a red cat", "blue", "--json")
    assert again.code == 0, again.err
    assert (out / "client.json").read_bytes() == before


def test_methods_lists_every_method_with_its_paper(here: Run) -> None:
    said = here("methods", "--json")
    found = {method["name"]: method for method in said.json["methods"]}
    assert {"ept", "dept", "lamp", "prompt_tuning"} <= set(found)
    assert found["ept"]["reconstructed"]
    assert found["ept"]["sites"] == ["input", "offset"]
    assert found["dept"]["paper"] in said.err


def test_schema_is_the_same_printed_and_written(tmp_path: Path, here: Run) -> None:
    printed = here("schema")
    assert printed.err == ""
    assert "train" in printed.json["properties"]
    assert here("schema", "--json").json == printed.json
    assert here("schema", "--out", tmp_path / "s.json", "--json").json == {"out": str(tmp_path / "s.json")}
    assert json.loads((tmp_path / "s.json").read_text()) == printed.json


def test_doctor_knows_what_is_there_and_how_to_add_the_rest(monkeypatch: pytest.MonkeyPatch, here: Run) -> None:
    monkeypatch.setitem(doctor.EXTRAS, "plots", "no-such-package-anywhere")
    said = here("doctor", "--json")
    found = said.json
    assert found["packages"]["torch"]
    assert "cpu" in found["devices"]
    assert found["offline"] == ["HF_HUB_OFFLINE"]
    missing = next(extra for extra in found["extras"] if extra["name"] == "plots")
    assert missing["version"] is None
    assert "promptuary[plots]" in missing["install"]
    assert missing["install"] in said.err


@pytest.mark.parametrize(
    ("flags", "through_onednn", "fast", "line"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, True, True, "fast on cpu"),
        ({"avx512_bf16": False, "amx_bf16": True}, True, True, "fast on cpu"),
        ({"avx512_bf16": False, "amx_bf16": False, "avx2": True}, True, False, "only emulated .* on cpu"),
        ({"bf16": True, "neon": True}, True, True, "fast on cpu"),
        ({"bf16": True, "neon": True}, False, False, "only emulated .* on cpu"),
        ({"architecture": "s390x"}, True, None, "unknown on cpu"),
    ],
)
def test_doctor_says_whether_bfloat16_is_fast_on_a_processor(
    flags: dict[str, Any],
    through_onednn: bool,
    fast: bool | None,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    here: Run,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: through_onednn)
    said = here("doctor", "--json")
    assert said.json["bfloat16"]["cpu"] is fast
    assert len(re.findall(f"^.*bfloat16.*{line}.*$", said.err, re.MULTILINE)) == 1


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux tells what its processor has")
def test_doctor_says_of_this_processor_what_the_system_says(here: Run) -> None:
    flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    native = bool(flags & {"avx512_bf16", "amx_bf16", "bf16", "svebf16"})
    assert here("doctor", "--json").json["bfloat16"]["cpu"] is (native and torch.backends.mkldnn.is_available())


def test_doctor_survives_a_machine_without_torch_and_linux(monkeypatch: pytest.MonkeyPatch, here: Run) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(doctor, "Path", lambda name: Path("/nowhere"))
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    said = here("doctor", "--json")
    assert said.code == 0
    assert "torch does not load" in said.json["problem"]
    assert said.json["bfloat16"] == {}


def test_doctor_knows_every_extra_and_core_package_of_the_project() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert set(doctor.EXTRAS) == set(extras)
    for extra, package in doctor.EXTRAS.items():
        assert any(line.startswith(package) for line in extras[extra])
    assert {line.partition(">")[0] for line in project["dependencies"]} == set(doctor.CORE)


def test_demo_compares_methods_beside_doing_nothing(tmp_path: Path, here: Run) -> None:
    # a vocabulary in which the label sentences of the demo differ
    words = tiny.tokenizer()
    spoken = {word for sentence in settings()["task"]["labels"].values() for word in sentence.split()}
    words.add_tokens([AddedToken(word, single_word=True) for word in sorted(spoken)])
    words.model_max_length = 256
    words.save_pretrained(tmp_path / "model")
    sizes = {"vocab_size": len(words), "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    transformers.BertModel(
        transformers.BertConfig(**sizes, intermediate_size=32, max_position_embeddings=256, pad_token_id=0)
    ).save_pretrained(tmp_path / "model")
    command = ("demo", "--model", tmp_path / "model", "--out", tmp_path / "demo", "--steps", 2, "--json")
    said = here(*command)
    assert said.code == 0, said.err
    rows = {row["name"]: row for row in said.json["rows"]}
    assert list(rows)[:2] == ["majority", "zero-shot"]
    assert {"ept", "prompt_tuning"} <= set(rows)
    budget = rows["prompt_tuning"]["trainable_parameters"]
    assert all(0 < row["trainable_parameters"] <= budget for row in rows.values() if row["folder"])
    assert all(row["interval"][0] <= row["accuracy"] <= row["interval"][1] for row in rows.values())
    assert len(said.json["predictions"]) == 3
    assert "ept on three test messages" in said.err
    again = here(*command).json
    assert again["predictions"] == said.json["predictions"]


# ---- the program itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help(verb: str, here: Run) -> None:
    said = here(verb, "--help")
    assert (said.code, said.err) == (0, "")
    assert "--json" in said.out


def test_help_and_version_are_quick_and_load_nothing_heavy(here: Run) -> None:
    code = "import sys, promptuary.cli.main as m; m.main(['--help']); print(*{n.split('.')[0] for n in sys.modules})"
    fastest = 9.0
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True
        )
        fastest = min(fastest, time.perf_counter() - began)
    loaded = done.stdout.splitlines()[-1].split()
    assert "rich" in loaded
    assert not {"torch", "transformers", "pydantic", "numpy", "datasets", "accelerate", "matplotlib"} & set(loaded)
    assert all(verb in done.stdout for verb in VERBS)
    # 0.2 s on a machine at rest; a busy one gets more
    assert fastest < 1.5
    assert here("--version").out.strip()
    assert here().out == here("--help").out


def test_progress_answers_whatever_a_listener_is_told() -> None:
    told = {name: inspect.signature(method) for name, method in vars(Listener).items() if inspect.isfunction(method)}
    answered = {name: inspect.signature(getattr(console.Progress, name)) for name in told}
    assert {n: list(s.parameters) for n, s in told.items()} == {n: list(s.parameters) for n, s in answered.items()}


def test_on_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch, place: Place, tmp_path: Path, here: Run) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    said = here("train", place.run, "--out", tmp_path / "out", "--set", "train.steps=4", "--json")
    assert said.code == 0, said.err
    assert "4/4" in said.err
    assert "tokens/s" in said.err
    assert said.json["steps"] == 4
