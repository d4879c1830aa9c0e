"""A job's evaluation report for a terminal: the verdict, base against tuned, answers side by side."""

from __future__ import annotations

from typing import Any

from loractl.common.job.kinds import kind_of
from loractl.common.text import clean_line, number, signed
from loractl.common.units import duration, gib, thousands
from loractl.common.verdict import RIGHT, are_of_pairs, rights, written
from loractl.scheduler.cli.screen import Screen, block, fit, table, wrapped

_OF_SHARES = "; its loss is that of the labels' shares of the training rows"
"""What a classifier's baseline is equally sure of."""


def report_text(report: dict[str, Any], screen: Screen, answers: int, final: str = "") -> str:
    """The evaluation report for a terminal: the verdict, the table with its intervals, answers side by side.

    `final`: what its final rows say.
    """
    job = f"{report['job']['job_id']} {report['job']['name']}"
    lines = wrapped(f"{job}: {report['verdict']['sentence']}", job, screen)
    for aside in filter(None, [report["verdict"].get("aside"), final]):
        lines += wrapped(aside, "", screen)
    lines.append("")
    rows = []
    for m in report["evaluation"]["metrics"]:
        shown = written(m)
        color = {"better": "green", "worse": "red"}.get(shown.reading)
        rows.append(
            [
                m["label"] + (f",\N{NO-BREAK SPACE}{m['unit']}" if m["unit"] else ""),
                shown.base,
                screen.style(shown.tuned, bold=True),
                shown.change,
                shown.interval,
                screen.style(shown.reading, fg=color),
            ]
        )
    headers = ["MEASURE", "BASE", "TUNED", "CHANGE", "95 % INTERVAL", "READING"]
    lines += table(headers, rows, screen, right=("BASE", "TUNED", "CHANGE"), wraps=True)
    training, data, e = report["training"], report["data"], report["evaluation"]
    if e.get("baseline"):  # older reports have none
        what = "" if kind_of(report.get("task_type")).writes else _OF_SHARES
        lines += ["", *wrapped(f"Base: {e['baseline']}{what}.", "", screen)]
    lines += _labels_table(e.get("labels"), screen) + _turns_table(e.get("turns"), screen)
    lines += _harness_table(e.get("lm_eval"), screen)
    apart = data.get("conversations_apart", 0)  # none in a report of an earlier version
    as_rows = f" {apart} conversations are {data['rows_of_conversations_apart']} rows." if apart else ""
    left_out = sum(data.get(f"{why}_rows_dropped", 0) for why in ("too_long", "bad", "overlap", "repeated"))
    speed = f", {training['tokens_per_second']:.0f} tok/s" if training["tokens_per_second"] else ""
    notes = (
        f"{e['rows']} held-out row{'s' * (e['rows'] != 1)}. {report['method']}, {_steps_taken(training)} in "
        f"{duration(training['seconds'])}{speed}, "
        f"peak {gib(training['peak_memory_bytes'])} GiB ({training['peak_memory_kind']}).",
        f"Intervals: {thousands(e['bootstrap']['samples'])} paired bootstrap samples, seed {e['bootstrap']['seed']}. "
        f"{data['truncated_rows']} row{'s' * (data['truncated_rows'] != 1)} truncated, {left_out} left out.{as_rows}",
    )
    about = [*_measured_before(e), *([clean_line(e["cheap"])] if e.get("cheap") else [])]
    about += [clean_line(f"Warning of the data: {warning}.") for warning in data.get("warnings", ())]
    lines += ["", *(line for note in (*notes, *about) for line in wrapped(note, "", screen))]
    # what changed comes first: repaired, broken, then the rest
    order = sorted(e["answers"], key=lambda a: (len({*rights(a)}) == 1, not rights(a)[1], a["row"]))
    for answer in order[:answers]:
        lines += ["", screen.style(f"Row {answer['row']}: ", bold=True) + block(answer["prompt"])]
        for name, text in _side_by_side(answer):
            lines.append(screen.dim(f"  {name}: ") + block(text or "(nothing)", indent=4))
    hidden = len(order) - answers
    if hidden > 0:
        more = "1 more answer" if hidden == 1 else f"{hidden} more answers"
        lines += [
            "",
            screen.dim(f"{more}: loractl report {report['job']['job_id']} --answers {len(order)}"),
        ]
    return "\n".join(lines)


def _side_by_side(answer: dict[str, Any]) -> list[tuple[str, str]]:
    """The texts shown side by side, and what each is."""
    if are_of_pairs(answer):
        named = [("chosen", "expected"), ("rejected", "rejected"), ("base", "base"), ("tuned", "tuned")]
        return [(name, answer[key]) for name, key in named]
    right = {who: RIGHT[found] for who, found in zip(("base", "tuned"), rights(answer), strict=True)}
    return [("expected", answer["expected"]), *((f"{who} ({word})", answer[who]) for who, word in right.items())]


def _measured_before(evaluation: dict[str, Any]) -> list[str]:
    """Which job measured the base, if it was an earlier one."""
    if (at := evaluation.get("base_measured_at")) is None:
        return []
    job, again = evaluation["base_measured_by_job"], evaluation["base_rows_measured_again"]
    told = (
        f"The base's figures are those that job {job} measured on this box on {str(at)[:10]}; checked on {again} rows."
    )
    return [clean_line(told)]


def _labels_table(labels: dict[str, Any] | None, screen: Screen) -> list[str]:
    """How often base and tuned named each expected label, and what tuned took it for. Empty for older reports."""
    if labels is None:
        return []
    names, rows = [clean_line(name) for name in labels["names"]], []
    for place, name in enumerate(names):
        base, tuned = labels["base"][place], labels["tuned"][place]
        if not sum(tuned):
            continue
        wrong = sorted(((n, names[k]) for k, n in enumerate(tuned) if n and k != place), key=lambda pair: -pair[0])
        taken = ", ".join(f"{other} {n}" for n, other in wrong[:2])
        right = screen.style(str(tuned[place]), bold=True)
        rows.append([name, str(sum(tuned)), str(base[place]), right, fit(taken, screen.width - 45)])
    headers = ["LABEL", "ROWS", "BASE RIGHT", "TUNED RIGHT", "TUNED SAID INSTEAD"]
    return ["", *table(headers, rows, screen, right=("ROWS", "BASE RIGHT", "TUNED RIGHT"), wraps=True)]


def _turns_table(turns: list[dict[str, Any]] | None, screen: Screen) -> list[str]:
    """The loss of the first, second, ... answers of conversations. Empty for older reports."""
    if not turns:
        return []
    rows = [[str(t["turn"]), str(t["cases"]), number(t["base"], 2), number(t["tuned"], 2)] for t in turns]
    headers = ["ANSWER", "CASES", "BASE LOSS", "TUNED LOSS"]
    return ["", *table(headers, rows, screen, right=tuple(headers))]


def _harness_table(harness: dict[str, Any] | None, screen: Screen) -> list[str]:
    """The lm-eval harness's tasks; members of a group with its own average are only in the page and the JSON."""
    if not harness:  # none was asked for, or an older report
        return []
    rows, shown = [], [m for m in harness["metrics"] if m["group"] is None]
    for m in shown:
        low, high = (signed(m[key], 3) for key in ("low", "high"))
        rows.append(
            [
                clean_line(m["label"]),
                _with_error(m["base"], m["base_stderr"]),
                screen.style(_with_error(m["tuned"], m["tuned_stderr"]), bold=True),
                signed(m["change"], 3),
                f"{low} to {high}" + (" *" if m["interval"] == "unpaired" else ""),
                screen.style(m["reading"], fg={"better": "green", "worse": "red"}.get(m["reading"])),
            ]
        )
    headers = ["TASK", "BASE", "TUNED", "CHANGE", "95 % INTERVAL", "READING"]
    limit = "all rows" if harness["limit"] is None else f"at most {thousands(harness['limit'])} rows"
    paired = "Intervals: paired bootstrap over the documents"
    unpaired = any(m["interval"] == "unpaired" for m in shown)
    hidden = len(harness["metrics"]) - len(shown)
    return [
        "",
        *table(headers, rows, screen, right=("BASE", "TUNED", "CHANGE"), wraps=True),
        *wrapped(f"lm_eval {harness['version']}, {limit} of each task; standard errors in brackets.", "", screen),
        *wrapped(paired + ("; * unpaired, from both standard errors." if unpaired else "."), "", screen),
        *([f"{hidden} more numbers, of the groups' members, are in the page and in --json."] if hidden else []),
    ]


def _with_error(value: float | None, error: float | None) -> str:
    return number(value, 3) + ("" if error is None else f" ({error:.3f})")


def _steps_taken(training: dict[str, Any]) -> str:
    """The number of steps, and the jobs that shared the process. The time shown after it is only this attempt's."""
    steps, resumed = training["steps"], training["resumed_from_step"]
    others = training.get("companions") or ()
    beside = f" alongside job{'s' * (len(others) > 1)} {', '.join(map(str, others))}" if others else ""
    return f"{steps} steps{beside}" if not resumed else f"{steps} steps{beside}, the last {steps - resumed} of them"
