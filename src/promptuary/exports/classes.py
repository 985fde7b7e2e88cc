"""A prompt of class texts as the static matrix that it folds to: a zero-shot head for a plain CLIP-like model.

Knows no method; neither the text tower nor this library is needed to use the matrix.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor, nn

import promptuary
from promptuary import files
from promptuary.errors import FileFormatError, NotFoldable

if TYPE_CHECKING:
    from promptuary.backbones.base import Backbone
    from promptuary.tuned import Tuned

FORMAT, VERSION = "promptuary-classes", 1
MATRIX, FACTS = "classes.safetensors", "classes.json"
WEIGHT, SCALE, NORMS = "weight", "scale", "norms."


class ClassHead(nn.Module):
    """Scores of images from their features: scale times the cosine-like product with each class's vector."""

    def __init__(self, weight: Float[Tensor, "c h"], scale: Float[Tensor, ""], labels: tuple[str, ...]) -> None:
        """Hold the matrix, which is not trained.

        Args:
            weight: the vector of each class.
            scale: the model's, 100 for OpenAI's CLIP.
            labels: what the classes are called, in the order of the rows.
        """
        super().__init__()
        self.weight, self.scale, self.labels = nn.Parameter(weight, False), nn.Parameter(scale, False), labels

    def forward(self, features: Float[Tensor, "b h"]) -> Float[Tensor, "b c"]:
        """Logits of image features, normalised or not, such as `model.get_image_features(...).pooler_output`."""
        return self.scale * nn.functional.normalize(features.float(), dim=-1) @ self.weight.T


def write(tuned: Tuned, folder: str | Path) -> Path:
    """Write the matrix with the labels and a page that shows its use without this library.

    Trained layer norms of the visual side are written beside it, under the names that they have in the model.

    Args:
        tuned: a task with label words on a dual model.
        folder: written as a whole.

    Raises:
        NotFoldable: the class texts depend on the image, or the image has rows of a prompt.
        FileFormatError: a value is not finite.
    """
    matrix = tuned.class_matrix()
    prompt = None if tuned.method is None else tuned.method.fold()
    if prompt is not None and prompt.layers is not None:
        raise NotFoldable(
            "this prompt also stands among the patches of the image, which no matrix of classes can carry"
        )
    backbone: Any = tuned.backbone
    tensors = {WEIGHT: matrix.float().contiguous(), SCALE: backbone.scale.cpu()}
    if prompt is not None and prompt.norms is not None:
        tensors |= _named_norms(backbone, prompt.norms)
    if not all(bool(value.isfinite().all()) for value in tensors.values()):
        raise FileFormatError("not written: the matrix holds values that are not finite")
    content = files.tensor_bytes(tensors)
    labels = list(getattr(tuned.task, "labels", ())) or list(tuned.task.words)
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "promptuary": promptuary.__version__,
        "method": None if tuned.method is None else tuned.method.name,
        "backbone": tuned.backbone.config.model,
        "identity": tuned.backbone.identity,
        "labels": labels,
        "words": list(tuned.task.words),
        "norms": sorted(name.removeprefix(NORMS) for name in tensors if name.startswith(NORMS)),
        "sha256": {MATRIX: files.digest(content)},
    }
    page = _page(facts, matrix).encode()
    path = Path(folder)
    files.write_folder(path, {MATRIX: content, FACTS: files.to_json(files.sealed(facts)), "README.md": page})
    return path


def read(folder: str | Path) -> ClassHead:
    """The head of an exported folder.

    Raises:
        FileFormatError: missing, damaged, or of another format.
    """
    path = Path(folder)
    facts = files.read_json(path / FACTS)
    if facts.get("format") != FORMAT or facts.get("version") != VERSION:
        raise FileFormatError(f"{path / FACTS} is no matrix of classes of this release; export it again")
    files.check_seal(path / FACTS, facts)
    tensors = files.read_tensors(path / MATRIX, facts["sha256"][MATRIX])
    return ClassHead(tensors[WEIGHT], tensors[SCALE], tuple(facts["labels"]))


def _named_norms(backbone: Backbone, values: Float[Tensor, "n 2 v"]) -> dict[str, Tensor]:
    """Trained layer norms by the names that they have in the model."""
    seeing: Any = backbone
    names = {module: name for name, module in backbone.model.named_modules()}
    found = {}
    for norm, (weight, bias) in zip(seeing.norms, values.cpu(), strict=True):
        found[f"{NORMS}{names[norm]}.weight"] = weight.clone()
        found[f"{NORMS}{names[norm]}.bias"] = bias.clone()
    return found


def _page(facts: dict[str, Any], matrix: Tensor) -> str:
    more = ""
    if facts["norms"]:
        more = (
            '\nnorms = {name[6:]: value for name, value in tensors.items() if name.startswith("norms.")}\n'
            "model.load_state_dict(norms, strict=False)  # the visual layer norms that were trained with it\n"
        )
    return f"""# Class vectors

{len(matrix)} classes, {matrix.shape[1]} numbers each, for `{Path(facts["backbone"]).name}`: what a prompt
({facts["method"] or "no method: the label words as they are"}) makes of the text tower. Neither the text tower nor
promptuary is needed.

```python
import json, torch
from safetensors.torch import load_file

tensors = load_file("{MATRIX}")
labels = json.load(open("{FACTS}"))["labels"]
{more}
features = model.get_image_features(pixel_values=pixels).pooler_output
logits = tensors["scale"] * torch.nn.functional.normalize(features, dim=-1) @ tensors["weight"].T
print([labels[int(place)] for place in logits.argmax(-1)])
```
"""
