"""Words that are looked for: texts tried on labelled examples, all of them in common batches, none of them twice.

Knows no solver and no method, family or task by name; computes no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch

from promptuary import judging
from promptuary.answering import Answerer, Question, predictions
from promptuary.asking import PLACE
from promptuary.data.collate import Row
from promptuary.data.load import Splits
from promptuary.errors import ConfigError
from promptuary.joint import Joint
from promptuary.methods.words import Draw, PolicyFacts, TextMethod
from promptuary.metrics import METRICS, compute
from promptuary.prompts.init import COMMON_TOKENS
from promptuary.seeds import seeded
from promptuary.solvers import soft_q
from promptuary.solvers.base import Tried
from promptuary.solvers.policy_net import Policy
from promptuary.speaking import Speaking
from promptuary.tasks.judged import JudgedTask
from promptuary.tuned import Tuned
from promptuary.types import ANSWER, Prediction

KNOWN = 2**18
"""Answers that are remembered, some 50 MB; our choice."""

Example = Mapping[str, Any]


class Wording:
    """A prompt of words while it is looked for, as `solvers.base.Words` asks for it."""

    def __init__(
        self,
        tuned: Tuned,
        examples: Sequence[Example],
        held_out: Sequence[Example] = (),
        *,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        """Around a prompt.

        Args:
            tuned: of words, with a task.
            examples: labelled, to learn from.
            held_out: labelled, to choose with.
            batch_size: most rows (a text on an example) that run together.
            seed: what proposals are drawn from.
        """
        self.tuned, self.examples, self.held_out = tuned, examples, held_out
        self.batch_size, self.seed = batch_size, seed
        self.runs = 0
        """Rows that the model has run."""
        self._rows = dict[Hashable, Row]()
        self._known = dict[str, dict[Hashable, tuple[float, float]]]()

    @classmethod
    def of(cls, tuned: Tuned | Joint, splits: Splits | None, **options: Any) -> Wording | None:
        """For a prompt of words; None for any other. Learns from the training rows, chooses with those of validation.

        Raises:
            ConfigError: several tasks at once.
        """
        parts = list(tuned.parts.values()) if isinstance(tuned, Joint) else [tuned]
        if parts[0].method is None or parts[0].method.text is None:
            return None
        if isinstance(tuned, Joint) or splits is None:
            raise ConfigError(f"{parts[0].method.name} looks for the words of one task; train it on one at a time")
        return cls(tuned, splits.train, splits.validation, **options)

    @property
    def method(self) -> TextMethod:
        """The method whose words they are."""
        assert isinstance(self.tuned.method, TextMethod)
        return self.tuned.method

    @property
    def text(self) -> str:
        """The prompt."""
        return self.method.text

    @text.setter
    def text(self, value: str) -> None:
        self.method.text = value
        self.tuned.train(self.tuned.training)

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields of an example that the template shows as text."""
        task = self.tuned.task
        return tuple(name for name in dict.fromkeys(task.template.fields) if name != task.config.image)

    def tried(
        self,
        texts: Sequence[str],
        examples: Sequence[Example],
        check: Callable[[], None] | None = None,
        draw: int = 0,
    ) -> Tried:
        """Every text on every example, see `Words.tried`; one that does not fit into the model gets a reward of -inf.

        Args:
            texts: k of them, which may be the same.
            examples: n of them, labelled.
            check: called before each batch; may raise to stop.
            draw: what answers that depend on chance are drawn by, besides the seed.
        """
        if isinstance(self.tuned.task, JudgedTask):
            return self._judged(texts, examples, self.tuned.task.sampling.groups, check, draw)
        keys = [self._key(example) for example in examples]
        asked, places = list[Question](), list[tuple[str, Hashable]]()
        for text in dict.fromkeys(texts):
            known = self._known.setdefault(text, {})
            missing = {key: one for key, one in zip(keys, examples, strict=True) if key not in known}
            answerer = Answerer.of(self.tuned.saying(text)) if missing else None
            for key, example in missing.items():
                assert answerer is not None
                row = self._row(key, example)
                if self._fits(row, answerer.added):
                    asked.append(Question(answerer, row, example))
                    places.append((text, key))
                else:
                    known[key] = (-torch.inf, 0.0)
        answers = predictions(asked, self.batch_size, check=check)
        self.runs += len(asked)
        self._grade(asked, places, answers)
        found = torch.tensor([[self._known[text][key] for key in keys] for text in texts], dtype=torch.float64)
        self._forget(set(texts))
        found = found.view(len(texts), len(examples), 2)
        return Tried(found[..., 0], found[..., 1])

    def _judged(
        self,
        texts: Sequence[str],
        examples: Sequence[Example],
        groups: int,
        check: Callable[[], None] | None,
        draw: int,
    ) -> Tried:
        """The same of answers that are drawn and judged, anew each time: nothing of them is remembered."""
        maxima = torch.full((len(texts), len(examples), groups), -torch.inf, dtype=torch.float64)
        for k, text in enumerate(texts):
            answerer = Answerer.of(self.tuned.saying(text))
            for n, example in enumerate(examples):
                row = self._row(self._key(example), example)
                if not self._fits(row, answerer.added):
                    continue
                if check is not None:
                    check()
                source = judging.mark(self.tuned.task.gold(example))
                seed = seeded(self.seed, 12, draw, k, source).initial_seed()
                found = judging.rewards(Question(answerer, row, example), seed)
                maxima[k, n] = soft_q.maxima(found, groups)
                self.runs += len(found)
        # best-of-n is what will be used; the mean of several maxima is its expectation
        reward = maxima.mean(-1)
        return Tried(reward, reward, maxima)

    def written_by(self, policy: Policy) -> None:
        """From here on the prompt is what a policy writes for each input.

        Raises:
            ConfigError: the method has one prompt for all inputs.
        """
        voice, speech = policy.voice, policy.speech
        facts = PolicyFacts(
            model=voice.name,
            identity=dict(voice.identity),
            width=voice.width,
            hidden=len(policy.weights[0]),
            num_tokens=speech.length,
            fluent=speech.fluent,
            no_repeat=speech.no_repeat,
            sayable=policy.sayable,
        )
        self.method.written_by(facts, policy.weights)
        self.tuned.speaking = Speaking(policy, self.fields[0])
        self.tuned.train(self.tuned.training)

    def proposal(self, number: int) -> str | None:
        """What the method itself proposes as number 0, 1, ... of a search; None if it has no more."""
        draw = Draw(self.examples, self.shown, self._drawn, seeded(self.seed, 11, number))
        return self.method.proposal(number, draw)

    def shown(self, example: Example) -> str:
        """An example as the task asks it, without the prompt's place, with its right answer in words."""
        filled, task = self.tuned.task.fill(example, labelled=True), self.tuned.task
        answer = filled.answer
        if answer is None:
            gold = task.gold(example)
            answer = task.words[filled.target] if task.words and isinstance(filled.target, int) else str(gold)
        parts, there = list[str](), False
        for piece in filled.pieces:
            if piece.role != "slot":
                parts.append(str(piece.value))
            elif piece.value == ANSWER:
                parts.append(answer)
                there = True
            elif piece.value != PLACE:
                parts.append(" ")
        if not there:
            parts.append(f"{task.template.glue}{answer}")
        return " ".join("".join(parts).split())

    def _drawn(self, count: int, generator: torch.Generator) -> str:
        """A text of tokens of the model, drawn among the common ones."""
        common = self.tuned.backbone.vocabulary.common(COMMON_TOKENS)
        ids = common[torch.randint(len(common), (count,), generator=generator)]
        return str(self.tuned.backbone.tokenizer.decode(ids.tolist(), skip_special_tokens=True)).strip()

    # ---- what is known -----------------------------------------------------------------------------------------------

    def _key(self, example: Example) -> Hashable:
        task = self.tuned.task
        return (*task.question(task.config, example), repr(task.gold(example)))

    def _row(self, key: Hashable, example: Example) -> Row:
        if key not in self._rows:
            if len(self._rows) >= KNOWN:
                self._rows.clear()
            self._rows[key] = self.tuned.asking.row(example, 0, labelled=True)
        return self._rows[key]

    def _fits(self, row: Row, added: int) -> bool:
        limit = self.tuned.backbone.max_positions
        return limit is None or len(row.encoded.ids) + self.tuned.answer_positions(row) + added <= limit

    def _forget(self, now: set[str]) -> None:
        """Keep what is known within its bound; what was just asked stays."""
        while sum(map(len, self._known.values())) > KNOWN and len(self._known) > len(now):
            del self._known[next(text for text in self._known if text not in now)]

    def _grade(
        self, asked: Sequence[Question], places: Sequence[tuple[str, Hashable]], answers: Sequence[Prediction]
    ) -> None:
        """Reward and score of each answer."""
        golds = [self.tuned.task.gold(one.example) for one in asked]
        scores = [self._score(gold, one.answer) for gold, one in zip(golds, answers, strict=True)]
        rewards = list(scores)
        kinds: dict[int, list[int]] = {}  # by the number of labels, which choices may have of their own
        for place, (gold, one) in enumerate(zip(golds, answers, strict=True)):
            if gold in one.scores:
                kinds.setdefault(len(one.scores), []).append(place)
        for chosen in kinds.values():
            values = torch.tensor([list(answers[place].scores.values()) for place in chosen], dtype=torch.float64)
            right = torch.tensor([list(answers[place].scores).index(golds[place]) for place in chosen])
            for place, reward in zip(chosen, self.method.reward(values, right).tolist(), strict=True):
                rewards[place] = reward
        for (text, key), reward, score in zip(places, rewards, scores, strict=True):
            self._known[text][key] = (reward, score)

    def _score(self, gold: Any, answer: Any) -> float:
        """The first metric of one example; of labels whether they are the same, of values minus the squared error."""
        name = self.tuned.task.metrics[0]
        if METRICS[name].kind == "value":
            return -float((gold - answer) ** 2)
        if METRICS[name].kind == "text":
            return compute([name], [gold], [answer])[name]
        return float(gold == answer)
