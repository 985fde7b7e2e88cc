"""A frozen backbone, a method and a task put together: what is trained, evaluated, saved and used.

Knows no files, optimisers or progress bars, and no method, family or task by name.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from promptuary.attaching import attach
from promptuary.backbones.base import Backbone
from promptuary.data.collate import Row, batches, collate, pad_candidates
from promptuary.errors import ConfigError, DataError
from promptuary.methods.base import Group, Method
from promptuary.prompts.blocks import kaiming_uniform
from promptuary.prompts.init import Starting
from promptuary.tasks.base import Task
from promptuary.types import Batch, Candidates, Losses, Prediction, Prompt, View


class Tuned(nn.Module):
    """A backbone that does a task with a prompt. Without a method it is the frozen model alone (zero-shot).

    Without a task it is a prompt on a model and nothing more: it can be attached, saved, loaded and exported, while
    the host's own code says what is learnt and what an answer means.
    """

    def __init__(
        self, backbone: Backbone, task: Task | None, method: Method | None = None, *, max_length: int = 256
    ) -> None:
        """Put the parts together.

        Args:
            backbone: frozen and wired.
            task: settled; or None.
            method: its tensors are moved to the backbone's device, in float32.
            max_length: most tokens of a text, special tokens included.

        Raises:
            ConfigError: the family cannot read what the task reads, or text and prompt exceed its positions.
        """
        super().__init__()
        if task is not None:
            self._check_task(backbone, task)
        self.backbone, self.method = backbone, method
        self._task = task
        self.max_length = max_length
        self.head: nn.Linear | None = None
        if task is not None and task.reading == "head":
            self.head = nn.Linear(self._hidden_width(), task.outputs).to(backbone.device)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        if method is not None:
            method.to(backbone.device)
        self._folded: Prompt | None = None
        self._folded_at: Hashable = None
        self._words: Candidates | None = None
        if task is not None and task.reading == "words" and task.words:
            glue = task.template.glue
            ids = [backbone.answer_ids(word, glue=glue) for word in task.words]
            self._check_words(ids)
            self._words = pad_candidates(ids).to(backbone.device)
        self.train(False)

    @property
    def task(self) -> Task:
        """What an example means.

        Raises:
            ConfigError: the prompt has no task.
        """
        if self._task is None:
            raise ConfigError(
                "this prompt has no task (no template, no answers), so it cannot predict or train by itself; "
                "use attach() and run the model, or give a task"
            )
        return self._task

    @property
    def has_task(self) -> bool:
        """Whether there is one."""
        return self._task is not None

    @staticmethod
    def _check_task(backbone: Backbone, task: Task) -> None:
        """Refuse a task that the family cannot do."""
        task.for_abilities(backbone.abilities, backbone.name)
        if backbone.answer_at != "mask" and not task.template.asks_at_end:
            raise ConfigError(
                f"task.template {task.template.text!r} has text behind {{mask}}, but the {backbone.name} family "
                "answers at the end: end it in {mask}, or use a masked model"
            )
        if backbone.answer_at == "mask" and task.reading == "words" and "mask" not in task.template.slots:
            raise ConfigError('a masked model reads its answer at a mask: put "{mask}" into task.template')

    def _check_words(self, ids: Sequence[Sequence[int]]) -> None:
        """Label words that become the same tokens could never be told apart."""
        known: dict[tuple[int, ...], int] = {}
        for place, tokens in enumerate(ids):
            first = known.setdefault(tuple(tokens), place)
            if first != place:
                raise ConfigError(
                    f"the label words {self.task.words[first]!r} and {self.task.words[place]!r} "
                    "are the same tokens in this "
                    "model's vocabulary; choose other words"
                )

    def train(self, mode: bool = True) -> Tuned:
        """Training keeps the prompt live; evaluation folds it once. The backbone's own mode is never touched."""
        self.training = mode
        self._folded = None
        if not mode and self.method is not None and not self.method.needs:
            self._folded, self._folded_at = self.method.fold(), self._stamp()
        return self

    def _stamp(self) -> Hashable:
        """Which values the method's tensors have; says nothing about the values, but changes with them."""
        return () if self.method is None else tuple((p.data_ptr(), p._version) for p in self.method.parameters())

    def initialise(self, generator: torch.Generator, saved: Tensor | None = None) -> Tuned:
        """First values of the prompt and of the head."""
        if self.head is not None:
            with torch.no_grad():
                self.head.weight.copy_(kaiming_uniform(self.head.out_features, self.head.in_features, generator))
        if self.method is not None:
            self.method.cpu().initialise(Starting(self.backbone.vocabulary, generator, saved)).to(self.backbone.device)
        return self.train(self.training)

    # ---- what is trained --------------------------------------------------------------------------------------------

    def trained(self) -> list[Group]:
        """Every trained tensor with its learning rate."""
        groups = [] if self.method is None else [replace(g, name=f"method.{g.name}") for g in self.method.trained()]
        if self.head is not None:
            rate = self.task.config.head_lr
            groups += [Group(f"head.{name}", value, rate, 0.0) for name, value in self.head.named_parameters()]
        return groups

    def state(self) -> dict[str, Tensor]:
        """Copies of the trained tensors, on the CPU."""
        return {group.name: group.parameter.detach().cpu().clone() for group in self.trained()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put trained tensors back; names and shapes must be the same."""
        with torch.no_grad():
            for group in self.trained():
                group.parameter.copy_(state[group.name])
        self.train(self.training)

    @property
    def trainable_parameters(self) -> int:
        """How many numbers are trained, head included."""
        return sum(group.parameter.numel() for group in self.trained())

    @property
    def added_tokens(self) -> int:
        """Positions that the prompt adds to an input."""
        with torch.no_grad():
            prompt = self.prompt(self._probe())
            return prompt.length + prompt.prefix_length

    @property
    def offset_rows(self) -> int | None:
        """Positions of the source that get an offset; None for a prompt without one."""
        with torch.no_grad():
            offset = self.prompt(self._probe()).offset
        return None if offset is None else len(offset.left)

    # ---- examples to batches ----------------------------------------------------------------------------------------

    def rows(self, examples: Iterable[Mapping[str, Any]], *, labelled: bool) -> list[Row]:
        """Encode examples.

        Raises:
            DataError: names the row (from 1) that is wrong.
        """
        out = []
        for index, example in enumerate(examples):
            try:
                out.append(self._row(example, index, labelled))
            except DataError as error:
                raise DataError(f"example {index + 1}: {error}") from None
        return out

    def _row(self, example: Mapping[str, Any], index: int, labelled: bool) -> Row:
        backbone, glue = self.backbone, self.task.template.glue
        filled = self.task.fill(example, labelled=labelled)
        target_ids = None
        if filled.answer is not None:
            limit = getattr(self.task.config, "max_new_tokens", 20)
            ids = backbone.answer_ids(filled.answer, glue=glue)[:limit]
            target_ids = (*ids, backbone.tokenizer.eos_token_id)
        choices = None
        if filled.choices is not None:
            choices = tuple(tuple(backbone.answer_ids(choice, glue=glue)) for choice in filled.choices)
        encoded = backbone.encode(filled.pieces, self.max_length)
        return Row(encoded, index, target=filled.target, target_ids=target_ids, choices=choices)

    def answer_positions(self, row: Row) -> int:
        """Positions that an answer takes besides the text's own; a single token is read where it would stand."""
        lengths = [len(row.target_ids or ()), *map(len, row.choices or ())]
        if self._words is not None:
            lengths.append(self._words.ids.shape[-1])
        if self.task.reading == "text":
            lengths.append(getattr(self.task.config, "max_new_tokens", 20))
        longest = max(lengths)
        return {"end": longest, "mask": longest - 1}.get(self.backbone.answer_at, 0) if longest > 1 else 0

    def batch(self, rows: Sequence[Row]) -> Batch:
        """Rows as one padded batch on the backbone's device."""
        return collate(rows, self.backbone.pad, segments=self.backbone.uses_segments).to(self.backbone.device)

    # ---- forward ----------------------------------------------------------------------------------------------------

    def prompt(self, batch: Batch) -> Prompt:
        """The prompt for this batch: live in training, folded in evaluation where that is legal."""
        if self.method is None:
            return Prompt()
        if self._folded is not None:
            if self._folded_at != self._stamp():  # somebody wrote into the tensors
                self.train(False)
            return self._folded
        view = View()
        if "embeddings" in self.method.needs:
            view = View(embeddings=self.backbone.embeddings(batch), mask=batch.attention_mask.bool())
        # prompt tensors stay in float32 whatever precision the model runs in
        with torch.autocast(batch.input_ids.device.type, enabled=False):
            return self.method.prompt(view)

    def scores(self, batch: Batch) -> Tensor:
        """What the task reads: [b, c] for words, [b, outputs] for a head."""
        if self.head is not None:
            return self.head(self.backbone.pooled(batch, self.prompt(batch)).float())
        candidates = batch.candidates if batch.candidates is not None else self._words
        if candidates is None:
            raise ConfigError(f"task {self.task.name} has no answers to score")
        return self.backbone.score(batch, self.prompt(batch), candidates)

    def weight(self, batch: Batch) -> int:
        """What the mean loss of a batch is taken over: examples, or tokens of the answers."""
        if self.task.reading == "text" and batch.target_ids is not None:
            return int((batch.target_ids >= 0).sum())
        return len(batch)

    def outputs(self, batch: Batch) -> Tensor:
        """What the backbone says of each row: scores as the task reads them, or [b] losses of the written answers."""
        if self.task.reading == "text":
            return self.backbone.answer_losses(batch, self.prompt(batch))
        return self.scores(batch)

    def loss(self, batch: Batch) -> Losses:
        """Mean loss over `weight(batch)`."""
        return self.losses(self.outputs(batch), batch)

    def losses(self, outputs: Tensor, batch: Batch) -> Losses:
        """The mean loss from what the backbone said."""
        total = outputs.sum() if self.task.reading == "text" else self.task.loss(outputs, batch)
        mean = total / max(self.weight(batch), 1)
        return Losses(mean) if self.method is None else self.method.loss(mean)

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
        dicts = self._mappings(examples)
        return self.answer(self.rows(dicts, labelled=False), dicts, batch_size=batch_size, check=check)

    def _mappings(self, examples: Any) -> list[Mapping[str, Any]]:
        """Examples as mappings of fields."""
        fields = self.task.asked(self.task.config)
        if isinstance(examples, str | bytes | Mapping | Tensor) or not isinstance(examples, Iterable):
            kind = type(examples).__name__
            raise DataError(f"expected a list of texts or of mappings of fields, got {kind}; put it into a list")
        found: list[Mapping[str, Any]] = []
        for number, item in enumerate(examples, start=1):
            if isinstance(item, Mapping):
                found.append(item)
            elif not isinstance(item, str):
                kind = type(item).__name__
                raise DataError(f"example {number}: expected a text or a mapping of fields, got {kind}")
            elif len(fields) != 1:
                names = ", ".join(fields)
                raise DataError(f"example {number}: expected a mapping of the fields {names}, got a text")
            else:
                found.append({fields[0]: item})
        return found

    def check_lengths(self, rows: Sequence[Row]) -> None:
        """Refuse texts that exceed the model's positions together with the prompt and the answer.

        Raises:
            DataError: names the first such row, from 1.
        """
        limit = self.backbone.max_positions
        if limit is None or not rows:
            return
        added = self.added_tokens
        for number, row in enumerate(rows, start=1):
            text, answer = len(row.encoded.ids), self.answer_positions(row)
            if text + answer + added > limit:
                raise DataError(
                    f"example {number}: its {text} tokens, the prompt ({added}) and the answer ({answer}) exceed the "
                    f"model's {limit} positions; shorten it to {max(0, limit - answer - added)} tokens"
                )

    @torch.no_grad()
    def answer(
        self, rows: Sequence[Row], examples: Sequence[Any], *, batch_size: int = 32, check: Any = None
    ) -> list[Prediction]:
        """Answers for encoded rows, in their order.

        Raises:
            DataError: a text is too long for the model.
            ConfigError: batch_size is no whole number of at least 1.
        """
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"batch_size: expected a whole number of at least 1, got {batch_size!r}")
        self.check_lengths(rows)
        was_training = self.training
        self.train(False)
        found: list[Prediction | None] = [None] * len(rows)
        for chosen in batches([len(row.encoded.ids) for row in rows], batch_size, generator=None):
            if check is not None:
                check()
            batch = self.batch([rows[place] for place in chosen])
            if self.task.reading == "text":
                limit = getattr(self.task.config, "max_new_tokens", 20)
                written = self.backbone.generate(batch, self.prompt(batch), max_new_tokens=limit)
                texts = self.backbone.tokenizer.batch_decode(written, skip_special_tokens=True)
                for place, text in zip(chosen, texts, strict=True):
                    found[place] = self.task.decode_text(text)
                continue
            for place, scores in zip(chosen, self.scores(batch).float().tolist(), strict=True):
                found[place] = self.task.decode(scores, examples[place])
        self.train(was_training)
        return [prediction for prediction in found if prediction is not None]

    def attach(self, model: Any = None, *, train: bool = False) -> AbstractContextManager[Any]:
        """Put the prompt on a transformers model; inside the block it runs, writes and trains with it. See `attach`."""
        return attach({"": self}, model, train=train)

    def _hidden_width(self) -> int:
        with torch.no_grad():
            return int(self.backbone.hidden(self._probe(), Prompt()).shape[-1])

    def _probe(self) -> Batch:
        first = self.backbone.vocabulary.common(1).to(self.backbone.device)
        return Batch(first[None], torch.ones_like(first)[None], torch.zeros_like(first))
