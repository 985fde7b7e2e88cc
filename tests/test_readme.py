"""The README is run: its run file, its commands and its Python, on a tiny saved model.

The two make commands are run as they stand by .ci/run; here their plain lines are held against the Makefile.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import promptuary
import tiny

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LABELS = {"positive": "funny gripping good great", "negative": "bad cold slow terrible"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the README's run file on a tiny model, and its data."""
    data = tmp_path / "my-folder"
    data.mkdir()
    example = json.loads(blocks("json")[0])
    lines = [
        {**example, "text": f"a {word} film {number}", "label": label}
        for label, words in LABELS.items()
        for word in words.split()
        for number in range(5)
    ]
    (data / "train.jsonl").write_text("\n".join(map(json.dumps, [example, *lines])), encoding="utf-8")
    run = next(block for block in blocks("yaml") if "backbone:" in block)
    model = re.search(r"model: (\S+?)}", run)
    assert model is not None
    (tmp_path / "run.yaml").write_text(run.replace(model[1], tiny.save(tmp_path / "base", "causal")), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_for_your_own_data_run_in_their_order(folder: Path) -> None:
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("promptuary ")]
    verbs = [command.split()[1] for command in commands]
    assert verbs == ["train", "evaluate", "predict", "inspect"]
    for command in commands:
        words = command.replace("train.steps=200", "train.steps=4").replace(
            "promptuary", f"{sys.executable} -m promptuary", 1
        )
        done = subprocess.run(words, shell=True, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, (command, done.stderr[-2000:])
        assert done.stdout or done.stderr


def test_the_python_runs_as_it_stands(folder: Path) -> None:
    run = (folder / "run.yaml").read_text(encoding="utf-8")
    (folder / "run.yaml").write_text(run + "train: {steps: 3}\n", encoding="utf-8")
    ids = torch.tensor([[5, 6, 7]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 2}
    exec(blocks("python")[0], {"model": tiny.model("llama"), "inputs": inputs})


def test_the_python_for_a_model_of_your_own_runs_as_it_stands(folder: Path) -> None:
    row = {"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([5, 6, 7])}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True
    )
    given = {"arguments": arguments, "rows": [row] * 2, "Trainer": transformers.Trainer, "promptuary": promptuary}
    exec(blocks("python")[1], {"model": tiny.model("llama"), "tokenizer": tiny.tokenizer(), **given})
    assert promptuary.load_prompt(folder / "my-prompt", tiny.backbone("llama", seed=0)).added_tokens == 20


@pytest.mark.parametrize(
    "line",
    [
        "-m pip install -c constraints.txt -e .",
        "-m pip install --no-deps --require-hashes -r demo-requirements.txt",
        "promptuary demo",
        "-m pip install -c constraints.txt -e '.[test]'",
        "-m pytest -n 2",
    ],
)
def test_plain_lines_do_what_make_does(line: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace(" --quiet", "")
    assert line in README
    assert line in makefile
