"""What prompts that a policy wrote are worth: scored on all rows of a step or each on one of them.

Knows no model and no loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from promptuary.errors import ConfigError
from promptuary.solvers import soft_q
from promptuary.solvers.base import Reduce, Words
from promptuary.solvers.policy_net import Spoken

Rows = Sequence[Mapping[str, Any]]
Check = Callable[[], None] | None


@dataclass(frozen=True)
class Earned:
    """What k prompts got.

    `reward`, `score` [k]: means over the rows that each was scored on. `row` [k], `pools`: of prompts that were dealt
    out, the row that each got, and by row all that its prompts got there, which rewards are compared with.
    """

    reward: Float[Tensor, " k"]
    score: Float[Tensor, " k"]
    row: Int[Tensor, " k"] | None = None
    pools: Sequence[Tensor] = ()

    def normalised(self, chosen: Int[Tensor, " n"], eps: float) -> Float[Tensor, " n"]:
        """Rewards of some prompts as z-scores among them, or among all that the prompts of the same row got."""
        rewards = self.reward[chosen]
        if self.row is None:
            return soft_q.normalised(rewards, eps)
        rows, found = self.row[chosen], torch.zeros_like(rewards)
        for number, pool in enumerate(self.pools):
            mine = rows == number
            found[mine] = soft_q.normalised(rewards[mine], eps, pool)
        return found


def on_all(
    words: Words, texts: Sequence[str], rows: Rows, draw: int, reduce: Reduce | None, check: Check, device: torch.device
) -> Earned:
    """Every prompt on every row, of all processes."""
    tried = words.tried(texts, rows, check, draw)
    sums = torch.stack([tried.reward.sum(1), tried.score.sum(1)]).detach().to(device, torch.float32)
    count = torch.tensor(float(len(rows)), device=device)
    if reduce is not None:
        sums, count = reduce(sums), reduce(count)
    rewards, scores = (sums / count).unbind()
    return Earned(rewards, scores)


def dealt(prompts: int, rows: int) -> list[int]:
    """Which row each prompt gets: as many prompts in a row for each as there are, the first ones for the first row.

    RLPrompt repeats each of 2 inputs 4 times.

    Raises:
        ConfigError: fewer prompts than rows.
    """
    if prompts < rows:
        raise ConfigError(
            f"solver.dealt: {prompts} prompts are fewer than the {rows} rows of a batch; lower train.batch_size, or "
            "raise solver.prompts"
        )
    return [place * rows // prompts for place in range(prompts)]


def on_one(
    words: Words, texts: Sequence[str], rows: Rows, draw: int, reduce: Reduce | None, check: Check, device: torch.device
) -> Earned:
    """Every prompt on the row that it was dealt, and what all prompts of a row got there.

    Raises:
        ConfigError: several processes, whose prompts would be other ones.
    """
    if reduce is not None and float(reduce(torch.ones((), device=device))) > 1:
        raise ConfigError("solver.dealt: prompts that are dealt out to rows need one process; run on one")
    places = dealt(len(texts), len(rows))
    rewards, scores, pools = list[Tensor](), list[Tensor](), list[Tensor]()
    for number, row in enumerate(rows):
        mine = [text for text, place in zip(texts, places, strict=True) if place == number]
        tried = words.tried(mine, [row], check, draw)
        pool = tried.reward if tried.maxima is None else tried.maxima
        pools.append(pool[pool.isfinite()].detach().to(device, torch.float32))
        rewards.append(tried.reward[:, 0])
        scores.append(tried.score[:, 0])
    reward, score = (torch.cat(parts).detach().to(device, torch.float32) for parts in (rewards, scores))
    return Earned(reward, score, torch.tensor(places, device=device), pools)


@torch.no_grad()
def told(drawn: Spoken, rewards: Float[Tensor, " k"], scores: Float[Tensor, " k"]) -> dict[str, float]:
    """For the log; repeated tokens and few different prompts say that the policy has settled."""
    prompts = drawn.ids.tolist()
    return {
        "reward": float(rewards.mean()),
        "reward_max": float(rewards.max()),
        "score": float(scores.mean()),
        "score_max": float(scores.max()),
        "entropy": float(soft_q.entropy(drawn.logits).mean()),
        "value": float(drawn.logits[:, 0].logsumexp(-1).mean()),
        "distinct_tokens": sum(len(set(ids)) for ids in prompts) / len(prompts),
        "distinct_prompts": float(len({tuple(ids) for ids in prompts})),
    }
