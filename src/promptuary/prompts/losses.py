"""Losses that more than one method adds to its task's: contrastive bounds on information, and classes told apart.

Knows no method's name, model or file; every function is pure, and noise is an argument.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def bilinear(x: Float[Tensor, "*#b d"], context: Float[Tensor, "*#b d"]) -> Float[Tensor, "*b"]:
    """<x, context> / sqrt(d): the critic of the contrastive losses below.

    It is linear in `x`: where positives and negatives differ in their spread alone, no context tells them apart, so
    that the bound stays at zero however much information there is.
    """
    return (x * context).sum(-1) / math.sqrt(x.shape[-1])


def nce(
    positive: Float[Tensor, "*b"],
    negatives: Float[Tensor, "*b k"],
    mask: Bool[Tensor, "*b k"] | None = None,
    floor: float | None = None,
) -> Float[Tensor, "*b"]:
    """-log of the positive's share in softmax([positive, negatives]), one loss per row, in nats.

    Args:
        positive: critic's score of the pair that belongs together.
        negatives: scores of pairs that do not; each row has its own.
        mask: which negatives exist; a row without any has loss 0.
        floor: the log-share is raised to it, so the loss is at most `-floor` and has no gradient at all below. None,
            the default, has none: with a floor of -2 a row with more than six equal scores learns nothing.

    Source: van den Oord et al. 2018, equation 4.
    """
    if negatives.shape[-1] == 0:
        return torch.zeros_like(positive)
    margins = negatives - positive[..., None]
    if mask is not None:
        margins = margins.masked_fill(~mask, -torch.inf)
    # log(1 + sum exp(f- - f+)); a row without negatives has no finite margin, and no gradient must come from it
    none = torch.isneginf(margins).all(-1)
    rest = torch.logsumexp(margins.masked_fill(none[..., None], 0.0), dim=-1)
    loss = torch.nn.functional.softplus(rest, threshold=40).masked_fill(none, 0.0)
    return loss if floor is None else loss.clamp(max=-floor)


def information(loss: Float[Tensor, "*b"], negatives: int | Int[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """log(1 + negatives) - loss: what `nce` says of the information, in nats.

    Its mean is at most log(1 + negatives), and at most the true value but for noise; it reaches the true value with
    many negatives and a critic that equals the log-ratio of the densities. In training it is a surrogate and no
    measurement: a prompt and a head are constants, and share no information.
    """
    count = torch.as_tensor(negatives, dtype=loss.dtype, device=loss.device)
    return torch.log1p(count) - loss


def conditional_nce(
    positive: Float[Tensor, "b d"],
    negatives: Float[Tensor, "b k d"],
    context: Float[Tensor, "g d"],
    floor: float | None = None,
) -> Float[Tensor, " b"]:
    """Information between prompt and representation given the input, one loss per row.

    Args:
        positive: a representation of each input under the prompt.
        negatives: representations of the same input without it: what contrasts is the prompt, never another input.
        context: what the critic knows of the prompt: one for all rows (static, g = 1) or one each (g = b).
        floor: as in `nce`.
    """
    return nce(bilinear(positive, context), bilinear(negatives, context[:, None]), floor=floor)


def aligned_nce(
    rows: Float[Tensor, "g n d"],
    direction: Float[Tensor, " d"],
    tokens: Float[Tensor, "b t d"],
    mask: Bool[Tensor, "b t"],
    floor: float | None = None,
) -> Float[Tensor, " b"]:
    """Information between prompt and head: the prompt points along the head, the text's tokens are the negatives.

    Args:
        rows: the prompt, shared (g = 1) or one per input (g = b); the mean of its rows is scored.
        direction: mean of the head's class vectors.
        tokens: embeddings of the text, which take part in no gradient.
        mask: real tokens, special ones included; padding is no negative.
        floor: as in `nce`.
    """
    scores = bilinear(tokens, direction)
    return nce(bilinear(rows.mean(1), direction).expand(len(tokens)), scores, mask, floor)


def gaussian_kl(
    mean: Float[Tensor, "*#b d"],
    log_std: Float[Tensor, "*#b d"],
    prior_mean: Float[Tensor, "*#b d"] | None = None,
    prior_log_std: Float[Tensor, "*#b d"] | None = None,
) -> Float[Tensor, "*b d"]:
    """KL(N(mean, std^2) || N(prior)) of each coordinate; the prior is N(0, 1) unless given.

    The sum over d is the divergence in nats; what the published losses use is its mean over everything.
    """
    prior_mean = torch.zeros_like(mean) if prior_mean is None else prior_mean
    prior_log_std = torch.zeros_like(log_std) if prior_log_std is None else prior_log_std
    ratio = log_std - prior_log_std
    # expm1 keeps what is left of (s^2 / s0^2 - 1) / 2 - log(s / s0) near s = s0
    spread = torch.expm1(2 * ratio) / 2 - ratio
    return spread + (mean - prior_mean).pow(2) * torch.exp(-2 * prior_log_std) / 2


def reparameterised(
    mean: Float[Tensor, "*#b d"], log_std: Float[Tensor, "*#b d"], noise: Float[Tensor, "*#b d"]
) -> Float[Tensor, "*b d"]:
    """Mean + std * noise: a sample through which gradients flow; `noise` is standard normal."""
    return mean + torch.exp(log_std) * noise


def unit(x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
    """X / |x|, right for every length that the dtype holds; a zero row stays zero, without gradient.

    The length has no say in a direction, so the row is brought to a largest entry of one first.
    """
    largest = x.detach().abs().amax(-1, keepdim=True)
    zero = largest == 0
    scaled = x / largest.masked_fill(zero, 1.0)
    length = scaled.masked_fill(zero, 1.0).pow(2).sum(-1, keepdim=True).sqrt()
    return (scaled / length).masked_fill(zero, 0.0)


def supervised_contrastive(
    features: Float[Tensor, "b d"],
    labels: Int[Tensor, " b"],
    temperature: float = 0.3,
    share_epsilon: float = 1e-5,
    count_epsilon: float = 1e-3,
) -> Float[Tensor, ""]:
    """Rows of one class come together, those of others apart, by cosine; mean over all rows.

    Row i: sum over the others j of its class of -log(q_ij + share_epsilon), over their number + count_epsilon, with
    q_ij the share of exp(cos_ij / temperature) among all k other than i. A row alone in its class counts as 0.

    Args:
        features: one vector per row; only directions count.
        labels: their classes.
        temperature: 0.3 in StablePT's release; 0.1 in Khosla et al. 2020.
        share_epsilon: 1e-5 in the release, which bounds what one pair can cost; 0 is Khosla et al. 2020, equation 2.
        count_epsilon: 1e-3 in the release; 0 takes the plain mean.
    """
    if len(features) < 2:
        return features.sum() * 0.0
    directions = unit(features)
    itself = torch.eye(len(features), dtype=torch.bool, device=features.device)
    # log q_ij = cos_ij / T - log sum_{k != i} exp(cos_ik / T)
    shares = torch.log_softmax((directions @ directions.T / temperature).masked_fill(itself, -torch.inf), dim=-1)
    alike = (labels[:, None] == labels) & ~itself
    costs = -shares.masked_fill(~alike, 0.0)
    if share_epsilon > 0:
        costs = -torch.logaddexp(-costs, torch.full_like(costs, math.log(share_epsilon)))
    count = alike.sum(-1).to(costs.dtype)
    count = count + count_epsilon if count_epsilon > 0 else count.clamp(min=1)
    return (costs.masked_fill(~alike, 0.0).sum(-1) / count).mean()


def cosine_distance(found: Float[Tensor, "c h"], wanted: Float[Tensor, "c h"]) -> Float[Tensor, ""]:
    """1 - the mean cosine of each row with its own partner; half of the mean squared distance of unit vectors.

    Source: KgCoOp's code; the paper writes the squared distance.
    """
    return 1 - (unit(found) * unit(wanted)).sum(-1).mean()


def text_to_text(learned: Float[Tensor, "c h"], references: Float[Tensor, "l c h"], scale: float) -> Float[Tensor, ""]:
    """Cross-entropy of sentences that learnt class vectors have to tell apart, mean over sentences.

    Sentence (l, c) is to be taken for class c: the softmax runs over the learnt vectors, not over the sentences.

    Args:
        learned: unit vectors of the classes.
        references: features of l sentences about each class, as they shall be compared.
        scale: of the scores; CLIP's is about 100.

    Source: LASP's code; the paper's equation has a sum.
    """
    scores = scale * references @ learned.T
    right = torch.arange(len(learned), device=learned.device).expand(len(references), -1)
    return torch.nn.functional.cross_entropy(scores.flatten(0, 1), right.flatten())


def label_gap(probabilities: Float[Tensor, "n c"], right: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Probability of the right label minus that of the best other one, by its place: a tie gives 0 (RLPrompt, 2.3)."""
    own = probabilities.gather(1, right[:, None])
    others = probabilities.scatter(1, right[:, None], -torch.inf)
    return own[:, 0] - others.amax(1)
