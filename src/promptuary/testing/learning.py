"""Properties of learning and keeping: parameters, gradients, whole runs, saved prompts, settings, the card.

Knows no method by name; what it needs to know of one is in the case.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from promptuary import checkpoint, registry
from promptuary.config import load_run
from promptuary.errors import ConfigError, FingerprintError, Interrupted
from promptuary.listening import Listener
from promptuary.population import Population
from promptuary.run import BaselineRun
from promptuary.testing.case import Case, expect, expect_close, expect_raised, gradient, logged
from promptuary.training import train
from promptuary.types import Shape


def builds_from_widths_only(case: Case) -> None:
    """Widths are all that the tensors need; no model is there."""
    shape = Shape(width=16, vocabulary=32, classes=3, hidden=16, visual=16, depth=2, patch=4, norms=4)
    made = case.method(case.config(), shape)
    stated, found = case.method.count(case.config(), shape), sum(p.numel() for p in made.parameters())
    expect(found == stated, f"at width 16 it trains {found} parameters, count says {stated}")


def parameter_count_is_the_stated_formula(case: Case) -> None:
    """`count` is what is really there, and every tensor is trained with a positive rate."""
    tuned = case.tuned()
    assert tuned.method is not None
    found = sum(group.parameter.numel() for group in tuned.trained() if not group.name.startswith("head."))
    stated = case.method.count(case.config(), tuned.method.shape)
    expect(found == stated, f"it trains {found} parameters, count says {stated}")
    names = {group.name for group in tuned.trained() if not group.name.startswith("head.")}
    there = dict(tuned.method.named_parameters())
    expect(names == {f"method.{name}" for name in there}, f"trained are {sorted(names)}, there are {sorted(there)}")
    still = [group.name for group in tuned.trained() if group.learning_rate <= 0]
    expect(not still, f"{still} have no positive learning rate")


def only_declared_parameters_get_gradients(case: Case) -> None:
    """Every tensor of the method gets a gradient that is not zero; the backbone gets none."""
    tuned = case.tuned().train(True)
    tuned.loss(tuned.batch(case.rows(tuned))).total.backward()
    leaked = [name for name, parameter in tuned.backbone.model.named_parameters() if parameter.grad is not None]
    expect(not leaked, f"the backbone's {leaked} got gradients")
    for group in tuned.trained():
        expect(bool(gradient(group.parameter, group.name).abs().max() > 0), f"the gradient of {group.name} is zero")


def backbone_bytes_are_unchanged_by_training(case: Case) -> None:
    """Training writes nothing into the frozen model."""
    backbone = case.backbone()
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    train(case.run("bytes", steps=3), backbone=backbone)
    after = backbone.model.state_dict()
    expect(before.keys() == after.keys(), f"{sorted(before.keys() ^ after.keys())} came or went")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    expect(not changed, f"{changed} changed")


def loss_falls_on_the_toy_task(case: Case) -> None:
    """Twenty-five steps on the whole toy set lower the loss by one in a hundred at least."""
    quick = {"batch_size": 30, "schedule": "constant", "evaluate_every": 25}
    result = train(case.run("falls", steps=25, train=quick), backbone=case.backbone())
    losses = [row["loss"] for row in logged(result.dir) if "loss" in row]
    expect(min(losses[-5:]) < 0.99 * losses[0], f"the loss was {losses[0]:.4f} and ends with {losses[-5:]}")


def same_seed_gives_same_bytes(case: Case) -> None:
    """Two runs with one seed write the same file; another seed writes another one."""
    first, second, other = (
        train(case.run(f"seed-{name}", steps=3, seed=seed), backbone=case.backbone())
        for name, seed in zip("abc", (1, 1, 2), strict=True)
    )
    facts = [checkpoint.read_facts(result.dir / "prompt") for result in (first, second, other)]
    # what is drawn stands for the tensors that follow from it
    read = [(one["sha256"], one["drawn"], one.get("text")) for one in facts]
    expect(read[0] == read[1], "two runs with the same seed wrote different prompts")
    # words may be nobody's choice
    expect(read[1] != read[2] or case.spoken, "another seed wrote the same prompt")


def saved_prompt_predicts_the_same(case: Case) -> None:
    """Saved and loaded again, without the training data, it gives the same answers and scores."""
    tuned = case.tuned()
    checkpoint.save_prompt(tuned, case.folder / "saved")
    again = checkpoint.load_prompt(case.folder / "saved", tuned.backbone)
    expect(
        tuned.predict(case.examples()) == again.predict(case.examples()), "the loaded prompt predicts something else"
    )


def another_base_is_refused(case: Case) -> None:
    """A saved prompt does not load onto another model; the message names both."""
    checkpoint.save_prompt(case.tuned(), case.folder / "other")
    own, other = case.backbone(), case.backbone(seed=9)
    error = expect_raised(
        FingerprintError, lambda: checkpoint.load_prompt(case.folder / "other", other), "another base"
    )
    for backbone in (own, other):
        expect(f'"{backbone.config.model}"' in error, f"the message does not name {backbone.config.model}: {error}")


def accumulation_equals_the_big_batch(case: Case) -> None:
    """A batch cut into three parts gives the gradients of the whole; where rows are compared, cutting it is refused."""
    if case.method.whole_batches:
        run = case.run("cut", steps=1, train={"accumulation": 3})
        expect_raised(ConfigError, functools.partial(train, run, backbone=case.backbone()), "a batch in parts")
        expect(not (case.folder / "cut").exists(), "a run that was refused has left its folder")
        return

    def gradients(parts: int) -> dict[str, Tensor]:
        tuned = case.tuned().train(True)
        rows = case.rows(tuned)
        size = -(-len(rows) // parts)
        for start in range(0, len(rows), size):
            batch = tuned.batch(rows[start : start + size])
            (tuned.loss(batch).total * len(batch) / len(rows)).backward()
        return {group.name: gradient(group.parameter, group.name) for group in tuned.trained()}

    whole, cut = gradients(1), gradients(3)
    for name, value in cut.items():
        expect_close(value, whole[name], f"the gradient of {name}")


def forward_only_under_evolution(case: Case) -> None:
    """Candidates for its tensors are scored by forward passes alone, and in one batch cost what each costs alone."""

    def kept(tensor: Tensor) -> Tensor:
        raise AssertionError(f"a tensor {tuple(tensor.shape)} was kept for a backward pass")

    tuned = case.tuned().train(True)
    tuned.moment = 0, 0
    batch, before = tuned.batch(case.rows(tuned)), tuned.state()
    generator = torch.Generator().manual_seed(1)
    candidates = {
        name: torch.stack([value + 0.1 * torch.randn(value.shape, generator=generator) for _ in range(3)])
        for name, value in before.items()
    }
    with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
        found = Population(tuned)(batch, candidates)
    expect(all(map(torch.equal, tuned.state().values(), before.values())), "scoring candidates changed the prompt")
    for number, cost in enumerate(found):
        tuned.restore({name: values[number] for name, values in candidates.items()})
        with torch.no_grad():
            expect_close(cost, tuned.loss(batch).total, f"the loss of candidate {number + 1}")


def a_resumed_run_equals_the_unbroken_one(case: Case) -> None:
    """Stopped twice in the middle of an epoch, with accumulation: the same prompt, scores and losses bit for bit."""
    settings = {"accumulation": 1 if case.method.whole_batches else 2}
    whole = train(case.run("whole", steps=6, train=settings), backbone=case.backbone())
    run = case.run("broken", steps=6, train=settings)
    for stop_at in (2, 4):
        start = functools.partial(train, run, resume=True, listener=_StopAt(stop_at), backbone=case.backbone())
        expect_raised(Interrupted, start, f"a stop at step {stop_at}")
    resumed = train(run, resume=True, backbone=case.backbone())
    prompts = [(result.dir / "prompt" / checkpoint.TENSORS).read_bytes() for result in (whole, resumed)]
    expect(prompts[0] == prompts[1], "the resumed run wrote another prompt")
    expect(whole.metrics == resumed.metrics, f"scores {whole.metrics}, resumed {resumed.metrics}")
    losses = [{row["step"]: row["loss"] for row in logged(one.dir) if "loss" in row} for one in (whole, resumed)]
    expect(losses[0] == losses[1], f"losses {losses[0]}, resumed {losses[1]}")


def settings_survive_yaml(case: Case) -> None:
    """A run written as YAML and read again is the same run."""
    run = case.run("yaml")
    again = load_run(yaml.safe_load(run.to_yaml()))
    expect(again == run, f"{run!r} came back as {again!r}")


def an_unknown_field_is_refused_with_a_suggestion(case: Case) -> None:
    """A misspelt setting is an error of one line that names the nearest one."""
    error = expect_raised(ConfigError, lambda: case.config(prompt_lrr=1), "the setting prompt_lrr")
    expect('did you mean "prompt_lr"' in error, f"no suggestion: {error}")
    expect("\n" not in error, f"more than one line: {error}")


def the_card_states_the_exceptions(case: Case) -> None:
    """The section "Exceptions" of the card lists the declared exceptions with their reasons (where a card is given)."""
    stated, declared = card_exceptions(_card(case).read_text(encoding="utf-8")), dict(case.method.exceptions)
    for name in sorted(stated.keys() | declared.keys()):
        expect(name in stated, f'the card lacks the line "- `{name}`: {declared.get(name)}" under "## Exceptions"')
        expect(name in declared, f'the card states an exception to "{name}", the class {case.method.__name__} does not')
        expect(stated[name] == declared[name], f'"{name}": the card says "{stated[name]}", not "{declared[name]}"')


def the_run_file_of_the_card_trains(case: Case) -> None:
    """The run file in the card's `promptuary train` line trains two steps on the toy task (where a card is given)."""
    file = card_run_file(_card(case))
    run = load_run(file)
    if isinstance(run, BaselineRun):
        raise AssertionError(f"{file.name} trains the baseline {run.baseline.name}, not {case.method.name}")
    own = registry.load("methods", run.method.name) is case.method
    expect(own, f"{file.name} trains {run.method.name}, not {case.method.name}")
    # its own settings, at the size of the tiny models and the toy data
    method = {**run.method.model_dump(), "name": case.method.name, "match_length": None, "init_prompt": None}
    method |= case.settings
    if run.method.origins:
        method["sources"] = case.sources()
    method["init"] = "vocabulary" if method["init"] == "saved" else method["init"]
    changes = {"steps": 2, "epochs": None, "batch_size": 6, "evaluate_every": 1, "save_every": 2, "threads": None}
    small = case.run("card", train={**run.train.model_dump(), **changes}, method=method)
    result = train(small, backbone=case.backbone())
    # a method of words may have nothing more to propose
    done = result.facts["steps"] == 2 or (case.spoken and result.facts["steps"] == 1)
    expect(done, f"{file.name} trained {result.facts['steps']} steps instead of 2")
    expect((result.dir / "prompt" / checkpoint.TENSORS).is_file(), f"{file.name} wrote no prompt")


def nothing_is_written_outside_the_run_folder(case: Case) -> None:
    """Training leaves everything around its folder, and the working folder, as it was."""
    inside, working = case.folder / "only" / "here", case.folder / "working"
    inside.mkdir(parents=True)
    working.mkdir()
    run = case.run("only/here/run", steps=2)
    before = {path for path in case.folder.rglob("*") if "only" not in path.parts}
    with contextlib.chdir(working):
        train(run, backbone=case.backbone())
    new = {path for path in case.folder.rglob("*") if "only" not in path.parts} - before
    new |= {path for path in inside.iterdir() if path.name != "run"}
    expect(not new, f"training wrote {sorted(str(path.relative_to(case.folder)) for path in new)}")


def card_exceptions(card: str) -> dict[str, str]:
    """The lines "- `property`: reason" of a card's section "Exceptions"; a reason may go on in indented lines."""
    section = re.search(r"^## Exceptions$(.*?)(?=^## |\Z)", card, flags=re.M | re.S)
    items = re.findall(r"^- `([^`]+)`: (.+(?:\n[ \t]+.+)*)", section[1], flags=re.M) if section else []
    return {name: " ".join(reason.split()) for name, reason in items}


def card_run_file(card: Path) -> Path:
    """The run file that a card's `promptuary train FILE` line names, in the card's folder or one above it.

    Raises:
        AssertionError: no such line, or no such file.
    """
    line = re.search(r"^promptuary train (\S+\.ya?ml)", card.read_text(encoding="utf-8"), flags=re.M)
    if line is None:
        raise AssertionError(f'{card.name} has no line "promptuary train FILE.yaml"')
    found = next((folder / line[1] for folder in card.resolve().parents if (folder / line[1]).is_file()), None)
    if found is None:
        raise AssertionError(f"{card.name} names {line[1]}, which is not beside it or in a folder above")
    return found


def _card(case: Case) -> Path:
    """The card.

    Raises:
        AssertionError: it does not exist.
    """
    assert case.card is not None
    expect(case.card.is_file(), f"there is no card {case.card}")
    return case.card


@dataclass
class _StopAt(Listener):
    """Asks for a stop once a step is reached."""

    step: int
    training: Any = field(default=None)

    def begun(self, training: Any) -> None:
        self.training = training

    def stepped(self, row: Mapping[str, Any]) -> None:
        if row["step"] == self.step:
            self.training.stop.request()
