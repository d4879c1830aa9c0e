"""What a job measured on its final rows. Showing any figure of them is a look, which the database records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loractl.common.verdict import has_interval, written
from loractl.scheduler.wait.gangs import in_words

if TYPE_CHECKING:
    from loractl.common.artifacts import ArtifactStore, Binding
    from loractl.common.store.store import Store
    from loractl.common.store.tables import FinalLook


@dataclass(frozen=True, kw_only=True)
class FinalResult:
    """Base against tuned on rows that chose nothing, and the looks at these rows so far."""

    job_id: int
    content: Mapping[str, Any]  # as in the report's file
    looks: Sequence[FinalLook]  # the last is this one

    @property
    def sentence(self) -> str:
        """What these rows say, and how often they were looked at."""
        rows, verdict = self.content["rows"], self.content["verdict"]
        told = [verdict["sentence"]]
        loss = next(metric for metric in self.content["metrics"] if metric["name"] == "loss")
        if has_interval(loss):
            told.append(f"Change of the loss {written(loss).change} ({written(loss).interval}).")
        told.append(f"Nothing was chosen by {f'these {rows} rows' if rows != 1 else 'this row'}.")
        others = dict.fromkeys(str(look.job_id) for look in self.looks if look.job_id != self.job_id)
        before = f"; job{'s' * (len(others) != 1)} {in_words(list(others))} looked at before" if others else ""
        return " ".join([*told, *filter(None, [verdict.get("aside")]), f"Look {len(self.looks)} at them{before}."])

    def as_json(self) -> dict[str, Any]:
        """The report file's entry on the final rows, `job_id`, the number of this `look`, and all `looks` at these rows
        so far with `job_id`, `sweep_id`, `user` and `at`."""
        told = [
            {"job_id": one.job_id, "sweep_id": one.sweep_id, "user": one.user, "at": one.at.isoformat()}
            for one in self.looks
        ]
        return {**self.content, "job_id": self.job_id, "look": len(self.looks), "looks": told}


def look(store: Store, artifacts: ArtifactStore, job_id: int, stored: Binding, user: str) -> FinalResult | None:
    """What a finished job measured on its final rows, once the look is recorded; None if it has none.

    `stored`: its result. Raises ArtifactError.
    """
    content = artifacts.read_final(stored)
    if content is None:
        return None
    return FinalResult(job_id=job_id, content=content, looks=store.results.look(job_id, str(content["sha256"]), user))


def seen(store: Store, job_id: int, content: Mapping[str, Any] | None) -> FinalResult | None:
    """The same without a new look: None while nobody has looked at this job's."""
    looks = [] if content is None else store.results.looks(str(content["sha256"]))
    while looks and looks[-1].job_id != job_id:
        looks.pop()
    return FinalResult(job_id=job_id, content=content, looks=looks) if content is not None and looks else None
