"""A frozen backbone, a method and a task put together: what is trained, evaluated, saved and used.

Knows no files, optimisers or progress bars, and no method, baseline, family or task by name.
Slightly longer than most files: it is the one object that users and all verbs hold.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from promptuary.answering import Answerer, Question, check_lengths, predictions
from promptuary.asking import Asking
from promptuary.attaching import attach
from promptuary.backbones.base import Backbone
from promptuary.baselines.base import Baseline
from promptuary.data.augment import AugmentConfig
from promptuary.data.collate import Row, collate
from promptuary.errors import ConfigError, SiteError
from promptuary.files import digest_of
from promptuary.judging import Judging
from promptuary.matching import class_matrix, match
from promptuary.methods.base import Group, Method
from promptuary.methods.words import PolicyFacts, TextMethod
from promptuary.passes import outputs
from promptuary.prompts.blocks import kaiming_uniform
from promptuary.prompts.init import Saved, Starting
from promptuary.seeds import Chance
from promptuary.speaking import Speaking
from promptuary.starting import seen
from promptuary.tasks.base import Task
from promptuary.types import ANSWER, Batch, Losses, Outputs, Prediction, Prompt, View

TEXT = "method.text"
"""Where the text of a prompt of words stands in a state."""


class Tuned(nn.Module):
    """A backbone that does a task with a prompt. Without a method it is the frozen model alone (zero-shot).

    With a baseline in the place of a method it is a model whose own weights, or a head alone, are trained.
    Without a task it is a prompt on a model and nothing more: it can be attached, saved, loaded and exported, while
    the host's own code says what is learnt and what an answer means.
    """

    def __init__(
        self,
        backbone: Backbone,
        task: Task | None,
        method: Method | None = None,
        *,
        baseline: Baseline | None = None,
        max_length: int = 256,
    ) -> None:
        """Put the parts together.

        Args:
            backbone: frozen and wired.
            task: settled; or None.
            method: its tensors are moved to the backbone's device, in float32.
            baseline: instead of a method; `initialise` lets it into the model, for good.
            max_length: most tokens of a text, special tokens included.

        Raises:
            ConfigError: the family cannot read what the task reads, or text and prompt exceed its positions; or the
                weights of the backbone are no longer those that it was loaded with.
            SiteError: the backbone has none of the places that the method uses.
        """
        super().__init__()
        if not backbone.frozen:
            raise ConfigError(
                f"the weights of this {backbone.config.model} are trained by a baseline, so nothing else can use it; "
                "load the model once more"
            )
        if baseline is not None and baseline.head_only and (task is None or task.reading != "head"):
            raise ConfigError(f"{baseline.name} trains a head and nothing else; set task.reading: head")
        if method is not None and backbone.modality not in method.modalities:
            raise ConfigError(
                f"method {method.name} is for {' and '.join(sorted(method.modalities))}, and the examples of the "
                f"{backbone.name} family are {backbone.modality}s; choose another method or model"
            )
        if method is not None and method.sites and not method.sites & backbone.sites:
            raise SiteError(backbone.lacks(*method.sites))
        self.baseline = baseline
        words_at = None if method is None else method.words_at
        self._asking = None if task is None else Asking(backbone, task, max_length, words_at)
        self.backbone, self.method = backbone, method
        self.judging = Judging(backbone)
        """Who judges what it writes, of a task that is judged."""
        self.speaking: Speaking | None = None
        """Who writes its words for each input, of a prompt that has such a policy; opened when first asked."""
        self.max_length = max_length
        self.head: nn.Linear | None = None
        if task is not None and task.reading == "head":
            self.head = nn.Linear(self._hidden_width(), task.outputs).to(backbone.device)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        if method is not None:
            method.to(backbone.device)
        self.moment: tuple[int, int] | None = None
        """Seed and step of the run, which noise in training is drawn from."""
        self._folded: tuple[Prompt, Hashable] | None = None
        if task is not None and method is not None and method.text is not None and task.reading == "head":
            raise ConfigError(f"method {method.name} is words, and nothing would train a head; use task.reading: words")
        if task is not None and method is not None and method.own_scores and task.reading != "words":
            raise ConfigError(
                f"method {method.name} reads answers by itself, from label words; use task.reading: words, and no task "
                "that writes"
            )
        self.train(False)

    @property
    def asking(self) -> Asking:
        """The task on the backbone.

        Raises:
            ConfigError: the prompt has no task.
        """
        if self._asking is None:
            raise ConfigError(
                "this prompt has no task (no template, no answers), so it cannot predict or train by itself; "
                "use attach() and run the model, or give a task"
            )
        return self._asking

    @property
    def task(self) -> Task:
        """What an example means.

        Raises:
            ConfigError: the prompt has no task.
        """
        return self.asking.task

    @property
    def has_task(self) -> bool:
        """Whether there is one."""
        return self._asking is not None

    def train(self, mode: bool = True) -> Tuned:
        """Training keeps the prompt live; evaluation folds it once. The backbone's own mode is never touched."""
        self.training = mode
        before, stamp = self._folded, self._stamp()
        if mode or self.method is None or self.method.depends:
            self._folded = None
            return self
        folded = self._spelled(self.method.fold())
        if before is not None and _same(before[0], folded):
            folded = before[0]  # the very same, so that what is kept for it is found
        self._folded = (folded, stamp)  # at once, since other threads may be reading
        return self

    def _stamp(self) -> Hashable:
        """Which values the method's tensors have; says nothing about the values, but changes with them."""
        if self.method is None:
            return ()
        return (self.method.text, *((p.data_ptr(), p._version) for p in self.method.parameters()))

    def initialise(
        self,
        generator: torch.Generator,
        saved: Tensor | None = None,
        sources: Sequence[Saved] = (),
        examples: Sequence[Mapping[str, Any]] = (),
        augment: AugmentConfig | None = None,
    ) -> Tuned:
        """First values of the prompt and of the head.

        Args:
            generator: all that is drawn.
            saved: rows of an earlier prompt, for `method.init: saved`.
            sources: the earlier prompts that the method's settings name.
            examples: for training, which a method may look at, without their answers.
            augment: how training varies their images.

        Raises:
            SiteError: the method reads answers as this model, or with these label words, cannot.
        """
        if self.head is not None:
            with torch.no_grad():
                self.head.weight.copy_(kaiming_uniform(self.head.out_features, self.head.in_features, generator))
        if self.baseline is not None:
            self.baseline.install(self.backbone.thaw(), generator)
        if self.method is not None:
            source = self._starting(generator, saved, sources, examples, augment)
            self.method.cpu().initialise(source).to(self.backbone.device)
        self.train(self.training)
        if self.method is not None and self.method.own_scores and self._asking is not None and self._asking.words:
            with torch.no_grad():  # what cannot be read should be known before anything is written
                self.scores(self.backbone.probe())
        return self

    def begin(
        self, stage: int, generator: torch.Generator, saved: Tensor | None, sources: Sequence[Saved]
    ) -> Mapping[str, float]:
        """Before the first step of a later stage: the method may fill tensors anew, and say something of it."""
        told: Mapping[str, float] = {}
        if self.method is not None:
            told = self.method.cpu().go_on(stage, self._starting(generator, saved, sources))
            self.method.to(self.backbone.device)
        self.train(self.training)
        return told

    def _starting(
        self,
        generator: torch.Generator,
        saved: Tensor | None,
        sources: Sequence[Saved],
        examples: Sequence[Mapping[str, Any]] = (),
        augment: AugmentConfig | None = None,
    ) -> Starting:
        labels = () if self._asking is None else self._asking.word_ids
        source = Starting(self.backbone.vocabulary, generator, saved, labels, sources)
        return source if self.backbone.reads_words else seen(source, self.backbone, self._asking, examples, augment)

    # ---- what is trained --------------------------------------------------------------------------------------------

    def trained(self) -> list[Group]:
        """Every trained tensor with its learning rate."""
        groups = [] if self.method is None else [replace(g, name=f"method.{g.name}") for g in self.method.trained()]
        if self.baseline is not None:
            groups += [replace(g, name=f"baseline.{g.name}") for g in self.baseline.trained()]
        if self.head is not None:
            rate = self.task.config.head_lr
            decay = self.task.config.head_weight_decay
            groups += [
                Group(f"head.{name}", value, rate, decay if value.dim() > 1 else 0.0)
                for name, value in self.head.named_parameters()
            ]
        return groups

    def state(self) -> dict[str, Tensor]:
        """Copies of the trained tensors, on the CPU; of a prompt of words its text too, as bytes of UTF-8."""
        found = {group.name: group.parameter.detach().cpu().clone() for group in self.trained()}
        if self.method is not None and self.method.text is not None:
            found |= text_state(self.method.text)
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put trained tensors back; names and shapes must be the same."""
        with torch.no_grad():
            for group in self.trained():
                group.parameter.copy_(state[group.name])
        if self.method is not None and self.method.text is not None:
            self.method.text = bytes(state[TEXT].tolist()).decode()
        self.train(self.training)

    def constants_digest(self) -> str:
        """A fingerprint of what the method holds besides what is trained; empty where that is nothing."""
        return "" if self.method is None else digest_of(dict(self.method.named_buffers()))

    @property
    def text(self) -> str | None:
        """The words of a prompt that is words; of one that a policy writes for each input, None."""
        return None if self.method is None or self.spoken is not None else self.method.text

    @property
    def spoken(self) -> PolicyFacts | None:
        """What writes the words for each input, of a prompt that has such a policy."""
        return self.method.policy if isinstance(self.method, TextMethod) else None

    @property
    def trainable_parameters(self) -> int:
        """How many numbers are trained, head included."""
        return sum(group.parameter.numel() for group in self.trained())

    @property
    def lengths(self) -> tuple[int, int]:
        """Positions that the prompt takes among the text, and those of keys and values before everything.

        Of a prompt of words the tokens that it has in this model's vocabulary.
        """
        if self.spoken is not None:
            return self.spoken.num_tokens, 0
        with torch.no_grad():
            prompt = self.prompt(self.backbone.probe())
            return prompt.length, prompt.prefix_length

    @property
    def added_tokens(self) -> int:
        """Positions that the prompt adds to an input."""
        return sum(self.lengths)

    @property
    def offset_rows(self) -> int | None:
        """Positions of the source that get an offset; None for a prompt without one."""
        if self.spoken is not None:
            return None
        with torch.no_grad():
            offset = self.prompt(self.backbone.probe()).offset
        return None if offset is None else len(offset.left)

    # ---- examples to batches ----------------------------------------------------------------------------------------

    def rows(self, examples: Iterable[Mapping[str, Any]], *, labelled: bool) -> list[Row]:
        """Encode examples.

        Raises:
            DataError: names the row (from 1) that is wrong.
        """
        return self.asking.rows(examples, labelled=labelled)

    def answer_positions(self, row: Row) -> int:
        """Positions that an answer takes besides the text's own; a single token is read where it would stand."""
        return self.asking.answer_positions(row)

    def batch(self, rows: Sequence[Row]) -> Batch:
        """Rows as one padded batch on the backbone's device."""
        backbone = self.backbone
        found = collate(rows, backbone.pad, segments=backbone.uses_segments, sight=backbone.sight)
        return found.to(backbone.device)

    # ---- forward ----------------------------------------------------------------------------------------------------

    @property
    def reads(self) -> frozenset[str]:
        """What of the model's outputs is looked at, see `Method.reads` and, in training, `Method.studies`."""
        if self.method is None:
            return frozenset({"scores"})
        return self.method.reads | (self.method.studies if self.training else frozenset())

    def prompt(self, batch: Batch) -> Prompt:
        """The prompt for this batch: live in training, folded in evaluation where that is legal."""
        return self.made(self.view(batch))

    def view(self, batch: Batch) -> View:
        """What the method asked to see of a batch, as far as that matters now."""
        method = self.method
        if method is None or not (self.training or method.depends or "view" in method.reads):
            return View()
        needs, backbone, mask = method.needs, self.backbone, batch.attention_mask.bool()
        chance = None if self.moment is None or not self.training else Chance(*self.moment, batch.index)
        if not needs:
            return View(chance=chance)
        states = backbone.bare(batch, "states").float() if "states" in needs else None
        answer = None
        if "answer" in needs:  # from the same pass where it is among the states
            answer = None if states is None else backbone.answer_in(batch, states)
            answer = backbone.bare(batch, "answer").float() if answer is None else answer
        return View(
            mask=mask,
            content=backbone.content(batch) if "content" in needs else None,
            ids=batch.input_ids if "ids" in needs else None,
            embeddings=backbone.embeddings(batch).float() if "embeddings" in needs else None,
            states=states,
            answer=answer,
            at=batch.slots.get(ANSWER) if "at" in needs else None,
            chance=chance,
        )

    def made(self, view: View) -> Prompt:
        """The prompt from what the method sees."""
        if self.method is None:
            return Prompt()
        folded = self._folded
        if folded is not None:
            if folded[1] != self._stamp():  # somebody wrote into the tensors
                self.train(False)
                return self.made(view)
            return folded[0]
        # prompt tensors stay in float32 whatever precision the model runs in
        with torch.autocast(self.backbone.device.type, enabled=False):
            return self._spelled(self.method.prompt(view))

    def _spelled(self, prompt: Prompt) -> Prompt:
        """A prompt of words as tokens, where it has a task that says where they stand."""
        return prompt if self._asking is None else self._asking.spelled(prompt)

    def saying(self, text: str) -> Tuned:
        """The same with other words, in evaluation; everything else is shared.

        Raises:
            ConfigError: this prompt is not words.
        """
        if not isinstance(self.method, TextMethod):
            raise ConfigError(f"only a prompt of words can say something else, and {self._name} holds vectors")
        other = copy.copy(self)
        other._modules = {**self._modules, "method": self.method.saying(text)}
        other._folded = None
        return other.train(False)

    @property
    def _name(self) -> str:
        return "the model alone" if self.method is None else self.method.name

    def teacher(self, view: View) -> Prompt | None:
        """What the batch is run with besides, in training."""
        return None if self.method is None or not self.training else self.method.teacher(view)

    def outputs(self, batch: Batch) -> Outputs:
        """What the backbone says of each row."""
        return outputs(batch, [(self, range(len(batch)))])[0]

    def scores(self, batch: Batch) -> Tensor:
        """What the task decides by: [b, c] of words, [b, outputs] of a head."""
        return self.decided(self.outputs(batch))

    def decided(self, outputs: Outputs) -> Tensor:
        """The score of each answer, as the method reads them."""
        if self.method is None:
            assert outputs.scores is not None
            return outputs.scores
        with torch.autocast(self.backbone.device.type, enabled=False):
            return self.method.scores(outputs)

    def match(self, answer: Tensor, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """Features of images against the task's classes, and the texts' features; see `matching.match`."""
        return match(self, answer, prompt)

    def class_matrix(self) -> Tensor:
        """The vector of each class, [c, h]: what the prompt makes of their texts; see `matching.class_matrix`.

        Raises:
            NotFoldable: the classes' texts depend on the image, or this model has no text tower.
        """
        return class_matrix(self)

    def weight(self, batch: Batch) -> int:
        """What the mean loss of a batch is taken over: examples, or tokens of the answers."""
        if self.task.reading == "text" and batch.target_ids is not None:
            return int((batch.target_ids >= 0).sum())
        return len(batch)

    def loss(self, batch: Batch) -> Losses:
        """Mean loss over `weight(batch)`."""
        return self.losses(self.outputs(batch), batch)

    def losses(self, outputs: Outputs, batch: Batch) -> Losses:
        """The mean loss from what the backbone said."""
        total = self.task.loss(self.decided(outputs), batch) if outputs.costs is None else outputs.costs.sum()
        mean = total / max(self.weight(batch), 1)
        if self.method is None:
            return Losses(mean)
        with torch.autocast(self.backbone.device.type, enabled=False):
            return self.method.loss(mean, outputs)

    # ---- use --------------------------------------------------------------------------------------------------------

    def predict(
        self, examples: Sequence[Mapping[str, Any] | str], *, batch_size: int = 32, check: Any = None
    ) -> list[Prediction]:
        """Answers in the order of the examples.

        Args:
            examples: mappings of fields, or plain texts where the template has one field.
            batch_size: examples per batch.
            check: called before each batch; may raise to stop.

        Raises:
            DataError: no list; or an example lacks a field or is too long; the message names its place, from 1.
            ConfigError: batch_size is no whole number of at least 1.
        """
        dicts = self.asking.mappings(examples)
        return self.answer(self.rows(dicts, labelled=False), dicts, batch_size=batch_size, check=check)

    def answer(
        self, rows: Sequence[Row], examples: Sequence[Any], *, batch_size: int = 32, check: Any = None
    ) -> list[Prediction]:
        """Answers for encoded rows, in their order.

        Raises:
            DataError: a text is too long for the model.
            ConfigError: batch_size is no whole number of at least 1.
        """
        was_training = self.training
        self.train(False)
        try:
            if self.spoken is not None:
                return self._answer_each(rows, examples, batch_size, check)
            answerer = Answerer.of(self)
            asked = [Question(answerer, row, example) for row, example in zip(rows, examples, strict=True)]
            check_lengths(asked, "example")
            return predictions(asked, batch_size=batch_size, check=check)
        finally:
            self.train(was_training)

    def _answer_each(
        self, rows: Sequence[Row], examples: Sequence[Any], batch_size: int, check: Any
    ) -> list[Prediction]:
        """The same where a policy writes the words for each example; the answers say which they were."""
        if self.speaking is None:
            self.speaking = Speaking.of(self)
        texts = self.speaking.texts(examples)
        answerers = {text: Answerer.of(self.saying(text)) for text in dict.fromkeys(texts)}
        asked = [Question(answerers[t], row, one) for t, row, one in zip(texts, rows, examples, strict=True)]
        check_lengths(asked, "example")
        found = predictions(asked, batch_size=batch_size, check=check)
        return [replace(one, prompt=text) for one, text in zip(found, texts, strict=True)]

    def attach(self, model: Any = None, *, train: bool = False) -> AbstractContextManager[Any]:
        """Put the prompt on a transformers model; inside the block it runs, writes and trains with it. See `attach`."""
        return attach({"": self}, model, train=train)

    def _hidden_width(self) -> int:
        with torch.no_grad():
            return int(self.backbone.pooled(self.backbone.probe(), Prompt()).shape[-1])


def text_state(text: str | None) -> dict[str, Tensor]:
    """The text of a prompt of words as part of a state, bytes of UTF-8; nothing for any other prompt."""
    return {} if text is None else {TEXT: torch.tensor(list(text.encode()), dtype=torch.uint8)}


def _same(one: Prompt, other: Prompt) -> bool:
    return one.text == other.text and all(map(torch.equal, one.tensors, other.tensors))
