"""Two processes train the same prompt as one: each takes its part of every batch, and only gradients are summed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
from pathlib import Path
import torch
from promptuary import registry
from promptuary.testing import case_of
from promptuary.training import train

torch.set_num_threads(1)
case = case_of(registry.load("methods", "ept"), "causal", Path(sys.argv[1]))
train(case.run(sys.argv[2], steps=6), backbone=case.backbone())
"""


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_two_processes_equal_one(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for launcher, name in (([sys.executable], "one"), (two, "two")):
        command = [*launcher, str(script), str(tmp_path / "data"), name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    one, both = losses(tmp_path / "data" / "one"), losses(tmp_path / "data" / "two")
    assert len(one) == len(both) == 6
    assert max(abs(a - b) for a, b in zip(one, both, strict=True)) < 1e-5
    assert (tmp_path / "data" / "two" / "prompt" / "prompt.safetensors").exists()
