"""Waiting jobs kept in order between the events of a replay, so that each event reads only what could start then."""

from __future__ import annotations

import bisect

from loractl.common.placement.rule import Openings, Waiting, size_step

Order = tuple[float, int]  # what comes first, then the job's number
_Shelf = tuple[int, frozenset[tuple[str, str]]]  # size step, required labels


class KeptLine:
    """Jobs in one order, on a shelf for each step of need: an opening rules out whole shelves unread."""

    def __init__(self) -> None:
        self._order: list[Order] = []
        self._shelves: dict[_Shelf, list[tuple[Order, Waiting]]] = {}
        self._jobs: dict[Order, Waiting] = {}

    def __len__(self) -> int:
        return len(self._order)

    def first(self) -> Waiting | None:
        return self._jobs[self._order[0]] if self._order else None

    def add(self, job: Waiting, rank: float = 0.0) -> None:
        """Put the job where its rank, and then its number, places it."""
        order = (rank, job.job_id)
        bisect.insort(self._order, order)
        bisect.insort(self._shelves.setdefault(_shelf(job), []), (order, job), key=lambda entry: entry[0])
        self._jobs[order] = job

    def remove(self, job: Waiting, rank: float = 0.0) -> None:
        """Take the job out; it must be there, with that rank."""
        order = (rank, job.job_id)
        del self._order[bisect.bisect_left(self._order, order)]
        del self._jobs[order]
        entries = self._shelves[_shelf(job)]
        del entries[bisect.bisect_left(entries, order, key=lambda entry: entry[0])]
        if not entries:
            del self._shelves[_shelf(job)]

    def reader(self) -> LineReader:
        """A `policy.Line` over what waits now. It must not be read on after a change."""
        return LineReader(self._shelves)


class LineReader:
    """One pass over a line, see `policy.Line`."""

    def __init__(self, shelves: dict[_Shelf, list[tuple[Order, Waiting]]]) -> None:
        self._shelves = shelves
        self._read: dict[_Shelf, int] = {}  # entries that were given or did not fit

    def next(self, openings: Openings) -> Waiting | None:
        best: tuple[Order, Waiting, _Shelf] | None = None
        for shelf, entries in self._shelves.items():
            if not _may_fit(shelf, openings):
                continue
            place = self._read.get(shelf, 0)
            while place < len(entries):
                order, job = entries[place]
                if openings.admit(job.least, job.requires):
                    if best is None or order < best[0]:
                        best = (order, job, shelf)
                    break
                place += 1
            self._read[shelf] = place
        if best is None:
            return None
        self._read[best[2]] += 1
        return best[1]


def _shelf(job: Waiting) -> _Shelf:
    return size_step(job.least), job.requires


def _may_fit(shelf: _Shelf, openings: Openings) -> bool:
    """False when nothing on the shelf can be admitted; steps are rounded down."""
    step, _ = shelf
    if step == 0:
        return openings.unknown
    low, high = openings.processor
    return step <= size_step(openings.gpu) or size_step(low) <= step <= size_step(high)
