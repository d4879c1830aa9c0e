"""What a measured change says and how it is written: one rule, and one set of words for all who show it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .text import number, signed

MIN_CASES = 8
"""Fewer cases are too few for an interval: its ends are then little more than the rows themselves."""

DESCRIPTIONS = frozenset({"context_gain"})
"""Names of measures that only describe: neither way is better. Older reports read them as better or worse."""

Reading = Literal[
    "better", "worse", "no practical change", "no clear change", "too few cases", "a description", "not known"
]

MIN_NEW = 30
"""With fewer held-out rows that resemble no row to train on, all of them decide, and the verdict says so."""

BADGES = {
    "better": "✓ Better",
    "worse": "✗ Worse",
    "mixed": "± Loss and answers disagree",
    "no_practical_change": "– No practical change",
    "no_measurable_gain": "– No measurable gain",
    "better_ends": "± Better only at ending its answers",
    "no_better_than_cheap": "– No better than the most frequent answer",
    "too_few_rows": "– Too few held-out rows to say",
    "cant_be_judged": "– Can't be judged",
    "not_known": "– Could not be measured",
}
"""The badge of each reading that a report's verdict can have."""

MOST_DECIMALS = 6


@dataclass(frozen=True, kw_only=True)
class MeasuredChange:
    """A change of a measure with its 95% interval, in the measure's unit; NaN where it is not known."""

    base: float
    change: float
    low: float
    high: float
    cases: int
    unit: str = "nats"
    higher_is_better: bool | None = False  # None: it only describes

    @property
    def slight(self) -> bool:
        """Whether no one would notice a change of this size."""
        return abs(self.change) < noticeable(self.unit, self.base)

    @property
    def reading(self) -> Reading:
        if self.higher_is_better is None:
            return "a description"
        if self.cases and not math.isfinite(self.change):
            return "not known"
        if self.cases < MIN_CASES:
            return "too few cases"
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            return "not known"
        if self.low <= 0 <= self.high:
            return "no clear change"
        if self.slight:
            return "no practical change"
        return "better" if (self.change > 0) == self.higher_is_better else "worse"


def noticeable(unit: str, base: float) -> float:
    """The least change that someone may notice: 0.01 nats, which is a hundredth of the perplexity; 0.1 %; of a share
    from 0 to 1 a thousandth, and of any other number a hundredth of the base's."""
    if unit in ("nats", "%"):
        return {"nats": 0.01, "%": 0.1}[unit]
    return 0.001 if not math.isfinite(base) or abs(base) <= 1 else abs(base) / 100


@dataclass(frozen=True, kw_only=True)
class Written:
    """A metric of a report for people. All numbers have as many decimals as the interval bears."""

    base: str
    tuned: str
    change: str
    low: str
    high: str
    reading: str

    @property
    def interval(self) -> str:
        return self.low if self.low == self.high == "–" else f"{self.low} to {self.high}"


def has_interval(metric: Mapping[str, Any]) -> bool:
    """Whether a metric's interval is shown. Too few cases have none, whatever was computed."""
    known = metric["low"] is not None and metric["high"] is not None
    return known and metric.get("reading") != "too few cases" and metric.get("cases", MIN_CASES) >= MIN_CASES


def written(metric: Mapping[str, Any]) -> Written:
    """A metric as report.json holds it."""
    described = metric.get("name") in DESCRIPTIONS
    reading = "a description" if described else str(metric["reading"])
    values = {key: _finite(metric[key]) for key in ("base", "tuned", "change", "low", "high")}
    digits = decimals(values["change"], values["low"], values["high"], least=1 if metric["unit"] == "%" else 2)
    told = has_interval(metric)
    return Written(
        base=number(values["base"], digits),
        tuned=number(values["tuned"], digits),
        change=signed(values["change"], digits),
        low=signed(values["low"] if told else None, digits),
        high=signed(values["high"] if told else None, digits),
        reading=reading,
    )


def decimals(change: float | None, low: float | None, high: float | None, least: int = 2) -> int:
    """As many decimals as show the width of the interval, or of the change where the interval has none."""
    width = 0.0 if low is None or high is None else high - low
    size = width if width > 0 else abs(change or 0.0)
    if not math.isfinite(size) or size <= 0:
        return least
    return min(MOST_DECIMALS, max(least, -math.floor(math.log10(size))))


@dataclass(frozen=True, kw_only=True)
class ReportVerdict:
    """What a report says as a whole. Its badge, its line in `status` and its sentence follow from the reading."""

    reading: str  # a key of BADGES
    short: str  # for a job's line
    sentence: str
    aside: str  # what is worse besides the held-out loss, and what is wrong with the held-out rows; else empty

    @property
    def badge(self) -> str:
        return BADGES[self.reading]


ANSWERS = frozenset({"exact_match", "rouge1", "rouge2", "rougeL", "accuracy", "macro_f1"})
"""Measures of what the model answers. Where they contradict the loss, neither decides alone."""

LOSSES = frozenset({"loss", "new_rows_loss", "words_loss", "perplexity"})
ACCURACIES = frozenset({"preference_accuracy", "new_rows_preference_accuracy"})
"""Measures whose numbers a verdict's sentence has, or that say the same as one of those."""

CHEAP = ("cheap_loss", "cheap_accuracy")
"""The tuned model against the labels' shares alone. A gain over the base needs a gain over one of the two."""

MIN_TURNED = 6
"""Minimum net number of pairs whose preference flipped. Fewer all flip the same way by chance more than 5 % of the
time."""

SPOILT = 1.0
"""Rise of the chosen answers' loss, in nats a token, that makes a verdict mixed: each token is e times less likely. The
margin alone can't tell, since it also grows when both answers become unlikely and the rejected one more so."""

OTHER_LENGTH = 1.5
"""Ratio of lengths at which a change is worth mentioning."""


def report_verdict(
    metrics: Sequence[Mapping[str, Any]],
    base: str = "the base",
    doubts: Sequence[str] = (),
    rows: str = "held-out",
    given_away: int = 0,
) -> ReportVerdict:
    """What a report's metrics say against `base`. The loss decides, unless the answers say the opposite. For pairs it
    does not decide either if it has not clearly changed but the share of correctly ranked pairs has.

    A gain is none if the labels' shares alone reach it, and can't be judged if most rows resemble rows to train on and
    the others are too few. `rows`: what to call the measured rows. `doubts`: sentences about them, which follow the
    measures that got worse, in `aside`. `given_away`: how many of them resemble a row to train on.
    """
    named = {metric["name"]: metric for metric in metrics}
    every, new = named["loss"], named.get("new_rows_loss")
    loss = every if new is None or new["cases"] < MIN_NEW else new
    shown = written(loss)
    accuracy = named.get("new_rows_preference_accuracy" if loss is new else "preference_accuracy")
    of = _of_rows(loss, metrics, rows) if accuracy is None else _of_pairs(loss, accuracy, named, rows)
    measured = of.measured
    if new is not None:
        seen = every["cases"] - new["cases"]
        about = f"{seen} of {every['cases']} {rows} rows resemble rows to train on"
        apart = (
            f"the verdict is of the other {new['cases']}" if loss is new else f"the other {new['cases']} are too few"
        )
        doubts = [*doubts, f"{about}; {apart}{'' if loss is new else ' to judge by'}."]
    reading, short, sentence = {
        "too few cases": (
            "too_few_rows",
            f"too few {rows} {of.cases} to say",
            f"Too few {rows} {of.cases} ({loss['cases']}) to say whether it is better: {measured}.",
        ),
        "no clear change": (
            "no_measurable_gain",
            "no measurable gain",
            f"No measurable gain: {measured}, and the interval of {of.changed} includes zero.",
        ),
        "no practical change": (
            "no_practical_change",
            "no practical change",
            f"No practical change: {measured}, too small to notice.",
        ),
        "not known": (
            "not_known",
            "could not be measured",
            f"Could not be measured: {measured}{_unmeasured(loss, f'{rows} {of.cases}')}.",
        ),
        "worse": ("worse", "worse", f"Worse than {base}: {measured}."),
        "better": ("better", "better", f"Better than {base}: {measured}."),
    }[shown.reading]
    opposite = {"better": "worse", "worse": "better"}.get(reading)
    against = [metric for metric in of.judges if metric["reading"] == opposite]
    unsure = [metric for metric in metrics if _points_down(metric)] if reading == "better" else []
    spoilt = named.get("chosen_loss", {})
    if reading == "better" and spoilt.get("reading") == "worse" and spoilt["change"] >= SPOILT:
        reading, short, shown = "mixed", "better preferences, spoilt answers", written(spoilt)
        cost = f"the chosen answers' own loss rose, {shown.base} -> {shown.tuned} nats a token"
        sentence = f"Better preferences than {base}'s, but spoilt answers: {measured}; {cost}."
        against = [*against, spoilt]
    elif against:
        reading, short = "mixed", f"{reading} loss, {opposite} {of.what}"
        told = [_told(more)] if (more := [metric for metric in against if metric is not accuracy]) else []
        sentence = f"{short.capitalize()} than {base}'s: {'; '.join([measured, *told])}."
    elif accuracy is not None and accuracy in of.judges and shown.reading.startswith("no "):
        reading, short = "mixed", f"{accuracy['reading']} {of.what}, {shown.reading} of the loss"
        sentence = (
            f"{accuracy['reading'].capitalize()} {of.what} than {base}'s, {shown.reading} of the loss: {measured}."
        )
    elif unsure:
        cases = max(int(metric["cases"]) for metric in unsure)
        few = f"{cases} answer{'s' * (cases != 1)} {'are' if cases != 1 else 'is'} too few to say"
        short = f"{short}, by loss"
        sentence = f"Better than {base} by loss: {measured}; {_told(unsure)}, but {few}."
    cheap = _unbeaten(named)
    if reading in ("better", "mixed") and loss is every and given_away * 2 > every["cases"]:
        reading, short = "cant_be_judged", "can't be judged"
        others = every["cases"] - given_away
        apart = f", and the other {others} are too few" if others else ""
        like = f"{given_away} of {every['cases']} {rows} rows resemble rows to train on{apart}"
        sentence = f"Can't be judged: {like}; {measured}."
        doubts = doubts[: len(doubts) - (new is not None)]
    elif reading in ("better", "mixed") and cheap is not None:
        reading, short = "no_better_than_cheap", "no better than the most frequent answer"
        sentence = (
            f"No better than the most frequent answer: {measured}, and the labels' shares alone give {cheap.base}."
        )
    elif reading == "better" and (words := named.get("words_loss")) is not None:
        reading, short = "better_ends", "better only at ending its answers"
        apart = f"without the stop token {written(words).base} -> {written(words).tuned}, {words['reading']}"
        sentence = f"Better than {base} only at ending its answers: {measured}; {apart}."
    sentence = f"{sentence.removesuffix('.')}{of.answers}."
    said = {*LOSSES, *ACCURACIES, *CHEAP, *(metric["name"] for metric in against)}
    worse = [metric["label"] for metric in metrics if metric["reading"] == "worse" and metric["name"] not in said]
    asides = [f"Worse on {' and '.join(worse)}."] if worse and reading != "too_few_rows" else []
    return ReportVerdict(
        reading=reading, short=f"{short}, {of.numbers}", sentence=sentence, aside=" ".join([*asides, *doubts])
    )


def _unbeaten(named: Mapping[str, Mapping[str, Any]]) -> Written | None:
    """The loss of the labels' shares, if the tuned model is clearly better in nothing; None otherwise."""
    against = [named[name] for name in CHEAP if name in named]
    beaten = any(metric["reading"] in ("better", "too few cases", "not known") for metric in against)
    return written(against[0]) if against and not beaten else None


def _unmeasured(loss: Mapping[str, Any], cases: str) -> str:
    count = loss.get("unmeasured")
    return f"; of {count} of {loss['cases']} {cases} it is not a number" if count else ", which is not a number"


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """What a verdict is about, in words."""

    numbers: str  # for a job's line
    measured: str
    judges: Sequence[Mapping[str, Any]]  # measures that may contradict the loss
    cases: str = "rows"
    what: str = "answers"
    changed: str = "the change"
    answers: str = ""  # what became of them


def _of_rows(loss: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], rows: str) -> _Subject:
    shown = written(loss)
    numbers = f"loss {shown.base} -> {shown.tuned}"
    return _Subject(
        numbers=numbers,
        measured=f"held-out {numbers}" if rows == "held-out" else f"{numbers} on {rows} rows",
        judges=[metric for metric in metrics if metric["name"] in ANSWERS],
    )


def _of_pairs(
    loss: Mapping[str, Any], accuracy: Mapping[str, Any], named: Mapping[str, Mapping[str, Any]], rows: str
) -> _Subject:
    shown, right = written(loss), written(accuracy)
    numbers, share = f"loss {shown.base} -> {shown.tuned}", f"{right.base} -> {right.tuned} %"
    margin, lengths = named.get("preference_margin"), named.get("answer_tokens")
    of_the_same = margin is not None and margin["cases"] == accuracy["cases"]
    return _Subject(
        numbers=f"chosen likelier in {share}, {numbers}",
        measured=f"the chosen answer is the likelier one in {share} of {accuracy['cases']} {rows} pairs, {numbers}",
        judges=[*([accuracy] if _turned(accuracy) else []), *([margin] if margin and of_the_same else [])],
        cases="pairs",
        what="preferences",
        changed="the loss's change",
        answers="" if lengths is None else _other_length(lengths),
    )


def _turned(accuracy: Mapping[str, Any]) -> bool:
    """Whether clearly more pairs are ranked correctly than before, or fewer."""
    clear = accuracy["reading"] in ("better", "worse")
    return clear and round(abs(accuracy["change"]) * accuracy["cases"] / 100) >= MIN_TURNED


def _other_length(lengths: Mapping[str, Any]) -> str:
    """What is said of answers that are clearly much longer or shorter than the base's; else nothing."""
    base, tuned, low, high = (lengths[key] for key in ("base", "tuned", "low", "high"))
    if not has_interval(lengths) or low <= 0 <= high or max(base, tuned) < OTHER_LENGTH * min(base, tuned):
        return ""
    times = round(tuned / base, 1) if base else 0.0
    size = {2.0: "twice", 0.5: "half"}.get(times, f"{times:g} times" if times else "")
    than = f"{size} as long" if size else ("longer" if tuned > base else "shorter")
    return f"; answers {than} ({base:.0f} -> {tuned:.0f} tokens)"


def chose_step(*, keeps_best: bool, evaluations: int, stopped_early: bool) -> bool:
    """Whether the held-out rows, which measure an adapter, have chosen the step that it is of."""
    return stopped_early or (keeps_best and evaluations > 1)


def _points_down(metric: Mapping[str, Any]) -> bool:
    """Whether answers got worse by what anyone would notice, in fewer cases than say anything."""
    if metric["name"] not in ANSWERS or metric["reading"] != "too few cases" or metric["change"] is None:
        return False
    return float(metric["change"]) < 0 and abs(metric["change"]) >= noticeable(metric["unit"], metric["base"])


def _told(metrics: Sequence[Mapping[str, Any]]) -> str:
    """The first measure, with its numbers, and how many more."""
    first, shown = metrics[0], written(metrics[0])
    more = f" and {len(metrics) - 1} more" if len(metrics) > 1 else ""
    return f"{first['label']} {shown.base} -> {shown.tuned}{more}"


def badge(reading: str) -> str:
    """The badge of a verdict's reading; a newer version's is shown as it is."""
    return BADGES.get(reading, reading.replace("_", " ").capitalize())


def are_of_pairs(answers: Mapping[str, Any]) -> bool:
    """Whether answers of base and tuned come with a chosen and a rejected one."""
    return answers.get("rejected") is not None


def answer_groups(answers: Sequence[dict[str, Any]]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """(key, title, answers) by what changed: repaired and broken first. Answers to the prompts of pairs are neither
    right nor wrong, so they are one group."""
    if any(are_of_pairs(answer) for answer in answers):
        return [("all", "answers", list(answers))]
    kinds = [
        ("repaired", "base wrong, tuned right", False, True),
        ("broken", "base right, tuned wrong", True, False),
        ("wrong", "both wrong", False, False),
        ("right", "both right", True, True),
    ]
    return [
        (key, title, [a for a in answers if (a["base_exact"], a["tuned_exact"]) == (b, t)])
        for key, title, b, t in kinds
    ]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
