"""Comparisons: equal trials on validation alone, one look at the test split, nothing run twice, wrong input refused."""

from __future__ import annotations

import copy
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import comparisons
import toy
from promptuary import files, memory
from promptuary.comparing import tuning, work
from promptuary.comparing.job import Group, Job, load_job
from promptuary.comparing.ledger import Ledger, Unit
from promptuary.comparing.summary import summarise
from promptuary.config import load_run
from promptuary.course import Course
from promptuary.errors import ConfigError, Interrupted
from promptuary.listening import Stop
from promptuary.training import train

ROOT = Path(__file__).parents[2]


def worked(values: dict[str, Any]) -> Ledger:
    """A comparison after one worker."""
    ledger = Ledger(load_job(values))
    ledger.open()
    work.Worker(ledger, lambda text: None).work()
    return ledger


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """How often each run, by the name of its folder, answered each split."""
    found: Counter[tuple[str, str]] = Counter()
    real = Course.evaluate

    def counting(self: Course, split: str, **how: Any) -> Any:
        found[Path(self.run.out).name, split] += 1
        return real(self, split, **how)

    monkeypatch.setattr(Course, "evaluate", counting)
    return found


def test_trials_never_answer_the_test_split_and_tested_runs_answer_it_once(
    tmp_path: Path, seen: Counter[tuple[str, str]]
) -> None:
    ledger = worked(comparisons.settings(tmp_path))
    tested = {name: count for (name, split), count in seen.items() if split == "test"}
    assert set(tested.values()) == {1}
    assert sorted(tested) == sorted(one.name for one in (ledger.path / "runs").iterdir())
    assert len(tested) == 4
    trials = {name for name, _ in seen if name.startswith("trial-")}
    assert len(trials) == 4
    for result in (ledger.path / "trials").glob("*/*/result.json"):
        facts = json.loads(result.read_text())
        assert facts["tested"] is False
        assert facts["metrics"] == {}
        assert not (result.parent / "predictions.jsonl").exists()
        assert not (result.parent / "checkpoints").exists()


def test_every_method_gets_the_same_trials_and_the_best_validation_score_chooses(tmp_path: Path) -> None:
    how = {"trials": 2, "sampler": "random", "seeds": [100, 101]}
    ledger = worked(comparisons.settings(tmp_path, tuning=how, seeds=[0]))
    rows = summarise(ledger)["blocks"][0]["methods"]
    assert [(one["method"], one["trials"], one["tuning_runs"]) for one in rows] == [
        ("prompts", 2, 4), ("bitfit", 2, 4),
    ]  # fmt: skip
    for group in ledger.job.groups:
        records = [ledger.trial(Unit(group, trial=number)) for number in range(2)]
        assert all(one is not None and set(one["validation"]) == {"100", "101"} for one in records)
        scores = [sum(one["validation"].values()) / 2 for one in records if one is not None]
        chosen = ledger.chosen(group)
        assert chosen is not None
        assert chosen["trial"] == scores.index(max(scores))
        for run in (ledger.path / "runs").glob(f"*--{group.method}--*"):
            path, value = next(iter(chosen["settings"].items()))
            part, name = path.split(".")
            assert load_run(run / "run.yaml").model_dump()[part][name] == value


def test_what_is_finished_is_not_run_again_and_other_settings_are(
    tmp_path: Path, seen: Counter[tuple[str, str]]
) -> None:
    values = comparisons.settings(tmp_path, tuning=None, seeds=[0])
    for entry in values["methods"].values():
        del entry["space"]
    first = summarise(worked(values))
    before = Counter(seen)
    assert summarise(worked(values)) == first
    assert seen == before
    # one more seed is one more run of each method; a method with another setting begins anew
    values["seeds"], values["methods"]["prompts"]["method"]["num_virtual_tokens"] = [0, 1], 2
    assert summarise(worked(values))["finished"] == 4
    assert len([name for name, split in seen - before if split == "test"]) == 3


def test_a_stop_between_steps_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = comparisons.settings(tmp_path)
    del values["methods"]["bitfit"]
    steps = [0]

    def stepped(self: Any, row: Any) -> None:
        steps[0] += 1
        if steps[0] == 6:
            self.stop.request()

    monkeypatch.setattr(work.Watch, "stepped", stepped)
    with pytest.raises(Interrupted, match="step 2 of 4"):
        worked(values)
    assert summarise(Ledger(load_job(values)))["left"] == 2
    stopped = summarise(worked(values))
    # not one step was taken twice
    assert steps[0] == 4 * 4
    whole = summarise(worked({**values, "out": str(tmp_path / "whole")}))
    assert comparisons.plain(comparisons.read(tmp_path / "out")) == comparisons.plain(
        comparisons.read(tmp_path / "whole")
    )
    assert stopped["blocks"][0]["pairs"] == whole["blocks"][0]["pairs"]


def test_a_run_that_fails_is_told_and_left_alone_until_it_is_tried_again(tmp_path: Path) -> None:
    values = comparisons.settings(tmp_path, tuning=None, seeds=[0])
    for entry in values["methods"].values():
        del entry["space"]
    values["backbones"]["gone"] = {"model": str(tmp_path / "gone"), "family": "masked"}
    found = summarise(worked(values))
    assert (found["finished"], found["left"], len(found["failed"])) == (2, 0, 2)
    assert "gone" in found["failed"][0]["error"]
    said: list[str] = []
    ledger = Ledger(load_job(values))
    work.Worker(ledger, said.append).work()
    assert said == []
    ledger.forget_failures()
    work.Worker(ledger, said.append).work()
    assert len(said) == 2


def test_the_base_is_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    real = work.open_backbone
    monkeypatch.setattr(work, "open_backbone", lambda config: loads.append(1) or real(config))
    values = comparisons.settings(tmp_path)
    del values["methods"]["bitfit"]  # a baseline changes weights, so it loads a model of its own
    worked(values)
    assert len(loads) == 1


def test_budgets_are_sizes_of_the_data_and_ranks_go_over_all_of_them(tmp_path: Path) -> None:
    values = comparisons.settings(tmp_path, tuning=None, seeds=[0], budgets={"train_size": [4, 8]})
    for entry in values["methods"].values():
        del entry["space"]
    found = summarise(worked(values))
    assert [one["budget"] for one in found["blocks"]] == ["train_size=4", "train_size=8"]
    assert found["ranks"]["blocks"] == 2
    assert sum(found["ranks"]["average_rank"].values()) == pytest.approx(3)
    assert found["ranks"]["verdicts"] == ["no difference in rank is shown"]
    block = found["blocks"][0]
    assert (block["test_examples"], block["one_example"], block["small"]) == (4, 0.25, True)
    assert block["note"].startswith("one seed")
    costs = {one["method"]: one["step_time_ratio"] for one in block["methods"]}
    assert costs["prompts"] == 1.0
    assert costs["bitfit"] > 0


def test_rows_are_tidy_and_their_command_repeats_the_run(tmp_path: Path) -> None:
    values = comparisons.settings(tmp_path, tuning=None, seeds=[3])
    for entry in values["methods"].values():
        del entry["space"]
    summarise(worked(values))
    row = comparisons.read(tmp_path / "out")[0]
    facts = json.loads((tmp_path / "out" / row["folder"] / "result.json").read_text())
    assert row["score"] == facts["metrics"][row["metric"]]
    assert (row["method"], row["seed"], row["trainable_parameters"]) == ("prompts", 3, facts["trainable_parameters"])
    assert row["prompt_bytes"] > 4 * row["trainable_parameters"]
    words = row["command"].split()
    assert words[:2] == ["promptuary", "train"]
    again = train(load_run(words[2], out=str(tmp_path / "again")))
    assert again.metrics == facts["metrics"]
    assert again.facts["run_hash"] == row["run_hash"]


def test_a_method_in_a_file_is_compared_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from typing import Literal\n"
        "from promptuary.methods.prompt_tuning import PromptTuning, PromptTuningConfig\n\n\n"
        "class MineConfig(PromptTuningConfig):\n    name: Literal['mine_in_a_file'] = 'mine_in_a_file'\n\n\n"
        "class Mine(PromptTuning):\n    name = 'mine_in_a_file'\n    Config = MineConfig\n"
    )
    values = comparisons.settings(tmp_path, tuning=None, seeds=[0])
    values["methods"] = {"mine": {"method": {"name": f"{tmp_path}/mine.py:Mine", "num_virtual_tokens": 2}}}
    found = summarise(worked(values))
    assert found["finished"] == 1
    assert found["blocks"][0]["note"] == "there is one method alone"


# ---- an untested run ------------------------------------------------------------------------------------------------


def test_an_untested_run_is_tested_later_and_is_then_the_run_that_it_would_have_been(tmp_path: Path) -> None:
    run, whole = (toy.run(tmp_path, family="masked", name=name) for name in ("parts", "whole"))
    import tiny

    first = train(run, backbone=tiny.backbone("masked"), tested=False)
    assert (first.metrics, first.facts["tested"]) == ({}, False)
    assert first.facts["validation"]["accuracy"] is not None
    again = train(run, backbone=tiny.backbone("masked"), tested=False, resume=True)
    assert again.facts == first.facts
    later = train(run, backbone=tiny.backbone("masked"), resume=True)
    at_once = train(whole, backbone=tiny.backbone("masked"))
    assert later.metrics == at_once.metrics
    assert "tested" not in later.facts
    names = [(one / "predictions.jsonl").read_bytes() for one in (later.dir, at_once.dir)]
    assert names[0] == names[1]


# ---- trials ---------------------------------------------------------------------------------------------------------


def job(tmp_path: Path, **changes: Any) -> Job:
    """A comparison that is not run."""
    return load_job(comparisons.settings(tmp_path, **changes))


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_what_is_tried_lies_in_its_space_and_follows_from_its_number(tmp_path: Path, sampler: str) -> None:
    made = job(tmp_path, tuning={"trials": 6, "sampler": sampler})
    assert made.config.tuning is not None
    found: dict[str, list[Any]] = {}
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        for group in made.groups:
            tried = []
            for number in range(6):
                settings, asked = tuning.propose(group, number, made.config.tuning, tmp_path / place)
                if asked is not None:
                    tuning.tell(group, asked, 0.1 * number, tmp_path / place)
                    tuning.tell(group, asked, 5.0, tmp_path / place)  # told once already: stays
                tried.append(settings)
            found.setdefault(group.method, []).append(tried)
    for one, two in found.values():
        assert one == two
        assert len({str(settings) for settings in one}) > 1
    assert all(0.01 <= one["method.prompt_lr"] <= 0.5 for one in found["prompts"][0])
    assert all(one["baseline.learning_rate"] in (0.01, 0.1) for one in found["bitfit"][0])


def test_a_grid_is_tried_whole(tmp_path: Path) -> None:
    values = comparisons.settings(tmp_path, tuning={"sampler": "grid"})
    values["methods"]["prompts"]["space"] = {"method.prompt_lr": [0.1, 0.2], "train.steps": [4]}
    made = load_job(values)
    assert made.config.tuning is not None
    group = made.groups[0]
    assert group.trials == 2
    tried = [tuning.propose(group, number, made.config.tuning, tmp_path)[0] for number in range(2)]
    assert tried == [{"method.prompt_lr": rate, "train.steps": 4} for rate in (0.1, 0.2)]


def test_whole_numbers_stay_whole(tmp_path: Path) -> None:
    values = comparisons.settings(tmp_path, tuning={"trials": 4, "sampler": "random"})
    values["methods"]["prompts"]["space"] = {"method.num_virtual_tokens": {"low": 2, "high": 9}}
    made = load_job(values)
    assert made.config.tuning is not None
    tried = [tuning.propose(made.groups[0], number, made.config.tuning, tmp_path)[0] for number in range(4)]
    sizes = [one["method.num_virtual_tokens"] for one in tried]
    assert all(isinstance(size, int) and 2 <= size <= 9 for size in sizes)


def test_the_best_trial_is_the_first_of_equal_ones_and_none_where_all_failed() -> None:
    def record(number: int, score: float | None, higher: bool = True) -> dict[str, Any]:
        return {"trial": number, "score": score, "higher_is_better": higher}

    assert tuning.best([record(0, 0.5), record(1, None), record(2, 0.7), record(3, 0.7)]) == record(2, 0.7)
    assert tuning.best([record(0, 0.5, False), record(1, 0.2, False)]) == record(1, 0.2, False)
    assert tuning.best([record(0, None)]) is None


# ---- wrong input ----------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], object]

WRONG: list[tuple[Change, str]] = [
    (lambda v: v["methods"]["prompts"]["method"].update(name="promt_tuning"), 'did you mean "prompt_tuning"'),
    (lambda v: v.update(seeds=[]), "seeds: expected a list of at least 1"),
    (lambda v: v.update(seeds=[0, 0]), "seeds: expected different whole numbers"),
    (lambda v: v.update(seeds=[0, 100]), "seed 100 is among seeds and tuning.seeds"),
    (lambda v: v["tasks"].update(toy={"suite": "glue/sst3"}), 'no suite "glue/sst3"'),
    (lambda v: v["tasks"]["toy"].pop("task"), "tasks.toy and backbones.tiny: task is required"),
    (lambda v: v["tasks"]["toy"]["task"].update(name="clasify"), 'did you mean "classify"'),
    (lambda v: v["tasks"]["toy"].update(seed=3), "a task has suite, task and data, and not seed"),
    (lambda v: v.update(backbones={}), "backbones: "),
    (lambda v: v["backbones"]["tiny"].pop("model"), "backbone.model is required"),
    (lambda v: v.update(method={}), "unknown field method; did you mean"),
    (lambda v: v["methods"]["prompts"].pop("space"), "methods.prompts: no space"),
    (lambda v: v.update(tuning=None), "space is searched by trials"),
    (lambda v: v["methods"]["prompts"]["space"].update({"method.promt_lr": [1.0]}), "unknown field method.promt_lr"),
    (lambda v: v["methods"]["prompts"]["space"].update({"data.max_length": [8]}), "data.max_length cannot be searched"),
    (lambda v: v["methods"]["prompts"]["space"].update({"method.prompt_lr": [0.1, -1]}), "method.prompt_lr: expected"),
    (lambda v: v["methods"]["prompts"]["space"].update({"method.prompt_lr": []}), "expected a list of at least one"),
    (
        lambda v: v["methods"]["prompts"]["space"].update({"method.prompt_lr": {"low": 0, "high": 1, "log": True}}),
        "log needs low above 0",
    ),
    (lambda v: v["tuning"].update(sampler="grid"), "a grid takes lists"),
    (lambda v: v["tuning"].update(trials=None), "tuning.trials is required"),
    (lambda v: v.update(budgets={"shoots": [4]}), "expected shots or train_size"),
    (lambda v: v.update(reference="lora"), "no method is called lora"),
    (lambda v: v["methods"].update({"a b": v["methods"]["bitfit"]}), "names a folder too"),
    (lambda v: v["methods"]["bitfit"].update(method={"name": "ept"}), "either a method or a baseline"),
]


@pytest.mark.parametrize(("change", "reason"), WRONG, ids=[reason for _, reason in WRONG])
def test_wrong_input_is_one_line_before_anything_runs(tmp_path: Path, change: Change, reason: str) -> None:
    values = copy.deepcopy(comparisons.settings(tmp_path))
    change(values)
    with pytest.raises(ConfigError) as error:
        load_job(values)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_grids_of_other_sizes_are_refused(tmp_path: Path) -> None:
    values = comparisons.settings(tmp_path, tuning={"sampler": "grid"})
    values["methods"]["prompts"]["space"] = {"method.prompt_lr": [0.1, 0.2, 0.3]}
    with pytest.raises(ConfigError, match="has 2 settings and not 3, and every method gets the same number"):
        load_job(values)


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    made = job(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds no comparison"):
        Ledger(made).open()


def test_the_example_is_a_comparison_with_equal_grids() -> None:
    made = load_job(ROOT / "runs" / "compare_demo.yaml")
    assert [(group.method, group.trials) for group in made.groups] == [("prompt_tuning", 4), ("ept", 4), ("lora", 4)]
    assert made.reference == "prompt_tuning"


# ---- speed ----------------------------------------------------------------------------------------------------------


def test_what_a_comparison_adds_to_its_runs_is_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = comparisons.settings(tmp_path)
    del values["methods"]["bitfit"]
    spent, real = [0.0], work.Worker._run

    def timed(self: work.Worker, *args: Any, **kwargs: Any) -> Any:
        began = time.process_time()
        done = real(self, *args, **kwargs)
        spent[0] += time.process_time() - began
        return done

    monkeypatch.setattr(work.Worker, "_run", timed)
    began = time.process_time()
    ledger = worked(values)
    added = time.process_time() - began - spent[0]
    # some milliseconds for each of the 4 runs: under 2 % of a run of a few seconds
    assert added / len(ledger.units) < 0.06


def test_a_thousand_finished_runs_are_summarised_in_seconds(tmp_path: Path) -> None:
    values = comparisons.settings(tmp_path, tuning=None, seeds=[0])
    for entry in values["methods"].values():
        del entry["space"]
    ledger = worked(values)
    result: dict[str, Any] = {}
    said = {}
    for unit in ledger.units:
        run = ledger.run(unit)
        assert run is not None
        result[unit.group.method] = files.read_json(Path(run.out) / "result.json")
        said[unit.group.method] = (Path(run.out) / "predictions.jsonl").read_bytes()
    many = Ledger(load_job({**values, "seeds": list(range(500))}))
    for unit in many.units[1:]:
        run = many.run(unit)
        assert run is not None
        folder, name = Path(run.out), unit.group.method
        kind = "weights" if name == "bitfit" else "prompt"
        (folder / kind).mkdir(parents=True, exist_ok=True)
        (folder / kind / f"{kind}.json").touch()
        (folder / "predictions.jsonl").write_bytes(said[name])
        facts = {**result[name], "seed": unit.seed, "run_hash": run.hash()}
        (folder / "result.json").write_text(json.dumps(facts))
        scores = {
            "run_hash": run.hash(),
            "examples": "same",
            "scores": [float(number % 3 > 0) for number in range(100)],
        }
        (many.path / "scores" / f"{folder.name}.json").write_text(json.dumps(scores))
    began = time.process_time()
    found = summarise(Ledger(load_job({**values, "seeds": list(range(500))})))
    assert time.process_time() - began < 5
    assert found["finished"] == 1000


def test_groups_are_told_apart_by_their_labels() -> None:
    one, two = (Group("b", "t", name, "all", {}, {}, 0) for name in ("x", "y"))
    assert one != two
    assert one.block == two.block


# ---- looking on -----------------------------------------------------------------------------------------------------


def test_a_long_run_says_how_far_it_is_and_a_run_that_nobody_wants_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    stop = Stop()
    watch = work.Watch("a run", said.append, stop, os.getppid())
    row = {"step": 3, "steps": 9}
    watch.stepped(row)
    assert said == []
    assert stop.signal is None
    watch.told -= work.EVERY + 1
    watch.stepped(row)
    watch.stepped(row)
    assert said == ["a run: step 3 of 9"]
    monkeypatch.setattr(os, "getppid", lambda: 1)
    watch.stepped(row)
    assert stop.signal == signal.SIGTERM


def test_the_peak_of_memory_can_be_forgotten() -> None:
    cpu = torch.device("cpu")
    large = torch.ones(2**26)
    high = memory.peak(cpu)
    del large
    memory.forget_peak(cpu)
    if Path("/proc/self/clear_refs").exists():
        assert memory.peak(cpu) < high - 2**27
