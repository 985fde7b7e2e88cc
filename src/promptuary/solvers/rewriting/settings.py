"""The settings of rewriting, each with its source.

Knows no prompt and no example.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from promptuary.solvers.base import SolverConfig
from promptuary.solvers.rewriting.roles import Role
from promptuary.speakers.base import SpeakerConfig


class RewriteConfig(SolverConfig):
    """Settings of rewriting."""

    name: Literal["rewrite"] = "rewrite"
    model: SpeakerConfig | None = Field(None, description="the model that plays every role; the release: one for all")
    roles: dict[Role, SpeakerConfig] = Field(
        default_factory=dict,
        description="another model for a role: attacker, strategist, explainer, summariser, rewriter or paraphraser",
    )
    attacker: Literal["model", "rule"] = Field(
        "model", description="who changes the inputs: a model (paper), or seeded rules, which cost no calls (ours)"
    )
    explainer: Literal["model", "rule"] = Field(
        "model",
        description="who says what went wrong: two models (paper), or a list of the kinds that did harm (ours)",
    )
    strategist: bool = Field(
        False,
        description="a model words the attack of C1 anew for the prompt at hand; the release tries to; off, our choice",
    )
    perturbations: Literal["mix", "combine", "all"] | tuple[str, ...] = Field(
        "mix",
        description="kinds of attack: mix (C1, C2, C3, S1), combine (W1, W2, W3, S2, S3), all, or a list. The "
        "release's families, of which each task there takes a part",
    )
    rounds: int = Field(
        5, ge=1, description="most rounds of attack and rewriting, where train.steps are not fewer; release: 5"
    )
    sample_num: int = Field(5, ge=1, description="training examples that are attacked in a round; release: 5")
    iter: int = Field(3, ge=0, description="repeats of each attack; 0 attacks nothing (an ablation); release: 3")
    candidates: int = Field(5, ge=1, description="texts that the attacker offers in each repeat; release: 5")
    attack_objective: Literal["score", "reward", "similarity"] = Field(
        "score",
        description="an attack lowers the task's score (paper) or the finer reward; similarity asks nobody, as the "
        "release does for classification",
    )
    chain: bool = Field(
        False,
        description="each kind goes on from the text of the kind before it, as the release does for classification",
    )
    stop_at_zero: bool = Field(
        False, description="end an attack whose score is 0, which saves calls (ours); the release goes on"
    )
    rewrites: int = Field(5, ge=1, description="prompts that the rewriter offers in a round; release: 5")
    paraphrases: int = Field(2, ge=0, description="variants of each of the best rewrites; release: 2")
    paraphrased: int = Field(1, ge=1, description="how many of the best rewrites are paraphrased; our choice")
    selection: int = Field(20, ge=1, description="examples of each kind that prompts are compared on; release: 20")
    pool: Literal["rule", "model"] = Field(
        "rule",
        description="who perturbs those: seeded rules, which cost no calls (ours), or the attacker (release)",
    )
    held_out: int = Field(
        200, ge=1, description="most held-out examples that the last word is spoken on; the release's sets have 200"
    )
    measure: Literal["score", "reward"] = Field(
        "score", description="what prompts are compared by: the task's score (paper) or the finer reward"
    )
    clean_weight: float = Field(
        0.0, ge=0, le=1, description="share of clean examples in what prompts are compared by; release: 0"
    )
    aggregate: Literal["mean", "min"] = Field(
        "mean", description="the kinds together: their mean (release), or the worst of them"
    )
    keep: tuple[str, ...] = Field((), description="texts that every prompt contains, such as a list of labels; ours")
    longest: int = Field(150, ge=1, description="most words of a prompt; our choice, the release has no limit")
    top_p: float = Field(
        0.95, gt=0, le=1, description="mass of the likeliest words that answers are drawn from; release: 0.95"
    )
    temperature: float = Field(1.0, ge=0, description="of all roles; release: 1 for the attacker")
    max_tokens: int = Field(300, ge=1, description="most tokens of an answer; our choice, release: 1000")

    @model_validator(mode="after")
    def _together(self) -> RewriteConfig:
        if self.strategist and self.attacker == "rule":
            raise ValueError("strategist: words an attack for a model; use attacker: model, or leave it out")
        if self.pool == "model" and self.attacker == "rule":
            raise ValueError("pool: model asks the attacker, which is a set of rules here; use attacker: model")
        return self

    def steps(self, planned: int) -> int:
        """A step is a round."""
        return min(planned, self.rounds)

    @property
    def needed(self) -> tuple[Role, ...]:
        """Roles that somebody must play."""
        found: list[Role] = ["rewriter"]
        found += ["attacker"] if self.attacker == "model" else []
        found += ["strategist"] if self.strategist else []
        found += ["explainer", "summariser"] if self.explainer == "model" else []
        return (*found, "paraphraser") if self.paraphrases else tuple(found)
