"""Baselines: which numbers each trains and no others, run and file like a prompt's, and what is refused in one line.

Knows no benchmark.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import promptuary
import tiny
import toy
from promptuary import registry, weights
from promptuary.backbones.base import BackboneConfig
from promptuary.building import build_baseline, open_backbone
from promptuary.config import load_run
from promptuary.course import Course
from promptuary.data.load import load
from promptuary.errors import ConfigError, FileFormatError, FingerprintError, Interrupted, PromptuaryError
from promptuary.evaluation import evaluate
from promptuary.listening import Stop
from promptuary.methods.base import Group
from promptuary.run import BaselineRun
from promptuary.seeds import seeded
from promptuary.training import Listener, Training, train
from promptuary.tuned import Tuned

ROOT = Path(__file__).parents[3]
BASELINES = registry.names("baselines")
FAMILIES = {"causal": "gpt2", "seq2seq": "bart", "masked": "bert", "encoder": "minilm"}
"""An architecture with biases for each family."""


def settings(where: Path, kind: str, name: str, task: str = "classify_head", run: str = "run") -> dict[str, Any]:
    """A run of a baseline on a tiny model that lies in a folder."""
    values = toy.settings(where, kind, task, run)
    model = where / kind
    if not model.exists():
        tiny.save(model, kind)
    backbone = {"model": str(model), "family": tiny.FAMILY[kind], "device": "cpu"}
    rate = {} if name == "linear_probe" else {"learning_rate": 1e-2}
    changed = {"backbone": backbone, "baseline": {"name": name, **rate}}
    return {key: value for key, value in {**values, **changed}.items() if key != "method"}


def result(where: Path, kind: str, name: str, task: str = "classify_head", run: str = "run", **train_: Any) -> Any:
    values = settings(where, kind, name, task, run)
    values["train"] = {**values["train"], **train_}
    return train(load_run(values))


def course(where: Path, kind: str, name: str, task: str = "classify_head", **baseline: Any) -> Course:
    values = settings(where, kind, name, task)
    values["baseline"] |= baseline
    run = load_run(values)
    assert isinstance(run, BaselineRun)
    return Course(run, open_backbone(run.backbone))


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def refusal(call: Any, kind: type[PromptuaryError] = ConfigError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- what is trained ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILIES.values())
@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_trains_on_every_family_and_comes_back_from_its_folder(name: str, kind: str, tmp_path: Path) -> None:
    done = result(tmp_path, kind, name)
    facts = json.loads((done.dir / "result.json").read_text())
    assert (facts["method"], facts["added_tokens"], facts["steps"]) == (name, 0, 3)
    assert facts["trainable_parameters"] == sum(group.parameter.numel() for group in done.prompt.trained())
    again = promptuary.load_baseline(done.dir)
    assert again.predict(toy.rows(4)) == done.prompt.predict(toy.rows(4))
    assert evaluate(again, toy.rows(4, seed=2)).scores == done.metrics


@pytest.mark.parametrize("name", BASELINES)
def test_only_what_a_baseline_names_changes(name: str, tmp_path: Path) -> None:
    """Loss and optimiser never reach another weight of the model, and every named tensor of the head or body moves."""
    taught = course(tmp_path, "bert", name)
    model = taught.learner.backbone.model
    before, named = state(model), {group.name: group.parameter for group in taught.learner.trained()}
    values = settings(tmp_path, "bert", name, run="other")
    training = Training(load_run(values), Listener())
    training.run(resume=False, fresh=False)
    after = state(training.backbone.model)
    # the body's own tensors, under the names that they have with PEFT's wrapping
    changed = {key for key in after if key not in before or not torch.equal(after[key], before[key])}
    if name == "full":
        assert changed >= {f"{key}" for key in before if ".layer." in key and key.endswith("weight")}
    if name == "bitfit":
        assert changed
        assert all(key.endswith("bias") for key in changed)
        assert len(named) - 2 == sum(key.endswith(".bias") for key, _ in model.named_parameters())
    if name == "lora":
        assert changed
        assert all("lora_" in key for key in changed)
    if name == "linear_probe":
        assert not changed
        assert {key.split(".")[0] for key in named} == {"head"}


def test_full_fine_tuning_takes_the_step_that_a_loop_by_hand_takes(tmp_path: Path) -> None:
    """One AdamW step on label words, against transformers' own model and torch's own optimiser."""
    taught = course(tmp_path, "bert", "full", "classify_words", learning_rate=1e-3)
    training = Training(load_run({**settings(tmp_path, "bert", "full", "classify_words", run="hand"), "train": {
        "steps": 1, "batch_size": 4, "warmup": 0, "schedule": "constant", "clip": 1e9,
    }, "baseline": {"name": "full", "learning_rate": 1e-3}}), Listener())  # fmt: skip
    rows = training.feed.at(0)
    by_hand = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "bert").eval()
    batch = taught.learner.batch(rows)
    words = taught.learner.asking.words
    assert words is not None
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    logits = by_hand(**given).logits[torch.arange(len(batch)), batch.slots["mask"]][:, words.ids[:, 0]]
    loss = torch.nn.functional.cross_entropy(logits, batch.target)
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=1e-3, weight_decay=0.0)
    loss.backward()
    optimizer.step()
    training.run(resume=False, fresh=False)
    loss_of = next(row["loss"] for row in toy.metric_rows(training.folder.path) if "loss" in row)
    assert loss_of == pytest.approx(float(loss.detach()), rel=1e-5)
    last = training.folder.load_state()
    assert last is not None
    for name, value in by_hand.named_parameters():
        if name.endswith("key.bias"):  # has no gradient but rounding, which Adam makes a whole step of
            continue
        torch.testing.assert_close(last[0][f"trained/baseline.{name}"], value.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", FAMILIES.values())
def test_every_fast_path_gives_full_fine_tuning_the_gradients_of_the_plain_pass(kind: str, tmp_path: Path) -> None:
    """Sharing, narrow heads and losses in chunks are made for frozen models; here they give way, or are exact."""
    kinds = ["classify_words", "choose", *(["generate"] if kind in ("gpt2", "bart") else [])]
    for task in kinds:
        found = []
        for plain in (False, True):
            values = settings(tmp_path, kind, "full", task)
            values["backbone"] |= {"narrow_head": not plain, "share_prefix": not plain}
            run = load_run(values)
            assert isinstance(run, BaselineRun)
            taught = Course(run, open_backbone(run.backbone))
            taught.learner.train(True)
            taught.learner.loss(taught.learner.batch(taught.feed.at(0))).total.backward()
            model = taught.learner.backbone.model
            found.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
        assert found[0].keys() == found[1].keys(), task
        for name in found[0]:
            torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-6, msg=f"{task} {name}")


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_lora_starts_as_the_bare_model(kind: str, tmp_path: Path) -> None:
    taught = course(tmp_path, kind, "lora", "classify_words")
    fresh = tiny.backbone(kind)
    bare = Tuned(fresh, taught.task, max_length=40)
    batch = bare.batch(taught.feed.rows["test"])
    with torch.no_grad():
        assert torch.equal(taught.learner.scores(batch), bare.scores(batch))


def test_lora_is_what_peft_loads(tmp_path: Path) -> None:
    """The adapter in the folder, loaded by PEFT onto the bare model, gives the scores of the run."""
    done = result(tmp_path, "bert", "lora", "classify_words", steps=8)
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "bert").eval()
    theirs = peft.PeftModel.from_pretrained(model, done.dir / "weights").eval()
    tuned = done.prompt
    batch = tuned.batch(tuned.rows(toy.rows(4), labelled=False))
    with torch.no_grad():
        given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        logits = theirs(**given).logits[torch.arange(4), batch.slots["mask"]][:, tuned.asking.words.ids[:, 0]]
        torch.testing.assert_close(tuned.scores(batch), logits, rtol=1e-5, atol=1e-5)


def test_lora_changes_the_modules_that_are_named(tmp_path: Path) -> None:
    taught = course(tmp_path, "bert", "lora", targets=["query", "key", "value"], rank=2)
    names = [group.name for group in taught.learner.trained() if group.name.startswith("baseline.")]
    assert len(names) == 2 * 3 * 2  # layers, targets, factors
    # factors [r, d] and [d, r] of 3 matrices in 2 layers, and a head of two answers
    assert taught.learner.trainable_parameters == 2 * 3 * 2 * (2 * tiny.WIDTH) + 2 * (tiny.WIDTH + 1)


def test_training_makes_the_loss_fall(tmp_path: Path) -> None:
    for name in BASELINES:
        values = settings(tmp_path, "bert", name, run=name)
        values |= {"train": {"steps": 40, "batch_size": 11, "evaluate_every": 40}}
        values["task"] = {**values["task"], "head_lr": 0.05}
        train(load_run(values))
        losses = [row["loss"] for row in toy.metric_rows(tmp_path / name) if "loss" in row]
        # a head or biases alone do little on a random model of two layers
        assert losses[-1] < (0.7 if name in ("full", "lora") else 0.97) * losses[0], name


# ---- like a run of a prompt -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASELINES)
def test_the_same_seed_gives_the_same_bytes_and_a_resumed_run_the_unbroken_one(name: str, tmp_path: Path) -> None:
    whole = result(tmp_path, "bert", name, run="whole", steps=4)
    twin = result(tmp_path, "bert", name, run="twin", steps=4)
    values = settings(tmp_path, "bert", name, run="broken")
    values["train"] |= {"steps": 4, "save_every": 1}
    stop = Stop()

    class Stopping(Listener):
        def stepped(self, row: Any) -> None:
            if row["step"] == 2:
                stop.request()

    with pytest.raises(Interrupted):
        train(load_run(values), listener=Stopping(), stop=stop)
    resumed = train(load_run(values), resume=True)
    files = [one.dir / "weights" / weights.TENSORS for one in (whole, twin, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes() == files[2].read_bytes()
    assert whole.metrics == resumed.metrics
    # a finished one is left alone
    assert train(load_run(values), resume=True).facts["train_seconds"] == resumed.facts["train_seconds"]


def test_padding_changes_nothing(tmp_path: Path) -> None:
    taught = course(tmp_path, "gpt2", "lora", "classify_words")
    rows = taught.feed.rows["train"]
    with torch.no_grad():
        together = taught.learner.scores(taught.learner.batch(rows))
        alone = torch.cat([taught.learner.scores(taught.learner.batch([row])) for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing_and_parts_of_a_batch_change_nothing(tmp_path: Path) -> None:
    losses = []
    for number, changes in enumerate(({}, {"gradient_checkpointing": True}, {"accumulation": 2})):
        result(tmp_path, "bert", "full", run=str(number), **changes)
        losses.append([row["loss"] for row in toy.metric_rows(tmp_path / str(number)) if "loss" in row])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("name", BASELINES)
def test_its_run_file_trains_two_steps(name: str, tmp_path: Path) -> None:
    model = {"model": tiny.save(tmp_path / "model", "encoder"), "family": "encoder", "device": "cpu"}
    read = load_run(ROOT / "runs" / f"{name}.yaml", ["train.steps=2"], out=str(tmp_path / "run"), backbone=model)
    labels = sorted({row["label"] for row in load(read.data, ("text", "label"), torch.Generator()).train})
    # the tiny vocabulary knows other words than the real one
    task = {**read.task.model_dump(), "labels": dict(zip(labels, tiny.WORDS, strict=False))}
    data = {**read.data.model_dump(), "train_size": 16, "validation_size": 8, "max_length": 24}
    done = train(load_run({**read.model_dump(), "task": task, "data": data}))
    assert (done.facts["method"], done.facts["steps"]) == (name, 2)


def test_settings_survive_yaml(tmp_path: Path) -> None:
    for name in BASELINES:
        run = load_run(settings(tmp_path, "bert", name))
        (tmp_path / "again.yaml").write_text(run.to_yaml())
        assert load_run(tmp_path / "again.yaml") == run


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_mistakes_in_a_run_are_told_in_one_line(tmp_path: Path) -> None:
    values = settings(tmp_path, "bert", "lora")

    def read(**changes: Any) -> str:
        changed = {name: value for name, value in {**values, **changes}.items() if value is not None}
        return refusal(lambda: load_run(changed))

    assert "either a method or a baseline" in read(method={"name": "ept"})
    assert "gradients" in read(solver={"name": "evolution"})
    assert 'no such baseline: "lorra"; did you mean "lora"?' in read(baseline={"name": "lorra"})
    assert "it is a method: write `method: {name: ept}`" in read(baseline={"name": "ept"})
    assert 'did you mean "rank"' in read(baseline={"name": "lora", "rnk": 4})
    assert "it is a baseline: write `baseline: {name: lora}`" in read(baseline=None, method={"name": "lora"})
    tasks = {"one": {"task": values["task"], "data": values["data"]}, "two": {"task": values["task"]}}
    assert "on one task" in read(tasks=tasks, task=None, data=None)


def test_a_probe_asks_for_a_head(tmp_path: Path) -> None:
    assert "task.reading: head" in refusal(lambda: course(tmp_path, "bert", "linear_probe", "classify_words"))


def test_a_model_without_biases_is_refused(tmp_path: Path) -> None:
    assert "LlamaForCausalLM has no biases" in refusal(lambda: course(tmp_path, "llama", "bitfit", "classify_words"))


def test_targets_that_are_not_there_are_refused(tmp_path: Path) -> None:
    assert "baseline.targets" in refusal(lambda: course(tmp_path, "bert", "lora", targets=["nothing"]))


@pytest.mark.parametrize("name", ["full", "bitfit"])
def test_weights_in_half_precision_are_not_trained(name: str, tmp_path: Path) -> None:
    values = settings(tmp_path, "bert", name)
    values["backbone"] |= {"dtype": "bfloat16"}
    assert "backbone.dtype: float32" in refusal(lambda: train(load_run(values)))


def test_lora_on_a_model_in_half_precision_is_held_in_float32(tmp_path: Path) -> None:
    values = settings(tmp_path, "bert", "lora")
    values["backbone"] |= {"dtype": "bfloat16"}
    done = train(load_run(values))
    assert {group.parameter.dtype for group in done.prompt.trained()} == {torch.float32}


def test_a_model_with_trained_weights_is_nobody_elses(tmp_path: Path) -> None:
    taught = course(tmp_path, "bert", "full")
    assert "nothing else can use it" in refusal(lambda: Tuned(taught.learner.backbone, taught.task))
    assert "nobody else uses" in refusal(taught.learner.backbone.thaw)
    run = load_run(settings(tmp_path, "bert", "full"))
    assert "leave backbone out" in refusal(lambda: train(run, backbone=tiny.backbone("bert")))
    assert "there is no prompt" in refusal(lambda: taught.learner.attach().__enter__(), PromptuaryError)


def test_a_sweep_takes_no_baseline(tmp_path: Path) -> None:
    run = load_run(settings(tmp_path, "bert", "lora"))
    assert "the baseline lora changes the weights" in refusal(lambda: promptuary.sweep([run]))


def test_a_model_that_others_hold_is_not_thawed() -> None:
    one = tiny.backbone("bert")
    other = type(one)(one.model, one.tokenizer, BackboneConfig(model="tiny", family="masked"))
    assert "nobody else uses" in refusal(one.thaw)
    other.release()
    assert one.thaw() is one.model


def test_a_damaged_or_foreign_folder_is_told(tmp_path: Path) -> None:
    done = result(tmp_path, "bert", "bitfit")
    folder = done.dir / "weights"
    assert "holds the weights of a baseline and no prompt" in refusal(
        lambda: promptuary.load_prompt(done.dir), FileFormatError
    )
    assert "holds no weights" in refusal(lambda: promptuary.load_baseline(tmp_path), FileFormatError)
    tiny.save(tmp_path / "other", "bert", seed=1)
    call = lambda: promptuary.load_baseline(done.dir, model=tmp_path / "other")  # noqa: E731
    assert "does not fit" in refusal(call, FingerprintError)
    tensors, facts = folder / weights.TENSORS, folder / weights.FACTS
    content = tensors.read_bytes()
    tensors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "damaged" in refusal(lambda: promptuary.load_baseline(done.dir), FileFormatError)
    tensors.write_bytes(content)
    facts.write_text(facts.read_text().replace('"max_length": 40', '"max_length": 41'))
    assert "damaged or was edited" in refusal(lambda: promptuary.load_baseline(done.dir), FileFormatError)


def test_starting_values_come_from_the_generator(tmp_path: Path) -> None:
    """Two seeds start LoRA's first factor apart, one seed twice alike, and torch's own generator is left alone."""
    drawn = []
    for seed in (0, 0, 1):
        made = build_baseline(load_run(settings(tmp_path, "bert", "lora")).baseline)
        torch.manual_seed(len(drawn))
        before = torch.get_rng_state()
        made.install(tiny.backbone("bert").thaw(), seeded(seed, 2))
        assert torch.equal(before, torch.get_rng_state())
        first: Group = made.trained()[0]
        drawn.append(first.parameter.detach().clone())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
