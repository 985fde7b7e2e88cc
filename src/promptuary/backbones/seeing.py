"""Models that see: an image becomes patch tokens behind special ones, and rows of a prompt may stand between the two.

Knows no method, task or data set, and no text; what the two families have in common.
"""

from __future__ import annotations

import abc
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
import transformers
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.image_processing_base import ImageProcessingMixin

from promptuary.backbones import load
from promptuary.backbones.base import Backbone, BackboneConfig, Prompts
from promptuary.backbones.cache import repeat_kv
from promptuary.backbones.inject import Seen, noting
from promptuary.backbones.recompute import layers
from promptuary.errors import ConfigError, SiteError
from promptuary.types import Batch, Encoded, Piece, Prompt, Sight


class Seeing(Backbone):
    """A model with a vision tower. The "text" of an example is its tokens there, which have no ids of their own."""

    answer_at = "none"
    reads_words: ClassVar[bool] = False
    modality: ClassVar[str] = "image"
    sight: Sight

    @property
    @abc.abstractmethod
    def eye(self) -> Any:
        """The module that takes pixels and gives states."""

    # ---- what it is -------------------------------------------------------------------------------------------------

    def input_table(self) -> Any:
        """The convolution (or linear map) of the patches."""
        found = self.eye.get_input_embeddings()
        return next(part for part in found.modules() if isinstance(part, nn.Conv2d | nn.Linear))

    def wire_eye(self) -> None:
        """Make layers and norms heed a prompt."""
        biases = [part for part in self.eye.modules() if type(part).__name__.endswith("RelativePositionBias")]
        self.wiring.sees(self.blocks, self.norms, biases)

    @cached_property
    def blocks(self) -> list[nn.Module]:
        """The layers.

        Raises:
            SiteError: none are found.
        """
        found = layers(self.eye)
        if not found:
            raise SiteError(f"{type(self.eye).__name__} has no layers among which a prompt could stand")
        return found

    @cached_property
    def norms(self) -> list[nn.LayerNorm]:
        """The layer norms in the layers, in their order."""
        return [part for block in self.blocks for part in block.modules() if isinstance(part, nn.LayerNorm)]

    @cached_property
    def lead(self) -> int:
        """Special tokens before the patches: the class token, a distillation token, registers."""
        return self.places - self.patches

    @cached_property
    def places(self) -> int:
        """Tokens of an image in front of the first layer."""
        return int(self._entering(self._blank())[0].shape[1])

    @cached_property
    def patches(self) -> int:
        """Patches of an image."""
        return int(self._patched(self._blank()).shape[1])

    @property
    def patch(self) -> int:
        """Side of a patch, in pixels."""
        return int(self.table.kernel_size[0]) if isinstance(self.table, nn.Conv2d) else 0

    def check_model(self) -> None:
        """Every layer must take one and the same number of tokens.

        Raises:
            ConfigError: patches do not fill an image.
            SiteError: it is no plain transformer over patches.
        """
        patch = self.eye.config.to_dict().get("patch_size")
        if isinstance(patch, int) and any(side % patch for side in self.sight.size):
            raise ConfigError(
                f"backbone.image_size: patches of {patch} pixels do not fill an image of {self.sight.size[0]} x "
                f"{self.sight.size[1]}; choose a multiple of {patch}"
            )
        self.table = self.input_table()
        shapes = {tuple(states.shape) for states in self._entering(self._blank())}
        if len(shapes) > 1 or len(next(iter(shapes))) != 3 or self._patched(self._blank()).dim() != 3:
            raise SiteError(
                f"{type(self.eye).__name__} is no plain transformer over patches, so rows of a prompt have no place in "
                "it; use a ViT, DeiT, DINOv2 or BEiT"
            )

    @property
    def max_positions(self) -> int | None:
        """None: an image has always the same number of tokens, and rows of a prompt have no positions."""
        return None

    @property
    def mixes_prefixes(self) -> bool:
        """Rows with different prompts run one prompt after the other."""
        return True

    @property
    def separable(self) -> bool:
        """There is no head over words."""
        return False

    def notes(self) -> list[str]:
        """Nothing."""
        return []

    def reader_hash(self) -> str:
        """Of how images are prepared."""
        return hashlib.sha256(repr(sorted(asdict(self.sight).items())).encode()).hexdigest()[:16]

    def probe(self) -> Batch:
        """A grey image."""
        nothing = torch.zeros(1, self.places, dtype=torch.long, device=self.device)
        return Batch(nothing, torch.ones_like(nothing), nothing[:, 0], pixels=self._blank())

    def _blank(self) -> Float[Tensor, "1 3 i j"]:
        return torch.zeros(1, 3, *self.sight.size, device=self.device)

    @property
    def layers(self) -> int:
        """Layers of the vision tower."""
        return len(self.blocks)

    @property
    def uses_segments(self) -> bool:
        """No text, no segments."""
        return False

    # ---- examples ---------------------------------------------------------------------------------------------------

    def encode(self, pieces: Sequence[Piece], max_length: int) -> Encoded:
        """An example of one image.

        Raises:
            ConfigError: it has text too, or no image.
        """
        images = [piece.value for piece in pieces if piece.role == "image"]
        if len(images) != 1 or len(pieces) != 1:
            raise ConfigError(
                f"the {self.name} family sees one image and reads no text: set task.image to the field that holds the "
                "image, and leave task.template out"
            )
        return Encoded([0] * self.places, [0] * self.places, {}, image=images[0])

    def embeddings(self, batch: Batch) -> Float[Tensor, "b t d"]:
        """None.

        Raises:
            SiteError: an image has no embeddings of tokens.
        """
        raise SiteError(self.lacks("input"))

    def content(self, batch: Batch) -> Bool[Tensor, "b t"]:
        """All tokens."""
        return batch.attention_mask.bool()

    def bare(self, batch: Batch, what: Literal["states", "answer"]) -> Tensor:
        """What the frozen model says of the images without any prompt."""
        read = self.hidden if what == "states" else self.answer
        with torch.no_grad():
            return read(replace(batch, prompt_index=None), Prompt())

    # ---- passes -----------------------------------------------------------------------------------------------------

    def groups(self, batch: Batch, prompts: Prompts) -> Iterator[tuple[Tensor | None, Batch, Prompt]]:
        """For each prompt: which rows are its own (None: all, in their order), those rows, and the prompt of them.

        Raises:
            SiteError: a prompt uses a site that this family does not have.
        """
        several = [prompts] if isinstance(prompts, Prompt) else list(prompts)
        for prompt in several:
            missing = self.missing(prompt.sites)
            if missing:
                raise SiteError(self.lacks(*missing))
        if len(several) == 1 or batch.prompt_index is None:
            yield None, batch, several[0]
            return
        for number, prompt in enumerate(several):
            at = (batch.prompt_index == number).nonzero()[:, 0]
            if len(at):
                yield at, batch.rows(at), repeat_kv(prompt, at)

    def each(
        self, batch: Batch, prompts: Prompts, run: Callable[[Batch, Prompt], Float[Tensor, "n ..."]]
    ) -> Float[Tensor, "b ..."]:
        """What `run` says of the rows of each prompt, in the order of the batch."""
        found = list(self.groups(batch, prompts)) if not isinstance(prompts, Prompt) else []
        if not found or found[0][0] is None:
            return next(run(part, prompt) for _, part, prompt in (found or self.groups(batch, prompts)))
        said = torch.cat([run(part, prompt) for _, part, prompt in found])
        order = torch.cat([at for at, _, _ in found if at is not None])
        return said[torch.argsort(order)]

    @staticmethod
    def known(batch: Batch, prompt: Prompt) -> Tensor | None:
        """Features that were computed before, where no part of the prompt changes them."""
        return batch.features if prompt.layers is None and prompt.norms is None else None

    def seeing(self, prompt: Prompt, *, lead: int | None = None) -> Any:
        """Within the block the eye runs with the visual parts of a prompt."""
        return self.wiring.active(seen=Seen(prompt.layers, self.lead if lead is None else lead, prompt.norms))

    def look(self, part: Any, pixels: Tensor | None, **options: Any) -> Any:
        """The eye, or the whole model, on pixels, with whatever is active.

        Raises:
            SiteError: there are none, only features.
        """
        if pixels is None:
            raise SiteError("the images themselves are needed here, and only features of them were kept")
        more = {"interpolate_pos_encoding": True} if self.interpolates else {}
        return part(pixel_values=pixels.to(self.table.weight.dtype), **more, **options)

    @cached_property
    def interpolates(self) -> bool:
        """Whether the model must be told that images are not of its own size."""
        own = self.eye.config.to_dict().get("image_size")
        own = tuple(own) if isinstance(own, list | tuple) else (own, own)
        takes = "interpolate_pos_encoding" in inspect.signature(type(self.eye).forward).parameters
        return takes and own != self.sight.size

    def without_rows(self, states: Float[Tensor, "b n v"], prompt: Prompt) -> Float[Tensor, "b m v"]:
        """Special tokens and patches alone."""
        if prompt.layers is None:
            return states
        return torch.cat([states[:, : self.lead], states[:, self.lead + prompt.layers.shape[2] :]], dim=1)

    @torch.no_grad()
    def attention(self, batch: Batch, prompt: Prompt) -> Float[Tensor, "b l p n"]:
        """How much each row of a prompt looks at each patch, in each layer, a mean over the heads; float32 on the CPU.

        Of a prompt without rows among the patches it is the first special token that looks, p = 1. What goes to other
        tokens is left out, so that the numbers of a row sum to less than one.

        Args:
            batch: with pixels.
            prompt: the same for all images.

        Raises:
            SiteError: the model does not tell its attention, or has no token that could look.
        """
        rows = 0 if prompt.layers is None else int(prompt.layers.shape[2])
        if not rows and not self.lead:
            raise SiteError(f"{type(self.eye).__name__} has neither rows of a prompt nor a class token that looks")
        before = self.eye.config._attn_implementation
        self.eye.set_attn_implementation("eager")
        try:
            with self.seeing(prompt):
                told = self.look(self.eye, batch.pixels, output_attentions=True).attentions
        finally:
            self.eye.set_attn_implementation(before)
        if not told or any(one is None for one in told):
            raise SiteError(f"{type(self.eye).__name__} does not tell its attention")
        looking = slice(self.lead, self.lead + rows) if rows else slice(0, 1)
        return torch.stack([one.float().mean(1)[:, looking, self.lead + rows :].cpu() for one in told], dim=1)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of an image."""
        return self.sight.size[0] // self.patch, self.sight.size[1] // self.patch

    def norm_values(self) -> Float[Tensor, "n 2 v"] | None:
        """As the model has them; None where norms have no weights, or not all of one width."""
        pairs = [(norm.weight, norm.bias) for norm in self.norms]
        if not pairs or any(one is None or one.shape != pairs[0][0].shape for pair in pairs for one in pair):
            return None
        return torch.stack([torch.stack([one.detach().float().cpu() for one in pair]) for pair in pairs])

    # ---- what goes in -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def tokens(self, batch: Batch, *, position: bool) -> list[Float[Tensor, "b n v"]]:
        """The patch tokens that enter each layer without any prompt, float32 on the CPU; special tokens are left out.

        Args:
            batch: with pixels.
            position: whether the first are those with their position added; else what the patch embedding gives.
        """
        assert batch.pixels is not None
        entering = [states[:, self.lead :] for states in self._entering(batch.pixels)]
        if not position:
            entering[0] = self._patched(batch.pixels)
        return [states.float().cpu() for states in entering]

    def _patched(self, pixels: Tensor) -> Float[Tensor, "b n v"]:
        """What the patch embedding gives."""
        with torch.no_grad():
            found: Any = self.eye.get_input_embeddings()(pixels.to(self.table.weight.dtype))
        found = found[0] if isinstance(found, tuple) else found
        return found.flatten(2).transpose(1, 2) if found.dim() == 4 else found

    @torch.no_grad()
    def _entering(self, pixels: Tensor) -> list[Float[Tensor, "b n v"]]:
        """The states in front of each layer."""
        found: list[Tensor] = []
        with noting(self.blocks, found):
            self.look(self.eye, pixels)
        return found


def opening(config: BackboneConfig) -> tuple[load.Source, dict[str, Any], dict[str, Any]]:
    """Where a model is, what transformers' loaders of its parts are asked for, and the settings of its images.

    Raises:
        ConfigError: not found, or it does not say how it wants its images.
    """
    transformers.utils.logging.disable_progress_bar()
    source = load.resolve(config.model)
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.revision is not None:
        options["revision"] = config.revision
    return source, options, load.image_settings(source, config.revision)


def settings_of(reader: Any, name: str) -> Mapping[str, Any]:
    """The settings of an image processor of transformers, or those settings themselves.

    Raises:
        SiteError: it is neither.
    """
    if isinstance(reader, Mapping):
        return reader
    if not isinstance(reader, ImageProcessingMixin):
        raise SiteError(f"{name} sees images and needs its image processor; {type(reader).__name__} is none")
    values: Mapping[str, Any] = reader.to_dict()
    return values


def sight_of(values: Mapping[str, Any], config: Mapping[str, Any], size: int | None) -> Sight:
    """How a model wants its images, from the settings of transformers' image processor.

    Args:
        values: those settings, as `preprocessor_config.json` has them.
        config: the model's own settings.
        size: another side of an image; everything else is scaled with it.

    Raises:
        ConfigError: they do not say what is needed.
    """
    resize, crop = _size(values.get("size")), _size(values.get("crop_size"))
    if resize is None:
        resize = config.get("image_size") if isinstance(config.get("image_size"), int) else None
    if resize is None:
        raise ConfigError("the model's preprocessor_config.json does not say how large an image is; set size there")
    cut = crop if values.get("do_center_crop") else None
    final = _square(cut if cut is not None else resize)
    if size is not None:
        scale = size / max(final)
        resize = round(resize * scale) if isinstance(resize, int) else _scaled(resize, scale)
        final = _scaled(final, scale)
    plain = not values.get("do_normalize", True)
    mean, std = (
        default if plain else tuple(values.get(name, (0.5, 0.5, 0.5)))
        for name, default in (("image_mean", (0.0, 0.0, 0.0)), ("image_std", (1.0, 1.0, 1.0)))
    )
    return Sight(final, resize, mean, std, int(values.get("resample", 3)))


def _square(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    return round(size[0] * scale), round(size[1] * scale)


def _size(value: Any) -> int | tuple[int, int] | None:
    if isinstance(value, int):
        return value
    if isinstance(value, Mapping) and "height" in value:
        return int(value["height"]), int(value["width"])
    return int(value["shortest_edge"]) if isinstance(value, Mapping) and "shortest_edge" in value else None
