"""The stages of a run: where each begins, and the solver that it has.

Knows no loop, no checkpoint, and no method or solver by name.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from promptuary import registry
from promptuary.backbones.base import BackboneConfig
from promptuary.building import open_backbone
from promptuary.course import Course, JointCourse
from promptuary.errors import ConfigError
from promptuary.population import Population
from promptuary.run import AnyRun
from promptuary.seeds import seeded
from promptuary.solvers.base import Job, Solver, SolverConfig
from promptuary.talking import Talking
from promptuary.voices import CausalVoice
from promptuary.wording import Wording


class Staging:
    """Stages one after the other, each with its share of the steps."""

    def __init__(self, run: AnyRun, course: Course | JointCourse, processes: int = 1) -> None:
        """Of the settings, or where they say nothing, of the method.

        Raises:
            ConfigError: there are fewer steps than stages, the model has no gradients for the solver, or batches that
                may not be cut would be.
        """
        self.run, self.course, self.stages = run, course, course.stages
        name = course.solver if run.solver is None else run.solver.name
        self.solver_class: type[Solver] = registry.load("solvers", name)
        self.settings = run.solver or self.solver_class.Config()
        self.words = self._words()
        self.talking = Talking(Path(run.out), course.learner.backbone)
        self.steps = self.settings.steps(course.feed.steps)
        self.borders = self._borders()
        if self.solver_class.uses_gradients and not course.learner.backbone.differentiable:
            raise ConfigError("this model gives no gradients; use solver: {name: evolution}")
        if course.whole_batches and (run.train.accumulation > 1 or processes > 1):
            raise ConfigError(
                "the loss of this method compares the rows of a batch, so a batch cannot be cut: use "
                "train.accumulation: 1 and one process"
            )

    def _borders(self) -> list[int]:
        """The step at which each stage begins, and the end; every stage has a step."""
        count, found = len(self.stages), [0]
        if count > self.steps:
            raise ConfigError(f"{self.steps} steps are fewer than the {count} stages of the method; train longer")
        for place, share in enumerate(itertools.accumulate(stage.share for stage in self.stages), start=1):
            found.append(min(max(round(share * self.steps), found[-1] + 1), self.steps - count + place))
        return found

    def solver(self, stage: int) -> Solver:
        """A fresh solver for a stage, with a schedule of its own."""
        train, only = self.run.train, self.stages[stage].parameters
        steps = self.borders[stage + 1] - self.borders[stage]
        groups = self.course.learner.trained()
        if only is not None:
            chosen = {f"method.{name}" for name in only}
            # a head learns in the stage that ends the run
            last = stage == len(self.stages) - 1
            groups = [one for one in groups if one.name in chosen or (last and not one.name.startswith("method."))]
        kind, settings = self._search(stage)
        return kind.of(
            settings,
            Job(
                groups,
                steps,
                seed=seeded(self.run.seed, 8, stage).initial_seed(),
                optimizer=train.optimizer,
                schedule=train.schedule,
                warmup=int(train.warmup) if train.warmup >= 1 else round(train.warmup * steps),
                clip=train.clip,
                advice={**self.course.advice, **self.stages[stage].advice},
                together=Population.of(self.course.learner) if self.words is None else None,
                words=self.words,
                voice=self._voice,
                speaker=self.talking.speaker,
            ),
        )

    def _words(self) -> Wording | None:
        """What is looked for, if that is words.

        Raises:
            ConfigError: the solver looks for something else.
        """
        found = Wording.of(
            self.course.learner,
            getattr(self.course, "splits", None),
            batch_size=self.run.train.eval_batch_size,
            seed=self.run.seed,
        )
        asked = "tensors" if found is None else "words"
        if self.solver_class.searches != asked:
            fitting = [name for name in registry.names("solvers") if registry.load("solvers", name).searches == asked]
            raise ConfigError(
                f"solver {self.solver_class.name} makes {self.solver_class.searches} better, and this method is "
                f"{asked}: use solver {' or '.join(fitting)}"
            )
        return found

    def _voice(self, model: str | None) -> CausalVoice:
        """The model that a policy speaks with."""
        own = self.course.learner.backbone
        if model is None or model == own.config.model:
            return CausalVoice(own)
        device, dtype = own.config.device, own.config.dtype
        return CausalVoice(open_backbone(BackboneConfig(model=model, family="causal", device=device, dtype=dtype)))

    def _search(self, stage: int) -> tuple[type[Solver], SolverConfig]:
        """The solver of a stage with its settings: those of the run that it has too, and its own defaults."""
        name = self.stages[stage].solver
        if name is None or self.solver_class.uses_gradients:
            return self.solver_class, self.settings
        kind: type[Solver] = registry.load("solvers", name)
        given = {key: value for key, value in self.settings.model_dump().items() if key in kind.Config.model_fields}
        return kind, kind.Config.model_validate({**given, "name": name})
