"""What sweep would queue: the members that settings make from a job file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loractl.common.errors import UsageError
from loractl.common.job.sweep import RUNGS, NewSweep, setting

from .grid import read_grid
from .members import member_specs, numbered

if TYPE_CHECKING:
    from loractl.common.job.spec import JobSpec


@dataclass(frozen=True, kw_only=True)
class SweepDraft:
    """What a sweep would queue."""

    name: str
    varied: Mapping[str, str]  # the values of each key, as given
    rungs: tuple[float, ...] | None  # None: no loser is stopped
    trials: int | None  # None: all points
    seed: int | None  # of the draw
    specs: tuple[JobSpec, ...]  # of the members

    @property
    def points(self) -> list[tuple[str, dict[str, Any]]]:
        """Each member's name and its values of the varied keys."""
        trees = [spec.model_dump(mode="json") for spec in self.specs]
        return [(tree["name"], {key: setting(tree, key) for key in self.varied}) for tree in trees]

    def new_sweep(self, user: str) -> NewSweep:
        """The sweep's own row, apart from its members."""
        return NewSweep(
            name=self.name, user=user, varied=self.varied, rungs=self.rungs, trials=self.trials, seed=self.seed
        )

    def as_json(self) -> dict[str, Any]:
        """`varied`; `rungs`, null without early stops; `members`: each with `name`, `settings` and resolved `spec`."""
        members = [
            {"name": name, "settings": settings, "spec": spec.model_dump(mode="json")}
            for (name, settings), spec in zip(self.points, self.specs, strict=True)
        ]
        return {"varied": dict(self.varied), "rungs": self.rungs, "members": members}


def sweep_draft(
    job_file: Path, settings: Sequence[str], *, trials: int | None, seed: int | None, early_stop: bool
) -> SweepDraft:
    """The sweep that `KEY=VALUES` settings make from a job file. Raises SpecError, UsageError."""
    if seed is not None and trials is None:
        raise UsageError("--seed is for draws", "say how many to draw: --trials 20")
    grid = read_grid(settings)
    specs = member_specs(job_file, grid, trials=trials, seed=seed or 0, early_stop=early_stop)
    return SweepDraft(
        name=specs[0].name,
        varied=grid.given,
        rungs=RUNGS if early_stop else None,
        trials=trials,
        seed=None if trials is None else seed or 0,
        specs=tuple(numbered(specs)),
    )
