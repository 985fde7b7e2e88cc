"""What a frozen model makes of images, computed once and kept on disk: a run then opens no image in any step.

Knows no method, task or family by name. A file belongs to what its features follow from: the weights of the model, how
images are prepared, the pictures themselves and their views; another of any of these has another file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor

from promptuary import files
from promptuary.backbones.base import Backbone
from promptuary.data.collate import Row, collate
from promptuary.types import Prompt

FOLDER = "features"
"""Its usual name in the folder of a run."""

TOGETHER = 64
"""Images of one file (our choice): what an interruption costs at most."""


class Features:
    """A store of features of images on one model."""

    def __init__(self, backbone: Backbone, folder: str | Path) -> None:
        """Nothing is read or written yet.

        Args:
            backbone: one that sees.
            folder: may be shared by any number of runs.
        """
        self.backbone, self.folder = backbone, Path(folder)
        sight, config = backbone.sight, backbone.config
        self._base = [backbone.identity, str(sight), config.pooling, config.dtype]
        self.computed = self.found = 0

    def of(self, rows: Sequence[Row], check: Callable[[], None] | None = None) -> Float[Tensor, "n h"]:
        """Features of the images of rows, in their order, on the CPU.

        Args:
            rows: with images, each in its view.
            check: called before each file; may raise to stop. What was computed until then is kept.
        """
        parts = []
        for start in range(0, len(rows), TOGETHER):
            if check is not None:
                check()
            parts.append(self._part(rows[start : start + TOGETHER]))
        return torch.cat(parts)

    def _part(self, rows: Sequence[Row]) -> Float[Tensor, "n h"]:
        key = self._key(rows)
        path = self.folder / f"{key[:32]}.safetensors"
        kept = _read(path, key, len(rows))
        if kept is not None:
            self.found += len(rows)
            return kept
        made = self._computed(rows)
        self.folder.mkdir(parents=True, exist_ok=True)
        facts = {"key": key, "sha256": files.digest_of({"features": made})}
        files.write_file(path, safetensors.torch.save({"features": made}, facts))
        self.computed += len(rows)
        return made

    def _key(self, rows: Sequence[Row]) -> str:
        """Everything that the features follow from."""
        pictures = []
        for row in rows:
            picture = row.encoded.image
            varied = picture.view is not None and picture.augment is not None and picture.augment.varies_images
            view = [picture.augment.model_dump(), picture.view] if varied else None
            pictures.append([picture.digest, view])
        return files.digest(json.dumps([self._base, pictures], sort_keys=True).encode())

    @torch.no_grad()
    def _computed(self, rows: Sequence[Row]) -> Float[Tensor, "n h"]:
        backbone, found = self.backbone, []
        for start in range(0, len(rows), 16):
            part = rows[start : start + 16]
            batch = collate(part, backbone.pad, segments=False, sight=backbone.sight).to(backbone.device)
            found.append(backbone.pooled(batch, Prompt()).cpu())
        return torch.cat(found)


def _read(path: Path, key: str, count: int) -> Float[Tensor, "n h"] | None:
    """What a file holds, if it is whole and belongs to the key; None otherwise: it is then made anew."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            facts, features = file.metadata() or {}, file.get_tensor("features")
    except (OSError, safetensors.SafetensorError):
        return None
    whole = facts.get("key") == key and facts.get("sha256") == files.digest_of({"features": features})
    found: Tensor = features
    return found if whole and found.dim() == 2 and len(found) == count else None
