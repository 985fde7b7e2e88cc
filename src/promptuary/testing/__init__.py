"""The public contract suite: every property that a method must have on every family that it supports.

Knows no method by name; the whole table stands in one file. An outside method gets the same tests:

    from promptuary.testing import check_method
    check_method(MyMethod)
"""

from __future__ import annotations

import functools
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from promptuary import checkpoint, registry
from promptuary.backbones.base import Backbone
from promptuary.config import Run, load_run
from promptuary.data.collate import Row
from promptuary.errors import ConfigError, FingerprintError, Interrupted, NotFoldable
from promptuary.listening import Listener
from promptuary.methods.base import Method, MethodConfig
from promptuary.prompts.init import Starting
from promptuary.tasks.classify import Classify, ClassifyConfig
from promptuary.testing import tiny
from promptuary.training import Result, train
from promptuary.tuned import Tuned
from promptuary.types import Batch, Prompt, Shape, View

TEXTS = (
    "a red apple was good",
    "the old dog sleeps in the sun and sings",
    "blue sky",
    "never cold but always very hot",
    "six birds eat one plum",
)


@dataclass(frozen=True)
class Case:
    """One method on one family, with everything a property needs."""

    method: type[Method]
    family: str
    settings: Mapping[str, Any]
    folder: Path

    def config(self, **changes: Any) -> MethodConfig:
        """The method's settings for tiny models."""
        made: MethodConfig = self.method.Config.read(
            {"name": self.method.name, **self.settings, **changes}, where="method"
        )
        return made

    def backbone(self, seed: int = 0, **settings: Any) -> Backbone:
        """A fresh tiny model of the family."""
        return tiny.backbone(self.family, seed, **settings)

    def tuned(self, backbone: Backbone | None = None, seed: int = 0, **changes: Any) -> Tuned:
        """The method on a small classification task, started and slightly moved so that every part matters."""
        backbone = backbone if backbone is not None else self.backbone()
        words = {"positive": "good", "negative": "bad", "neutral": "maybe"}
        task = Classify(ClassifyConfig(template="{text} it was {mask}", labels=words))
        tuned = Tuned(backbone, task, self.method(self.config(**changes), backbone.shape), max_length=40)
        tuned.initialise(torch.Generator().manual_seed(seed))
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for group in tuned.trained():
                group.parameter.add_(0.1 * torch.randn(group.parameter.shape, generator=generator))
        return tuned.train(False)

    def rows(self, tuned: Tuned) -> list[Row]:
        """Encoded examples with labels."""
        labels = itertools.cycle(("positive", "negative", "neutral"))
        return tuned.rows([{"text": text, "label": next(labels)} for text in TEXTS], labelled=True)

    def run(self, name: str, *, steps: int = 12, seed: int = 0, train: Mapping[str, Any] | None = None) -> Run:
        """A run on a toy data set in which the first word decides; its folder is `name`."""
        source = self.folder / "toy"
        if not source.exists():
            write_toy(source)
        return load_run(
            {
                "task": {
                    "name": "classify",
                    "template": "{text} it was {mask}",
                    "labels": {"positive": "good", "negative": "bad"},
                },
                "data": {"source": str(source), "max_length": 40},
                "backbone": {
                    "model": f"tiny-{self.family}",
                    "family": tiny.FAMILY[tiny.FAMILIES.get(self.family, self.family)],
                },
                "method": self.config().model_dump(),
                "train": {"steps": steps, "batch_size": 6, "evaluate_every": 5, "save_every": 3, **(train or {})},
                "seed": seed,
                "out": str(self.folder / name),
            }
        )


def write_toy(folder: Path) -> None:
    """A tiny data set: the first word decides the label."""
    folder.mkdir(parents=True)
    words = torch.Generator().manual_seed(5)
    fillers = tiny.WORDS[20:60]
    for name, count in (("train", 30), ("validation", 8), ("test", 8)):
        lines = []
        for number in range(count):
            label = ("positive", "negative")[number % 2]
            length = int(torch.randint(2, 7, (1,), generator=words))
            rest = [fillers[int(place)] for place in torch.randint(len(fillers), (length,), generator=words)]
            lines.append(json.dumps({"text": " ".join([("red", "blue")[number % 2], *rest]), "label": label}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


# ---- properties -----------------------------------------------------------------------------------------------------


def builds_from_widths_only(case: Case) -> None:
    """No model is needed to make the tensors."""
    made = case.method(case.config(), Shape(width=16))
    assert sum(p.numel() for p in made.parameters()) == case.method.count(case.config(), Shape(width=16))


def parameter_count_is_the_stated_formula(case: Case) -> None:
    """`count` is what is really there, and every tensor belongs to a learning-rate group."""
    tuned = case.tuned()
    assert tuned.method is not None
    assert tuned.trainable_parameters == case.method.count(case.config(), tuned.backbone.shape)
    assert {group.name for group in tuned.trained()} == {
        f"method.{name}" for name, _ in tuned.method.named_parameters()
    }
    assert all(group.learning_rate > 0 for group in tuned.trained())


def only_declared_parameters_get_gradients(case: Case) -> None:
    """The backbone gets none, every tensor of the method does."""
    tuned = case.tuned().train(True)
    tuned.loss(tuned.batch(case.rows(tuned))).total.backward()
    assert all(parameter.grad is None for parameter in tuned.backbone.model.parameters())
    for group in tuned.trained():
        gradient = group.parameter.grad
        assert gradient is not None, group.name
        assert bool(gradient.abs().max() > 0), group.name


def backbone_bytes_are_unchanged_by_training(case: Case) -> None:
    """Training writes nothing into the frozen model."""
    backbone = case.backbone()
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    train(case.run("bytes", steps=3), backbone=backbone)
    after = backbone.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def loss_falls_on_the_toy_task(case: Case) -> None:
    """Training helps: forty steps on the whole toy set."""
    quick = {"batch_size": 30, "schedule": "constant", "evaluate_every": 40}
    result = train(case.run("falls", steps=40, train=quick), backbone=case.backbone())
    losses = [row["loss"] for row in _rows(result.dir) if "loss" in row]
    assert min(losses[-5:]) < 0.99 * losses[0], (losses[0], losses[-5:])


def same_seed_gives_same_bytes(case: Case) -> None:
    """And another seed other ones."""
    first, second, other = (
        train(case.run(f"seed-{name}", steps=3, seed=seed), backbone=case.backbone())
        for name, seed in zip("abc", (1, 1, 2), strict=True)
    )
    read = [(result.dir / "prompt" / checkpoint.TENSORS).read_bytes() for result in (first, second, other)]
    assert read[0] == read[1] != read[2]


def saved_prompt_predicts_the_same(case: Case) -> None:
    """Through the folder and back, without the training data."""
    tuned = case.tuned()
    checkpoint.save_prompt(tuned, case.folder / "saved")
    again = checkpoint.load_prompt(case.folder / "saved", tuned.backbone)
    assert tuned.predict(list(TEXTS)) == again.predict(list(TEXTS))


def another_base_is_refused(case: Case) -> None:
    """With a message that names both."""
    checkpoint.save_prompt(case.tuned(), case.folder / "other")
    error = _raised(FingerprintError, lambda: checkpoint.load_prompt(case.folder / "other", case.backbone(seed=9)))
    assert "-0" in error, error
    assert "-9" in error, error


def folded_equals_live(case: Case) -> None:
    """Within 1e-5, or a typed refusal by a method whose prompt depends on the input."""
    tuned = case.tuned()
    assert tuned.method is not None
    batch = tuned.batch(case.rows(tuned))
    if tuned.method.needs:
        _raised(NotFoldable, tuned.method.fold)
        return
    folded = tuned.scores(batch)
    _close(folded, tuned.train(True).scores(batch))


def padding_on_either_side_changes_nothing(case: Case) -> None:
    """More padding, and padding on the left."""
    tuned = case.tuned()
    batch = tuned.batch(case.rows(tuned))
    _close(tuned.scores(batch), tuned.scores(_padded(batch, right=5)))
    _close(tuned.scores(batch), tuned.scores(_padded(batch, left=5)))


def a_row_of_a_batch_equals_that_row_alone(case: Case) -> None:
    """Batch composition is irrelevant."""
    tuned = case.tuned()
    rows = case.rows(tuned)
    alone = torch.cat([tuned.scores(tuned.batch([row])) for row in rows])
    _close(tuned.scores(tuned.batch(rows)), alone)


def row_order_is_irrelevant(case: Case) -> None:
    """A permuted batch gives permuted scores."""
    tuned = case.tuned()
    rows, order = case.rows(tuned), [3, 1, 4, 0, 2]
    _close(tuned.scores(tuned.batch(rows))[order], tuned.scores(tuned.batch([rows[place] for place in order])))


def rows_with_different_prompts_equal_separate_runs(case: Case) -> None:
    """Two prompts and none at all, mixed in one batch."""
    backbone = case.backbone()
    one, two = case.tuned(backbone, seed=1), case.tuned(backbone, seed=7)
    batch = one.batch(case.rows(one))
    if one.method is None or one.method.needs:
        return
    prompts = [one.prompt(batch), two.prompt(batch), Prompt()]
    which = torch.tensor([0, 1, 2, 1, 0])
    words = one._words
    assert words is not None
    mixed = backbone.score(replace(batch, prompt_index=which), prompts, words)
    separate = torch.stack([backbone.score(batch, prompts[int(k)], words)[row] for row, k in enumerate(which)])
    _close(mixed, separate)


def cached_generation_equals_uncached(case: Case) -> None:
    """Where the family writes; also a padded batch against each row alone."""
    tuned = case.tuned()
    if "generate" not in tuned.backbone.abilities:
        return
    rows = case.rows(tuned)
    batch = tuned.batch(rows)

    def write(part: Batch, **options: Any) -> list[list[int]]:
        return tuned.backbone.generate(part, tuned.prompt(part), max_new_tokens=6, **options)

    cached = write(batch)
    assert cached == write(batch, use_cache=False)
    assert cached == [write(tuned.batch([row]))[0] for row in rows]


def detaching_restores_the_base(case: Case) -> None:
    """Bit for bit, after a step of training."""
    kind = tiny.FAMILIES.get(case.family, case.family)
    model, plain = tiny.model(kind), tiny.model(kind)
    backbone = type(case.backbone())(model, tiny.backbone(kind).tokenizer, case.backbone().config)
    tuned = case.tuned(backbone).train(True)
    tuned.loss(tuned.batch(case.rows(tuned))).total.backward()
    backbone.release()
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert all(p.requires_grad for p in model.parameters())


def accumulation_equals_the_big_batch(case: Case) -> None:
    """Cut in three, the gradients are the same."""

    def gradients(parts: int) -> list[Tensor]:
        tuned = case.tuned().train(True)
        rows = case.rows(tuned)
        size = -(-len(rows) // parts)
        for start in range(0, len(rows), size):
            batch = tuned.batch(rows[start : start + size])
            (tuned.loss(batch).total * len(batch) / len(rows)).backward()
        return [_gradient(group.parameter) for group in tuned.trained()]

    for whole, cut in zip(gradients(1), gradients(3), strict=True):
        _close(whole, cut)


def a_resumed_run_equals_the_unbroken_one(case: Case) -> None:
    """Bit for bit: prompt, validation scores and losses, stopped in the middle of an epoch, with accumulation."""
    settings = {"accumulation": 2}
    whole = train(case.run("whole", train=settings), backbone=case.backbone())
    run = case.run("broken", train=settings)
    for stop_at in (4, 9):
        start = functools.partial(train, run, resume=True, listener=_StopAt(stop_at), backbone=case.backbone())
        _raised(Interrupted, start)
    resumed = train(run, resume=True, backbone=case.backbone())
    assert (whole.dir / "prompt" / checkpoint.TENSORS).read_bytes() == (
        resumed.dir / "prompt" / checkpoint.TENSORS
    ).read_bytes()
    assert whole.metrics == resumed.metrics
    losses = [{row["step"]: row["loss"] for row in _rows(result.dir) if "loss" in row} for result in (whole, resumed)]
    assert losses[0] == losses[1]


def mixed_precision_is_finite(case: Case) -> None:
    """Under bf16 autocast, and on a bfloat16 backbone; the prompt stays in float32."""
    for backbone in (case.backbone(), case.backbone(dtype="bfloat16")):
        tuned = case.tuned(backbone).train(True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = tuned.loss(tuned.batch(case.rows(tuned))).total
        loss.backward()
        assert bool(loss.isfinite())
        assert all(
            g.parameter.dtype == torch.float32 and bool(_gradient(g.parameter).isfinite().all())
            for g in tuned.trained()
        )


def settings_survive_yaml(case: Case) -> None:
    """A run written as YAML and read again is the same run."""
    run = case.run("yaml")
    assert load_run(yaml.safe_load(run.to_yaml())) == run


def an_unknown_field_is_refused_with_a_suggestion(case: Case) -> None:
    """One line that names the nearest field."""
    error = _raised(ConfigError, lambda: case.config(prompt_lrr=1))
    assert 'did you mean "prompt_lr"' in error, error
    assert "\n" not in error


def nothing_is_written_outside_the_run_folder(case: Case) -> None:
    """Two steps of training leave everything else as it was."""
    inside = case.folder / "only" / "here"
    inside.mkdir(parents=True)
    run = case.run("only/here/run", steps=2)
    before = {path for path in case.folder.rglob("*") if "only" not in path.parts}
    train(run, backbone=case.backbone())
    assert {path for path in case.folder.rglob("*") if "only" not in path.parts} == before
    assert [path.name for path in inside.iterdir()] == ["run"]


PROPERTIES: dict[str, Callable[[Case], None]] = {
    check.__name__: check
    for check in (
        builds_from_widths_only,
        parameter_count_is_the_stated_formula,
        only_declared_parameters_get_gradients,
        backbone_bytes_are_unchanged_by_training,
        loss_falls_on_the_toy_task,
        same_seed_gives_same_bytes,
        saved_prompt_predicts_the_same,
        another_base_is_refused,
        folded_equals_live,
        padding_on_either_side_changes_nothing,
        a_row_of_a_batch_equals_that_row_alone,
        row_order_is_irrelevant,
        rows_with_different_prompts_equal_separate_runs,
        cached_generation_equals_uncached,
        detaching_restores_the_base,
        accumulation_equals_the_big_batch,
        a_resumed_run_equals_the_unbroken_one,
        mixed_precision_is_finite,
        settings_survive_yaml,
        an_unknown_field_is_refused_with_a_suggestion,
        nothing_is_written_outside_the_run_folder,
    )
}
"""Every property by name."""


def check_method(
    method: type[Method], *, settings: Mapping[str, Any] | None = None, families: Sequence[str] = tuple(tiny.FAMILIES)
) -> None:
    """Run the whole contract on a method.

    Args:
        method: a final class; it need not be registered.
        settings: settings that fit tiny models (width 32, texts of up to 40 tokens); default: `method.tiny`.
        families: families to check on.

    Raises:
        AssertionError: names the property and the family that failed.
    """
    for family, (name, check) in itertools.product(families, PROPERTIES.items()):
        with tempfile.TemporaryDirectory() as folder:
            try:
                check(case_of(method, family, Path(folder), settings))
            except AssertionError as error:
                raise AssertionError(f"{method.name} on {family}: {name}: {error}") from error


def case_of(method: type[Method], family: str, folder: Path, settings: Mapping[str, Any] | None = None) -> Case:
    """One cell of the table."""
    registry.add("methods", method)
    return Case(method, family, method.tiny if settings is None else settings, folder)


# ---- helpers --------------------------------------------------------------------------------------------------------


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


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def _close(one: Tensor, two: Tensor, tolerance: float = 1e-5) -> None:
    one, two = one.detach(), two.detach()
    difference = float((one - two).abs().max())
    scale = max(1.0, float(two[two.isfinite()].abs().max()))
    assert difference <= tolerance * scale, f"differs by {difference:.1e} on a scale of {scale:.1e}"


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _raised(kind: type[Exception], call: Callable[[], Any]) -> str:
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"{kind.__name__} was not raised")


def _padded(batch: Batch, left: int = 0, right: int = 0) -> Batch:
    def pad(value: Tensor | None, filling: int) -> Tensor | None:
        return None if value is None else torch.nn.functional.pad(value, (left, right), value=filling)

    ids, mask = pad(batch.input_ids, 0), pad(batch.attention_mask, 0)
    assert ids is not None
    assert mask is not None
    slots = {name: at + left for name, at in batch.slots.items()}
    return replace(batch, input_ids=ids, attention_mask=mask, segment_ids=pad(batch.segment_ids, 0), slots=slots)


__all__ = ["PROPERTIES", "Case", "Result", "Starting", "View", "case_of", "check_method", "write_toy"]
