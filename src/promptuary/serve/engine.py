"""An engine: many prompts on one backbone, requests for any of them answered in common batches.

Knows no network, no training, and no method, family or task by name.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from promptuary import checkpoint
from promptuary.answering import Answerer, Question, check_lengths, predictions, texts
from promptuary.asking import named
from promptuary.backbones.base import Backbone
from promptuary.errors import ConfigError, DataError, SiteError
from promptuary.registry import suggest
from promptuary.tuned import Tuned
from promptuary.types import Prediction, Prompt

Request = tuple[str, Mapping[str, Any] | str]
"""The name of a prompt, and an example as its task reads it: a mapping of fields, or the text of the only field."""

ANSWER_SETTINGS = ("pooling", "temperature")
"""Settings of a backbone that change answers and do not belong to its identity."""


class Engine:
    """Answers requests for many prompts on one backbone.

    For example::

        film = promptuary.load_prompt("out/film")
        engine = promptuary.Engine(film.backbone)
        engine.add("film", film)
        engine.add("food", "out/food")
        engine.predict([("film", "a gripping, funny film"), ("food", "cold soup")])

    A batch mixes prompts, methods, tasks and lengths. Each prompt is folded once, when it is added; on causal models
    its keys and values are computed when it is first asked and kept (`backbone.kept_mib`), so that later batches run
    the texts alone. Any number of threads may ask, add, replace and remove; each call sees the prompts as they were
    when it began.
    """

    def __init__(self, backbone: Backbone, *, batch_size: int = 32, batch_tokens: int = 16384) -> None:
        """Without any prompt yet.

        Args:
            backbone: a loaded model, such as `load_prompt(folder).backbone`.
            batch_size: most requests that run together.
            batch_tokens: most positions that run together, padding and prompts included; a longer request runs alone.

        Raises:
            ConfigError: not a backbone, or a bound is no whole number of at least 1.
        """
        if not isinstance(backbone, Backbone):
            raise ConfigError(
                f"an engine needs a loaded Backbone, got {type(backbone).__name__}; use load_prompt(folder).backbone, "
                "or hold_backbone(model, tokenizer) for a model that you hold"
            )
        for name, bound in (("batch_size", batch_size), ("batch_tokens", batch_tokens)):
            if not isinstance(bound, int) or isinstance(bound, bool) or bound < 1:
                raise ConfigError(f"{name}: expected a whole number of at least 1, got {bound!r}")
        self.backbone, self.batch_size, self.batch_tokens = backbone, batch_size, batch_tokens
        # never written into: a call that has it keeps seeing it as it is
        self._prompts: Mapping[str, Answerer] = {}
        self._lock = threading.Lock()
        with torch.no_grad():  # what the backbone finds out on its first run, before threads come
            backbone.hidden(backbone.probe(), Prompt())

    # ---- prompts ----------------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """The prompts that can be asked, in the order in which they came."""
        return list(self._prompts)

    def add(self, name: str, prompt: Tuned | str | Path) -> None:
        """Add a prompt.

        Args:
            name: how requests will call it.
            prompt: loaded, or a folder (or hub name) as `load_prompt` takes it. What is later written into the tensors
                of a loaded one counts from then on; a saved folder is read once.

        Raises:
            ConfigError: the name is no text or stands for a prompt already, or the prompt has no task.
            FingerprintError: it was trained on another base.
            FileFormatError: the folder is missing or damaged.
        """
        self._check_name(name)
        self._refuse_twice(name)
        made = self._make(name, prompt)
        with self._lock:
            self._refuse_twice(name)
            self._prompts = {**self._prompts, name: made}

    def replace(self, name: str, prompt: Tuned | str | Path) -> None:
        """Put another prompt in the place of one; calls that begin from now on get the new one.

        Raises:
            DataError: there is none of this name.
            ConfigError: the new one has no task.
            FingerprintError: it was trained on another base.
            FileFormatError: the folder is missing or damaged; the old prompt stays.
        """
        self._find(self._prompts, name)
        made = self._make(name, prompt)
        with self._lock:
            self._find(self._prompts, name)
            self._prompts = {**self._prompts, name: made}

    def remove(self, name: str) -> None:
        """Forget a prompt, and with it what is kept for it.

        Raises:
            DataError: there is none of this name.
        """
        with self._lock:
            self._find(self._prompts, name)
            self._prompts = {one: made for one, made in self._prompts.items() if one != name}

    def _make(self, name: str, prompt: Any) -> Answerer:
        """The prompt on the engine's own backbone, folded."""
        if isinstance(prompt, str | Path):
            settings = checkpoint.read_facts(checkpoint.find_prompt(prompt))["backbone"]
            given = checkpoint.load_prompt(prompt, self.backbone)
        elif isinstance(prompt, Tuned):
            settings, given = prompt.backbone.config.model_dump(), prompt
            self.backbone.check_identity(prompt.backbone.identity, prompt.backbone.config.model)
        else:
            raise ConfigError(
                f'prompt "{name}": expected a loaded prompt (Tuned) or its folder, got {type(prompt).__name__}'
            )
        for setting in ANSWER_SETTINGS:
            mine = getattr(self.backbone.config, setting)
            if settings.get(setting, mine) != mine:
                raise ConfigError(
                    f'prompt "{name}" was trained with backbone.{setting}: {settings[setting]}, and this engine\'s '
                    f"backbone has {mine}; load the backbone so, or give the prompt an engine of its own"
                )
        if not given.has_task:
            raise ConfigError(f'prompt "{name}" has no task (no template, no answers), so nothing can be asked of it')
        method, head = given.method, given.head
        if given.backbone.device != self.backbone.device:
            method, head = copy.deepcopy(method), copy.deepcopy(head)
        own = Tuned(self.backbone, given.task, method, max_length=given.max_length)
        own.head = head if head is None else head.to(self.backbone.device)
        return Answerer.of(own)

    @staticmethod
    def _check_name(name: Any) -> None:
        if not isinstance(name, str) or not name.strip():
            raise ConfigError(f"the name of a prompt should be a text that is not blank, got {name!r}")

    def _refuse_twice(self, name: str) -> None:
        if name in self._prompts:
            raise ConfigError(f'there is a prompt "{name}" already; use replace, or choose another name')

    @staticmethod
    def _find(prompts: Mapping[str, Answerer], name: Any) -> Answerer:
        found = prompts.get(name) if isinstance(name, str) else None
        if found is None:
            shown = f'"{name}"' if isinstance(name, str) else repr(name)
            near = suggest(name, list(prompts)) if isinstance(name, str) else ""
            there = ", ".join(prompts) or "none yet; add one"
            raise DataError(f"there is no prompt {shown}{near} (prompts: {there})")
        return found

    # ---- requests ---------------------------------------------------------------------------------------------------

    def predict(self, requests: Iterable[Request]) -> list[Prediction]:
        """Answers in the order of the requests, each as its prompt's own `predict` gives it.

        Raises:
            DataError: no requests; or one names an unknown prompt, lacks a field or is too long; the message names its
                place, from 1. Nothing has run then.
        """
        asked = self._questions(requests)
        return self._answer(asked)

    def score(self, requests: Iterable[Request]) -> list[dict[str, float]]:
        """Probabilities of the labels (or of the request's own choices), in the order of the requests.

        Raises:
            DataError: as `predict`; or a prompt's answers are numbers or texts, which have no probabilities.
        """
        asked = self._questions(requests)
        for number, one in enumerate(asked, start=1):
            task = one.answerer.tuned.task
            if not task.gives_scores:
                raise DataError(f"request {number}: the answers of task {task.name} have no probabilities; use predict")
        return [dict(found.scores) for found in self._answer(asked)]

    def generate(self, requests: Iterable[Request], **options: Any) -> list[str]:
        """What the model writes behind each request, greedily unless the options say otherwise.

        Args:
            requests: for prompts of any task; its template is what the model goes on from.
            options: of the model's own `generate`, such as `max_new_tokens` or `num_beams`; without `max_new_tokens`,
                each task's own number (20 where it has none).

        Raises:
            DataError: as `predict`.
            ConfigError: `generate` has no such option, or it would give several texts for a request.
            SiteError: the model's family does not write.
        """
        if "generate" not in self.backbone.abilities:
            raise SiteError(f"the {self.backbone.name} family does not write text; use a causal or seq2seq model")
        known = {*self.backbone.model.generation_config.to_dict()} - {"transformers_version", "max_length"}
        for name, value in options.items():
            if name not in known:
                raise ConfigError(f"generate has no option {name!r}{suggest(name, sorted(known))}")
            if name in ("num_return_sequences", "return_dict_in_generate") and value not in (None, False, 1):
                raise ConfigError(f"{name}: an engine gives one text per request, got {value!r}")
        asked = self._questions(requests)
        most = options.pop("max_new_tokens", None)
        if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
            raise ConfigError(f"max_new_tokens: expected a whole number of at least 1, got {most!r}")
        writes = [one.answerer.tuned.asking.writes if most is None else most for one in asked]
        check_lengths(asked, "request", writes)
        return texts(asked, self.batch_size, self.batch_tokens, writes=writes, **options)

    def _answer(self, asked: Sequence[Question]) -> list[Prediction]:
        check_lengths(asked, "request")
        return predictions(asked, self.batch_size, self.batch_tokens)

    def _questions(self, requests: Any) -> list[Question]:
        """Encoded requests, each with its prompt as it is now."""
        prompts = self._prompts
        if isinstance(requests, str | bytes | Mapping) or not isinstance(requests, Iterable):
            kind = type(requests).__name__
            raise DataError(f"expected a list of requests (pairs of a prompt's name and an example), got {kind}")
        asked = [
            named(f"request {number}", self._question, prompts, one, number)
            for number, one in enumerate(requests, start=1)
        ]
        if not asked:
            raise DataError("there are no requests; give at least one pair of a prompt's name and an example")
        return asked

    def _question(self, prompts: Mapping[str, Answerer], request: Any, number: int) -> Question:
        if not isinstance(request, tuple | list) or len(request) != 2:
            raise DataError(f"expected a pair of a prompt's name and an example, got {type(request).__name__}")
        answerer = self._find(prompts, request[0])
        asking = answerer.tuned.asking
        example = asking.mapping(request[1])
        return Question(answerer, asking.row(example, number - 1), example)
