"""Style transfer: a sentence is written anew in a wanted style, and frozen models judge what is kept and what is won.

Knows no prompt, method or backbone. Source: RLPrompt (Deng et al. 2022, arXiv 2205.12548), section 4.2 and its release.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from promptuary.data.check import as_text
from promptuary.errors import ConfigError, DataError, PromptuaryError
from promptuary.registry import suggest
from promptuary.tasks.base import Filled, TaskConfig
from promptuary.tasks.judged import JudgedTask, Judges, Sampling
from promptuary.types import Batch, Prediction

_SENTENCE = re.compile(r"[^.!?]*[.!?]?")


class TransferConfig(TaskConfig):
    """Settings of style transfer."""

    name: Literal["transfer"] = "transfer"
    template: str | None = Field(
        '{prompt} "{text}" "',
        description="how a sentence is asked; its first field is the sentence. The default is RLPrompt's: the model "
        "goes on behind an open quote",
    )
    content: str = Field(
        description="hub name or folder of the frozen encoder that compares with the source, token by token; the paper "
        "takes roberta-large"
    )
    content_baseline: float | None = Field(
        None,
        lt=1,
        description="similarity of unrelated sentences, which then counts as 0 (BERTScore's rescaling); none: not "
        "rescaled",
    )
    style: str = Field(description="folder of a saved prompt or baseline that classifies styles: part of the reward")
    style_label: str = Field(description="the label that is wanted, as the classifiers call it")
    held_out: str | None = Field(
        None,
        description="folder of another classifier of the same labels, which measures style and no search sees; without "
        "it style, joint and geometric_mean are not measured",
    )
    fluency: str | None = Field(
        None,
        description="folder of a classifier that tells acceptable sentences; without it joint and geometric_mean do "
        "without fluency. The paper's is a RoBERTa-large trained on CoLA",
    )
    fluency_label: str = Field("acceptable", description="its label for them")
    samples: int = Field(32, ge=1, description="answers that are drawn, of which the best by reward counts; the paper")
    bootstraps: int = Field(
        4, ge=1, description="times so many in a search; a reward is the mean of their maxima; the paper's"
    )
    top_k: int = Field(10, ge=1, description="only so many likeliest tokens are drawn; the paper's")
    temperature: float = Field(1.0, gt=0, description="of these draws; the paper's")
    lower: bool = Field(False, description="answers in lower case, as the paper has them for Yelp")
    sample_seed: int = Field(0, ge=0, description="of what is drawn in evaluation and use; our choice")


class Transfer(JudgedTask):
    """A sentence in another style. There is no right answer: the score is content kept and style won, by judges.

    Of one answer w to a source x: content = 100 max(0, F1), where F1 matches the tokens of w and x greedily by the
    cosine of their states; style = 100 P(wanted | w); reward = (content + style) / 2. An empty answer gets 0 of all.
    """

    name = "transfer"
    Config = TransferConfig
    default_metrics: ClassVar = ("reward", "content")
    pipeline = "text-generation"
    ends = '".!?'

    @property
    def settings(self) -> TransferConfig:
        """The settings with their own type."""
        return cast(TransferConfig, self.config)

    @property
    def metrics(self) -> tuple[str, ...]:
        """What the judges that are there can measure; the reward comes first, and chooses."""
        if self.config.metrics:
            return self.config.metrics
        own = ("style", "joint", "geometric_mean") if self.settings.held_out is not None else ()
        return (*self.default_metrics, *own, *(("fluency",) if self.settings.fluency is not None else ()))

    @property
    def notes(self) -> list[str]:
        """Which judges are missing, and what is not measured for that."""
        found = []
        if self.settings.held_out is None:
            found.append(
                "task.held_out is not set: style, joint and geometric_mean are not measured, and the reward is the "
                "judgement of what was searched with"
            )
        elif self.settings.fluency is None:
            found.append("task.fluency is not set: joint and geometric_mean are of content and style alone")
        return found

    def settle(self, examples: Sequence[Mapping[str, Any]]) -> None:
        """Answers are always written; metrics need their judges.

        Raises:
            ConfigError: a metric has no judge.
        """
        self.reading = "text"
        needs = {name: "held_out" for name in ("style", "joint", "geometric_mean")} | {"fluency": "fluency"}
        for metric in self.metrics:
            judge = needs.get(metric)
            if judge is not None and getattr(self.settings, judge) is None:
                raise ConfigError(f"task.metrics: {metric} needs a judge; set task.{judge} to a saved classifier")

    def settled(self) -> TaskConfig:
        """Nothing is open."""
        return self.config

    @classmethod
    def answer_fields(cls, config: TaskConfig) -> tuple[str, ...]:
        """None: there is no right answer."""
        return ()

    @classmethod
    def answer(cls, config: TaskConfig, example: Mapping[str, Any]) -> str:
        """The source, which an answer is compared with."""
        fields = cls.asked(config)
        return as_text(example.get(fields[0]), fields[0]).strip()

    def source(self, example: Mapping[str, Any]) -> str:
        """The first field of the template."""
        return self.answer(self.config, example)

    def gold(self, example: Mapping[str, Any]) -> str:
        """The source."""
        return self.source(example)

    def fill(self, example: Mapping[str, Any], *, labelled: bool) -> Filled:
        """The template; nothing to be written."""
        return Filled(self.template.fill(example))

    def longest(self, tokens: int) -> int:
        """max(1.5 n, n + 10), the release's."""
        return max(3 * tokens // 2, tokens + 10)

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        """There is none.

        Raises:
            DataError: always; judged answers are searched for, not learnt by gradient.
        """
        raise DataError("a judged answer has no loss")

    def decode(self, scores: list[float], example: Mapping[str, Any]) -> Prediction:
        """Written answers have no scores.

        Raises:
            DataError: always; `decode_text` is the way.
        """
        raise DataError("a written answer is decoded from its text")

    def decode_text(self, text: str) -> Prediction:
        """Up to the first quote, then up to and with the first of . ! ?"""
        found = _SENTENCE.match(text.partition('"')[0].strip())
        sentence = "" if found is None else found.group().strip()
        return Prediction(sentence.lower() if self.settings.lower else sentence)

    # ---- judging ----------------------------------------------------------------------------------------------------

    @property
    def sampling(self) -> Sampling:
        """As the settings say."""
        c = self.settings
        return Sampling(c.samples, c.bootstraps, c.top_k, c.temperature, c.sample_seed)

    def ready(self, judges: Judges) -> None:
        """Open every judge and look for the labels that are asked.

        Raises:
            PromptuaryError: one cannot be opened.
            ConfigError: a classifier has no such label.
        """
        c = self.settings
        try:
            judges.states(c.content, ["a"])
        except PromptuaryError as error:
            raise ConfigError(f"task.content: {error}") from None
        asked = {"style": c.style_label, "held_out": c.style_label, "fluency": c.fluency_label}
        for name, label in asked.items():
            folder = getattr(c, name)
            if folder is None:
                continue
            try:
                known = list(judges.labels(folder))
            except PromptuaryError as error:
                raise ConfigError(f"task.{name}: {error}") from None
            if label not in known:
                setting = "fluency_label" if name == "fluency" else "style_label"
                raise ConfigError(
                    f'task.{setting}: the classifier in {folder} has no label "{label}"{suggest(label, known)} '
                    f"(its labels: {', '.join(known)})"
                )

    def rewards(self, judges: Judges, source: str, written: Sequence[str]) -> list[dict[str, float]]:
        """Content, style and their mean, each 0 to 100."""
        c = self.settings
        whole = [text for text in dict.fromkeys(written) if text]
        found = {"": {"reward": 0.0, "content": 0.0, "wanted": 0.0}}
        if whole:
            source_states, *states = judges.states(c.content, [source, *whole])
            said = judges.probabilities(c.style, whole)
            for text, own, labels in zip(whole, states, said, strict=True):
                content = 100 * max(0.0, matched_f1(own, source_states, c.content_baseline))
                style = 100 * labels[c.style_label]
                found[text] = {"reward": (content + style) / 2, "content": content, "wanted": style}
        return [dict(found[text]) for text in written]

    def measured_by(self, judges: Judges, written: Sequence[str]) -> list[dict[str, float]]:
        """1 where a judge's likeliest label is the asked one, else 0."""
        c = self.settings
        found: list[dict[str, float]] = [{} for _ in written]
        for name, folder, label in (("style", c.held_out, c.style_label), ("fluency", c.fluency, c.fluency_label)):
            if folder is None:
                continue
            whole = [text for text in dict.fromkeys(written) if text]
            said = dict(zip(whole, judges.probabilities(folder, whole), strict=True)) if whole else {}
            for text, one in zip(written, found, strict=True):
                labels = said.get(text)
                one[name] = float(labels is not None and max(labels, key=labels.__getitem__) == label)
        return found


def matched_f1(
    candidate: Float[Tensor, "n h"], reference: Float[Tensor, "m h"], baseline: float | None = None
) -> float:
    """F1 of greedy matching (Zhang et al. 2020, BERTScore, arXiv 1904.09675, section 3), without idf weights.

    Precision is the mean over the candidate's tokens of the best cosine to a token of the reference, recall the other
    way round. Special tokens are no tokens here: the release matches them too, without weight of their own.

    Args:
        candidate: states of its tokens.
        reference: of the other's.
        baseline: b; the result is then (F1 - b) / (1 - b).

    Returns:
        At most 1; 0 where either has no token.
    """
    if not len(candidate) or not len(reference):
        return 0.0
    cosine = normalize(candidate.float(), dim=1) @ normalize(reference.float(), dim=1).T
    precision, recall = float(cosine.amax(1).mean()), float(cosine.amax(0).mean())
    total = precision + recall
    score = 2 * precision * recall / total if total > 0 else 0.0
    return score if baseline is None else (score - baseline) / (1 - baseline)
