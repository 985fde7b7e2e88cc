"""Hand-made sentences about classes, as the frozen text tower reads them: what learnt contexts are compared with.

Knows no method and no model: the tower is asked through `Classes`.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from promptuary.errors import ConfigError
from promptuary.prompts.init import Classes, Starting

PLACE = "{}"
"""Where the name goes in a template."""

LASP = (
    "a photo of a {}, a type of flower.",
    "a photo of a person doing {}.",
    "a centered satellite photo of {}.",
    "a photo of a {}, a type of aircraft.",
    "{} texture.",
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
    "a photo of a {}.",
    "a photo of many {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a pixelated photo of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a close-up photo of the {}.",
    "a low resolution photo of a {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a blurry photo of a {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
)
"""The 35 sentences of LASP's release, for every data set; one of them stands twice, and so counts twice."""


def check_template(template: str) -> str:
    """The template itself.

    Raises:
        ValueError: it has no place for the name.
    """
    if PLACE not in template:
        raise ValueError(f'the template "{template}" has no {PLACE} for the name of the class')
    return template


def named_classes(source: Starting, method: str) -> Classes:
    """The text tower and the names of the classes.

    Raises:
        ConfigError: there is no tower, or the task names no classes to it.
    """
    if source.classes is None:
        raise ConfigError(
            f"{method} compares with sentences about classes: it needs backbone.family: dual and a task that names them"
        )
    return source.classes


def reference_features(classes: Classes, templates: Sequence[str], names: Sequence[str]) -> Float[Tensor, "l c h"]:
    """What the frozen tower says of each name in each template, not normalised, float32 on the CPU.

    Args:
        classes: the tower.
        templates: l of them.
        names: c of them.
    """
    texts = [template.replace(PLACE, name) for template in templates for name in names]
    return classes.features(texts).unflatten(0, (len(templates), len(names)))


def at_hand(references: Tensor | None, near: Tensor, method: str) -> Tensor:
    """The references on the device of another tensor.

    Raises:
        ConfigError: there are none, since the prompt was loaded: they are made when a prompt starts, and not saved.
    """
    if references is None:
        raise ConfigError(
            f"this prompt of {method} was loaded, and the sentences that its loss compares with are not saved; train "
            "in a run of its own (method.init: saved starts from a prompt)"
        )
    return references.to(near.device)
