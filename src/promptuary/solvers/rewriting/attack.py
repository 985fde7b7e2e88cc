"""The attack: an example's text is changed, step by step, until the model goes wrong and the meaning is still the same.

Knows no method and no provider: candidates come from a model or from seeded rules, and a measure tells what counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from promptuary.perturbing import closeness
from promptuary.perturbing.closeness import Similarity
from promptuary.perturbing.kinds import Kind, chosen
from promptuary.perturbing.perturb import perturbed
from promptuary.solvers.rewriting import questions
from promptuary.solvers.rewriting.answers import plain
from promptuary.solvers.rewriting.records import Example, Examples, Record, field_of
from promptuary.solvers.rewriting.roles import Ledger, drawn
from promptuary.solvers.rewriting.worth import MARGIN, first_best

Measure = Callable[[str, Sequence[Example]], list[float]]
"""A prompt and n examples -> what the model makes of each of them, n numbers; low is wrong."""

Objective = Literal["score", "reward", "similarity"]

GROUPS = {"mix": "C1,C2,C3,S1", "combine": "W1,W2,W3,S2,S3", "all": "all"}
"""The families of perturbations by the release's names: noise on the surface, and other words or syntax."""


def kinds_of(names: str | Sequence[str]) -> tuple[Kind, ...]:
    """The kinds of a group, or of a list of ids.

    Raises:
        ConfigError: an unknown one.
    """
    return chosen(GROUPS[names] if isinstance(names, str) else ",".join(names))


def close(kind: Kind, clean: str, text: str, similarity: Similarity | None) -> tuple[float, bool]:
    """How close a text is to the clean one, by the measure of a kind, and whether that passes its gate."""
    if kind.gate == "surface":
        found, least = closeness.surface(clean, text), closeness.SURFACE
    elif similarity is None:
        found, least = closeness.overlap(clean, text), closeness.OVERLAP
    else:
        found, least = float(similarity(clean, text)), closeness.MEANING
    return found, found > least


@dataclass
class Attacked:
    """One example under attack by one kind.

    `clean`: the example's own text, which closeness is measured to; `begun`, `lowest`: what the model made of the text
    that the attack began with and of the worst one so far; `passed`: whether any candidate passed the gate; `trace`:
    `lowest` after each repeat.
    """

    example: int
    kind: Kind
    field: str
    clean: str
    text: str
    begun: float
    lowest: float
    instruction: str
    passed: bool
    trace: list[float]

    @property
    def success(self) -> bool:
        """Whether the model does worse on the text than on the clean one."""
        return self.text != self.clean and self.lowest < self.begun

    @property
    def record(self) -> Record:
        """The text with its clean example."""
        return Record(self.example, self.kind.id, self.field, self.clean, self.text, self.passed)


@dataclass(frozen=True)
class Attacker:
    """How texts are attacked.

    `repeats`: rounds of candidates for each example and kind; `count`: candidates of each; `by`: who makes them;
    `objective`: what an accepted text lowers (`similarity`: nothing; the closest candidate is taken, as the release
    does for classification); `chain`: each kind goes on from what the one before it left, instead of from the clean
    text; `strategist`: whether a model words the instruction of C1 anew for the prompt at hand; `stop_at_zero`: no
    more candidates for a text whose score is 0; `similarity`: of meaning, without it what letters tell of it.
    """

    by: Literal["model", "rule"]
    kinds: Sequence[Kind]
    repeats: int
    count: int
    objective: Objective
    chain: bool
    strategist: bool
    stop_at_zero: bool
    seed: int
    similarity: Similarity | None = None

    def attack(
        self,
        prompt: str,
        places: Sequence[int],
        examples: Examples,
        fields: Sequence[str],
        measure: Measure,
        ledger: Ledger,
    ) -> list[Attacked]:
        """Every chosen example under every kind.

        Args:
            prompt: the prompt as it is.
            places: which examples.
            examples: the clean ones.
            fields: fields with text.
            measure: what the model makes of examples under a prompt; called once for all of them in each repeat.
            ledger: of the round.

        Returns:
            One for each example and kind. The score of its text never exceeds that of the text it began with.
        """
        if self.repeats == 0:
            return []
        done: list[Attacked] = []
        if not self.chain:
            begun = [
                self._begin(place, kind, prompt, examples, fields, ledger) for place in places for kind in self.kinds
            ]
            return self._driven(begun, prompt, examples, measure, ledger)
        texts: dict[int, str] = {}
        for kind in self.kinds:
            begun = [self._begin(place, kind, prompt, examples, fields, ledger) for place in places]
            for one in begun:
                one.text = texts.get(one.example, one.text)
            found = self._driven(begun, prompt, examples, measure, ledger)
            texts.update({one.example: one.text for one in found})
            done += found
        return done

    def _begin(
        self, place: int, kind: Kind, prompt: str, examples: Examples, fields: Sequence[str], ledger: Ledger
    ) -> Attacked:
        field = field_of(examples[place], fields, place)
        clean, instruction = examples[place][field], kind.instruction
        if self.strategist and self.by == "model" and kind.id == "C1":
            told = ledger.ask("strategist", questions.strategy(instruction, prompt))
            instruction = plain(told[0]) if told and plain(told[0]) else instruction
        return Attacked(place, kind, field, clean, clean, 0.0, 0.0, instruction, False, [])

    def _driven(
        self, targets: list[Attacked], prompt: str, examples: Examples, measure: Measure, ledger: Ledger
    ) -> list[Attacked]:
        """All repeats; in each, the candidates of all targets are measured together."""
        by_score = self.objective != "similarity"
        before = measure(prompt, [one.record.among(examples) for one in targets]) if by_score else [0.0] * len(targets)
        for one, value in zip(targets, before, strict=True):
            one.begun = one.lowest = value
            one.trace.append(value)
        for repeat in range(self.repeats):
            rows: list[Example] = []
            offered: list[tuple[Attacked, str]] = []
            for one in targets:
                if self.stop_at_zero and by_score and one.lowest <= 0:
                    continue
                drafts = dict.fromkeys(self._candidates(one, repeat, ledger))
                passed = [text for text in drafts if self._close(one.kind, one.clean, text)[1]]
                if by_score:
                    # what is known already cannot lower the score
                    passed = [text for text in passed if text not in (one.clean, one.text)]
                one.passed = one.passed or bool(passed)
                offered += [(one, text) for text in passed]
                rows += [{**examples[one.example], one.field: text} for text in passed]
            if by_score:
                values = measure(prompt, rows) if rows else []
            else:
                values = [-self._close(one.kind, one.clean, text)[0] for one, text in offered]
            self._accept(offered, values, by_score)
            for one in targets:
                one.trace.append(one.lowest)
        return targets

    def _close(self, kind: Kind, clean: str, text: str) -> tuple[float, bool]:
        return close(kind, clean, text, self.similarity)

    @staticmethod
    def _accept(offered: Sequence[tuple[Attacked, str]], values: Sequence[float], by_score: bool) -> None:
        """Text and score go together: the lowest of each target, if it is below what the target has."""
        mine: dict[int, list[int]] = {}
        for place, (one, _) in enumerate(offered):
            mine.setdefault(id(one), []).append(place)
        for places in mine.values():
            place = places[first_best([-values[each] for each in places])]
            one, text = offered[place]
            if values[place] < one.lowest - MARGIN or not by_score:
                one.text, one.lowest = text, values[place]

    def _candidates(self, one: Attacked, repeat: int, ledger: Ledger) -> list[str]:
        """Changed texts, from the one that the attack has reached."""
        if self.by == "model":
            answers = ledger.ask("attacker", questions.attack(one.text, one.instruction), n=self.count)
            return [text for text in map(plain, answers) if text]
        seeds = [
            (self.seed, 2, ledger.step, one.example, *one.kind.id.encode(), repeat, place)
            for place in range(self.count)
        ]
        return [one.kind.rule(one.text, drawn(*seed)) for seed in seeds]

    def pooled(
        self, place: int, kind: Kind, examples: Examples, fields: Sequence[str], ledger: Ledger | None = None
    ) -> Record:
        """One example under one kind, whatever the model makes of it: for the sets that prompts are chosen with.

        By the rule of the kind, or with a ledger from the attacker; the first changed text that passes the gate, or the
        clean one where none does.
        """
        field = field_of(examples[place], fields, place)
        clean: str = examples[place][field]
        if ledger is None:
            found = perturbed(clean, kind, seed=self.seed, similarity=self.similarity)
            return Record(place, kind.id, field, clean, found.text, found.changed)
        answers = ledger.ask("attacker", questions.attack(clean, kind.instruction), n=self.count, account="pool")
        drafts = [text for text in map(plain, answers) if text and text != clean]
        passed = next((text for text in drafts if self._close(kind, clean, text)[1]), None)
        return Record(place, kind.id, field, clean, clean if passed is None else passed, passed is not None)


def described(attacked: Sequence[Attacked]) -> str:
    """What did harm, in a line, without a model: the kinds by how often they did."""
    counts: dict[str, list[int]] = {}
    for one in attacked:
        found = counts.setdefault(one.kind.title, [0, 0])
        found[0] += one.success
        found[1] += 1
    harmful = sorted(((harm, title, count) for title, (harm, count) in counts.items() if harm), reverse=True)
    return "; ".join(f"{title} (worse in {harm} of {count} texts)" for harm, title, count in harmful)
