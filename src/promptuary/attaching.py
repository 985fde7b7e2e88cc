"""Prompts on a transformers model of the host's own, for as long as a block runs.

Knows no task, method or file; `backbones/attach.py` does the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from promptuary.backbones.attach import Attachment
from promptuary.backbones.hosts import attached
from promptuary.backbones.place import Placed, Side
from promptuary.errors import ConfigError, NotFoldable, SiteError
from promptuary.types import Batch, Prompt

if TYPE_CHECKING:
    from promptuary.tuned import Tuned

TRAINED_AS = "promptuary_prompt"
"""Name of the submodule that a prompt in training is for the host's model, so that optimisers and Trainer find it."""


@contextmanager
def attach(prompts: Mapping[str, Tuned], model: Any = None, *, train: bool = False) -> Iterator[Any]:
    """Run a model with one or several prompts; it takes and gives text positions only.

    Inside the block `model(...)` and `model.generate(...)` take what they always take: padding on either side, labels,
    a cache of an earlier turn, `inputs_embeds`, packed texts. With several prompts, `prompt_names=[...]` says which one
    each row takes. Each thread may attach its own prompts to one model; a thread that has none runs with the only
    prompt that is attached anywhere. After the block the model is its own again, byte for byte.

    Args:
        prompts: names and prompts; a single one needs no name in the calls.
        model: the same base as the prompts were trained on; default: the one that the first prompt holds.
        train: keep the prompt live and make its tensors parameters of the model, for the host's own training loop or
            transformers.Trainer; one prompt only. Otherwise it is folded once.

    Yields:
        The model.

    Raises:
        FingerprintError: another base.
        NotFoldable: there is no prompt.
        SiteError: this thread has a prompt on the model already, others use the model that shall be trained, or the
            model sees.
    """
    if not prompts:
        raise ConfigError("attach needs at least one prompt")
    tuned = list(prompts.values())
    first = tuned[0].backbone
    if first.modality != "text":
        raise SiteError("a prompt for images cannot be attached to a model yet; use predict")
    model = first.model if model is None else model
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"attach takes a transformers model, got {type(model).__name__}")
    host_config = first.config.model_copy(update={"model": model.name_or_path or type(model).__name__})
    host = type(first)(model, first.tokenizer, host_config)
    try:
        for one in tuned:
            if one.backbone.model is not model:
                host.check_identity(one.backbone.identity, one.backbone.config.model)
        makers = [_maker(one, train) for one in tuned]

        fixed = not any(one.method is not None and one.method.depends for one in tuned)

        def place(batch: Batch, side: Side, vectors: torch.Tensor | None) -> Placed:
            if vectors is not None and not fixed:
                raise SiteError("a prompt that depends on the text needs input_ids, not inputs_embeds")
            return host.place(batch, [make(batch) for make in makers], side, vectors=vectors)

        attachment = Attachment(
            place,
            names=list(prompts) if len(prompts) > 1 else (),
            decodes=host.answer_at == "target",
            causal=host.answer_at == "end",
            fixed=fixed,
            wiring=host.wiring,
        )
        with attached(attachment), _trained(tuned, model, host.wiring) if train else nullcontext():
            yield model
    finally:
        host.release()


def _maker(tuned: Tuned, train: bool) -> Callable[[Batch], Prompt]:
    """What gives the prompt for a batch."""
    if tuned.method is None:
        raise NotFoldable("there is no prompt to attach: this is the frozen model alone")
    if tuned.method.text is not None:
        raise SiteError(
            f"a prompt of {tuned.method.name} is words ({tuned.method.text[:80]!r}): write them into the text, or use "
            "predict, or an Engine"
        )
    if tuned.method.own_scores:
        raise SiteError(
            f"a prompt of {tuned.method.name} reads answers by itself, which a model with the prompt alone would not; "
            "use predict, or an Engine"
        )
    if train and tuned.method.studies:
        raise SiteError(
            f"with these settings {tuned.method.name} has a loss of its own, which your own loop would leave out; use "
            "promptuary train"
        )
    if train or tuned.method.depends:
        return tuned.prompt
    folded = tuned.method.fold()
    return lambda batch: folded


@contextmanager
def _trained(tuned: list[Tuned], model: Any, wiring: Any) -> Iterator[None]:
    """The prompt's tensors as parameters of the model; modes are put back."""
    if len(tuned) > 1 or len(wiring.attached) > 1:
        raise SiteError("only a single prompt can be trained on a model, and nobody else may use it meanwhile")
    modes = {module: module.training for module in model.modules()}
    model.add_module(TRAINED_AS, tuned[0].method)
    tuned[0].train(True)
    try:
        yield
    finally:
        delattr(model, TRAINED_AS)
        for module, mode in modes.items():
            module.training = mode
        tuned[0].train(False)
