"""The guard against numbers that are not finite: what a step without them means, when to go back, and when to give up.

Knows no data, files or listener; it reads what the solver says of a step and says what becomes of the run.
"""

from __future__ import annotations

import statistics
from typing import Any

from promptuary.joint import Joint
from promptuary.solvers.base import Solver, StepResult
from promptuary.training_state import Progress, Snapshot, put_back, snapshot
from promptuary.tuned import Tuned

STRIKES = 3
"""Steps in a row that are not finite before rolling back, and roll-backs before giving up; our choice."""

SPIKE, RECENT, FEWEST = 10.0, 20, 5
"""A loss of this many times the median of the newest finite losses is logged as a spike, as soon as there are
enough of them; our choice. Nothing else is done about it: its gradient is clipped as any other."""


class Guard:
    """Watches the steps of one run.

    `sound` is the state that a roll-back returns to: the last one that was validated and from which a finite step was
    taken, or the one that the run began with.
    """

    def __init__(
        self,
        tuned: Tuned | Joint,
        solver: Solver,
        progress: Progress,
        sound: Snapshot | None = None,
        begun: int = 0,
    ) -> None:
        """Begin with the state as it is, or with the sound state of a resumed run; the solver began at step `begun`."""
        self.tuned, self.solver, self.progress, self.begun = tuned, solver, progress, begun
        self.sound = sound or snapshot(tuned, solver)
        self._candidate: Snapshot | None = None

    def before_step(self) -> None:
        """Keep a state that was just validated: it becomes the sound one if a finite step can be taken from it."""
        validated = self.progress.validated == self.progress.step
        self._candidate = snapshot(self.tuned, self.solver) if validated else None

    def after_step(self, taken: StepResult) -> dict[str, Any]:
        """Count a step, `progress.step` of the run; what the log should say of it besides its numbers."""
        progress = self.progress
        if not taken.applied:
            progress.strikes, progress.idle, progress.skipped = (
                progress.strikes + 1,
                progress.idle + 1,
                progress.skipped + 1,
            )
            return {"event": "not finite, step skipped", "what": taken.fault, "strike": progress.strikes}
        progress.strikes = progress.idle = 0
        self.sound, self._candidate = self._candidate or self.sound, None
        usual = statistics.median(progress.losses) if len(progress.losses) >= FEWEST else None
        progress.losses = [*progress.losses[1 - RECENT :], taken.loss]
        if usual is not None and taken.loss > SPIKE * abs(usual):
            return {"event": "loss spike", "usual": usual}
        return {}

    @property
    def must_go_back(self) -> bool:
        """Whether too many steps in a row were not finite."""
        return self.progress.strikes >= STRIKES

    def go_back(self) -> bool:
        """Return to the sound state with half the rates; false if that was done too often already.

        The step counter and with it the schedule go on, as the batches do: only tensors and moments return.
        """
        progress = self.progress
        progress.strikes, progress.rollbacks = 0, progress.rollbacks + 1
        put_back(self.tuned, self.solver, self.sound)
        self.solver.seek(progress.step - self.begun)
        if progress.rollbacks > STRIKES:
            return False
        self.solver.slow_down(0.5)
        # with the lower rates, so that a second roll-back to it halves them once more
        self.sound = snapshot(self.tuned, self.solver)
        return True

    @property
    def lost(self) -> bool:
        """Whether a run that ends now has nothing to show: no finite step at all, or none since too many others."""
        progress = self.progress
        return progress.idle >= min(STRIKES, max(progress.step, 1))
