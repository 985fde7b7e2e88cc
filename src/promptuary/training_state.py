"""Everything that the next step of a run depends on: as an object, and as the tensors and facts of a checkpoint.

Knows no files, no data and no loop.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from promptuary.joint import Joint
from promptuary.seeds import seeded
from promptuary.solvers.base import Solver
from promptuary.tuned import Tuned

TIMES = 1000
"""How many of the newest steps the median of their times is taken over."""

Snapshot = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]
"""Trained tensors, and the optimiser's tensors and numbers."""


@dataclass
class Progress:
    """What changes from step to step, besides tensors.

    `worse`: validations since the best one; `validated`: step of the last one; `strikes`: steps that were not finite
    since the last finite one or roll-back; `idle`: the same without regard to roll-backs; `skipped`: all of them;
    `micro_batch`, `eval_batch_size`: sizes that fitted into memory, where those of the settings did not; `recompute`:
    single examples did not either, and layers run again since then; `stage`: which of the method's; `calls`: candidates
    that were scored without gradients; `texts`: validation scores of words, each when it was first validated; `times`:
    seconds of the newest steps; `losses`: of the newest finite steps.
    """

    step: int = 0
    best: float | None = None
    best_step: int = 0
    worse: int = 0
    validated: int = -1
    strikes: int = 0
    idle: int = 0
    skipped: int = 0
    rollbacks: int = 0
    micro_batch: int | None = None
    eval_batch_size: int | None = None
    recompute: bool = False
    stage: int = 0
    calls: int = 0
    seconds: float = 0.0
    texts: dict[str, float] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def took(self, seconds: float) -> None:
        """Count a step."""
        self.step += 1
        self.seconds += seconds
        self.times = [*self.times[1 - TIMES :], round(seconds, 6)]

    @property
    def median(self) -> float | None:
        """Seconds of a step."""
        return statistics.median(self.times) if self.times else None


def snapshot(tuned: Tuned | Joint, solver: Solver) -> Snapshot:
    """Copies of everything that is trained and of what the solver keeps."""
    return (tuned.state(), *solver.state())


def put_back(tuned: Tuned | Joint, solver: Solver, state: Snapshot) -> None:
    """Return to a snapshot, bit for bit."""
    tuned.restore(state[0])
    solver.restore(state[1], state[2])


def pack(
    now: Snapshot, sound: Snapshot, best: Mapping[str, Tensor], progress: Progress
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the facts of a checkpoint.

    Args:
        now: the state after the last step.
        sound: the state that a roll-back returns to.
        best: the trained tensors of the best validation so far.
        progress: everything else.
    """
    parts = {"trained": now[0], "optimizer": now[1], "best": best, "sound": sound[0], "sound-optimizer": sound[1]}
    tensors = {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}
    return tensors, {"progress": asdict(progress), "solver": now[2], "sound": sound[2]}


def unpack(
    tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> tuple[Snapshot, Snapshot, dict[str, Tensor], Progress]:
    """What `pack` was given."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    now = (part("trained/"), part("optimizer/"), facts["solver"])
    sound = (part("sound/"), part("sound-optimizer/"), facts["sound"])
    return now, sound, part("best/"), Progress(**facts["progress"])


@contextlib.contextmanager
def chance(device: torch.device, seed: int, *parts: int) -> Iterator[None]:
    """Torch's global generators (dropout draws from them) seeded for what happens inside, and untouched by it.

    A step's chance is thus a matter of seed and step alone: a stop in the middle of a step, a second attempt after a
    lack of memory and a resumed run draw the same numbers.
    """
    value, on_cuda = seeded(seed, *parts).initial_seed(), device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_cuda else [], device_type="cuda"):
        torch.default_generator.manual_seed(value)
        if on_cuda:
            torch.cuda.manual_seed(value)
        yield
