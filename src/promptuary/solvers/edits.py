"""Greedy search by edits: pieces of a prompt are deleted, swapped, said otherwise or put back, and the best edit stays.

Knows no method, family or task, and needs no gradient; a model only for paraphrases. Source: GrIPS (Prasad et al. 2022,
arXiv 2203.07281).
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from pydantic import Field, model_validator
from torch import Tensor

from promptuary.errors import ConfigError
from promptuary.solvers.base import Batches, Job, Learner, Reduce, Solver, SolverConfig, StepResult, Words
from promptuary.solvers.rewriting import questions
from promptuary.solvers.rewriting.answers import Gate, plain
from promptuary.solvers.rewriting.phrases import Draft, Level, Operation, phrases
from promptuary.solvers.rewriting.roles import Ledger, drawn
from promptuary.solvers.rewriting.worth import MARGIN, Scorer, first_best
from promptuary.speakers.base import HASHED, Speaker, SpeakerConfig


class EditsConfig(SolverConfig):
    """Settings of the search by edits."""

    name: Literal["edits"] = "edits"
    model: SpeakerConfig | None = Field(
        None, description="says pieces in other words; GrIPS: PEGASUS, tuned on paraphrases; without it none are made"
    )
    operations: tuple[Operation, ...] = Field(
        ("delete", "swap", "paraphrase", "add"),
        min_length=1,
        description="edits that are drawn from, all alike; GrIPS: these four. paraphrase needs a model, and "
        "add something that was deleted",
    )
    level: Level = Field(
        "phrase", description="what is edited: words, phrases (GrIPS; here by rule, without a parser) or sentences"
    )
    rounds: int = Field(10, ge=1, description="most rounds, where train.steps are not fewer; GrIPS: 10")
    candidates: int = Field(5, ge=1, description="edited prompts in a round; GrIPS: 5")
    compose: int = Field(1, ge=1, description="edits that make one of them; GrIPS: 1")
    patience: int = Field(2, ge=1, description="rounds in a row without a better prompt that end the search; GrIPS: 2")
    examples: int = Field(100, ge=1, description="training examples that prompts are compared on; GrIPS: 100")
    held_out: int = Field(200, ge=1, description="most held-out examples that the last word is spoken on; ours")
    measure: Literal["score", "reward"] = Field(
        "score",
        description="what prompts are compared by: the mean of the task's score, or of the finer reward. GrIPS: "
        "balanced accuracy and 0.1 times the entropy of the predicted labels",
    )
    keep: tuple[str, ...] = Field((), description="texts that every prompt contains, such as a list of labels; ours")
    longest: int = Field(150, ge=1, description="most words of a prompt; our choice")

    @model_validator(mode="after")
    def _possible(self) -> EditsConfig:
        if self.model is None and set(self.operations) == {"paraphrase"}:
            raise ValueError("operations: paraphrase needs a model; set model, or name other operations")
        return self

    def steps(self, planned: int) -> int:
        """A step is a round."""
        return min(planned, self.rounds)


@dataclass
class Edited:
    """Where a search stands. `deleted`: pieces that may come back; `idle`: rounds since the last better prompt."""

    current: str
    best: str
    score: float | None = None
    worth: float | None = None
    round: int = 0
    idle: int = 0
    exhausted: bool = False
    deleted: list[str] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    asked: int = 0
    tried: int = 0


class EditsSolver(Solver):
    """Rounds of edited prompts on one sample of the training examples; the best one is gone on from if it is better.

    Between steps `words.text` is the prompt, of all that were gone on from, that does best on held-out examples: never
    worse there than the start (our choice; GrIPS keeps the last one). A spent budget ends paraphrases, not the search.
    """

    name = "edits"
    uses_gradients = False
    searches = "words"
    chooses = True
    Config = EditsConfig

    def __init__(self, words: Words, config: EditsConfig, speaker: Speaker | None, seed: int) -> None:
        """Start from the prompt as it is.

        Raises:
            ConfigError: examples are missing, or the start is empty or lacks what every prompt must contain.
        """
        self.words, self.config, self.speaker, self.seed = words, config, speaker, seed
        if not len(words.examples) or not len(words.held_out):
            raise ConfigError(
                f"a search by edits needs training and validation examples, got {len(words.examples)} and "
                f"{len(words.held_out)}; raise data.validation_size or give more rows"
            )
        self.gate = Gate(keep=config.keep, longest=config.longest, examples=())
        fault = self.gate.fault(" ".join(words.text.split()))
        if fault in ("empty", "lost"):
            what = "is empty" if fault == "empty" else f"lacks one of solver.keep ({', '.join(config.keep)})"
            raise ConfigError(f"the prompt that edits start from {what}; mend method.init_text")
        self.search = Edited(words.text, words.text)
        self.sample = self._drawn(1, len(words.examples), config.examples)
        self.judges = self._drawn(2, len(words.held_out), config.held_out)

    @classmethod
    def of(cls, config: SolverConfig, job: Job) -> Solver:
        """As its settings say.

        Raises:
            ConfigError: no prompt of words.
        """
        c = cast(EditsConfig, config)
        if job.words is None:
            raise ConfigError("solver edits is for prompts of words; use method: {name: grips}")
        speaker = None
        if c.model is not None and "paraphrase" in c.operations:
            if job.speaker is None:
                raise ConfigError("nothing opens solver.model here; leave it out, or train through a run")
            speaker = job.speaker(c.model, "paraphraser")
        return cls(job.words, c, speaker, job.seed)

    @property
    def done(self) -> bool:
        """Whether patience has run out."""
        return self.search.idle >= self.config.patience

    @property
    def history(self) -> list[dict[str, Any]]:
        """The start and every change that was accepted: text, edits, scores, and what was tried and asked by then."""
        return copy.deepcopy(self.search.history)

    def step(
        self,
        learner: Learner,
        batches: Batches,
        total_weight: float,
        *,
        reduce: Reduce | None = None,
        check: Callable[[], None] | None = None,
    ) -> StepResult:
        """One round; its examples are those of the whole search, so the batch says nothing.

        Args:
            learner: not asked.
            batches: not looked at.
            total_weight: not looked at.
            reduce: not needed: every process goes the same way.
            check: called before each request to a model and each pass; may raise to stop, with nothing changed.

        Returns:
            The score of the prompt that is gone on from, with its sign turned.

        Raises:
            SpeakerError: a model cannot be reached, or refuses.
        """
        search = copy.deepcopy(self.search)
        scorer = Scorer(self.words, self.config.measure, 1.0, "mean", check)
        if search.score is None:
            search.score = self._scores(scorer, [search.current])[0]
            search.worth = self._judged(scorer, search.current)
            search.history.append({
                "step": 0, "from": "start", "text": search.current, "score": search.score, "held_out": search.worth,
            })  # fmt: skip
        ledger = Ledger(
            {} if self.speaker is None else {"paraphraser": self.speaker}, self.seed, search.round, check=check
        )
        ledger.exhausted = search.exhausted
        refused: Counter[str] = Counter()
        drafts = self._drafts(search, ledger, refused)
        scores = self._scores(scorer, list(drafts))
        place = first_best(scores) if scores else None
        found = None if place is None else (list(drafts.values())[place], scores[place])
        before = search.current
        search.round, search.exhausted = search.round + 1, ledger.exhausted
        search.asked += sum(ledger.asked.values())
        if found is not None and found[1] > search.score + MARGIN:
            self._accept(search, *found, scorer)
        else:
            search.idle += 1
        search.tried += scorer.tried
        self.search, self.words.text = search, search.best
        parts = {
            "held_out": cast(float, search.worth),
            "best_edit": math.nan if found is None else found[1],
            "accepted": float(search.current != before),
            "compared": float(len(drafts)),
            "tried": float(scorer.tried),
            "asked": float(sum(ledger.asked.values())),
            **{f"refused/{reason}": float(count) for reason, count in sorted(refused.items())},
            **({"exhausted": 1.0} if search.exhausted else {}),
        }
        parts = {name: value for name, value in parts.items() if math.isfinite(value)}
        return StepResult(-search.score, math.nan, parts, calls=len(drafts))

    def _drafts(self, search: Edited, ledger: Ledger, refused: Counter[str]) -> dict[str, Draft]:
        """Edited prompts by their texts."""
        c, found = self.config, dict[str, Draft]()
        base = Draft(tuple(phrases(search.current, c.level)))
        for place in range(c.candidates):
            chance, draft = drawn(self.seed, 0, search.round, place), base
            for _ in range(c.compose):
                open_ = [one for one in c.operations if self._can(one, search, ledger)]
                if open_:
                    say = _Saying(ledger, base.text)
                    draft = draft.edited(chance.choice(open_), search.deleted, chance, say)
            text = draft.text
            fault = self.gate.fault(text) or ("same" if text == base.text or text in found else None)
            if fault is None:
                found[text] = draft
            else:
                refused[fault] += 1
        return found

    def _can(self, operation: Operation, search: Edited, ledger: Ledger) -> bool:
        if operation == "add":
            return bool(search.deleted)
        return operation != "paraphrase" or (self.speaker is not None and not ledger.exhausted)

    def _accept(self, search: Edited, draft: Draft, score: float, scorer: Scorer) -> None:
        """Go on from an edited prompt."""
        for piece in draft.back:
            if piece in search.deleted:
                search.deleted.remove(piece)
        search.deleted += draft.gone
        worth = self._judged(scorer, draft.text)
        best = worth > cast(float, search.worth) + MARGIN
        search.history.append({
            "step": search.round, "from": ", ".join(draft.done), "text": draft.text, "instead_of": search.current,
            "score": score, "score_before": search.score, "held_out": worth, "best": best, "asked": search.asked,
            "tried": search.tried + scorer.tried,
        })  # fmt: skip
        search.current, search.score, search.idle = draft.text, score, 0
        if best:
            search.best, search.worth = draft.text, worth

    def _scores(self, scorer: Scorer, texts: list[str]) -> list[float]:
        """Of each text on the sample."""
        if not texts:
            return []
        return [one.total for one in scorer.worth(texts, self.sample, [], self.words.examples)]

    def _judged(self, scorer: Scorer, text: str) -> float:
        return scorer.worth([text], self.judges, [], self.words.held_out)[0].total

    def _drawn(self, purpose: int, count: int, most: int) -> list[int]:
        return sorted(drawn(self.seed, purpose).sample(range(count), min(most, count)))

    # ---- state ------------------------------------------------------------------------------------------------------

    def rates(self) -> dict[str, float]:
        """It has none."""
        return {}

    def seek(self, step: int) -> None:
        """There is no schedule."""

    def slow_down(self, factor: float) -> None:
        """There is no step size."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The prompts, what was deleted, their history, and what depends on the settings besides; no tensor."""
        return {}, {"settings": self._settings(), "search": copy.deepcopy(vars(self.search))}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Put a state back, and the best prompt of it.

        Raises:
            ConfigError: it belongs to other settings.
        """
        if numbers["settings"] != self._settings():
            raise ConfigError("this state belongs to another search; continue with the settings it was begun with")
        self.search = Edited(**copy.deepcopy(dict(numbers["search"])))
        self.words.text = self.search.best

    def _settings(self) -> dict[str, Any]:
        # of a speaker only what its answers depend on: a budget may be raised in between
        return {"seed": self.seed, **self.config.model_dump(mode="json", exclude={"rounds"}, context={HASHED: True})}


@dataclass(frozen=True)
class _Saying:
    """Says a piece of a prompt in other words."""

    ledger: Ledger
    prompt: str

    def __call__(self, piece: str) -> str | None:
        """None where nothing came."""
        found = self.ledger.ask("paraphraser", questions.piece(piece, self.prompt))
        return plain(found[0]) or None if found else None
