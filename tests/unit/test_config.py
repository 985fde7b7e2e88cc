"""Run files: read, merged, checked, written again; every kind of wrong input is one line that helps.

Knows no model; nothing is trained here.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from promptuary import registry
from promptuary.config import load_run, merge, parse_override, schema, suite, suites
from promptuary.errors import ConfigError
from promptuary.run import Run
from promptuary.tasks.template import Template

FILES = sorted(
    path for path in (Path(__file__).parents[2] / "runs").glob("*.yaml") if not path.name.startswith("compare_")
)
PROTOTYPE: dict[str, Any] = {
    "task": {"name": "classify", "template": "{text} it was {mask}", "labels": {"p": "good", "n": "bad"}},
    "data": {"source": "demo"},
    "backbone": {"model": "some/model"},
    "method": {"name": "ept", "rank": 3},
}


def changed(**parts: Mapping[str, Any]) -> dict[str, Any]:
    """The prototype with fields of its parts changed."""
    return {**PROTOTYPE, **{part: {**PROTOTYPE.get(part, {}), **values} for part, values in parts.items()}}


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


def refusal(source: Any, *overrides: str, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_run(source, overrides, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- reading --------------------------------------------------------------------------------------------------------


def test_a_file_and_its_content_are_the_same_run(tmp_path: Path) -> None:
    assert load_run(write(tmp_path / "a.yaml", PROTOTYPE)) == load_run(PROTOTYPE)
    assert load_run(str(tmp_path / "a.yaml")).method.name == "ept"


def test_overrides_win_over_the_file_and_keywords_over_both(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", {**PROTOTYPE, "seed": 1})
    run = load_run(path, ["seed=2", "method.rank=8", "train.steps=7", "task.labels.p=great", "out='x y'"], seed=3)
    assert (run.seed, run.train.steps, run.out) == (3, 7, "x y")
    assert run.method.model_dump()["rank"] == 8
    assert run.task.model_dump()["labels"] == {"p": "great", "n": "bad"}
    assert load_run(path, ["seed=2"]).seed == 2


def test_the_source_is_not_changed() -> None:
    values = {**PROTOTYPE, "suite": "glue/sst2"}
    before = json.dumps(values)
    load_run(values, ["method.rank=8", "data.shots=4"], seed=3)
    assert json.dumps(values) == before


def test_values_of_overrides_are_yaml() -> None:
    assert parse_override("a.b=[1, x]") == (("a", "b"), [1, "x"])
    assert parse_override("a=null") == (("a",), None)
    assert parse_override("a.b=x=y") == (("a", "b"), "x=y")


def test_extends_is_read_beneath_the_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "base.yaml", {**PROTOTYPE, "train": {"steps": 5, "batch_size": 2}})
    child = write(tmp_path / "sub" / "child.yaml", {"extends": "../base.yaml", "train": {"steps": 6}, "seed": 4})
    run = load_run(child, ["train.batch_size=3"])
    assert (run.train.steps, run.train.batch_size, run.seed) == (6, 3, 4)


def test_only_one_level_of_extends(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", PROTOTYPE)
    write(tmp_path / "b.yaml", {"extends": "a.yaml"})
    text = refusal(write(tmp_path / "c.yaml", {"extends": "b.yaml"}))
    assert "b.yaml" in text
    assert "one level" in text
    assert 'did you mean "a.yaml"' in refusal(write(tmp_path / "d.yaml", {"extends": "aa.yaml"}))


def test_a_part_whose_name_changes_is_replaced_and_not_mixed() -> None:
    run = load_run(changed(method={"prompt_lr": 0.5}), ["method={name: lamp, pool: 2}"])
    assert (run.method.name, run.method.prompt_lr) == ("lamp", 0.05)
    same = load_run(changed(method={"prompt_lr": 0.5}), ["method={name: ept, spaces: 2}"])
    assert (same.method.prompt_lr, same.method.model_dump()["rank"]) == (0.5, 3)
    assert merge({"task": {"name": "a", "x": 1}}, {"task": {"x": 2}}) == {"task": {"name": "a", "x": 2}}


def test_a_suite_fills_task_and_data_beneath_the_file() -> None:
    run = load_run(
        {"suite": "glue/stsb", "backbone": {"model": "m"}, "method": {"name": "lamp"}, "data": {"source": "here"}}
    )
    found = suite("glue/stsb")
    assert run.task.template == found["task"]["template"]
    assert (run.data.source, run.data.protocol, run.suite) == ("here", "halve_validation", "glue/stsb")
    other = load_run({**PROTOTYPE, "suite": "glue/stsb"})
    assert other.task.name == "classify"
    assert other.data.subset == "stsb"
    assert load_run({**PROTOTYPE, "task": {"metrics": ["pearson"]}}, ["suite=glue/stsb"]).task.metrics == ("pearson",)


# ---- wrong input ----------------------------------------------------------------------------------------------------

WRONG = {
    "unknown top field": ({**PROTOTYPE, "mehtod": {}}, 'unknown field "mehtod"; did you mean "method"?'),
    "unknown in method": (changed(method={"rnak": 1}), 'unknown field method.rnak; did you mean "rank"?'),
    "unknown in data": (changed(data={"sourc": "x"}), 'unknown field data.sourc; did you mean "source"?'),
    "unknown in train": (changed(train={"step": 1}), 'unknown field train.step; did you mean "steps"?'),
    "unknown in task": (changed(task={"lables": []}), 'unknown field task.lables; did you mean "labels"?'),
    "unknown in backbone": (changed(backbone={"modle": "x"}), 'unknown field backbone.modle; did you mean "model"?'),
    "method of another": (changed(method={"pool": 1}), "unknown field method.pool"),
    "no method": ({k: v for k, v in PROTOTYPE.items() if k != "method"}, "method is required (known: "),
    "no task": ({k: v for k, v in PROTOTYPE.items() if k != "task"}, "task is required (known: choose, classify,"),
    "no method name": ({**PROTOTYPE, "method": {"rank": 1}}, "method.name is required (known: "),
    "no task name": ({**PROTOTYPE, "task": {"template": "{a}"}}, "task.name is required (known: "),
    "no data": ({k: v for k, v in PROTOTYPE.items() if k != "data"}, "data is required"),
    "no model": ({**PROTOTYPE, "backbone": {}}, "backbone.model is required"),
    "unknown method": ({**PROTOTYPE, "method": {"name": "epd"}}, 'no such method: "epd"; did you mean "ept"?'),
    "unknown task": ({**PROTOTYPE, "task": {"name": "clasify"}}, 'no such task: "clasify"; did you mean "classify"?'),
    "name of a wrong type": ({**PROTOTYPE, "method": {"name": ["ept"]}}, "method.name: expected text, got ['ept']"),
    "part is no mapping": ({**PROTOTYPE, "method": "ept"}, "method should be a mapping of settings, got 'ept'"),
    "part is empty": ({**PROTOTYPE, "data": None}, "data should be a mapping of settings, got None"),
    "out of range": (changed(method={"rank": 0}), "method.rank: "),
    "wrong type": (changed(train={"steps": "many"}), "train.steps: "),
    "wrong choice": (changed(train={"optimizer": "adam"}), "train.optimizer: expected 'adamw', 'adafactor' or 'sgd'"),
    "wrong top value": ({**PROTOTYPE, "seed": -1}, "seed: expected at least 0, got -1"),
    "labels of YAML's no": (changed(task={"labels": {False: "no", True: "yes"}}), "task.labels"),
    "contradiction": (changed(data={"shots": 4, "train_size": 4}), "data: shots already sets the sizes"),
    "unknown suite": ({**PROTOTYPE, "suite": "glue/sst3"}, 'no suite "glue/sst3"; did you mean "glue/sst2"?'),
}


@pytest.mark.parametrize(("values", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_input_is_one_line_that_says_how_to_mend_it(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert refusal(values).startswith(message)
    assert refusal(write(tmp_path / "run.yaml", values)).startswith(message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.rank", '--set takes "a.b=value", got "method.rank"'),
        ("=3", '--set takes "a.b=value"'),
        ("method.rank=[1", '--set method.rank: "[1" is not YAML'),
        ("method.rnak=1", 'unknown field method.rnak; did you mean "rank"?'),
        ("sed=1", 'unknown field "sed"; did you mean "seed"?'),
        ("method.=1", '--set takes "a.b=value"'),
    ],
)
def test_wrong_overrides(override: str, message: str) -> None:
    assert refusal(PROTOTYPE, override).startswith(message)


def test_wrong_keywords() -> None:
    assert refusal(PROTOTYPE, sed=1).startswith('unknown field "sed"; did you mean "seed"?')


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1", "is not YAML"),
        ("- a\n- b\n", "should be a mapping"),
        ("", "should be a mapping"),
        ("a: b: c", "is not YAML"),
    ],
)
def test_files_that_are_no_run(content: str, message: str, tmp_path: Path) -> None:
    text = refusal(write(tmp_path / "run.yaml", content))
    assert str(tmp_path / "run.yaml") in text
    assert message in text


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    assert "holds byte 0xff, not UTF-8 text" in refusal(tmp_path / "run.yaml")
    assert "cannot be read" in refusal(tmp_path)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "sentiment.yaml", PROTOTYPE)
    assert refusal(tmp_path / "sentimnt.yaml").endswith('does not exist; did you mean "sentiment.yaml"?')
    assert refusal(tmp_path / "nowhere" / "a.yaml").endswith("does not exist")


# ---- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", registry.names("methods"))
def test_a_run_round_trips_through_yaml(method: str, tmp_path: Path) -> None:
    labels = {"no": "no", "1": "yes", "ü": "größer: 'a' {b}"}
    run = load_run({**PROTOTYPE, "method": {"name": method}, "task": {**PROTOTYPE["task"], "labels": labels}}, seed=5)
    again = load_run(write(tmp_path / "run.yaml", run.to_yaml()))
    assert again == run
    assert type(again.method) is type(run.method)
    assert again.hash() == run.hash()


def test_a_run_with_a_suite_round_trips() -> None:
    run = load_run({**PROTOTYPE, "suite": "fewshot/trec"}, ["data.source=/here"])
    assert load_run(yaml.safe_load(run.to_yaml())) == run


def test_an_outside_class_keeps_its_place_in_the_run_file() -> None:
    target = "promptuary.methods.lamp:LAMP"
    run = load_run({**PROTOTYPE, "method": {"name": target, "pool": 2}})
    assert yaml.safe_load(run.to_yaml())["method"]["name"] == target
    assert load_run(yaml.safe_load(run.to_yaml())) == run


def leaves(values: Mapping[str, Any], path: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        deeper = isinstance(value, Mapping) and key not in ("labels", "rename")
        found += leaves(value, f"{path}{key}.") if deeper else [(path + key, value)]
    return found


@pytest.mark.filterwarnings("ignore:Pydantic serializer")
def test_the_hash_ignores_out_and_changes_with_anything_else() -> None:
    run = load_run(PROTOTYPE)
    assert run.hash() == load_run(PROTOTYPE, out="elsewhere").hash()
    hashes = {run.hash()}
    paths = [
        (path, value) for path, value in leaves(run.model_dump()) if path not in ("out", "method.name", "task.name")
    ]
    for path, value in paths:
        changed: Any = f"not {value}"
        *parents, last = path.split(".")
        for depth in range(len(parents), -1, -1):
            part: Any = functools.reduce(getattr, parents[:depth], run)
            changed = part.model_copy(update={[*parents, last][depth]: changed})
        hashes.add(changed.hash())
    assert len(paths) > 60
    assert len(hashes) == len(paths) + 1


def test_a_run_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_run(PROTOTYPE).seed = 3  # type: ignore[misc]


def test_the_schema_is_json_and_lists_every_method_and_task() -> None:
    found = json.loads(json.dumps(schema()))
    for part, kind in (("method", "methods"), ("baseline", "baselines"), ("task", "tasks")):
        named = {option["properties"]["name"]["const"] for option in found["properties"][part]["oneOf"]}
        assert named == set(registry.names(kind))
    assert set(found["properties"]) == {*Run.model_fields, "baseline", "extends"}
    assert {"task", "data", "backbone"} == set(found["required"])
    assert found["oneOf"] == [{"required": ["method"]}, {"required": ["baseline"]}]
    assert found["additionalProperties"] is False
    described = [*found["properties"]["method"]["oneOf"], *found["$defs"].values()]
    fields = [(name, field) for part in described for name, field in part["properties"].items() if name != "name"]
    assert len(fields) > 80
    assert all(field.get("description") for _, field in fields), [
        name for name, field in fields if "description" not in field
    ]


# ---- what is shipped ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_example_run_file_loads(path: Path) -> None:
    run = load_run(path)
    assert load_run(yaml.safe_load(run.to_yaml())) == run


@pytest.mark.parametrize("name", suites())
def test_every_suite_is_a_run(name: str) -> None:
    run = load_run({"suite": name, "backbone": {"model": "dummy"}, "method": {"name": "prompt_tuning"}})
    task = registry.load("tasks", run.task.name)
    template = Template(run.task.template or "")
    assert template.fields
    assert all(field.isidentifier() for field in task.required(run.task))
    # one template serves every family
    assert template.asks_at_end
    assert "mask" in template.slots
    task(run.task, []) if run.task.name != "generate" else None


@pytest.mark.parametrize("name", [name for name, part in suites().items() if part["task"]["name"] == "classify"])
def test_every_classifying_suite_has_its_own_words_for_each_label(name: str) -> None:
    found = suite(name)
    words = list(found["task"]["labels"].values())
    assert len(words) == len({word.lower() for word in words}) >= 2
    assert all(isinstance(word, str) for word in words)
    assert set(found["data"]["label_names"]) == set(found["task"]["labels"])
