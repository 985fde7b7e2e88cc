"""Soft Q-learning over sequences of tokens: its losses, and how a reward is brought to their scale.

Knows no model, no optimiser and no text: Q, V and rewards are numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from promptuary.errors import ConfigError

LossName = Literal["v1", "v2", "v2r", "v3", "v3r", "v2_v2r", "v3_v3r", "v2_v2r_v3_v3r"]
"""Terms of a loss, as the release of Guo et al. 2021 (arXiv 2106.07704) calls them."""


@dataclass(frozen=True)
class Along:
    """What one network holds of sequences: `q` of the tokens that were taken, `v` of the states they were taken in.

    Logits are Q themselves, at temperature 1; so V is their logsumexp, and the advantage Q - V the log-probability.
    """

    q: Float[Tensor, "b t"]
    v: Float[Tensor, "b t"]

    @property
    def a(self) -> Float[Tensor, "b t"]:
        """The advantage, log pi(token | state)."""
        return self.q - self.v


def along(logits: Float[Tensor, "b t v"], tokens: Int[Tensor, "b t"]) -> Along:
    """Q of the tokens and V of their states."""
    return Along(logits.gather(-1, tokens[..., None])[..., 0], logits.logsumexp(-1))


def losses(
    name: LossName,
    coefficient: float | None,
    online: Along,
    target: Along,
    reward: Float[Tensor, " b"],
    lengths: Int[Tensor, " b"] | None = None,
) -> Float[Tensor, " b"]:
    """One of the losses of each sequence, summed over its tokens (Guo et al. 2021, section 3); a step takes their mean.

    Args:
        name: its terms. A pair such as "v2_v2r" is c v2 + (1 - c) v2r; two pairs are halved and added.
        coefficient: c. None drops the reversed half of each pair: what RLPrompt trains as "v2_v2r_v3_v3r" is
            (v2 + v3) / 2, since neither its code nor its settings give c.
        online: of the network that learns.
        target: of the one that follows it, without gradients.
        reward: of the whole sequence, due at its last token; discount 1.
        lengths: tokens of each sequence; those behind are padding. Without it all are real.
    """
    if lengths is None:
        lengths = torch.full((len(reward),), online.q.shape[1], device=reward.device)
    terms = name.split("_")
    pairs = [terms[place : place + 2] for place in range(0, len(terms), 2)]
    parts = []
    for pair in pairs:
        forward = squares(pair[0], online, target, reward, lengths)
        if len(pair) == 2 and coefficient is not None:
            forward = coefficient * forward + (1 - coefficient) * squares(pair[1], online, target, reward, lengths)
        parts.append(forward)
    return (torch.stack(parts).sum(0) / len(pairs)).sum(1)


def squares(
    term: str, online: Along, target: Along, reward: Float[Tensor, " b"], lengths: Int[Tensor, " b"]
) -> Float[Tensor, "b t"]:
    """The squared error of one term at each token, 0 behind the last; the arguments are those of `losses`."""
    places = torch.arange(online.q.shape[1], device=reward.device)
    real, last = places < lengths[:, None], places == lengths[:, None] - 1
    if term == "v1":
        # Q_t - V'_{t+1}; Q_L - r
        error = online.q - _following(target.v, reward, last)
    elif term in ("v2", "v2r"):
        # A_t - (V'_{t+1} - V'_t); A_L - (r - V'_L); reversed: the networks change places
        one, other = (online, target) if term == "v2" else (target, online)
        error = one.a - (_following(other.v, reward, last) - other.v)
    else:
        # sum_{l >= t} A_l - (r - V'_t)
        one, other = (online, target) if term == "v3" else (target, online)
        rest = one.a.masked_fill(~real, 0).flip(1).cumsum(1).flip(1)
        error = rest - (reward[:, None] - other.v)
    # what stands behind the end may be anything, so that zero times it may be no number
    return error.masked_fill(~real, 0).square()


def _following(v: Float[Tensor, "b t"], reward: Float[Tensor, " b"], last: Bool[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """V of the next state, and the reward behind the last token."""
    following = torch.cat([v[:, 1:], torch.zeros_like(v[:, :1])], 1)
    return torch.where(last, reward[:, None], following)


def entropy(logits: Float[Tensor, "*n v"]) -> Float[Tensor, "*n"]:
    """Of the distributions, in nats; a token that may not be said has logit minus infinity."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)


# ---- rewards --------------------------------------------------------------------------------------------------------


def normalised(
    rewards: Float[Tensor, " k"], eps: float, among: Float[Tensor, " m"] | None = None
) -> Float[Tensor, " k"]:
    """(R - mean) / (standard deviation + eps), ddof 0 (RLPrompt, section 3.3 "z-score"); equal rewards become 0.

    Args:
        rewards: of the prompts.
        eps: RLPrompt's code takes 1e-4.
        among: what mean and deviation are of, if not of the rewards themselves: where each input has prompts of its
            own, all maxima of all prompts of that input.
    """
    among = rewards if among is None else among
    return (rewards - among.mean()) / (among.std(correction=0) + eps)


def shaped(rewards: Float[Tensor, " k"], bounds: tuple[float, float]) -> Float[Tensor, " k"]:
    """Rewards on a scale on which 0 becomes the first bound and 1 the second; nothing is cut off."""
    low, high = bounds
    return low + (high - low) * rewards


def maxima(scores: Float[Tensor, "*k n"], groups: int) -> Float[Tensor, "*k g"]:
    """The maximum of each of some groups of consecutive scores; their mean estimates that of the best of n / groups.

    RLPrompt's reward of a prompt that rewrites: 128 samples in 4 groups.

    Raises:
        ConfigError: the scores do not divide into so many groups.
    """
    if groups < 1 or scores.shape[-1] % groups:
        raise ConfigError(f"{scores.shape[-1]} samples do not divide into {groups} groups; change one of them")
    return scores.unflatten(-1, (groups, -1)).amax(-1)


# ---- which tokens are drawn -----------------------------------------------------------------------------------------


def likeliest(logits: Float[Tensor, "b v"], count: int) -> Bool[Tensor, "b v"]:
    """The `count` highest of each row and what ties with the last of them; never what is minus infinity."""
    if count >= logits.shape[1]:
        return logits > -torch.inf
    least = logits.topk(count, dim=1).values[:, -1:]
    return (logits >= least) & (logits > -torch.inf)


def nucleus(logits: Float[Tensor, "b v"], mass: float) -> Bool[Tensor, "b v"]:
    """The fewest highest of each row that together have the mass, and what ties with the last of them.

    Holtzman et al. 2020 (arXiv 1904.09751); at least one token always.
    """
    ordered = logits.sort(dim=1, descending=True).values
    share = ordered.double().softmax(1)
    before = share.cumsum(1) - share
    kept = (before < mass) & (ordered > -torch.inf)
    least = ordered.masked_fill(~kept, torch.inf).amin(1, keepdim=True)
    return logits >= least
