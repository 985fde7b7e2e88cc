"""Soft Q-learning: a policy learns to write the prompt from the rewards of what it wrote.

Knows no method, family or task; the model that is asked gives numbers, and no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from promptuary.errors import ConfigError
from promptuary.seeds import seeded
from promptuary.solvers import soft_q
from promptuary.solvers.base import (
    Batches,
    Job,
    Learner,
    Reduce,
    Solver,
    SolverConfig,
    StepResult,
    Voice,
    Words,
    afforded,
)  # fmt: skip
from promptuary.solvers.gradient import GradientSolver
from promptuary.solvers.policy_net import Policy, Speech, Spoken
from promptuary.solvers.policy_rewards import dealt, on_all, on_one, told
from promptuary.types import Losses

WEIGHTS, DRAWS = 0, 1
"""What a generator is for."""

LAYERS = ("first.weight", "first.bias", "second.weight", "second.bias")
"""Names of the policy's weights in a state."""


LENGTH = 5
"""Tokens of a prompt; the paper's."""


class PolicyConfig(SolverConfig):
    """Settings of the policy; "code" is the release of RLPrompt (Deng et al. 2022)."""

    name: Literal["policy"] = "policy"
    model: str | None = Field(
        None,
        description="hub name or folder of the causal model that the policy speaks with, distilgpt2 in the paper; "
        "without it the run's own",
    )
    placeholder: str = Field(
        "classification",
        min_length=1,
        description="text that the policy is conditioned on; the paper's, the code now has <|endoftext|>",
    )
    num_tokens: int | None = Field(
        None, ge=1, description="tokens of a prompt, in the policy's own; without it the method's, or 5 (the paper)"
    )
    hidden: int = Field(2048, ge=1, description="width of the trained network; the paper's")
    prompts: int = Field(16, ge=2, description="prompts that are drawn and scored in a step; the paper's")
    top_k: int | None = Field(256, ge=1, description="only so many likeliest tokens are drawn; the paper's")
    top_p: float | None = Field(
        None,
        gt=0,
        le=1,
        description="only the likeliest tokens with this mass are drawn, behind top_k; off in the code",
    )
    fluent: int | None = Field(
        None,
        ge=1,
        description="every token that is not among so many of the likeliest of the model alone is forbidden, which "
        "makes prompts readable and worse; 20 in the paper's ablation",
    )
    no_repeat: bool = Field(False, description="no token twice in a prompt; our choice, off as in the paper")
    sayable: bool = Field(
        True,
        description="forbid tokens that do not come back when their text is read again, such as parts of characters: "
        "a prompt is kept as text; our choice, the code allows them and published a prompt with a broken one",
    )
    loss: soft_q.LossName = Field("v2_v2r_v3_v3r", description="terms of the loss; the code's")
    coefficient: float | None = Field(
        None,
        ge=0,
        le=1,
        description="weight of v2 and v3 against v2r and v3r. Without it the reversed terms are dropped, and (v2 + v3) "
        "/ 2 is trained: so does the code, and all published numbers are of that, though it does not lead to the soft "
        "optimum. 0.5 does, and stays exploratory",
    )
    learning_rate: float = Field(
        5e-5,
        gt=0,
        description="of Adam, constant; the paper's, made for 12,000 steps. In runs of about a thousand 1e-3 found far "
        "better prompts (our measurement on a small model)",
    )
    clip: float = Field(5.0, gt=0, description="largest norm of the gradient; the code's")
    target: Literal["polyak", "copy"] = Field(
        "polyak", description="how the target network follows: a little each step (the code's), or by copies"
    )
    rho: float = Field(1e-3, gt=0, le=1, description="part of the way that polyak follows in a step; the code's")
    copy_every: int = Field(100, ge=1, description="steps between copies; our choice")
    logit_bias: float = Field(
        0.0, description="added to every logit: moves V, not the policy. The code has -10 for style transfer"
    )
    normalise: bool = Field(True, description="rewards of a step to mean 0 and deviation 1 (z-score); the paper's")
    eps: float = Field(1e-4, gt=0, description="added to that deviation; the code's")
    shape: tuple[float, float] = Field(
        (0.0, 5.0), description="what rewards 0 and 1 become; the code's. It has (-20, 80) for style transfer"
    )
    keep: Literal["best", "greedy"] | None = Field(
        None,
        description="what the prompt is between steps: the best-rewarded text so far (our choice), or the policy's "
        "likeliest (the paper's). Without it best, and with rows: batch, where rewards do not compare, greedy",
    )
    top: int = Field(3, ge=1, description="best-rewarded texts that are remembered; the paper reports the mean of 3")
    rows: Literal["all", "batch"] = Field(
        "all",
        description="score prompts on all training rows (the paper, 16 of each class), or on a batch",
    )
    dealt: bool = Field(
        False,
        description="each prompt is scored on one row of the batch, and its reward compared with all that the prompts "
        "of the same row got; the paper for style transfer: 8 prompts on 2 rows. Needs rows: batch",
    )
    per_input: bool = Field(
        False,
        description="the policy is conditioned on the input instead of the placeholder, and writes a prompt for each: "
        "the paper's style transfer; what is saved is the policy. Needs dealt: true",
    )
    budget: int | None = Field(
        None, ge=1, description="most prompts that are scored in all; decides train.steps. 192,000 in the paper"
    )

    @model_validator(mode="after")
    def _together(self) -> PolicyConfig:
        if self.coefficient is not None and "_" not in self.loss:
            raise ValueError(f"coefficient weighs one term against another, and loss {self.loss} has one; leave it out")
        if self.keep == "best" and not self.whole:
            raise ValueError("keep: best compares rewards of the same rows; use rows: all, or keep: greedy")
        if self.dealt and self.whole:
            raise ValueError("dealt: prompts are dealt out to the rows of a batch; use rows: batch")
        if self.per_input and not self.dealt:
            raise ValueError("per_input: a prompt for one row is scored on that row; use dealt: true")
        if not self.shape[0] < self.shape[1]:
            raise ValueError(f"shape: expected the smaller value first, got {list(self.shape)}")
        return self

    @property
    def whole(self) -> bool:
        """As `rows` says."""
        return self.rows == "all"

    @property
    def keeps_best(self) -> bool:
        """As `keep` says, or `rows`."""
        return self.whole if self.keep is None else self.keep == "best"

    @property
    def scored(self) -> int:
        """Prompts that a step scores: where the best is kept, the likeliest one as well."""
        return self.prompts + int(self.keeps_best)

    def steps(self, planned: int) -> int:
        """As many steps as the budget holds.

        Raises:
            ConfigError: it does not hold one.
        """
        return afforded(self.budget, planned, self.scored, "prompts", "prompts")


@dataclass(frozen=True)
class Weight:
    """One trained tensor of the policy, as `GradientSolver` wants it."""

    name: str
    parameter: torch.nn.Parameter
    learning_rate: float
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Found:
    """A text, what it got, and the step in which it was first tried."""

    text: str
    reward: float
    score: float
    step: int


class PolicySolver(Solver):
    """On-policy soft Q-learning with a target network (Guo et al. 2021; Deng et al. 2022, RLPrompt).

    A step: the target follows, prompts are drawn, all are scored on all rows at once, rewards are normalised and
    shaped, and the policy learns from them. The loss does not say how far it is; the reward does.

    `found`: the best-rewarded texts so far, best first, of equal ones the earlier first.
    """

    name = "policy"
    uses_gradients = False
    searches = "words"
    Config = PolicyConfig
    found: list[Found]

    def __init__(self, config: PolicyConfig, words: Words, voice: Voice, seed: int) -> None:
        """Begin with a policy that is close to uniform; the prompt stays what it is until the first step.

        Raises:
            ConfigError: the placeholder has no tokens.
        """
        self.config, self.words, self.seed = config, words, seed
        c = config
        speech = Speech(c.num_tokens or LENGTH, c.top_k, c.top_p, c.fluent, c.no_repeat, c.logit_bias)
        self.policy = Policy(voice, c.hidden, speech, seeded(seed, WEIGHTS), c.sayable)
        self.context = self.policy.context(config.placeholder)
        if c.per_input:
            words.written_by(self.policy)
        self.target = [weight.detach().clone() for weight in self.policy.weights]
        weights = [Weight(name, one, c.learning_rate) for name, one in zip(LAYERS, self.policy.weights, strict=True)]
        # without decay AdamW is Adam; the release has neither warm-up nor a schedule
        self.gradient = GradientSolver(
            weights, optimizer="adamw", schedule="constant", steps=1, warmup=0, clip=config.clip
        )
        self.draw, self.found = 0, []

    @classmethod
    def of(cls, config: SolverConfig, job: Job) -> Solver:
        """As its settings say.

        Raises:
            ConfigError: there is no prompt of words to look for, or no model to speak with.
        """
        c = cast(PolicyConfig, config)
        if job.words is None:
            raise ConfigError(
                "the policy solver writes a prompt of words, and this method holds none; use method: {name: rlprompt}, "
                "or another solver"
            )
        if job.voice is None:
            raise ConfigError("the policy solver speaks with a causal model, and none can be opened here")
        if c.num_tokens is None:
            c = c.model_copy(update={"num_tokens": int(job.advice.get("num_tokens", LENGTH))})
        return cls(c, job.words, job.voice(c.model), job.seed)

    @property
    def best(self) -> Found | None:
        """The best-rewarded text so far."""
        return self.found[0] if self.found else None

    def step(
        self,
        learner: Learner,
        batches: Batches,
        total_weight: float,
        *,
        reduce: Reduce | None = None,
        check: Callable[[], None] | None = None,
    ) -> StepResult:
        """Draw prompts, score them on the examples of the batch, and learn from their rewards.

        Args:
            learner: asked for nothing.
            batches: parts of one batch; only `index` counts.
            total_weight: has no meaning here; a reward is the mean over examples.
            reduce: sums a tensor over processes, which all draw the same prompts.
            check: called before prompts are drawn and before each forward pass that scores them.

        Returns:
            The loss of soft Q-learning. A prompt whose reward is not finite takes no part; if none is finite, or the
            loss or what comes of it is not, nothing is changed and the next step draws other prompts.
        """
        if check is not None:
            check()
        c, step = self.config, self.draw
        followed = self._followed()
        likeliest = int(c.keeps_best)
        rows = [self.words.examples[place] for batch in batches for place in batch.index.tolist()]
        contexts = [self.context] * c.scored
        if c.per_input:
            inputs = [self.policy.context(str(row[self.words.fields[0]])) for row in rows]
            contexts = [inputs[place] for place in dealt(c.prompts, len(rows))]
        with torch.enable_grad():
            spoken = self.policy.speak(contexts, seeded(self.seed, DRAWS, step), greedy=likeliest)
        texts = [self.policy.text(ids) for ids in spoken.ids.tolist()]
        earn = on_one if c.dealt else on_all
        earned = earn(self.words, texts, rows, step, reduce, check, self.policy.voice.device)
        rewards, scores = earned.reward, earned.score
        self.draw += 1
        finite = rewards[: c.prompts].isfinite().nonzero()[:, 0]
        if not len(finite):
            return StepResult(math.nan, math.nan, {}, "loss", c.scored)
        drawn = Spoken(spoken.ids[finite], spoken.states[finite], spoken.logits[finite])
        parts = told(drawn, rewards[finite], scores[finite])
        parts["unscored"] = float(c.prompts - len(finite))
        wanted = earned.normalised(finite, c.eps) if c.normalise else rewards[finite]
        loss = self._loss(drawn, followed, soft_q.shaped(wanted, c.shape).float())
        self.gradient.begin()
        self.gradient.share(Losses(loss), 1.0).backward()
        taken = self.gradient.update()
        if taken.applied:
            self.target = followed
            if not c.dealt:  # rewards on different rows do not compare
                self._note(texts, rewards.tolist(), scores.tolist(), step)
            if not c.per_input:
                self.words.text = self.found[0].text if c.keeps_best else self.likeliest()
            if self.found:
                parts["best"] = self.found[0].reward
        return StepResult(taken.loss, taken.grad_norm, parts, taken.fault, c.scored)

    @torch.no_grad()
    def likeliest(self) -> str:
        """The text whose every token is the policy's likeliest."""
        return self.policy.text(self.policy.speak([self.context]).ids[0].tolist())

    def rates(self) -> dict[str, float]:
        """Of the policy; all its weights have the same."""
        return {"policy": self.gradient.rates()[LAYERS[0]]}

    def seek(self, step: int) -> None:
        """Which prompts are drawn next follows from the step; the rate is constant."""
        self.draw = step

    def slow_down(self, factor: float) -> None:
        """Multiply the rate from here on."""
        self.gradient.slow_down(factor)

    # ---- state ------------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights, their followers and moments, the step, and the best texts; the prompt itself is the caller's."""
        moments, numbers = self.gradient.state()
        tensors = {f"moments/{name}": value for name, value in moments.items()}
        for place, name in enumerate(LAYERS):
            tensors[f"policy/{name}"] = self.policy.weights[place].detach().cpu().clone()
            tensors[f"target/{name}"] = self.target[place].cpu().clone()
        found = [[one.text, one.reward, one.score, one.step] for one in self.found]
        return tensors, {"draw": self.draw, "found": found, "moments": numbers, "settings": self._settings()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Put a state back, exactly.

        Raises:
            ConfigError: it belongs to other settings.
        """
        if numbers.get("settings") != self._settings():
            raise ConfigError("this state belongs to another policy; continue with the settings it was begun with")
        for place, name in enumerate(LAYERS):
            self.policy.weights[place].copy_(tensors[f"policy/{name}"])
            self.target[place] = tensors[f"target/{name}"].to(self.policy.weights[place]).clone()
        begin = "moments/"
        mine = {name.removeprefix(begin): value for name, value in tensors.items() if name.startswith(begin)}
        self.gradient.restore(mine, numbers["moments"])
        self.draw = int(numbers["draw"])
        self.found = [Found(*one) for one in numbers["found"]]

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        """What a state depends on besides itself."""
        chosen = self.config.model_dump(mode="json", exclude={"budget", "top"})
        return {**chosen, "seed": self.seed, "width": self.policy.voice.width}

    @torch.no_grad()
    def _followed(self) -> list[Tensor]:
        """The target's weights for this step: (1 - rho) theirs + rho the policy's, or every so often the policy's."""
        weights = [weight.detach() for weight in self.policy.weights]
        if self.config.target == "polyak":
            rho = self.config.rho
            return [(1 - rho) * old + rho * new for old, new in zip(self.target, weights, strict=True)]
        if self.draw % self.config.copy_every == 0:
            return [weight.clone() for weight in weights]
        return self.target

    def _loss(self, drawn: Spoken, followed: Sequence[Tensor], rewards: Float[Tensor, " k"]) -> Float[Tensor, ""]:
        """Both networks along the same prompts; the target's part takes no gradient."""
        c = self.config
        with torch.no_grad():
            target = soft_q.along(self.policy.likewise(drawn, followed), drawn.ids)
        online = soft_q.along(drawn.logits, drawn.ids)
        return soft_q.losses(c.loss, c.coefficient, online, target, rewards).mean()

    def _note(self, texts: Sequence[str], rewards: Sequence[float], scores: Sequence[float], step: int) -> None:
        """Keep the best of what was known and what is new; what is known stays as it was first tried."""
        known = {one.text: one for one in self.found}
        for text, reward, score in zip(texts, rewards, scores, strict=True):
            if math.isfinite(reward) and text not in known:
                known[text] = Found(text, reward, score, step)
        # the sort is stable: of equal ones the earlier stays ahead
        self.found = sorted(known.values(), key=lambda one: -one.reward)[: self.config.top]
