"""The suite itself: it reports every failure, finds what is wrong, and judges declared exceptions.

Knows no method of the library; the methods here are outside ones, most of them wrong on purpose.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from outside import BUILDS, COUNT, PADDING, STATES, TRAINS, Sound, changed, config_for
from promptuary.errors import NotFoldable, SiteError
from promptuary.methods.base import Method
from promptuary.prompts.init import Starting
from promptuary.testing import PROPERTIES, ContractFailure, check_method
from promptuary.types import Outputs, Prompt, View

# ---- the report -----------------------------------------------------------------------------------------------------


def test_every_failure_is_reported_with_method_family_property_and_reason() -> None:
    wrong = changed("outside_wrong", count=classmethod(lambda cls, config, shape: 7))
    with pytest.raises(ContractFailure) as caught:
        check_method(wrong, families=["encoder", "causal"], properties=[BUILDS, COUNT, PADDING])
    lines = str(caught.value).splitlines()
    assert lines[0] == "4 of 6 checks failed:"
    assert lines[1:] == [
        f"  outside_wrong on {family}: {message}"
        for family in ("encoder", "causal")
        for message in (
            f"{BUILDS}: at width 16 it trains 48 parameters, count says 7",
            f"{COUNT}: it trains 96 parameters, count says 7",
        )
    ]
    found = [(failure.family, failure.property_name) for failure in caught.value.failures]
    assert found == [(family, name) for family in ("encoder", "causal") for name in (BUILDS, COUNT)]


def test_an_error_of_the_method_itself_is_one_failure_and_the_others_are_still_checked() -> None:
    def breaks(self: Method, view: View) -> Prompt:
        raise RuntimeError("no\nprompt today")

    with pytest.raises(ContractFailure) as caught:
        check_method(changed("outside_breaks", prompt=breaks), families=["masked"], properties=[PADDING, BUILDS])
    line = f"  outside_breaks on masked: {PADDING}: RuntimeError: no prompt today"
    assert str(caught.value) == f"1 of 2 checks failed:\n{line}"
    cause = caught.value.__cause__
    assert isinstance(cause, ExceptionGroup)
    assert [type(error) for error in cause.exceptions] == [RuntimeError]


def test_an_interrupt_is_not_taken_for_a_failure() -> None:
    def stops(self: Method, view: View) -> Prompt:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_method(changed("outside_stops", prompt=stops), families=["masked"], properties=[PADDING])


def test_it_prints_nothing_returns_nothing_and_leaves_no_file(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    assert check_method(Sound, families=["encoder"]) is None
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in tmp_path.rglob("*")] == ["temporary"]


# ---- every property that a method can break, broken -----------------------------------------------------------------


def _at_each_call(self: Any, view: View) -> Prompt:
    """Another prompt at each call."""
    self.calls = self.__dict__.get("calls", 0) + 1
    return Prompt(rows=(self.rows * (-3.0) ** self.calls)[None])


def _batch(self: Any, view: View) -> Prompt:
    """Rows that hang on the width of the padded batch and on its other rows."""
    reach = 0.1 * view.embeddings.shape[1] + view.embeddings.mean()
    return Prompt(rows=(self.rows + reach * torch.linspace(0, 1, self.shape.width))[None])


def _place(self: Any, view: View) -> Prompt:
    """Rows that hang on the place in the batch."""
    return Prompt(rows=self.rows * torch.arange(1.0, 1 + len(view.embeddings))[:, None, None])


def _unused(self: Any, view: View) -> Prompt:
    return Prompt(rows=(self.rows.detach() + 0 * self.rows)[None])


def _large(self: Any, view: View) -> Prompt:
    return Prompt(rows=(self.rows * 1e30 * 1e30)[None])


def _leaves_a_file(self: Any, view: View) -> Prompt:
    Path("left.txt").write_text("here")
    return Prompt(rows=self.rows[None])


def _with_secret(self: Any, view: View) -> Prompt:
    return Prompt(rows=(self.rows + self.secret)[None])


def _build_with_secret(self: Any) -> None:
    Sound.build(self)
    self.secret = torch.zeros(3, self.shape.width)


def _fill_secret(self: Any, source: Starting) -> None:
    """A part of the prompt that is no parameter, so that no file holds it."""
    Sound.fill(self, source)
    self.secret = torch.randn(3, self.shape.width, generator=source.generator)


def _as_first_made(self: Any, view: View) -> Prompt:
    """A prompt that is made once and handed out for ever."""
    if "made" not in self.__dict__:
        self.__dict__["made"] = Prompt(rows=self.rows.detach().clone()[None])
    return self.__dict__["made"]


def _with_gradients(self: Any, view: View) -> Prompt:
    """A graph, whoever asks."""
    with torch.enable_grad():
        return Prompt(rows=self.rows.sin()[None])


def _count_steps(self: Any, task_loss: torch.Tensor, outputs: Outputs) -> Any:
    """A weight that changes from step to step and that no checkpoint holds."""
    self.steps = self.__dict__.get("steps", 0) + 1
    return Method.loss(self, task_loss * self.steps, outputs)


def _fill_from_the_global_generator(self: Any, source: Starting) -> None:
    Sound.fill(self, source)
    self.rows.add_(torch.rand(3, self.shape.width))


def _fill_and_write_to_the_model(self: Any, source: Starting) -> None:
    Sound.fill(self, source)
    source.vocabulary.table.weight.data.add_(0.5)


def _refuse(self: Any) -> Prompt:
    raise NotFoldable("it reads the text")


def _constant(self: Any) -> Prompt:
    """Rows as if nothing were read."""
    return Prompt(rows=self.rows.detach().clone()[None])


def _double(self: Any) -> Prompt:
    return Prompt(rows=2 * self.rows.detach()[None])


READS = {"needs": property(lambda self: frozenset({"embeddings"})), "fold": _refuse}
WRONG: dict[str, tuple[list[str], dict[str, Any]]] = {
    "count": ([BUILDS, COUNT], {"count": classmethod(lambda cls, config, shape: 7)}),
    "unused": (["only_declared_parameters_get_gradients", "loss_falls_on_the_toy_task"], {"prompt": _unused}),
    "model": (
        ["backbone_bytes_are_unchanged_by_training", "detaching_restores_the_base"],
        {"fill": _fill_and_write_to_the_model},
    ),
    "global": (["same_seed_gives_same_bytes"], {"fill": _fill_from_the_global_generator}),
    "secret": (
        ["saved_prompt_predicts_the_same"],
        {"build": _build_with_secret, "fill": _fill_secret, "prompt": _with_secret},
    ),
    "graph": (["forward_only_under_evolution"], {"prompt": _with_gradients}),
    "steps": (["a_resumed_run_equals_the_unbroken_one"], {"loss": _count_steps}),
    "fold": (["folded_equals_live"], {"fold": _double}),
    "no_fold": (["folded_equals_live"], {**READS, "prompt": _batch, "fold": _constant}),
    "batch": (
        [PADDING, "a_row_of_a_batch_equals_that_row_alone", "accumulation_equals_the_big_batch"],
        {**READS, "prompt": _batch},
    ),
    "place": (["row_order_is_irrelevant"], {**READS, "prompt": _place}),
    "calls": (["cached_generation_equals_uncached"], {**READS, "prompt": _at_each_call}),
    "large": (["mixed_precision_is_finite"], {"prompt": _large}),
    "yaml": (["settings_survive_yaml"], {"Config": config_for("outside_yaml", scale=(float, float("nan")))}),
    "stale": (["changed_tensors_count_at_once"], {"prompt": _as_first_made, "fold": lambda self: self.prompt(None)}),
    "file": (["nothing_is_written_outside_the_run_folder"], {"prompt": _leaves_a_file}),
}
# a misspelt field is settled by the settings' base class, the others by the backbone: no method can break them alone
UNBREAKABLE = {
    "an_unknown_field_is_refused_with_a_suggestion",
    "another_base_is_refused",
    "every_switch_off_gives_the_same",
    "rows_with_different_prompts_equal_separate_runs",
    "second_turn_equals_fresh",
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_caught(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # one of these leaves a file behind
    names, parts = WRONG[kind]
    with pytest.raises(ContractFailure) as caught:
        check_method(changed(f"outside_{kind}", **parts), families=["causal"], properties=names)
    assert [failure.property_name for failure in caught.value.failures] == names


def test_every_other_property_has_a_method_that_breaks_it() -> None:
    shown = {name for names, _ in WRONG.values() for name in names}
    assert shown | UNBREAKABLE | {STATES, TRAINS} == set(PROPERTIES)


# ---- exceptions -----------------------------------------------------------------------------------------------------

WHY = "the rows hang on the width of the batch"
ODD = {**READS, "prompt": _batch}


def test_a_declared_exception_is_accepted_and_an_undeclared_one_is_not() -> None:
    with pytest.raises(ContractFailure, match=PADDING):
        check_method(changed("outside_silent", **ODD), families=["masked"], properties=[PADDING])
    honest = changed("outside_honest", **ODD, exceptions={PADDING: WHY})
    check_method(honest, families=["masked"], properties=[PADDING])


def test_a_declared_exception_that_holds_is_a_failure() -> None:
    stale = changed("outside_stale", exceptions={PADDING: "it used to"})
    with pytest.raises(ContractFailure) as caught:
        check_method(stale, families=["masked"], properties=[PADDING, BUILDS])
    assert [failure.property_name for failure in caught.value.failures] == [PADDING]
    assert 'declared as an exception ("it used to") but it holds; take it out of `exceptions`' in str(caught.value)


def test_an_exception_for_one_family_says_nothing_of_another() -> None:
    here = changed("outside_here", **ODD, exceptions={f"{PADDING} on masked": WHY})
    with pytest.raises(ContractFailure) as caught:
        check_method(here, families=["masked", "causal"], properties=[PADDING])
    assert [failure.family for failure in caught.value.failures] == ["causal"]


def test_a_declared_exception_does_not_cover_a_fault_of_another_kind() -> None:
    def breaks(self: Any, view: View) -> Prompt:
        raise ZeroDivisionError("a bug")

    declared = changed("outside_fault", prompt=breaks, exceptions={PADDING: WHY})
    with pytest.raises(ContractFailure, match="ZeroDivisionError: a bug"):
        check_method(declared, families=["masked"], properties=[PADDING])


def test_a_typed_refusal_is_a_way_not_to_hold() -> None:
    def refuses(self: Any, view: View) -> Prompt:
        raise SiteError("not on this base")

    declared = changed("outside_typed", prompt=refuses, exceptions={PADDING: "it refuses such bases"})
    check_method(declared, families=["masked"], properties=[PADDING])
