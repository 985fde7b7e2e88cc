"""How prompts get in: virtual token ids, rows among the patches of an image, a head that computes only what is read.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
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
class Seen:
    """What a model that sees runs with.

    `rows` [1 or b, l, p, v]: come in behind the first `lead` tokens before the first layer, and take the place of what
    became of the rows before in front of each later one up to the l-th; `norms` [n, 2, v]: weights and biases.
    """

    rows: Float[Tensor, "g l p v"] | None
    lead: int
    norms: Float[Tensor, "n 2 v"] | None = None


@dataclass(frozen=True)
class Active:
    """What a model runs with: a bank, what its head reads, the mask of the placed input [b, q] while it writes, a cut.

    Or what it sees with. Nothing of it outlives the pass.
    """

    bank: Bank | None
    read: Read | None = None
    mask: Int[Tensor, "b q"] | None = None
    cut: Cut | None = None
    seen: Seen | None = None


_ACTIVE: ContextVar[Mapping[int, Active]] = ContextVar("promptuary_active", default={})  # noqa: B039 (never mutated)

_NAME = "_promptuary_wiring"


class Wiring:
    """The shadowed functions of one model, and what is active on it in the current thread or task.

    Everybody who puts prompts on a model shares its one wiring; `held` counts them.
    """

    def __init__(self, model: Any, *, words: bool = True) -> None:
        """Shadow every embedding module that shares the input table, and the output head where there is one.

        Args:
            model: of transformers.
            words: whether prompts are to stand among tokens; if not, no embedding and no head is shadowed.

        Raises:
            SiteError: the model names no input embedding.
        """
        self.model = model
        self.held = self.vocabulary = 0
        self.attached: list[Any] = []
        self._later, self._lock = set[tuple[nn.Module, str]](), threading.Lock()
        self._shadowed: list[tuple[Any, str, Any]] = []
        self._trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
        self._training = {module: module.training for module in model.modules()}
        if words:
            self._shadow_words(model)
        model.__dict__[_NAME] = self

    def _shadow_words(self, model: Any) -> None:
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

    def sees(
        self, layers: Sequence[nn.Module], norms: Sequence[nn.LayerNorm], biases: Sequence[nn.Module] = ()
    ) -> None:
        """Make the layers of a model that sees, and the norms in them, heed `Seen`; once, however often it is asked.

        Args:
            layers: in their order; each takes states [b, n, v] and a mask, and gives states.
            norms: in their order.
            biases: modules that answer what attention adds for pairs of tokens, [1, k, n, n].
        """
        for number, layer in enumerate(layers):
            self.shadow_once(layer, "forward", functools.partial(self._among, number))
        for number, norm in enumerate(norms):
            self.shadow_once(norm, "forward", functools.partial(self._normed, norm, number))
        for bias in biases:
            self.shadow_once(bias, "forward", self._widened)

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
        seen: Seen | None = None,
    ) -> Iterator[None]:
        """Within the block the model answers the ids of `bank` and computes only `read`, in this thread only."""
        token = _ACTIVE.set({**_ACTIVE.get(), id(self): Active(bank, read, mask, cut, seen)})
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

    @property
    def _seen(self) -> Seen | None:
        active = self.now
        return None if active is None else active.seen

    def _among(self, number: int, run: Callable[..., Any]) -> Callable[..., Any]:
        """A layer before which rows come in among the states, or take the place of earlier ones."""

        @functools.wraps(run)
        def forward(hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
            seen = self._seen
            if seen is None or seen.rows is None:
                return run(hidden_states, attention_mask, *args, **kwargs)
            depth, size = seen.rows.shape[1:3]
            if number < depth:
                rows = seen.rows[:, number].to(hidden_states.dtype).expand(len(hidden_states), -1, -1)
                behind = hidden_states[:, seen.lead + (size if number else 0) :]
                hidden_states = torch.cat([hidden_states[:, : seen.lead], rows, behind], dim=1)
            if attention_mask is not None and attention_mask.shape[-1] < hidden_states.shape[1]:
                attention_mask = _wider(attention_mask, seen.lead, size)
            return run(hidden_states, attention_mask, *args, **kwargs)

        return forward

    def _normed(self, norm: nn.LayerNorm, number: int, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A layer norm with another weight and bias."""

        @functools.wraps(run)
        def forward(states: Tensor) -> Tensor:
            seen = self._seen
            if seen is None or seen.norms is None:
                return run(states)
            weight, bias = seen.norms[number].to(states.dtype)
            return nn.functional.layer_norm(states, norm.normalized_shape, weight, bias, norm.eps)

        return forward

    def _widened(self, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A bias of attention that says nothing of pairs with a row of a prompt."""

        @functools.wraps(run)
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            seen, found = self._seen, run(*args, **kwargs)
            return found if seen is None or seen.rows is None else _wider(found, seen.lead, seen.rows.shape[2])

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


@contextmanager
def noting(parts: Sequence[nn.Module], found: list[Tensor]) -> Iterator[None]:
    """Within the block, what enters each of these modules first is put into `found`, in the order of their calls."""
    handles = [part.register_forward_pre_hook(functools.partial(_note, found), with_kwargs=True) for part in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _note(found: list[Tensor], part: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
    found.append(given[0] if given else next(iter(named.values())))


def _wider(mask: Tensor, lead: int, more: int) -> Tensor:
    """What attention adds for pairs of tokens, with nothing for `more` tokens behind the first `lead`."""
    for axis in (-1, -2):
        if mask.shape[axis] > 1:
            rest = mask.shape[axis] - lead
            before, behind = mask.split([lead, rest], dim=axis)
            size = list(mask.shape)
            size[axis] = more
            nothing = mask.new_ones(size) if mask.dtype == torch.bool else mask.new_zeros(size)
            mask = torch.cat([before, nothing, behind], dim=axis)
    return mask
