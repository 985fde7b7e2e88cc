"""Mixtures of modules: gates that are open or shut by chance in training, their normalisation, and what they mix.

Knows no method and no model; chance comes from a generator that is handed in, and without one nothing is drawn.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def log_gates(
    logits: Float[Tensor, "*b k"], generator: torch.Generator | None = None, temperature: float = 1.0
) -> Float[Tensor, "*b k"]:
    """Logarithms of gates between 0 and 1.

    Args:
        logits: of each gate being open.
        generator: draws relaxed Bernoulli gates, sigmoid((logit + logistic noise) / temperature), through which
            gradients reach the logits (Maddison et al. 2017). None gives sigmoid(logit), whatever the temperature.
        temperature: towards 0, gates are open or shut; at 1, a gate of logit 0 is uniform on (0, 1).

    Raises:
        ValueError: the temperature is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"expected a temperature above 0, got {temperature}")
    if generator is None:
        return torch.nn.functional.logsigmoid(logits)
    # in float64 on the CPU: the same numbers for every device and dtype, and the ends of (0, 1) stay away
    drawn = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
    noise = torch.logit(drawn, eps=torch.finfo(torch.float64).eps).to(logits)
    return torch.nn.functional.logsigmoid((logits + noise) / temperature)


def mixture_weights(gates: Float[Tensor, "*b k"], epsilon: float = 0.0, *, hard: bool = False) -> Float[Tensor, "*b k"]:
    """Gates, given by their logarithms, over their sum + epsilon.

    Normalised among the logarithms, so that weights sum to one however small all gates are. With an epsilon (1e-12 in
    MP2's release) they vanish together instead, once all logits are below about -25.

    Args:
        gates: logarithms of the gates, at most 0.
        epsilon: of the sum.
        hard: the gates above one half share evenly and the others get exactly nothing (if none is, the largest gate
            takes all), while gradients are those of the soft weights: straight-through (Bengio et al. 2013).
    """
    soft = torch.softmax(gates, dim=-1)
    if epsilon > 0:  # times sum / (sum + epsilon)
        soft = soft * torch.sigmoid(torch.logsumexp(gates, dim=-1, keepdim=True) - math.log(epsilon))
    if not hard:
        return soft
    opened = (gates > math.log(0.5)) | (gates == gates.amax(-1, keepdim=True))
    share = opened.to(soft) / opened.sum(-1, keepdim=True)
    # share + (soft - soft) is exactly share
    return share + (soft - soft.detach())


def mixed(weights: Float[Tensor, "*b k"], modules: Float[Tensor, "k ..."]) -> Tensor:
    """The weighted sum of modules [k, *m], [*b, *m].

    Linear in the modules: what is mixed first and mapped then is what is mapped first and mixed then, so a mixture
    of maps of small vectors folds into one.
    """
    return torch.tensordot(weights, modules, dims=1)
