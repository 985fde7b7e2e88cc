"""A frozen backbone, a method and a task put together: what is trained, evaluated, saved and used.

Knows no files, optimisers or progress bars, and no method, family or task by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from promptuary import registry
from promptuary.backbones.base import Backbone, BackboneConfig
from promptuary.backbones.inject import attached
from promptuary.backbones.load import guess_family
from promptuary.data.collate import Row, batches, collate, pad_candidates
from promptuary.errors import ConfigError, DataError, NotFoldable
from promptuary.methods.base import Group, Method, MethodConfig
from promptuary.prompts.blocks import kaiming_uniform
from promptuary.prompts.init import Starting
from promptuary.tasks.base import Task
from promptuary.types import Batch, Candidates, Losses, Prediction, Prompt, Shape, View


class Tuned(nn.Module):
    """A backbone that does a task with a prompt. Without a method it is the frozen model alone (zero-shot)."""

    def __init__(self, backbone: Backbone, task: Task, method: Method | None = None, *, max_length: int = 256) -> None:
        """Put the parts together.

        Args:
            backbone: frozen and wired.
            task: settled.
            method: its tensors are moved to the backbone's device, in float32.
            max_length: most tokens of a text, special tokens included.

        Raises:
            ConfigError: the family cannot read what the task reads, or text and prompt exceed its positions.
        """
        super().__init__()
        task.for_abilities(backbone.abilities, backbone.name)
        if backbone.answer_at != "mask" and not task.template.asks_at_end:
            raise ConfigError(
                f"task.template {task.template.text!r} has text behind {{mask}}, "
                f"but a {backbone.name} model answers at the end"
            )
        if backbone.answer_at == "mask" and task.reading == "words" and "mask" not in task.template.slots:
            raise ConfigError('a masked model reads its answer at a mask: put "{mask}" into task.template')
        self.backbone, self.task, self.method = backbone, task, method
        self.max_length = max_length
        self.head: nn.Linear | None = None
        if task.reading == "head":
            self.head = nn.Linear(self._hidden_width(), task.outputs).to(backbone.device)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        if method is not None:
            method.to(backbone.device)
        self._folded: Prompt | None = None
        self._words: Candidates | None = None
        if task.reading == "words" and task.words:
            glue = task.template.glue
            ids = [backbone.answer_ids(word, glue=glue) for word in task.words]
            self._check_words(ids)
            self._words = pad_candidates(ids).to(backbone.device)
        self.train(False)

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
            self._folded = self.method.fold()
        return self

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
            return self.prompt(self._probe()).length

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

    def loss(self, batch: Batch) -> Losses:
        """Mean loss over `weight(batch)`."""
        if self.task.reading == "text":
            total = self.backbone.answer_loss(batch, self.prompt(batch))
        else:
            total = self.task.loss(self.scores(batch), batch)
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
            DataError: an example lacks a field; the message names its row.
        """
        fields = self.task.template.fields
        dicts = [{fields[0]: item} if isinstance(item, str) else item for item in examples]
        return self.answer(self.rows(dicts, labelled=False), dicts, batch_size=batch_size, check=check)

    @torch.no_grad()
    def answer(
        self, rows: Sequence[Row], examples: Sequence[Any], *, batch_size: int = 32, check: Any = None
    ) -> list[Prediction]:
        """Answers for encoded rows, in their order."""
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

    @contextmanager
    def attach(self, model: Any) -> Iterator[Any]:
        """Put the folded prompt on your own transformers model; inside the block it runs and generates with it.

        Args:
            model: the same base as the prompt was trained on; not one that this object already holds.

        Raises:
            FingerprintError: another base.
            NotFoldable: the prompt depends on the input.
            SiteError: the model already carries a prompt.
        """
        if self.method is None or self.method.needs:
            raise NotFoldable("only a prompt that does not depend on the input can be attached")
        if model is self.backbone.model:
            raise ConfigError("this model already belongs to the prompt; call predict, or release the backbone first")
        host = self.backbone.config.model_copy(update={"model": model.name_or_path or type(model).__name__})
        other = type(self.backbone)(model, self.backbone.tokenizer, host)
        try:
            other.check_identity(self.backbone.identity, self.backbone.config.model)
            prompt = self.method.fold()
            with attached(
                other.wiring,
                lambda batch, side: other.place(batch, prompt, side),
                decoder_writes=other.answer_at == "target",
            ):
                yield model
        finally:
            other.release()

    def _hidden_width(self) -> int:
        with torch.no_grad():
            return int(self.backbone.hidden(self._probe(), Prompt()).shape[-1])

    def _probe(self) -> Batch:
        first = self.backbone.vocabulary.common(1).to(self.backbone.device)
        return Batch(first[None], torch.ones_like(first)[None], torch.zeros_like(first))


def open_backbone(config: BackboneConfig) -> Backbone:
    """Load a backbone; family "auto" is read from the model's config.

    Raises:
        ConfigError: no such model or family.
    """
    family = config.family if config.family != "auto" else guess_family(config.model, config.revision)
    config = config.model_copy(update={"family": family})
    loaded: Backbone = registry.load("backbones", family).load(config)
    return loaded


def build_method(config: MethodConfig, shape: Shape) -> Method:
    """A method from its settings; `match_length` is resolved first."""
    found = registry.load("methods", config.name)
    if config.match_length is not None:
        config = found.match_budget(config, config.match_length, shape)
    made: Method = found(config, shape)
    return made


def match_budget(method: str, length: int, width: int, /, **settings: Any) -> MethodConfig:
    """Settings of a method with at most as many trained parameters as prompt tuning of `length` rows.

    Args:
        method: its name.
        length: rows of the prompt that is compared with.
        width: width of the backbone's token embeddings.
        settings: the method's own settings.

    Raises:
        ConfigError: no such method or setting, or even its smallest form is larger.
    """
    found = registry.load("methods", method)
    config: MethodConfig = found.Config.read({"name": method, **settings}, where="method")
    resized: MethodConfig = found.match_budget(config, length, Shape(width))
    return resized
