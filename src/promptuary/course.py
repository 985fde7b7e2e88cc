"""What a run learns: one task with its examples and its prompt, or several of them side by side.

Knows no optimiser, no loop, and no method, family or task by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from promptuary import checkpoint, files, registry, weights
from promptuary.backbones.base import Backbone
from promptuary.base_to_new import NEW, new_classes, with_new
from promptuary.baselines.base import Baseline
from promptuary.building import PROMPTS, build_baseline, build_method, shape_of
from promptuary.config import part_of
from promptuary.data.load import Splits, load
from promptuary.errors import ConfigError, PromptuaryError
from promptuary.evaluation import Evaluation, evaluate
from promptuary.joint import MEAN, Joint, JointEvaluation, JointFeed, check_metrics
from promptuary.methods.base import Method, Stage
from promptuary.metrics import METRICS
from promptuary.run import AnyRun, BaselineRun, JointRun, Run
from promptuary.seeds import seeded
from promptuary.sources import load_start
from promptuary.tasks.judged import JudgedTask
from promptuary.training_data import Feed
from promptuary.tuned import Tuned, text_state


class Course:
    """One task: its examples, the prompt that learns it, and what that is fed."""

    def __init__(self, run: Run | BaselineRun, backbone: Backbone, place: str = "prompt") -> None:
        """Load and encode the examples, and start the prompt, or let the baseline into the model.

        Args:
            run: the settings.
            backbone: the frozen model.
            place: where the prompt stands in the run's folder.

        Raises:
            PromptuaryError: one line on what is wrong with the settings, the data or an earlier prompt.
        """
        self.run = run
        task_class = registry.load("tasks", run.task.name)
        split_seed = run.data.split_seed if run.data.split_seed is not None else run.seed
        required, check = task_class.required(run.task), task_class.check(run.task)
        self.splits: Splits = load(run.data, required, seeded(split_seed, 1), check)
        self.task = task_class(run.task, self.splits.train)
        length, generator = run.data.max_length, seeded(run.seed, 2)
        self.taught: Method | Baseline
        if isinstance(run, BaselineRun):
            self.folders: tuple[str, ...] = (weights.FOLDER,)
            self.taught = baseline = build_baseline(run.baseline)
            self.learner = Tuned(backbone, self.task, baseline=baseline, max_length=length)
            self.learner.initialise(generator)
        else:
            self.folders = (place,)
            self.taught = method = build_method(run.method, shape_of(backbone, self.task))
            self.learner = Tuned(backbone, self.task, method, max_length=length)
            saved, sources = load_start(method.config, backbone)
            self.learner.initialise(generator, saved, sources, self.splits.train, run.data.augment)
            if not self.learner.trained() and method.text is None:
                raise ConfigError(
                    f"nothing would be trained: {method.name} is frozen and there is no head; set task.reading: head, "
                    "or method.frozen: false"
                )
        if isinstance(self.task, JudgedTask):
            if self.learner.text is None:
                raise ConfigError(
                    f"task {self.task.name} has no right answers to learn from by gradient; use a method whose prompt "
                    "is words, such as rlprompt"
                )
            self.task.ready(self.learner.judging)
        self.feed = Feed(run, self.splits, self.learner)
        self.new = new_classes(run, self.learner)
        if self.new is not None:
            self.feed.rows[NEW] = self.new.rows

    @property
    def prompts(self) -> dict[str, Tuned]:
        """The prompt, by the name of its task."""
        return {self.task.name: self.learner}

    @property
    def primary(self) -> str:
        """The score that chooses the best tensors."""
        return self.task.metrics[0]

    @property
    def higher_is_better(self) -> bool:
        """Whether that should rise."""
        return METRICS[self.primary].higher_is_better

    @property
    def rate(self) -> str:
        """The setting of its learning rate."""
        if self.learner.baseline is None:
            return "method.prompt_lr"
        return "task.head_lr" if self.learner.baseline.head_only else "baseline.learning_rate"

    @property
    def notes(self) -> list[str]:
        """What a person should know about the data."""
        return [*self.splits.notes, *self.task.notes, *self.feed.notes(), *(() if self.new is None else self.new.notes)]

    @property
    def solver(self) -> str:
        """The one that trains it by default."""
        return self.taught.solver

    @property
    def advice(self) -> Mapping[str, Any]:
        """Settings of the solver that the method gives where they are left open."""
        return self.taught.advice

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The parts of the run, one after the other."""
        return self.taught.stages()

    @property
    def whole_batches(self) -> bool:
        """Whether a batch cannot be cut."""
        return self.taught.whole_batches

    def begin(self, stage: int) -> Mapping[str, float]:
        """Before the first step of a later stage; what the method says of it."""
        method = self.learner.method
        assert method is not None  # a baseline has one stage
        sources = load_start(method.config, self.learner.backbone)
        return self.learner.begin(stage, seeded(self.run.seed, 9, stage), *sources)

    def facts(self) -> dict[str, Any]:
        """What result.json says of it."""
        return {
            "method": self.taught.name,
            "task": self.run.suite or self.task.name,
            "data": self.run.data.source,
            "examples": sizes(self.feed),
            "split_hash": self.splits.hash,
            "skipped_rows": self.splits.skipped,
        }

    def evaluate(
        self, split: str, *, batch_size: int, interval: bool, check: Callable[[], None] | None = None
    ) -> Evaluation:
        """Scores on a split; as `evaluation.evaluate`. Of base classes, the test has scores of the new ones too."""
        examples, rows = getattr(self.splits, split), self.feed.rows[split]
        found = evaluate(self.learner, examples, rows=rows, batch_size=batch_size, interval=interval, check=check)
        if self.new is None or split != "test":
            return found
        rows, size = self.feed.rows[NEW], found.batch_size
        other = evaluate(self.new.tuned, self.new.examples, rows=rows, batch_size=size, interval=False, check=check)
        return with_new(found, other, self.primary)

    def save(self, folder: Path, tested: Any) -> None:
        """Write what was learnt as it is now, with its test scores, if there are any, in the card."""
        scores = {} if tested is None else {f"test {name}": score for name, score in tested.scores.items()}
        if self.learner.baseline is not None:
            weights.save_weights(self.learner, folder / self.folders[0], metrics=scores)
            return
        data = self.run.data.model_dump(include={"source", "subset", "revision"})
        data["examples"] = sizes(self.feed)
        checkpoint.save_prompt(self.learner, folder / self.folders[0], metrics=scores, data=data)

    def reload(self, folder: Path) -> None:
        """What was learnt as it was written."""
        if self.learner.baseline is not None:
            weights.restore(self.learner, folder / self.folders[0])
            return
        prompt = folder / self.folders[0]
        facts = checkpoint.read_facts(prompt)
        state = files.read_tensors(prompt / checkpoint.TENSORS, facts["sha256"][checkpoint.TENSORS])
        self.learner.restore({**state, **text_state(facts.get("text"))})
        self.learner.train(False)


class JointCourse:
    """Several tasks: a prompt for each, or one for all."""

    primary = MEAN
    higher_is_better = True
    rate = "method.prompt_lr"

    def __init__(self, run: JointRun, backbone: Backbone) -> None:
        """Load every task, and tie what their prompts share.

        Raises:
            PromptuaryError: one line on what is wrong, with the name of the task.
        """
        self.run = run
        self.courses = {name: _opened(run, name, backbone) for name in run.tasks}
        check_metrics({name: one.primary for name, one in self.courses.items()})
        prompts = {name: one.learner for name, one in self.courses.items()}
        self.learner = Joint(prompts, one=run.mixture.prompt == "one")
        self.feed = JointFeed(run, {name: one.feed for name, one in self.courses.items()})

    @property
    def prompts(self) -> dict[str, Tuned]:
        """The prompts, by task."""
        return self.learner.parts

    @property
    def folders(self) -> tuple[str, ...]:
        """Where the prompts stand in the run's folder."""
        return tuple(folder for one in self.courses.values() for folder in one.folders)

    @property
    def notes(self) -> list[str]:
        """What a person should know about the data."""
        return [f"{name}: {note}" for name, one in self.courses.items() for note in one.notes]

    @property
    def solver(self) -> str:
        """The method's own solver."""
        return next(iter(self.courses.values())).solver

    @property
    def advice(self) -> Mapping[str, Any]:
        """Settings of the solver that the method gives where they are left open."""
        return next(iter(self.courses.values())).advice

    @property
    def stages(self) -> tuple[Stage, ...]:
        """One: methods that learn in stages do so on one task.

        Raises:
            ConfigError: this method does.
        """
        found = {one.stages for one in self.courses.values()}
        if any(len(stages) > 1 for stages in found):
            raise ConfigError(f"{self.run.method.name} learns in stages with these settings: train it on one task")
        return (Stage("all"),)

    @property
    def whole_batches(self) -> bool:
        """Whether a batch cannot be cut."""
        return any(one.whole_batches for one in self.courses.values())

    def begin(self, stage: int) -> Mapping[str, float]:
        """Never called: there is one stage."""
        raise AssertionError(stage)

    def facts(self) -> dict[str, Any]:
        """What result.json says of it; `data`, `split_hash` and `skipped_rows` by task, and the tasks' own examples."""
        own = {name: one.facts() for name, one in self.courses.items()}
        by_task = {key: {name: facts[key] for name, facts in own.items()} for key in ("data", "split_hash")}
        return {
            "method": self.run.method.name,
            "task": "+".join(own),
            **by_task,
            "examples": sizes(self.feed),
            "tasks": {name: {"task": facts["task"], "examples": facts["examples"]} for name, facts in own.items()},
            "skipped_rows": {name: facts["skipped_rows"] for name, facts in own.items() if facts["skipped_rows"]},
        }

    def evaluate(
        self, split: str, *, batch_size: int, interval: bool, check: Callable[[], None] | None = None
    ) -> JointEvaluation:
        """Scores of every task on a split, and their mean."""
        found = {}
        for name, one in self.courses.items():
            found[name] = one.evaluate(split, batch_size=batch_size, interval=interval, check=check)
            batch_size = min(batch_size, found[name].batch_size)
        return JointEvaluation(found, {name: one.primary for name, one in self.courses.items()})

    def save(self, folder: Path, tested: Any) -> None:
        """Write the prompt of every task."""
        for name, one in self.courses.items():
            one.save(folder, None if tested is None else tested.tasks[name])

    def reload(self, folder: Path) -> None:
        """The prompts as they were written."""
        for one in self.courses.values():
            one.reload(folder)


def open_course(run: AnyRun, backbone: Backbone) -> Course | JointCourse:
    """What a run learns.

    Raises:
        PromptuaryError: as the courses themselves.
    """
    if isinstance(run, Run | BaselineRun):
        return Course(run, backbone)
    assert isinstance(run, JointRun)
    return JointCourse(run, backbone)


def _opened(run: JointRun, name: str, backbone: Backbone) -> Course:
    """One of several tasks; what is wrong is said with its name."""
    try:
        return Course(part_of(run, name), backbone, f"{PROMPTS}/{name}")
    except PromptuaryError as error:
        raise type(error)(f"tasks.{name}: {error}") from None


def sizes(feed: Feed | JointFeed) -> dict[str, int]:
    """Examples of each split."""
    return {name: len(rows) for name, rows in feed.rows.items()}
