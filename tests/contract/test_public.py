"""The public surface: names, import cost, and the contract suite for an outside method.

Knows no internals.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any, ClassVar, Literal

import pytest

import promptuary
import promptuary.evaluation
import promptuary.training
from promptuary.methods.base import Method, MethodConfig
from promptuary.prompts.init import Starting
from promptuary.testing import check_method
from promptuary.types import Prompt, Shape, View


def test_every_public_name_can_be_had_and_train_is_the_function() -> None:
    for name in promptuary.__all__:
        assert getattr(promptuary, name) is not None
    assert callable(promptuary.train)
    assert callable(promptuary.evaluate)


def test_importing_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import promptuary, promptuary.registry; "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules); print(time.perf_counter() - start)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.5  # 0.02 s when quiet; generous, since test machines are shared


class ScaledConfig(MethodConfig):
    """Settings of an outside method."""

    name: Literal["outside_scaled"] = "outside_scaled"


class Scaled(Method):
    """Rows with a trained factor."""

    name = "outside_scaled"
    title = "Scaled rows"
    paper = "none"
    groups: ClassVar = {"rows": "prompt", "factor": "prompt"}
    tiny: ClassVar[dict[str, Any]] = {}
    Config = ScaledConfig

    def build(self) -> None:
        self.rows = self.parameter(3, self.shape.width)
        self.factor = self.parameter(1)

    def fill(self, source: Starting) -> None:
        self.rows.copy_(self.first_rows(3, source))
        self.factor.fill_(1)

    def prompt(self, view: View) -> Prompt:
        return Prompt(rows=(self.factor * self.rows)[None])

    @classmethod
    def count(cls, config: MethodConfig, shape: Shape) -> int:
        return 3 * shape.width + 1

    @classmethod
    def match_budget(cls, config: MethodConfig, length: int, shape: Shape) -> MethodConfig:
        return config


class Leaky(Scaled):
    """A method that claims fewer parameters than it trains."""

    name = "outside_leaky"

    @classmethod
    def count(cls, config: MethodConfig, shape: Shape) -> int:
        return 3 * shape.width


class LeakyConfig(ScaledConfig):
    """Its settings."""

    name: Literal["outside_leaky"] = "outside_leaky"  # type: ignore[assignment]


Leaky.Config = LeakyConfig


def test_an_outside_method_passes_the_same_suite() -> None:
    check_method(Scaled, families=["encoder"])


def test_the_suite_catches_a_wrong_parameter_count() -> None:
    with pytest.raises(AssertionError, match="outside_leaky on encoder: builds_from_widths_only"):
        check_method(Leaky, families=["encoder"])
