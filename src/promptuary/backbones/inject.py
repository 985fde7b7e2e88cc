"""How prompts get in: virtual token ids, and a head that computes only what is read.

Knows no method, no family and no tokenizer. With `attach.py` and `processors.py`, which use its `Wiring`, the only file
that changes how a module runs.

A sequence with a prompt is a sequence of token ids. With V rows in the embedding table, R prompt rows in use and
S = V + R: id < V is a token, V <= id < S is prompt row id - V, and id + S * code is a token or row that also gets
row code - 1 of the offset tables. Everything about a position therefore travels in its id, so padding, caches,
chunks and reordering cannot tear a token from its prompt row or its offset.

No module is replaced: the `forward` of an embedding or a head is shadowed on the instance, so names, types, keys of the
state dict and everything that transformers does with a model stay as they are.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from promptuary.errors import SiteError


@dataclass(frozen=True)
class Bank:
    """The vectors behind the ids of one batch: prompt rows [R, d], and offsets with a zero row in front [1 + O, d]."""

    vocabulary: int
    rows: Float[Tensor, "n d"] | None
    offsets: Float[Tensor, "o d"] | None

    @property
    def stride(self) -> int:
        """S = V + R."""
        return self.vocabulary + (0 if self.rows is None else len(self.rows))


@dataclass(frozen=True)
class Read:
    """What the head computes: `columns` [b, n] of the placed sequence, `words` [w] of the vocabulary; None is all."""

    columns: Int[Tensor, "b n"] | None
    words: Int[Tensor, " w"] | None = None


@dataclass
class Cut:
    """Where a forward pass is cut in two: `body` answers `answer`, or runs, and what it answers is put here.

    In the second case what comes behind the body gets no position to work on.
    """

    body: nn.Module
    answer: Any = None


@dataclass(frozen=True)
class Active:
    """What a model runs with: a bank, what its head reads, the mask of the placed input [b, q] while it writes, a cut.

    Nothing of it outlives the pass.
    """

    bank: Bank | None
    read: Read | None = None
    mask: Int[Tensor, "b q"] | None = None
    cut: Cut | None = None


_ACTIVE: ContextVar[Mapping[int, Active]] = ContextVar("promptuary_active", default={})  # noqa: B039 (never mutated)

_NAME = "_promptuary_wiring"


class Wiring:
    """The shadowed functions of one model, and what is active on it in the current thread or task.

    Everybody who puts prompts on a model shares its one wiring; `held` counts them.
    """

    def __init__(self, model: Any) -> None:
        """Shadow every embedding module that shares the input table, and the output head where there is one.

        Raises:
            SiteError: the model names no input embedding.
        """
        self.model = model
        self.held = 0
        self.attached: list[Any] = []
        self._later, self._lock = set[tuple[nn.Module, str]](), threading.Lock()
        self._shadowed: list[tuple[Any, str, Any]] = []
        table: Any = model.get_input_embeddings()
        if not isinstance(table, nn.Module):
            raise SiteError(f"{type(model).__name__} has no input embedding that takes token ids")
        weight: Any = table.weight
        self.vocabulary = int(weight.shape[0])
        # T5 and BART keep several embedding modules over one weight: all are shadowed
        for module in model.modules():
            if module is table or (isinstance(module, nn.Embedding) and module.weight is table.weight):
                self.shadow(module, "forward", self._prompted)
        head = model.get_output_embeddings()
        if head is not None:
            self.shadow(head, "forward", functools.partial(self._narrow, head))
        self._trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
        self._training = {module: module.training for module in model.modules()}
        model.__dict__[_NAME] = self

    @staticmethod
    def on(model: Any) -> Wiring | None:
        """The wiring of a model that has one."""
        return model.__dict__.get(_NAME)

    def shadow(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        """Put `make(original)` in the place of a bound method, on this one object, until `remove`."""
        self._shadowed.append((owner, name, owner.__dict__.get(name)))
        setattr(owner, name, make(getattr(owner, name)))

    def remove(self) -> None:
        """Give the model back as it came: functions, gradients wanted, training modes."""
        while self._shadowed:
            owner, name, before = self._shadowed.pop()
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
        for parameter, trained in self._trained.items():
            parameter.requires_grad_(trained)
        for module, training in self._training.items():
            module.training = training
        del self.model.__dict__[_NAME]

    def shadow_once(self, owner: nn.Module, name: str, make: Callable[[Any], Any]) -> None:
        """The same, unless this was done before; for what is wanted later than at the start."""
        with self._lock:
            if (owner, name) not in self._later:
                self.shadow(owner, name, make)
                self._later.add((owner, name))

    def cuts(self, body: nn.Module) -> None:
        """Make a module between embedding and head heed a `Cut`."""
        self.shadow_once(body, "forward", functools.partial(self._cut, body))

    # ---- what is active ---------------------------------------------------------------------------------------------

    @property
    def now(self) -> Active | None:
        """What is active now, in this thread."""
        return _ACTIVE.get().get(id(self))

    @contextmanager
    def active(
        self,
        bank: Bank | None = None,
        read: Read | None = None,
        mask: Int[Tensor, "b q"] | None = None,
        *,
        cut: Cut | None = None,
    ) -> Iterator[None]:
        """Within the block the model answers the ids of `bank` and computes only `read`, in this thread only."""
        token = _ACTIVE.set({**_ACTIVE.get(), id(self): Active(bank, read, mask, cut)})
        try:
            yield
        finally:
            _ACTIVE.reset(token)

    # ---- what the shadows do ----------------------------------------------------------------------------------------

    def _prompted(self, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """An embedding that also answers virtual ids: rows and offsets are kept in float32 and cast once."""

        @functools.wraps(run)
        def forward(input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            active = self.now
            if active is None or active.bank is None:
                return run(input_ids, *args, **kwargs)
            bank = active.bank
            ids = input_ids
            if bank.offsets is not None:  # without a table, no id carries a code
                code = torch.div(input_ids, bank.stride, rounding_mode="floor")
                ids = input_ids - code * bank.stride
            is_prompt = ids >= bank.vocabulary
            embedded = run(ids.masked_fill(is_prompt, 0), *args, **kwargs)
            exact = embedded
            if bank.rows is not None:
                rows = nn.functional.embedding((ids - bank.vocabulary).clamp(min=0), bank.rows)
                exact = torch.where(is_prompt[..., None], rows, exact)
            if bank.offsets is not None:
                exact = exact + nn.functional.embedding(code, bank.offsets)
            return exact.to(embedded.dtype)

        return forward

    def _cut(self, body: nn.Module, run: Callable[..., Any]) -> Callable[..., Any]:
        """A body whose answer is given, or taken away."""

        @functools.wraps(run)
        def forward(*args: Any, **kwargs: Any) -> Any:
            active = self.now
            if active is None or active.cut is None or active.cut.body is not body:
                return run(*args, **kwargs)
            cut = active.cut
            if cut.answer is not None:
                return cut.answer
            cut.answer = run(*args, **kwargs)
            return type(cut.answer)(last_hidden_state=cut.answer.last_hidden_state[:, :0])

        return forward

    def _narrow(self, head: Any, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """An output head that computes only the positions and words that are asked for."""

        @functools.wraps(run)
        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            active = self.now
            if active is None or active.read is None:
                return run(hidden, *args, **kwargs)
            columns, words, chosen = active.read.columns, active.read.words, hidden
            if columns is not None:
                chosen = hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[-1]))
            if words is None:
                return run(chosen, *args, **kwargs)
            if type(head) is nn.Linear:
                bias = None if head.bias is None else head.bias[words]
                return nn.functional.linear(chosen, head.weight[words], bias)
            return run(chosen, *args, **kwargs)[..., words]

        return forward
