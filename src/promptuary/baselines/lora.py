"""LoRA: low-rank changes of chosen weight matrices, through PEFT.

Knows no architecture; PEFT knows which matrices are usual for each.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from promptuary import files
from promptuary.baselines.base import Baseline, WeightsConfig
from promptuary.errors import ConfigError, require


class LoraConfig(WeightsConfig):
    """Settings of LoRA."""

    name: Literal["lora"] = "lora"
    learning_rate: float = Field(
        5e-4, gt=0, description="of both factors; 4e-4 to 5e-4 on RoBERTa-base (Hu et al. 2022, appendix D)"
    )
    rank: int = Field(8, ge=1, description="of each change; 8 on RoBERTa (Hu et al. 2022, appendix D)")
    alpha: float = Field(16.0, gt=0, description="a change is scaled by alpha / rank; our choice: twice the rank")
    targets: tuple[str, ...] = Field(
        (),
        description="ends of the names of the changed modules; without them PEFT's own choice for the architecture, "
        "queries and values of the attention where the paper has them",
    )


class Lora(Baseline):
    """W + (alpha / rank) B A, with B zero at the start (Hu et al. 2022, equation 3)."""

    name = "lora"
    title = "LoRA"
    paper = "Hu et al. 2022, arXiv 2106.09685"
    Config = LoraConfig

    def choose(self, model: nn.Module, generator: torch.Generator) -> Mapping[str, nn.Parameter]:
        """The factors, which PEFT puts into the model.

        Raises:
            ConfigError: PEFT knows no targets for this architecture, or finds none of those that were given.
            MissingExtra: PEFT is not installed.
        """
        peft, config = require("peft", extra="peft"), self.config
        assert isinstance(config, LoraConfig)
        wanted = peft.LoraConfig(
            r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets) or None, lora_dropout=0.0
        )
        # PEFT draws from torch's global generator
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # of GPT-2's transposed matrices, which PEFT then treats as they are
            warnings.filterwarnings("ignore", message="fan_in_fan_out")
            torch.manual_seed(int(torch.randint(2**53, (), generator=generator)))
            try:
                self.adapted: Any = peft.get_peft_model(model, wanted)
            except ValueError as error:
                reason = " ".join(str(error).split())[:200]
                raise ConfigError(f"baseline.targets: PEFT refuses ({reason}); name modules of the model") from None
        self.adapted.train(False)
        return {name: value for name, value in self.adapted.named_parameters() if value.requires_grad}

    def companions(self) -> dict[str, bytes]:
        """An adapter as PEFT reads it: `PeftModel.from_pretrained(model, folder)`."""
        peft = require("peft", extra="peft")
        tensors = {name: value.detach().cpu() for name, value in peft.get_peft_model_state_dict(self.adapted).items()}
        settings = {**self.adapted.active_peft_config.to_dict(), "inference_mode": True}
        plain = {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}
        return {"adapter_config.json": files.to_json(plain), "adapter_model.safetensors": files.tensor_bytes(tensors)}
