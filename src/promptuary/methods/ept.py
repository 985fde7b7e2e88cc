"""EPT (arXiv 2405.11464, AAAI 2025): a short prompt and a low-rank pair, fused by attention, then gated spaces.

Knows no backbone. A reconstruction from partial sources: each open question is a switch, listed in docs/methods/ept.md.

Notation: P_s [s, d] short prompt; A [m, r], B [r, d] low-rank pair, C = gamma A B; W_q, W_k [d, h];
D_i [d, k], U_i [k, d] for spaces i = 1..N; W_g [d, N], b_g [N]. LN has no affine part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor

from promptuary.errors import NotFoldable
from promptuary.methods.base import Method, MethodConfig, check_size
from promptuary.prompts.blocks import attend, kaiming_uniform, layer_norm, masked_mean, svd_factors, xavier_uniform
from promptuary.prompts.init import Starting, starting_rows
from promptuary.types import Offset, OffsetAlign, OffsetOverflow, Prompt, Shape, View


class EPTConfig(MethodConfig):
    """Settings of EPT. "Open question n" refers to the list in docs/methods/ept.md."""

    name: Literal["ept"] = "ept"
    num_virtual_tokens: int = Field(60, ge=1, description="s, rows of the short prompt; DePT's released runs: 40 to 80")
    reference_length: int = Field(
        100, ge=1, description="l, rows of the prompt that is decomposed; its rows after s give B (open question 1)"
    )
    rank: int = Field(30, ge=1, description="r of the low-rank pair; DePT's released runs: 15 to 45")
    max_tokens: int = Field(256, ge=1, description="m, positions of the source that get an offset; DePT: 256")
    use_lowrank: bool = Field(True, description="the low-rank pair; off leaves a plain prompt to fuse and project")
    use_fusion: bool = Field(True, description="prompt fusion; the paper ablates it")
    use_spaces: bool = Field(True, description="multi-space projection; the paper ablates it")
    lowrank_init: Literal["svd", "svd_pad", "dept"] = Field(
        "svd", description="B from the SVD and A = 0 (our choice), A padded from U, or DePT's (open question 1)"
    )
    lowrank_scale: Literal["alpha", "one"] = Field(
        "alpha", description="gamma = alpha / sqrt(r) as in DePT's code, or 1 (open question 2; our choice alpha)"
    )
    alpha: float = Field(8.0, gt=0, description="alpha of gamma; DePT's released code: 8")
    fusion_kv: Literal["AB", "B"] = Field(
        "AB", description="what the fusion attends to: the m rows of A B, or the r rows of B (open question 3)"
    )
    fusion_residual: Literal["add", "difference"] = Field(
        "add", description="P_s + Delta, or P_s + lambda (Delta - P_s) (open question 4; our choice add)"
    )
    fusion_lambda: bool = Field(
        False,
        description="a trained factor on what fusion adds, zero at the start; a difference always has it (question 4)",
    )
    fusion_dim: int = Field(0, ge=0, description="h of W_q and W_k; 0 uses none (open question 5; our choice 0)")
    fusion_detach: bool = Field(
        False, description="keep the fusion path from training A and B (open question 10; our choice off)"
    )
    spaces: int = Field(4, ge=1, description="N spaces; our choice, ablate 1 2 4 8 (not published)")
    space_dim: int = Field(4, ge=1, description="k, bottleneck of a space; our choice (not published)")
    space_type: Literal["bottleneck", "linear", "scale"] = Field(
        "bottleneck", description="residual bottleneck, d x d map, or a scale vector (open question 6)"
    )
    activation: Literal["silu", "relu"] = Field("silu", description="phi of a bottleneck space; our choice")
    gate_input: Literal["prompt", "text"] = Field(
        "prompt", description="what the gate reads: the fused prompt, or the mean text embedding (open question 7)"
    )
    gate_granularity: Literal["prompt", "token"] = Field(
        "prompt", description="one gate for the whole prompt or one for each row; our choice prompt"
    )
    gate_top_k: int | None = Field(None, ge=1, description="keep only the k largest gates (open question 8)")
    topology: Literal["serial", "parallel"] = Field(
        "serial", description="project the fused prompt, or add both branches to P_s (open question 9)"
    )
    reconstruct: Literal["mix", "residual", "concat"] = Field(
        "mix", description="P_m, P_m + P_s, or [P_s ; P_m] with 2 s rows (open question 9; our choice mix)"
    )
    offset_align: OffsetAlign = Field("token", description="as in dept")
    offset_overflow: OffsetOverflow = Field("zero", description="as in dept (open question 11)")
    low_rank_lr: float = Field(5e-4, gt=0, description="learning rate of A and B; DePT's released runs: 1e-4 to 5e-3")
    modules_lr: float = Field(1e-3, gt=0, description="learning rate of gate, spaces and maps; our choice")

    @model_validator(mode="after")
    def _consistent(self) -> EPTConfig:
        if self.gate_input == "text" and self.gate_granularity == "token":
            raise ValueError('gate_granularity "token" reads prompt rows; with gate_input "text" use "prompt"')
        if self.gate_top_k is not None and self.gate_top_k > self.spaces:
            raise ValueError(f"gate_top_k {self.gate_top_k} is above spaces {self.spaces}")
        return self

    @property
    def fuses(self) -> bool:
        """Whether fusion has a low-rank pair to read."""
        return self.use_fusion and self.use_lowrank

    @property
    def weighs(self) -> bool:
        """Whether lambda is trained; without it a difference would throw P_s away: P_s + (Delta - P_s) = Delta."""
        return self.fuses and (self.fusion_lambda or self.fusion_residual == "difference")


class EPT(Method):
    """Short prompt, low-rank offset, fusion, gated spaces."""

    name = "ept"
    title = "EPT"
    paper = "arXiv 2405.11464"
    reconstructed = True
    sites = frozenset({"input", "offset"})
    tiny: ClassVar = {
        "num_virtual_tokens": 3,
        "reference_length": 8,
        "rank": 2,
        "max_tokens": 24,
        "spaces": 2,
        "space_dim": 2,
    }
    groups: ClassVar = {
        "rows": "prompt",
        "a": "low_rank",
        "b": "low_rank",
        "w_q": "modules",
        "w_k": "modules",
        "fusion_factor": "modules",
        "down": "modules",
        "up": "modules",
        "w_g": "modules",
        "b_g": "modules",
    }
    Config = EPTConfig

    @property
    def settings(self) -> EPTConfig:
        """The settings with their own type."""
        return cast(EPTConfig, self.config)

    @property
    def needs(self) -> frozenset[str]:
        """Text embeddings when the gate reads the text, nothing otherwise."""
        c = self.settings
        return frozenset({"embeddings"}) if c.use_spaces and c.gate_input == "text" else frozenset()

    def build(self) -> None:
        """Only the tensors that the switches leave in use."""
        c, d = self.settings, self.shape.width
        n, k = c.spaces, c.space_dim
        self.rows = self.parameter(c.num_virtual_tokens, d)
        if c.use_lowrank:
            self.a = self.parameter(c.max_tokens, c.rank)
            self.b = self.parameter(c.rank, d)
        if c.fuses and c.fusion_dim:
            self.w_q = self.parameter(d, c.fusion_dim)
            self.w_k = self.parameter(d, c.fusion_dim)
        if c.weighs:
            self.fusion_factor = self.parameter(1)
        if c.use_spaces:
            if c.space_type == "bottleneck":
                self.down = self.parameter(n, d, k)
            self.up = self.parameter(*{"bottleneck": (n, k, d), "linear": (n, d, d), "scale": (n, d)}[c.space_type])
            self.w_g = self.parameter(d, n)
            self.b_g = self.parameter(n)

    def fill(self, source: Starting) -> None:
        """P_s and B from one starting prompt; what projects, gates or mixes starts as no change."""
        c, d = self.settings, self.shape.width
        s, r, generator = c.num_virtual_tokens, c.rank, source.generator
        # P0 [l, d]: P_s = P0[:s]; the rest R = U Sigma V^T gives B = Sigma_r^1/2 V_r^T
        start = self.first_rows(s + max(c.reference_length - s, r), source)
        self.rows.copy_(start[:s])
        if c.use_lowrank and c.lowrank_init == "dept":
            self.a.copy_(kaiming_uniform(c.max_tokens, r, generator))
        elif c.use_lowrank:
            u, sigma, vt = svd_factors(start[s:], min(r, d))
            found = int((sigma > 1e-4 * sigma[0]).sum())
            self.b[:found].copy_((sigma.sqrt()[:, None] * vt)[:found])
            # a short text repeats itself and spans fewer than r directions; with A = 0 and B = 0 the others would
            # never train, so each starts from a vocabulary row v of its own, whose SVD gives v / sqrt(|v|)
            more = starting_rows("vocabulary", r - found, source)
            self.b[found:].copy_(more / more.norm(dim=1, keepdim=True).clamp(min=1e-12).sqrt())
            if c.lowrank_init == "svd_pad":
                # A = [U_r Sigma_r^1/2 ; 0]
                literal = (u * sigma.sqrt())[: c.max_tokens, :found]
                self.a[: len(literal), : literal.shape[1]].copy_(literal)
        if c.fuses and c.fusion_dim:
            self.w_q.copy_(xavier_uniform(d, c.fusion_dim, generator))
            self.w_k.copy_(xavier_uniform(d, c.fusion_dim, generator))
        if c.use_spaces and c.space_type == "bottleneck":
            bound = 1 / math.sqrt(d)
            self.down.uniform_(-bound, bound, generator=generator)

    def prompt(self, view: View) -> Prompt:
        """Fusion, spaces, gate and mixing once per step, outside the batch (unless the gate reads the text)."""
        c = self.settings
        fused = self._fuse()
        base = fused if c.topology == "serial" else self.rows
        mixed = fused[None]
        if c.use_spaces:
            # P_m = sum_i g_i Z_i = P + sum_i g_i (Z_i - P), since the gates sum to one
            mixed = mixed + torch.einsum("gsn,nsd->gsd", self._gate(fused, view), self._space_changes(base))
        if c.reconstruct == "residual":
            mixed = mixed + self.rows
        elif c.reconstruct == "concat":
            mixed = torch.cat([self.rows.expand(len(mixed), -1, -1), mixed], dim=1)
        offset = Offset(self._gamma * self.a, self.b, c.offset_align, c.offset_overflow) if c.use_lowrank else None
        return Prompt(rows=mixed, offset=offset, placement=c.placement)

    def fold(self) -> Prompt:
        """P* and the factors of the offset table: s d + r (m + d) numbers.

        Raises:
            NotFoldable: if the gate reads the text.
        """
        if "embeddings" in self.needs:
            raise NotFoldable('the gate reads the text (method.gate_input: "text"), so the rows differ from row to row')
        return super().fold()

    def insight(self) -> Mapping[str, Tensor]:
        """Gate weights [N] or [s, N], and the fusion attention [s, m] (or [s, r])."""
        c, found = self.settings, {}
        with torch.no_grad():
            if c.use_spaces and c.gate_input == "prompt":
                found["gate"] = self._gate(self._fuse(), View())[0][
                    0 if c.gate_granularity == "prompt" else slice(None)
                ]
            if c.fuses:
                query, key, _ = self._fusion_inputs()
                found["fusion attention"] = torch.softmax(query @ key.T / math.sqrt(query.shape[-1]), dim=-1)
        return found

    @property
    def _gamma(self) -> float:
        c = self.settings
        return 1.0 if c.lowrank_scale == "one" else c.alpha / math.sqrt(c.rank)

    def _fusion_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        c = self.settings
        a, b = (self.a.detach(), self.b.detach()) if c.fusion_detach else (self.a, self.b)
        source = a @ b if c.fusion_kv == "AB" else b
        query, key = layer_norm(self.rows), layer_norm(source)
        if c.fusion_dim:
            query, key = query @ self.w_q, key @ self.w_k
        return query, key, self._gamma * source

    def _fuse(self) -> Tensor:
        c = self.settings
        if not c.fuses:
            return self.rows
        # Delta = softmax(LN(P_s) W_q (LN(A B) W_k)^T / sqrt(h)) gamma A B;  P_f = P_s + Delta
        added = attend(*self._fusion_inputs())
        if c.fusion_residual == "difference":
            added = added - self.rows
        return self.rows + (self.fusion_factor * added if c.weighs else added)

    def _gate(self, fused: Tensor, view: View) -> Tensor:
        """G [g, s or 1, N], summing to one over N."""
        c = self.settings
        if c.gate_input == "text":
            if view.embeddings is None or view.mask is None:
                raise NotFoldable('method.gate_input "text" needs the text embeddings')
            read = masked_mean(view.embeddings.to(fused.dtype), view.mask)[:, None]
        else:
            read = (fused if c.gate_granularity == "token" else fused.mean(dim=0, keepdim=True))[None]
        # g = softmax(LN(.) W_g + b_g)
        logits = layer_norm(read) @ self.w_g + self.b_g
        if c.gate_top_k is not None:
            lowest = logits.topk(c.gate_top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < lowest, -math.inf)
        return torch.softmax(logits, dim=-1).expand(-1, len(fused), -1)

    def _space_changes(self, base: Tensor) -> Tensor:
        """Z_i - P for each space, [N, s, d]."""
        c = self.settings
        if c.space_type == "scale":
            return base * self.up[:, None]
        if c.space_type == "linear":
            return base @ self.up
        # Z_i - P = phi(P D_i) U_i
        phi = torch.nn.functional.silu if c.activation == "silu" else torch.nn.functional.relu
        return phi(base @ self.down) @ self.up

    @classmethod
    def count(cls, config: MethodConfig, shape: Shape) -> int:
        """S d + r (m + d) + 2 d h + N (2 d k) + N (d + 1), less what is switched off."""
        c, d = cast(EPTConfig, config), shape.width
        total = c.num_virtual_tokens * d
        if c.use_lowrank:
            total += c.rank * (c.max_tokens + d)
        if c.fuses:
            total += 2 * d * c.fusion_dim + int(c.weighs)
        if c.use_spaces:
            each = {"bottleneck": 2 * d * c.space_dim, "linear": d * d, "scale": d}[c.space_type]
            total += c.spaces * each + c.spaces * (d + 1)
        return total

    @classmethod
    def match_budget(cls, config: MethodConfig, length: int, shape: Shape) -> MethodConfig:
        """The largest r >= 1 that fits into length d; without the low-rank pair, the largest s."""
        c, d = cast(EPTConfig, config), shape.width
        budget = length * d
        if not c.use_lowrank:
            rest = cls.count(c, shape) - c.num_virtual_tokens * d
            check_size(rest + d, budget, length, "lower method.spaces or method.space_dim")
            return c.model_copy(update={"num_virtual_tokens": (budget - rest) // d})
        smallest = c.model_copy(update={"rank": 1})
        fix = "lower method.num_virtual_tokens, method.spaces or method.space_dim"
        check_size(cls.count(smallest, shape), budget, length, fix)
        spare = budget - cls.count(smallest, shape)
        return c.model_copy(update={"rank": 1 + spare // (c.max_tokens + d), "reference_length": length})
