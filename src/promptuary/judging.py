"""Judged answers: drawn from a prompt's model, and graded by frozen models that are opened when they are first asked.

Knows no way of searching, and no method, family or task by name.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from promptuary.answering import Question, texts
from promptuary.backbones.base import Backbone, BackboneConfig
from promptuary.building import open_backbone
from promptuary.data.collate import Row, collate
from promptuary.errors import ConfigError
from promptuary.seeds import seeded
from promptuary.tasks.judged import JudgedTask
from promptuary.types import Piece, Prediction

if TYPE_CHECKING:
    from promptuary.tuned import Tuned

LONGEST = 256
"""Most tokens of a text that an encoder compares; the rest is cut. Our choice: sentences are far shorter."""

AT_ONCE = 128
"""Texts that a judge reads in one batch; our choice."""


@dataclass(frozen=True)
class Ended:
    """Which rows end in a token behind which nothing of an answer is kept, as transformers asks it of a generation.

    `ending` [v]: which tokens are such.
    """

    ending: Bool[Tensor, " v"]

    def __call__(self, ids: Tensor, scores: Tensor, **options: Any) -> Tensor:
        """[b] from ids [b, t]; a token that the tokenizer does not know ends nothing."""
        last = ids[:, -1]
        return self.ending[last.clamp(max=len(self.ending) - 1)] & (last < len(self.ending))


class Judging:
    """The judges of one task, on the device of the model that they judge; see `tasks.judged.Judges`."""

    def __init__(self, backbone: Backbone) -> None:
        """Nothing is opened yet.

        Args:
            backbone: the model that is judged; a classifier on the same base shares it.
        """
        self.backbone = backbone
        self._encoders = dict[str, Backbone]()
        self._classifiers: dict[str, Tuned] = {}
        self._ends = dict[str, Ended]()

    @torch.no_grad()
    def states(self, model: str, texts: Sequence[str]) -> list[Float[Tensor, "t h"]]:
        """Last hidden states of an encoder at the tokens of each text, special tokens left out.

        Raises:
            ConfigError: no such model, or it has no states of a text.
        """
        encoder = self._encoder(model)
        found = list[Tensor]()
        for begin in range(0, len(texts), AT_ONCE):
            encoded = [encoder.encode([Piece("field", text)], LONGEST) for text in texts[begin : begin + AT_ONCE]]
            rows = [Row(one, place) for place, one in enumerate(encoded)]
            batch = collate(rows, encoder.pad, segments=encoder.uses_segments).to(encoder.device)
            states, content = encoder.bare(batch, "states"), encoder.content(batch)
            found += [own[mine].float() for own, mine in zip(states, content, strict=True)]
        return found

    def labels(self, folder: str) -> Sequence[str]:
        """What a saved classifier tells apart."""
        return list(self.probabilities(folder, ["a"])[0])

    def probabilities(self, folder: str, texts: Sequence[str]) -> list[Mapping[str, float]]:
        """What a saved classifier gives each label of each text."""
        return [one.scores for one in self._classifier(folder).predict(list(texts), batch_size=AT_ONCE)]

    def ended(self, ends: str) -> Ended:
        """What tells that an answer of this model has ended."""
        if ends not in self._ends:
            tokenizer = self.backbone.tokenizer
            tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
            found = [token is not None and any(end in token for end in ends) for token in tokens]
            self._ends[ends] = Ended(torch.tensor(found, device=self.backbone.device))
        return self._ends[ends]

    def answers(self, asked: Sequence[Question], check: Callable[[], None] | None = None) -> list[Prediction]:
        """The best answer to each question; `check` is called before each and may raise to stop."""
        found = []
        for one in asked:
            if check is not None:
                check()
            found.append(best(one))
        return found

    def _encoder(self, model: str) -> Backbone:
        if model not in self._encoders:
            device = str(self.backbone.device)
            self._encoders[model] = open_backbone(BackboneConfig(model=model, family="encoder", device=device))
        return self._encoders[model]

    def _classifier(self, folder: str) -> Tuned:
        """A saved prompt or baseline that reads one text and tells labels apart."""
        # these import what holds a prompt, which holds this
        from promptuary import checkpoint, weights

        if folder not in self._classifiers:
            found = weights.find_saved(folder)
            device = str(self.backbone.device)
            same = weights.find_weights(found) is None and self._is_own(checkpoint.read_facts(found)["backbone"])
            opened = checkpoint.load_prompt(found, self.backbone) if same else weights.load_saved(found, device=device)
            if not opened.has_task or not opened.task.gives_scores or len(opened.task.asked(opened.task.config)) != 1:
                raise ConfigError(f"{folder} does not tell labels of a single text apart; a judge does")
            self._classifiers[folder] = opened
        return self._classifiers[folder]

    def _is_own(self, known: Mapping[str, str]) -> bool:
        own = self.backbone.config
        return self.backbone.frozen and (known.get("model"), known.get("family")) == (own.model, own.family)


# ---- answers ---------------------------------------------------------------------------------------------------------


def drawn(asked: Question, count: int, seed: int, *, ended: bool = True) -> list[str]:
    """Answers to one question, drawn in one pass, so that they follow from the seed alone.

    Args:
        asked: of a judged task.
        count: how many.
        seed: of all that is drawn; torch's own generators stay as they are.
        ended: stop once all answers have ended, which changes nothing of them.
    """
    task = _task(asked)
    how, device = task.sampling, asked.answerer.tuned.backbone.device
    options: dict[str, Any] = {"do_sample": True, "top_k": how.top_k, "top_p": 1.0, "temperature": how.temperature}
    if ended:
        options["stopping_criteria"] = [asked.answerer.tuned.judging.ended(task.ends)]
    longest = asked.row.writes
    assert longest is not None
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        written = texts([asked] * count, count, writes=[longest] * count, **options)
    return [task.decode_text(text).answer for text in written]


def rewards(asked: Question, seed: int) -> Float[Tensor, " n"]:
    """What each of the answers of a search is worth, count x groups of them, in the order in which they were drawn."""
    task = _task(asked)
    written = drawn(asked, task.sampling.count * task.sampling.groups, seed)
    graded = task.rewards(asked.answerer.tuned.judging, task.source(asked.example), written)
    return torch.tensor([one["reward"] for one in graded], dtype=torch.float64)


def best(asked: Question) -> Prediction:
    """The best by reward of the answers that are drawn in use, of equal ones the first, with all judgements of it.

    It depends on the task's seed and the source, on no other question.
    """
    task = _task(asked)
    source, judges = task.source(asked.example), asked.answerer.tuned.judging
    written = drawn(asked, task.sampling.count, seeded(task.sampling.seed, 13, mark(source)).initial_seed())
    graded = task.rewards(judges, source, written)
    place = max(range(len(graded)), key=lambda one: graded[one]["reward"])
    (measured,) = task.measured_by(judges, [written[place]])
    return Prediction(written[place], {**graded[place], **measured})


def mark(text: str) -> int:
    """A number for a text, the same everywhere, which its draws follow from."""
    return zlib.crc32(text.encode("utf-8", "surrogatepass"))


def _task(asked: Question) -> JudgedTask:
    return cast(JudgedTask, asked.answerer.tuned.task)
