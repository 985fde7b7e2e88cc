"""Rewriting: models attack the inputs, say what went wrong, and rewrite the prompt; the better prompt stays.

Knows no method, family, task or provider. Adversarial training with the prompt in the place of the weights and words in
the place of gradients (BATprompt, arXiv 2412.18196v1/v2); the described loop, not the released code, which differs.
"""

from __future__ import annotations

import copy
import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

from torch import Tensor

from promptuary.errors import ConfigError
from promptuary.perturbing.closeness import Similarity
from promptuary.perturbing.kinds import Kind
from promptuary.solvers.base import Batches, Job, Learner, Reduce, Solver, SolverConfig, StepResult, Words
from promptuary.solvers.rewriting import questions
from promptuary.solvers.rewriting.answers import Gate
from promptuary.solvers.rewriting.attack import Attacked, Attacker, described, kinds_of
from promptuary.solvers.rewriting.records import Record
from promptuary.solvers.rewriting.roles import Ledger, Role, drawn
from promptuary.solvers.rewriting.search import Search
from promptuary.solvers.rewriting.settings import RewriteConfig
from promptuary.solvers.rewriting.worth import MARGIN, Scorer, Worth, first_best
from promptuary.speakers.base import HASHED, Speaker


@dataclass
class Round:
    """One round while it happens: everything that a stop in the middle throws away.

    `attacked`, `places`: training examples that are attacked, and those that prompts are compared on; `direction`: what
    the rewriter is told; `unsaid`: roles that were asked for a description and gave none; `worth`: of the prompt that
    the round ends with, where any were compared; `candidates`: how many were.
    """

    search: Search
    ledger: Ledger
    scorer: Scorer
    attacked: list[int]
    places: list[int]
    attacks: list[Attacked] = field(default_factory=list)
    direction: str | None = None
    unsaid: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    worth: Worth | None = None
    candidates: int = 0

    @property
    def harm(self) -> list[Attacked]:
        """Attacks that made the model do worse."""
        return [one for one in self.attacks if one.success]


class RewriteSolver(Solver):
    """Rounds of attack, explanation and rewriting, with the prompt so far always among those compared.

    Between steps `words.text` is the prompt that does best on held-out examples, clean and perturbed by rules: never
    worse there than the start. A spent budget ends the search, not the run.
    """

    name = "rewrite"
    uses_gradients = False
    searches = "words"
    chooses = True
    Config = RewriteConfig

    def __init__(
        self,
        words: Words,
        config: RewriteConfig,
        speakers: Mapping[Role, Speaker],
        seed: int,
        similarity: Similarity | None = None,
    ) -> None:
        """Start from the prompt as it is.

        Args:
            words: the prompt and its examples.
            config: settings.
            speakers: who plays each role that these need.
            seed: of everything that is drawn.
            similarity: of meaning, for the gates of words and sentences; without it what letters tell of it.

        Raises:
            ConfigError: examples are missing, or the start lacks what every prompt must contain.
        """
        self.words, self.config, self.speakers, self.seed = words, config, speakers, seed
        c = config
        self.kinds: Sequence[Kind] = kinds_of(c.perturbations)
        if len(words.examples) < 2 or not len(words.held_out):
            raise ConfigError(
                f"rewriting needs 2 training examples and 1 validation example, got {len(words.examples)} and "
                f"{len(words.held_out)}; raise data.validation_size or give more rows"
            )
        texts = [str(one.get(name, "")) for one in words.examples for name in words.fields]
        self.gate = Gate(keep=c.keep, longest=c.longest, examples=texts)
        fault = self.gate.fault(" ".join(words.text.split())) if words.text.strip() else "empty"
        if fault in ("empty", "lost"):
            what = "is empty" if fault == "empty" else f"lacks one of solver.keep ({', '.join(c.keep)})"
            raise ConfigError(f"the prompt that rewriting starts from {what}; mend method.init_text")
        self.search = Search(words.text, words.text)
        self.attacker = Attacker(
            by=c.attacker,
            kinds=self.kinds,
            repeats=c.iter,
            count=c.candidates,
            objective=c.attack_objective,
            chain=c.chain,
            strategist=c.strategist,
            stop_at_zero=c.stop_at_zero,
            seed=seed,
            similarity=similarity,
        )
        count = len(words.held_out)
        self.judges = sorted(drawn(seed, 1).sample(range(count), min(c.held_out, count)))

    @classmethod
    def of(cls, config: SolverConfig, job: Job) -> Solver:
        """As its settings say; each role is played by its own model, or by that of all.

        Raises:
            ConfigError: no prompt of words, no model for a role, or no kind of attack.
        """
        c = cast(RewriteConfig, config)
        if job.words is None:
            raise ConfigError("solver rewrite is for prompts of words; use method: {name: batprompt}")
        speakers: dict[Role, Speaker] = {}
        for role in c.needed:
            settings = c.roles.get(role, c.model)
            if settings is None or job.speaker is None:
                raise ConfigError(
                    f"the {role} has to be played by a model; set solver.model: {{model: NAME}}, or solver.roles.{role}"
                )
            speakers[role] = job.speaker(settings, role)
        return cls(job.words, c, speakers, job.seed)

    @property
    def history(self) -> list[dict[str, Any]]:
        """The start and every change that was accepted.

        Each with its text, where it came from and why, what it scored on the examples of its round and on held-out
        ones, and what had been asked and tried by then.
        """
        return copy.deepcopy(self.search.history)

    @property
    def done(self) -> bool:
        """Whether a budget is spent."""
        return self.search.exhausted

    # ---- a round ----------------------------------------------------------------------------------------------------

    def step(
        self,
        learner: Learner,
        batches: Batches,
        total_weight: float,
        *,
        reduce: Reduce | None = None,
        check: Callable[[], None] | None = None,
    ) -> StepResult:
        """One round; it draws its own examples, so the batch says nothing.

        Args:
            learner: not asked.
            batches: not looked at.
            total_weight: not looked at.
            reduce: not needed: every process goes the same way.
            check: called before each request to a model and each pass; may raise to stop, with nothing changed.

        Returns:
            The best held-out objective so far with its sign turned; `parts` tell of the round.

        Raises:
            SpeakerError: a model cannot be reached, or refuses.
            DataError: a perturbed example belongs to other data.
        """
        if self.search.exhausted:
            return self._result(self.search, {"exhausted": 1.0}, 0)
        now = self._begin(check)
        before = now.search.current
        self._attack(now)
        self._explain(now)
        self._rewrite(now)
        parts = self._parts(now, before)
        self._commit(now)
        return self._result(self.search, parts, now.candidates)

    @staticmethod
    def _result(search: Search, parts: dict[str, float], calls: int) -> StepResult:
        assert search.worth is not None
        return StepResult(-search.worth, math.nan, {"held_out": search.worth, **parts}, calls=calls)

    def _begin(self, check: Callable[[], None] | None) -> Round:
        """Draw what is attacked and what prompts are compared on, apart from each other."""
        c, search = self.config, copy.deepcopy(self.search)
        ledger = Ledger(
            self.speakers, self.seed, search.round, temperature=c.temperature, top_p=c.top_p, max_tokens=c.max_tokens,
            check=check,
        )  # fmt: skip
        scorer = Scorer(self.words, c.measure, c.clean_weight, c.aggregate, check)
        if search.worth is None:
            start = self._judged(search.current, scorer)
            search.worth = start.total
            search.history.append({"step": 0, "from": "start", "text": search.current, "held_out": asdict(start)})
        count = len(self.words.examples)
        order = drawn(self.seed, 0, search.round).sample(range(count), count)
        attacked = min(c.sample_num, max(1, count // 2))
        return Round(search, ledger, scorer, order[:attacked], order[attacked : attacked + c.selection])

    def _attack(self, now: Round) -> None:
        """Inner maximisation: look for texts that the model gets wrong."""
        objective: Literal["score", "reward"] = "reward" if self.config.attack_objective == "reward" else "score"
        measure = functools.partial(now.scorer.alone, objective)
        now.attacks = self.attacker.attack(
            now.search.current, now.attacked, self.words.examples, self.words.fields, measure, now.ledger
        )

    def _explain(self, now: Round) -> None:
        """The direction of descent: what the texts that did harm have in common; nothing where none did."""
        harm, ledger = now.harm, now.ledger
        if not harm:
            return
        now.direction = described(now.attacks)
        if self.config.explainer == "rule":
            return
        pairs = [(one.clean, one.text) for one in harm]
        found = ledger.ask("explainer", questions.differences([kind.instruction for kind in self.kinds], pairs))
        if not found:
            now.unsaid += 1
            return
        structural = all(kind.gate == "meaning" for kind in self.kinds)
        told = ledger.ask("summariser", questions.summary(found[0], structural))
        now.unsaid += not told
        now.direction = told[0] if told else found[0]

    def _rewrite(self, now: Round) -> None:
        """Outer minimisation: the best of the rewrites, their paraphrases and the prompt as it is."""
        c, ledger, current = self.config, now.ledger, now.search.current
        answers = ledger.ask("rewriter", questions.rewriting(current, now.direction, c.keep), n=c.rewrites)
        texts = self.gate.prompts(answers, [current], now.refused)
        if not texts:
            return
        records = self._pool(now)
        scored = self._scored(now, [current, *texts], records)
        if c.paraphrases:
            variants: list[str] = []
            left = list(texts)
            for _ in range(min(c.paraphrased, len(left))):
                text = left.pop(first_best([scored[one].total for one in left]))
                answers = ledger.ask("paraphraser", questions.paraphrase(text, c.keep), n=c.paraphrases)
                variants += self.gate.prompts(answers, [*scored, *variants], now.refused)
            scored.update(self._scored(now, variants, records))
        # of equals the first one, and the prompt as it is stands first
        best = list(scored)[first_best([one.total for one in scored.values()])]
        now.worth = scored[best]
        if best != current:
            self._accept(now, best, "rewrite" if best in texts else "paraphrase", scored)

    def _scored(self, now: Round, texts: Sequence[str], records: Sequence[Record]) -> dict[str, Worth]:
        if not texts:
            return {}
        now.candidates += len(texts)
        return dict(zip(texts, now.scorer.worth(texts, now.places, records, self.words.examples), strict=True))

    def _accept(self, now: Round, text: str, origin: str, scored: Mapping[str, Worth]) -> None:
        """Go on from another prompt; it is the best one if held-out examples say so too."""
        search = now.search
        judged = self._judged(text, now.scorer)
        best = judged.total > cast(float, search.worth) + MARGIN
        search.history.append({
            "step": search.round + 1,
            "from": origin,
            "text": text,
            "instead_of": search.current,
            "why": now.direction,
            "selection": asdict(scored[text]),
            "selection_before": asdict(scored[search.current]),
            "held_out": asdict(judged),
            "best": best,
            "asked": sum((search.asked + now.ledger.asked).values()),
            "tried": search.tried + now.scorer.tried,
        })  # fmt: skip
        search.current = text
        if best:
            search.best, search.worth = text, judged.total

    def _pool(self, now: Round) -> list[Record]:
        """The perturbed examples of the round; what a model was asked for is kept for the rounds to come."""
        found, words = list[Record](), self.words
        for place in now.places:
            for kind in self.kinds:
                key = f"{kind.id}/{place}"
                if self.config.pool == "rule":
                    found.append(self.attacker.pooled(place, kind, words.examples, words.fields))
                    continue
                if key not in now.search.pool:
                    made = self.attacker.pooled(place, kind, words.examples, words.fields, now.ledger)
                    if now.ledger.exhausted:
                        return found
                    now.search.pool[key] = made
                found.append(now.search.pool[key])
        return found

    def _judged(self, text: str, scorer: Scorer) -> Worth:
        """A prompt on held-out examples, clean and perturbed by rules."""
        rows, fields = self.words.held_out, self.words.fields
        records = [self.attacker.pooled(place, kind, rows, fields) for place in self.judges for kind in self.kinds]
        return scorer.worth([text], self.judges, records, rows)[0]

    def _parts(self, now: Round, before: str) -> dict[str, float]:
        """For the log."""
        asked, answers = now.ledger.asked, now.ledger.answers
        return {
            **({} if now.worth is None else {"selection": now.worth.total}),
            "accepted": float(now.search.current != before),
            "attacks": float(len(now.attacks)),
            "harmful": float(len(now.harm)),
            "too_far": float(sum(not one.passed for one in now.attacks)),
            "unsaid": float(now.unsaid),
            "compared": float(now.candidates),
            "tried": float(now.scorer.tried),
            "asked": float(sum(asked.values())),
            **{f"asked/{role}": float(count) for role, count in sorted(asked.items())},
            **{f"answers/{role}": float(count) for role, count in sorted(answers.items())},
            **{f"refused/{reason}": float(count) for reason, count in sorted(now.refused.items())},
            **({"exhausted": 1.0} if now.ledger.exhausted else {}),
        }

    def _commit(self, now: Round) -> None:
        """The round has happened."""
        search = now.search
        search.round += 1
        search.asked += now.ledger.asked
        search.answers += now.ledger.answers
        search.refused += now.refused
        search.tried += now.scorer.tried
        search.exhausted = now.ledger.exhausted
        self.search, self.words.text = search, search.best

    # ---- state ------------------------------------------------------------------------------------------------------

    def rates(self) -> dict[str, float]:
        """It has none."""
        return {}

    def seek(self, step: int) -> None:
        """There is no schedule."""

    def slow_down(self, factor: float) -> None:
        """There is no step size."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The prompts, their history, what was asked so far, and what depends on the settings besides; no tensor."""
        return {}, {"settings": self._settings(), "search": self.search.numbers()}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Put a state back, and the best prompt of it.

        Raises:
            ConfigError: it belongs to other settings.
        """
        given, own = numbers["settings"], self._settings()
        differing = [name for name, value in own.items() if given.get(name) != value]
        if differing:
            raise ConfigError(
                f"this state belongs to a search with another {', '.join(differing)}; continue with the settings it "
                "was begun with"
            )
        self.search = Search.of(numbers["search"])
        self.words.text = self.search.best

    def _settings(self) -> dict[str, Any]:
        # of a speaker only what its answers depend on: a budget may be raised in between
        return {"seed": self.seed, **self.config.model_dump(mode="json", exclude={"rounds"}, context={HASHED: True})}
