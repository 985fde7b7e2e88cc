"""Images against the texts of classes, on a model with two towers: scores, and the matrix that a prompt folds to.

Knows no method or family by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from promptuary.data.collate import pad_candidates
from promptuary.errors import NotFoldable
from promptuary.types import Candidates, Prompt

if TYPE_CHECKING:
    from promptuary.tuned import Tuned


def match(
    tuned: Tuned, answer: Float[Tensor, "b h"], prompt: Prompt
) -> tuple[Float[Tensor, "b c"], Float[Tensor, "s k h"]]:
    """Scores of images, and the text features that they come from.

    Args:
        tuned: a prompt, or none, with a task that has label words.
        answer: features of the images, not normalised.
        prompt: of these images.

    Returns:
        A score for each of the task's classes; and features [s, k, h], not normalised: in training those of the
        method's own words stand behind those of the task's.
    """
    words = _words(tuned, more=tuned.training)
    texts = tuned.backbone.texts(prompt, words).float()
    own = texts[:, : len(tuned.asking.word_ids)]
    return tuned.backbone.match(answer, _vectors(tuned, own, prompt)), texts


@torch.no_grad()
def class_matrix(tuned: Tuned) -> Float[Tensor, "c h"]:
    """The vector of each class, on the CPU: an image's unit feature times these and the scale scores it.

    Raises:
        NotFoldable: the classes' texts depend on the image, or this model has no text tower.
    """
    if "texts" not in tuned.backbone.abilities or tuned.task.reading != "words":
        raise NotFoldable("only a task with label words on a model with a text tower (dual) has a matrix of classes")
    if tuned.method is not None and tuned.method.depends:
        raise NotFoldable(f"the class texts of {tuned.method.name} depend on the image: there is no single matrix")
    prompt = Prompt() if tuned.method is None else tuned.method.fold()
    texts = tuned.backbone.texts(prompt, _words(tuned, more=False)).float()
    return _vectors(tuned, texts, prompt)[0].cpu()


def _words(tuned: Tuned, *, more: bool) -> Candidates:
    """The task's words, and behind them those that the method's loss looks at."""
    named = () if tuned.method is None or not more else tuned.method.more_words
    assert tuned.asking.words is not None
    if not named:
        return tuned.asking.words
    spoken = [tuned.backbone.answer_ids(tuned.task.spoken_as(name)) for name in named]
    return pad_candidates([*tuned.asking.word_ids, *spoken]).to(tuned.backbone.device)


def _vectors(tuned: Tuned, texts: Float[Tensor, "s c h"], prompt: Prompt) -> Float[Tensor, "s c h"]:
    """What each class is compared by: one matrix, or one for each image where each has its own."""
    with torch.autocast(tuned.backbone.device.type, enabled=False):
        vectors = nn.functional.normalize(texts, dim=-1) if tuned.method is None else tuned.method.classes(texts)
    return vectors if prompt.by_row else vectors.mean(0, keepdim=True)
