"""A simulation on a terminal."""

from __future__ import annotations

from loractl.common.text import clean_line
from loractl.common.units import thousands
from loractl.scheduler.cli.screen import Screen, table

from .outcome import POLICIES, RULES, RuleOutcome, Simulation, mean, quantile, waits_of
from .quotas import quota_text
from .workload import fleet_text


def text(done: Simulation, screen: Screen) -> str:
    """A sentence, each rule's outcome, and the waits by need."""
    lines = [screen.style(_head(done), bold=True), *_what(done), ""]
    headers = ["RULE", "MEAN", "P99", "MEAN WAIT", "P99", "LARGEST", "MAKESPAN", "VRAM"]
    lines += table(headers, [_row(name, out) for name, out in done.outcomes.items()], screen, right=headers[1:])
    lines += ["", *_by_class(done, screen), ""] if any(done.outcomes[name].courses for name in RULES) else [""]
    if done.nodes.presences:
        lines += [*_by_stops(done, screen), ""]
    if done.quotas:
        lines += [*_by_user(done, screen), ""]
    notes = [
        "MEAN, P99: from arrival to end. LARGEST: p99 wait of the tenth that needs most.",
        "VRAM: reserved, of all cards, over the makespan.",
        "fifo: whole cards by age, the first blocks the rest. best fit: shared by age.",
        "shortest first*: whole cards; it knows how long each job will take.",
    ]
    if done.how_loaded.startswith("load"):
        notes.append("load: how busy the jobs keep the cards, one on each; above 1 they fall behind.")
    if done.quotas:
        notes.append("without quotas: loractl's rule, if nobody had a quota.")
    if done.nodes.presences:
        notes.append("blind: loractl's rule, if it did not look at the time that a card has left.")
        notes.append("IN VAIN: the card went while the job loaded. UNFINISHED: not in the means.")
    if done.nodes.roomy:
        notes.append("recomputing: loractl's rule, but every job recomputes.")
    return "\n".join([*lines, *(screen.dim(note) for note in notes)])


def _head(done: Simulation) -> str:
    """Compares the two rules by jobs that ended under both: the others have no time to compare."""
    ours, fifo = ({c.job_id: c.took for c in done.outcomes[name].courses} for name in ("loractl", "fifo"))
    if not (both := ours.keys() & fifo.keys()):
        return "No job ended both with loractl and by fifo."
    took, theirs = (mean([one[job_id] for job_id in both]) for one in (ours, fifo))
    change = 1 - took / theirs if theirs else 0.0
    against = f"{abs(change):.0%} {'sooner' if change >= 0 else 'later'} than" if abs(change) >= 0.005 else "as soon as"
    said = f"With loractl a job ends {span(took)} after it arrives, {against} by fifo."
    return (
        said
        if len(both) == len(done.chosen.jobs)
        else f"{said}\nThis compares the {thousands(len(both))} jobs that end under both."
    )


def span(seconds: float | None) -> str:
    """A time as one number, so that a column of them can be compared: 45 s, 12 min, 11.0 h, 3.2 d. None: a dash."""
    if seconds is None:
        return "–"
    for below, size, unit in ((90, 1, "s"), (5400, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < below:
            return f"{seconds / size:.{0 if size < 3600 else 1}f} {unit}"
    return f"{seconds / 86400:.1f} d"


def _what(done: Simulation) -> list[str]:
    chosen, workload = done.chosen, done.chosen.workload
    users = len({job.user for job in chosen.jobs})
    people = f"{users} user{'' if users == 1 else 's'}"
    if workload.users_are != "user":
        people += f" (its {workload.users_are}, for want of users)"
    lines = [
        f"{thousands(len(chosen.jobs))} job{'' if len(chosen.jobs) == 1 else 's'} of {people},",
        f"on {fleet_text(done.cards, done.nodes.presences)}; {done.how_loaded}contention {done.contention:g}.",
    ]
    if done.nodes.roomy:
        lines += _roomy(done)
    if chosen.never:
        lines.append(f"Larger than every card, and not replayed: {thousands(chosen.never)}.")
    if chosen.slow:
        lines.append(f"Loading for longer than any card stays, and never started: {thousands(chosen.slow)}.")
    if unfinished := done.outcomes["loractl"].unfinished:
        lines.append(f"Not ended under loractl's rule, and in none of its means: {thousands(unfinished)}.")
    if chosen.longer:
        lines.append(f"Longer than --longest, and not replayed: {thousands(chosen.longer)}.")
    if workload.left_out:
        lines.append(f"No job on one card with a lifetime, and not read: {thousands(workload.left_out)} rows.")
    return lines


def _roomy(done: Simulation) -> list[str]:
    """How many jobs had the memory to recompute less, and how many jobs ended later because of that."""
    later = [seconds for seconds in done.later if seconds > 0]
    share = len(later) / len(done.later) if done.later else 0.0
    lines = [f"{done.outcomes['loractl'].roomy:.0%} of the jobs recomputed nothing, or every second block alone."]
    if later:
        lines.append(f"{share:.0%} end later for it, the worst by {span(max(later))}.")
    return lines


def _row(name: str, out: RuleOutcome) -> list[str]:
    took, waits = [c.took for c in out.courses], waits_of(out.courses)
    if not took:
        return [POLICIES[name].title, *7 * ["–"]]
    return [
        POLICIES[name].title,
        span(mean(took)),
        span(quantile(took, 0.99)),
        span(mean(waits)),
        span(quantile(waits, 0.99)),
        span(quantile(waits_of(out.largest_tenth), 0.99)),
        span(out.makespan),
        f"{out.utilisation:.0%}",
    ]


def _by_class(done: Simulation, screen: Screen) -> list[str]:
    """Mean waits by VRAM class, one row per class. JOBS: that ended under our rule."""
    classes = {name: done.outcomes[name].by_class() for name in RULES}
    headers = ["MEAN WAIT BY NEED", "JOBS", *(POLICIES[name].title.upper() for name in classes)]
    rows = [
        [
            f"{'≤' if screen.unicode else 'to'} {size} GiB",
            thousands(len(classes["loractl"].get(size, ()))),
            *(span(mean(waits_of(ended)) if (ended := courses.get(size)) else None) for courses in classes.values()),
        ]
        for size in sorted(set().union(*classes.values()))
    ]
    return table(headers, rows, screen, right=headers[1:])


def _by_stops(done: Simulation, screen: Screen) -> list[str]:
    """What became of attempts whose cards went, one row per rule."""
    headers = ["CARDS THAT GO", "STOPS", "IN VAIN", "UNFINISHED"]
    rows = [
        [POLICIES[name].title, thousands(out.stops), thousands(out.in_vain), thousands(out.unfinished)]
        for name, out in done.outcomes.items()
    ]
    return table(headers, rows, screen, right=headers[1:])


def _by_user(done: Simulation, screen: Screen) -> list[str]:
    """Waits of each user with a quota, and of all others, with and without quotas."""
    headers = ["WAITS BY QUOTA", "", "JOBS", "UNFINISHED", "MEAN", "P99", "MEAN WITHOUT"]
    rows = [
        [
            "others" if one.user is None else clean_line(one.user),
            "" if one.quota is None else quota_text(one.quota),
            thousands(one.jobs),
            thousands(one.unfinished),
            span(one.mean_wait_s),
            span(one.p99_wait_s),
            span(one.mean_wait_without_s),
        ]
        for one in done.by_user
    ]
    return table(headers, rows, screen, right=headers[2:])
