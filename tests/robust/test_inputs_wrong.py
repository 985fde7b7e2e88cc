"""Whatever a user gets wrong: one line that names it, exit code 2, no traceback, and nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest

import promptuary
from promptuary import registry
from promptuary.errors import PromptuaryError
from robust import inputs
from robust.wrong_inputs import WRONG


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inputs.make(tmp_path_factory.mktemp("wrong"))


def test_the_table_is_long_enough_and_says_something_of_its_own_in_every_line() -> None:
    assert len(WRONG) >= 180
    assert all(len(line) > 20 and "\n" not in line for _, line in WRONG)


@pytest.mark.parametrize(("given", "line"), WRONG, ids=[line[:50] for _, line in WRONG])
def test_a_wrong_input_gets_its_line_and_changes_nothing(
    given: inputs.Input, line: str, root: Path, tmp_path: Path
) -> None:
    place = inputs.Place(root, tmp_path)
    made = given(place)
    before = inputs.snapshot(root, tmp_path)
    if callable(made):
        with pytest.raises(PromptuaryError) as caught:
            made()
        code, told = caught.value.exit_code, str(caught.value)
    else:
        said = inputs.say(*made)
        assert said.out == ""
        assert said.err.startswith("error: "), said.err
        assert said.err.endswith("\n")
        code, told = said.code, said.err.removeprefix("error: ").removesuffix("\n")
    assert code == 2
    assert "\n" not in told
    told = place.blank(told)
    line = line.replace("{methods}", ", ".join(registry.names("methods")))
    if line.endswith("..."):
        assert told.startswith(line.removesuffix("..."))
        assert len(told) > len(line) - 3
    else:
        assert told == line
    assert inputs.snapshot(root, tmp_path) == before


# ---- what is right beside what is wrong ------------------------------------------------------------------------------


def test_numbers_may_name_labels() -> None:
    values = {**inputs.RUN, "data": {"source": "demo"}, "backbone": {"model": "m"}}
    run = promptuary.load_run(values, ["task.labels={0: bad, 1: good}"])
    assert run.task.model_dump()["labels"] == {"0": "bad", "1": "good"}


def test_label_words_of_a_run_replace_those_of_its_suite_and_its_base(tmp_path: Path) -> None:
    base = {"suite": "glue/sst2", "backbone": {"model": "m"}, "method": {"name": "ept", "rank": 3}}
    own = {"neg": "awful", "pos": "fine"}
    assert promptuary.load_run(base).task.model_dump()["labels"] == {"negative": "terrible", "positive": "great"}
    run = promptuary.load_run({**base, "task": {"labels": own}})
    assert run.task.model_dump()["labels"] == own
    assert run.task.template == promptuary.load_run(base).task.template
    assert promptuary.load_run(base, ["task.labels={neg: awful, pos: fine}"]).task.model_dump()["labels"] == own
    again = tmp_path / "run.yaml"
    again.write_text(run.to_yaml())
    assert promptuary.load_run(again) == run
    child = tmp_path / "child.yaml"
    child.write_text("extends: run.yaml\ntask: {labels: [a, b]}\ndata: {rename: {x: text}}\n")
    changed = promptuary.load_run(child)
    assert changed.task.model_dump()["labels"] == ("a", "b")
    assert changed.data.rename == {"x": "text"}
    assert changed.method == run.method


def test_a_longer_path_changes_one_entry_of_a_mapping_and_the_order_of_overrides_is_free() -> None:
    base = {"suite": "glue/sst2", "backbone": {"model": "m"}, "method": {"name": "ept"}}
    run = promptuary.load_run(base, ["task.labels.negative=awful", "data.rename.a=b", "data.rename.c=d"])
    assert run.task.model_dump()["labels"] == {"negative": "awful", "positive": "great"}
    assert run.data.rename == {"a": "b", "c": "d"}
    assert base == {"suite": "glue/sst2", "backbone": {"model": "m"}, "method": {"name": "ept"}}
    sets = ["method.name=dept", "method.rank=4"]
    assert promptuary.load_run(base, sets) == promptuary.load_run(base, sets[::-1])
    assert promptuary.load_run(base, sets).method.model_dump()["rank"] == 4


def test_a_text_as_long_as_the_positions_allow_is_answered(root: Path) -> None:
    tuned = promptuary.load_prompt(root / "trained-causal")
    with pytest.raises(PromptuaryError, match="shorten it to 61 tokens"):
        tuned.predict(["cat " * 59])
    assert len(tuned.predict(["cat " * 58])) == 1


def test_an_older_prompt_is_replaced_and_other_files_are_not(root: Path, tmp_path: Path) -> None:
    tuned = promptuary.load_prompt(root / "trained-masked")
    promptuary.save_prompt(tuned, tmp_path / "prompt")
    promptuary.save_prompt(tuned, tmp_path / "prompt")
    (tmp_path / "empty").mkdir()
    promptuary.save_prompt(tuned, tmp_path / "empty")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(PromptuaryError, match="holds no prompt, so it is not replaced"):
        promptuary.save_prompt(tuned, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"
