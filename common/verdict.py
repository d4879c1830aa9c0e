"""What a measured change says and how it is written: one rule, and one set of words for all who show it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from .text import number, signed

MIN_CASES = 8
"""Fewer cases are too few for an interval: its ends are then little more than the rows themselves."""

DESCRIPTIONS = frozenset({"context_gain"})
"""Names of measures that only describe: neither way is better. Older reports read them as better or worse."""

Reading = Literal[
    "better", "worse", "no practical change", "no clear change", "too few cases", "a description", "not known"
]

MIN_JUDGED = 20
"""Fewer rows carry no verdict. Of simulated trainings without effect (skewed losses, rows of 5 to 40 tokens), 5 %
should have an interval without zero; 16 % have one with 8 rows, 9.5 % with 20, 7 % with 48."""

MIN_NEW = 30
"""With fewer held-out rows that resemble no row to train on, all of them decide, and the verdict says so. A gain that
those few do not show can't be judged."""

BADGES = {
    "better": "✓ Better",
    "better_by_loss": "± Better by loss only",
    "no_better_than_cheap": "– No better than a cheap answer",
    "no_clear_change": "– No clear change",
    "worse": "✗ Worse",
    "cant_be_judged": "– Can't be judged",
}
"""The badge of each reading that a report's verdict can have; without its sign, the word that every face uses."""

SIGNS = "✓✗±– "

_EARLIER_BADGES = {
    "mixed": "± Loss and answers disagree",
    "better_ends": "± Better only at ending its answers",
}
"""Of reports that earlier versions wrote."""

MOST_DECIMALS = 6


@dataclass(frozen=True, kw_only=True)
class MeasuredChange:
    """A change of a measure with its 95% interval, in the measure's unit; NaN where it is not known."""

    base: float
    change: float
    low: float
    high: float
    cases: int
    unit: str = "nats"  # nats, %, ...
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
    """What a report says as a whole. Its badge, its line in `status` and its sentence begin with the same word."""

    reading: str  # a key of BADGES
    why: str  # the reason in one clause; empty for most that are better, worse, or a change that may be none
    short: str  # for a job's line
    sentence: str
    aside: str  # what is worse besides the held-out loss, and what is wrong with the held-out rows; else empty

    @property
    def badge(self) -> str:
        return BADGES[self.reading]


ROUGES = frozenset({"rouge1", "rouge2", "rougeL"})
"""Measures of how near answers are. They may gain by the answers' end or length alone."""

ANSWERS = ROUGES | {"exact_match", "accuracy", "macro_f1"}
"""Measures of what the model answers. Where they contradict the loss, neither decides alone."""

LOSSES = frozenset({"loss", "new_rows_loss", "words_loss", "perplexity"})
ACCURACIES = frozenset({"preference_accuracy", "new_rows_preference_accuracy"})
"""Measures whose numbers a verdict's sentence has, or that say the same as one of those."""

LENGTH, EXPECTED_LENGTH = "answer_tokens", "expected_tokens"
"""Lengths of the tuned model's answers, against the base's and against the expected ones."""

ENDS = "ends_by_itself"
"""The share of generated answers that ended before evaluation.max_new_tokens."""

FEW = 0.1
"""Up to this share of the answers of base and tuned, and up to two of each, answers that were cut are not mentioned. Up
to this share, rows that resemble rows to train on are no reason."""

_SHARES = "the labels' shares alone have"
_FREQUENT, _SHOWN = "the most frequent answer alone has", "the base with training examples in its prompt has"
_COPIED = "the question repeated as the answer has"
_FORM = "a rule by the form of the questions has"

FORM = "cheap_form_accuracy"

CHEAP = {
    _SHARES: ("cheap_loss", "cheap_accuracy"),
    _FREQUENT: ("cheap_rougeL", "cheap_exact_match"),
    _COPIED: ("copied_rougeL", "copied_exact_match"),
    _FORM: (FORM,),
    _SHOWN: ("few_shot_loss", "few_shot_rougeL", "few_shot_exact_match", "few_shot_accuracy"),
}
"""The tuned model against answers that cost no training. A gain over the base needs a gain over each of them in one
measure; where a measure decides, in that one or over the shares in either."""

NEW_ROWS = "new_rows_"
"""How the name begins of a measure on rows that resemble no row to train on."""

RESEMBLE = "resemble rows to train on"

SPOILT = 1.0
"""Rise of the chosen answers' loss, in nats a token, that makes a verdict mixed: each token is e times less likely. The
margin alone can't tell, since it also grows when both answers become unlikely and the rejected one more so."""

OTHER_LENGTH = 1.5
"""Ratio of lengths at which a change is worth mentioning."""

CUT_SHORT, TOO_LONG = 0.5, 2.0
"""Answers that are clearly at most the first share of the expected length are no better, whatever their loss is. Those
that are at least the second one may be, but the first line says so."""


def report_verdict(
    metrics: Sequence[Mapping[str, Any]],
    base: str = "the base",
    doubts: Sequence[str] = (),
    rows: str = "held-out",
    given_away: int = 0,
    *,
    resemble: str = RESEMBLE,
    read_off: str = "",
    texts: bool = False,
) -> ReportVerdict:
    """What a report's metrics say against `base`. The loss decides, unless the answers say the opposite. For pairs it
    does not decide either if it has not clearly changed but the share of correctly ranked pairs has. A measure that the
    job names as the deciding one (`decides`) decides alone.

    Where at least MIN_NEW rows resemble no row to train on, each measure is the one on those, if it was measured apart.
    A gain of the loss is one "by loss only" unless a measure of answers gained, too. It is none if a cheap answer
    reaches it. It can't be judged if there are few rows, or if the rows measure something else: some resemble rows to
    train on, and the others are few and are the fewer ones or show no clear gain; or their questions hold the answer.

    `rows`: what to call the measured rows. `doubts`: sentences about them, which follow the measures that got worse, in
    `aside`. `given_away`: how many of them `resemble` a row that was trained on. `read_off`: a clause if most of them
    hold their answer. `texts`: the rows are plain texts, so the loss is all there is.
    """
    measured = {metric["name"]: metric for metric in metrics}
    every, new = measured["loss"], measured.get("new_rows_loss")
    loss = new if new is not None and _decide(new) else every
    deciding = next((metric for metric in metrics if metric.get("decides")), None)
    twin = measured.get(f"{NEW_ROWS}{(deciding or every)['name']}")
    if twin is not None and _decide(twin):
        metrics = _of_new_rows(measured)
    named = {metric["name"]: metric for metric in metrics}
    accuracy, cut = named.get("preference_accuracy"), _cut(named.get(ENDS))
    of = _of_rows(loss, metrics, rows) if accuracy is None else _of_pairs(loss, accuracy, named, rows)
    known = ""
    if new is not None and deciding is None:
        seen = every["cases"] - new["cases"]
        about = f"{seen} of {every['cases']} {rows} rows {resemble}"
        apart = (
            f"the verdict is of the other {new['cases']}" if loss is new else f"the other {new['cases']} are too few"
        )
        doubts = [*doubts, f"{about}; {apart}{'' if loss is new else ' to judge by'}."]
        known = f"{about}, and {apart}" if loss is every and seen > FEW * every["cases"] else ""
    if deciding is None:
        said, spoken = _said(of, loss, named, metrics, texts=texts)
        spoken |= LOSSES
    else:
        said, judged, apart_from = _decided(deciding, twin, resemble)
        spoken = {deciding["name"], f"{NEW_ROWS}{deciding['name']}", *(LOSSES - {"loss"})}
        of, doubts = _by_measure(judged, of, str(deciding["label"])), [*doubts, *apart_from]
        if deciding["cases"]:
            said = replace(said, why=", and ".join(part for part in (said.why, cut) if part))
    if said.reading in GAINS or said.disagrees:
        if deciding is None and loss is every and (alike := _alike(every, given_away, new, said.reading)) is not None:
            said = _Said("cant_be_judged", f"{given_away} of {every['cases']} {rows} rows {resemble}{alike}")
            doubts = doubts[: len(doubts) - (new is not None)]
        elif read_off and FORM not in named:  # else it is compared with what they can be told by
            said = _Said("cant_be_judged", read_off)
        elif cheap := _unbeaten(named, deciding and named[deciding["name"]]):
            said = _Said("no_better_than_cheap", cheap)
    if said.reading in GAINS and deciding is None:
        mostly = cut if cut and named[ENDS]["tuned"] < 50 else ""
        why = ", and ".join(part for part in (said.why, known, _too_long(named), mostly) if part)
        said, doubts = replace(said, why=why), doubts[: len(doubts) - bool(known)]
    begin = word(said.reading)
    against = f" than {base}" if said.reading in ("better", "worse") else ""
    because = f"{said.why}; " if said.why else ""
    sentence = f"{begin}{against}: {because}{of.measured}{said.more}{of.answers}."
    spoken |= ACCURACIES
    worse = [
        metric["label"]
        for metric in metrics
        if metric["reading"] == "worse"
        and metric["name"] not in spoken
        and not metric["name"].removeprefix(NEW_ROWS).startswith(("cheap_", "copied_", "few_shot_"))
    ]
    asides = [f"Worse on {' and '.join(worse)}."] if worse and loss["cases"] >= MIN_CASES else []
    if (words := _only_ends(named)) is not None and said.reading == "better":
        shown = written(words)
        asides.append(f"Without the stop token the loss is {shown.base} -> {shown.tuned}, {words['reading']}.")
    if accuracy is None and (lengths := _lengths(named)):
        asides.append(f"{lengths}.")
    if cut and cut not in said.why:
        asides.append(f"{cut[0].upper()}{cut[1:]}.")
    short = f"{begin.lower()}{f': {said.why}' if said.why else ''}, {of.numbers}"
    return ReportVerdict(
        reading=said.reading, why=said.why, short=short, sentence=sentence, aside=" ".join([*asides, *doubts])
    )


GAINS = ("better", "better_by_loss")


def _decide(new: Mapping[str, Any]) -> bool:
    """Whether a measure of the rows that resemble no row to train on has enough of them to decide."""
    return bool(new["cases"] >= MIN_NEW)


def _of_new_rows(measured: Mapping[str, Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The measures, with those of the rows that resemble no row to train on in place of those of all rows. What was not
    measured apart stays: all its rows are such, or the report is of an earlier version."""
    found = {name: metric for name, metric in measured.items() if not name.startswith(NEW_ROWS)}
    for name, metric in measured.items():
        if name.startswith(NEW_ROWS):
            plain = name.removeprefix(NEW_ROWS)
            every = found.get(plain, metric)
            found[plain] = {**every, **metric, "name": plain, "label": every["label"]}
    return list(found.values())


def _alike(every: Mapping[str, Any], seen: int, new: Mapping[str, Any] | None, reading: str) -> str | None:
    """Why a gain says nothing if `seen` of its cases resemble rows to train on, as the end of a sentence about these;
    None if it says something. `new`: the same measure on the others, which are too few to decide alone."""
    if 2 * seen > every["cases"]:
        others = every["cases"] - seen
        return f", and the other {others} are too few" if others else ""
    if reading in GAINS and new is not None and new["reading"] != "better":
        return f", and the other {new['cases']} show no clear gain"
    return None


@dataclass(frozen=True)
class _Said:
    """A reading with its reason, and what follows the numbers."""

    reading: str
    why: str = ""
    more: str = ""
    disagrees: bool = False


def _said(
    of: _Subject,
    loss: Mapping[str, Any],
    named: Mapping[str, Mapping[str, Any]],
    metrics: Sequence[Mapping[str, Any]],
    *,
    texts: bool,
) -> tuple[_Said, set[str]]:
    """What the loss and the answers say together, and the names of the measures that this speaks of."""
    reading, rows = loss["reading"], f"{of.rows} {of.cases}"
    if reading == "not known":
        return _Said("cant_be_judged", f"the loss is not a number{_unmeasured(loss, rows)}"), set()
    if loss["cases"] < MIN_JUDGED:
        few = f"{loss['cases']} {rows}" if loss["cases"] != 1 else f"1 {rows.removesuffix('s')}"
        return _Said("cant_be_judged", f"{few} {'are' if loss['cases'] != 1 else 'is'} too few"), set()
    spoilt = named.get("chosen_loss", {})
    if reading == "better" and spoilt.get("reading") == "worse" and spoilt["change"] >= SPOILT:
        shown = written(spoilt)
        cost = f"; the chosen answers' own loss rose, {shown.base} -> {shown.tuned} nats a token"
        return _Said("cant_be_judged", "better preferences, spoilt answers", cost, disagrees=True), {"chosen_loss"}
    opposite = {"better": "worse", "worse": "better"}.get(reading)
    against = [metric for metric in of.judges if metric["reading"] == opposite]
    spoken = {metric["name"] for metric in against}
    if against:
        more = [metric for metric in against if metric["name"] not in ACCURACIES]
        told = f"; {_told(more)}" if more else ""
        return _Said("cant_be_judged", f"{reading} loss, {opposite} {of.what}", told, disagrees=True), spoken
    if reading.startswith("no "):
        turned = [metric for metric in of.judges if metric["name"] in ACCURACIES]
        if turned:
            why = f"{turned[0]['reading']} {of.what}, {reading} of the loss"
            return _Said("cant_be_judged", why, disagrees=turned[0]["reading"] == "better"), spoken
        if reading == "no practical change":
            return _Said("no_clear_change", "too small to notice"), spoken
        return _Said("no_clear_change", "", f", and the interval of {of.changed} includes zero"), spoken
    if reading == "better" and of.what == "answers" and not texts:
        return _by_loss(of, named, metrics) or _Said("better"), spoken
    return _Said(str(reading)), spoken


def _decided(
    every: Mapping[str, Any], new: Mapping[str, Any] | None, resemble: str
) -> tuple[_Said, Mapping[str, Any], list[str]]:
    """What the measure that the job has named says, the answers that it is about, and a sentence about the others.
    `new`: on rows that resemble none to train on, if others do."""
    seen = 0 if new is None else every["cases"] - new["cases"]
    if new is None or not seen:
        return _of_measure(every), every, []
    about = f"{seen} of the {every['cases']} answers of {every['label']} are to rows that {resemble}"
    if new["cases"] >= MIN_NEW:
        return _of_measure(new), new, [f"{about}; the verdict is of the other {new['cases']}."]
    said = _of_measure(every)
    if said.reading in GAINS and (alike := _alike(every, seen, new, said.reading)) is not None:
        return _Said("cant_be_judged", f"{about}{alike}"), every, []
    if said.reading in GAINS and seen > FEW * every["cases"]:
        return replace(said, why=f"{about}, and the other {new['cases']} are too few"), every, []
    return said, every, [f"{about}; the other {new['cases']} are too few to judge by."]


def _of_measure(metric: Mapping[str, Any]) -> _Said:
    """What one measure says by itself."""
    reading, cases = metric["reading"], metric["cases"]
    if not cases or reading == "not known":
        return _Said("cant_be_judged", f"{metric['label']} was not measured")
    if cases < MIN_JUDGED:
        return _Said("cant_be_judged", _too_few_answers([metric]))
    if reading == "no practical change":
        return _Said("no_clear_change", "too small to notice")
    if reading == "no clear change":
        return _Said("no_clear_change", "", f", and the interval of the change of {metric['label']} includes zero")
    return _Said(str(reading))


def _by_measure(metric: Mapping[str, Any], of: _Subject, name: str) -> _Subject:
    """The subject of a verdict that a measure of the job's own has made."""
    shown = written(metric)
    share = f"{name} {shown.base} -> {shown.tuned} %"
    numbers = share if metric["cases"] else f"{name} not measured"
    measured = f"{share} of {metric['cases']} answers, {of.measured}" if metric["cases"] else of.measured
    return replace(of, numbers=numbers, measured=measured, answers="")


def _by_loss(
    of: _Subject, named: Mapping[str, Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]]
) -> _Said | None:
    """A clear gain of the loss as one of the loss alone; None if the answers gained as well."""
    reading = "better_by_loss"
    gained = {metric["name"] for metric in of.judges if metric["reading"] == "better"}
    if gained - ROUGES:
        return None  # more answers are right, whatever their length and the stop token did
    if (words := _only_ends(named)) is not None:
        shown = written(words)
        apart = f"; without the stop token {shown.base} -> {shown.tuned}, {words['reading']}"
        return _Said(reading, "it learned to end its answers", apart)
    if (lengths := named.get(EXPECTED_LENGTH)) is not None and _clearly(lengths, CUT_SHORT):
        short = f"{lengths['tuned']:.0f} tokens where {lengths['base']:.0f} are expected"
        return _Said(reading, f"its answers are too short, {short}")
    if unsure := [metric for metric in metrics if _points_down(metric)]:
        return _Said(reading, _too_few_answers(unsure), f"; {_told(unsure)}")
    if not of.judges:
        return _Said(reading, "no answers were measured")
    if gained:
        return None
    if all(metric["reading"] == "too few cases" for metric in of.judges):
        return _Said(reading, _too_few_answers(of.judges))
    told = next(metric for metric in of.judges if metric["reading"] != "too few cases")
    return _Said(reading, f"{told['reading']} of the answers", f"; {_told(of.judges)}")


def _only_ends(named: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The loss without the stop token, where that has not gained."""
    words = named.get("words_loss")
    return None if words is None or words["reading"] == "better" else words


def _too_long(named: Mapping[str, Mapping[str, Any]]) -> str:
    """A clause about answers that are clearly much longer than expected; empty without such."""
    lengths = named.get(EXPECTED_LENGTH)
    if lengths is None or not _clearly(lengths, TOO_LONG):
        return ""
    return f"its answers are too long, {lengths['tuned']:.0f} tokens where {lengths['base']:.0f} are expected"


def _too_few_answers(metrics: Sequence[Mapping[str, Any]]) -> str:
    cases = max(int(metric["cases"]) for metric in metrics)
    if not cases:
        return "no answers were measured"
    return f"{cases} answer{'s' * (cases != 1)} {'are' if cases != 1 else 'is'} too few to say"


def _unbeaten(named: Mapping[str, Mapping[str, Any]], deciding: Mapping[str, Any] | None) -> str:
    """Which cheap answer the tuned model is clearly better than in nothing; empty if it beats all."""
    cheap: Mapping[str, Sequence[str]] = CHEAP
    if deciding is not None:
        own = {_FREQUENT: "cheap", _COPIED: "copied", _SHOWN: "few_shot"}
        measured = {whose: (f"{kind}_{deciding['name']}",) for whose, kind in own.items()}
        cheap = {_SHARES: CHEAP[_SHARES], _FORM: CHEAP[_FORM], **measured}
    for whose, names in cheap.items():
        against = [named[name] for name in names if name in named]
        judged = [metric for metric in against if metric["reading"] not in ("too few cases", "not known")]
        if deciding is not None and whose == _SHOWN:
            judged = [metric for metric in judged if not _leaves_open(metric, deciding)]
        if judged and not any(metric["reading"] == "better" for metric in judged):
            first = judged[0]
            kind = first["label"].partition(", ")[0]
            unit = " %" if first["unit"] == "%" else ""
            return f"{whose} {kind} {written(first).base}{unit}"
    return ""


def _leaves_open(cheap: Mapping[str, Any], deciding: Mapping[str, Any]) -> bool:
    """Whether a cheap answer was measured on so few rows that the whole gain over the base may be one over it, too."""
    unclear = cheap["reading"] == "no clear change" and cheap["change"] > 0
    return unclear and bool(cheap["low"] <= deciding["change"] <= cheap["high"])


def _unmeasured(loss: Mapping[str, Any], cases: str) -> str:
    count = loss.get("unmeasured")
    return f" for {count} of {loss['cases']} {cases}" if count else ""


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """What a verdict is about, in words."""

    numbers: str  # for a job's line
    measured: str
    judges: Sequence[Mapping[str, Any]]  # measures that may contradict the loss
    rows: str
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
        judges=[metric for metric in metrics if _is_of_answers(metric)],
        rows=rows,
    )


def _is_of_answers(metric: Mapping[str, Any]) -> bool:
    """Whether it measures what the model answers: by loractl's rule, or by one of the job file."""
    return metric["name"] in ANSWERS or bool(metric.get("own"))


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
        judges=[
            *([accuracy] if accuracy["reading"] in ("better", "worse") else []),
            *([margin] if margin and of_the_same else []),
        ],
        rows=rows,
        cases="pairs",
        what="preferences",
        changed="the loss's change",
        answers="" if lengths is None else _other_length(lengths),
    )


def _other_length(lengths: Mapping[str, Any]) -> str:
    """What is said of answers that are clearly much longer or shorter than the base's; else nothing."""
    if not (_clearly(lengths, 1 / OTHER_LENGTH) or _clearly(lengths, OTHER_LENGTH)):
        return ""
    base, tuned = lengths["base"], lengths["tuned"]
    times = round(tuned / base, 1) if base else 0.0
    size = {2.0: "twice", 0.5: "half"}.get(times, f"{times:g} times" if times else "")
    than = f"{size} as long" if size else ("longer" if tuned > base else "shorter")
    return f"; answers {than} ({base:.0f} -> {tuned:.0f} tokens)"


def _lengths(named: Mapping[str, Mapping[str, Any]]) -> str:
    """How the answers' length changed, and whether it is the expected one; empty if neither is worth a word."""
    base, expected = named.get(LENGTH), named.get(EXPECTED_LENGTH)
    if base is None or expected is None:
        return ""
    unlike = any(_clearly(expected, ratio) for ratio in (1 / OTHER_LENGTH, OTHER_LENGTH))
    if not unlike and not _other_length(base):
        return ""
    longer = "longer" if base["tuned"] > base["base"] else "shorter"
    change = (
        f"Answers became {longer}, {base['base']:.0f} -> {base['tuned']:.0f} tokens"
        if _other_length(base)
        else (f"Answers have {base['tuned']:.0f} tokens")
    )
    return f"{change}; expected are {expected['base']:.0f}"


def _cut(ends: Mapping[str, Any] | None) -> str:
    """How many answers were cut off, as a clause; empty if those are a few."""
    if ends is None or not ends["cases"]:
        return ""
    cases = int(ends["cases"])
    base, tuned = (round(cases * (1 - ends[whose] / 100)) for whose in ("base", "tuned"))
    if max(base, tuned) <= max(2, FEW * cases):
        return ""
    return f"{base} of {cases} answers of the base and {tuned} of the tuned model were cut off"


def _clearly(lengths: Mapping[str, Any], ratio: float) -> bool:
    """Whether lengths clearly changed by this ratio or more; below 1, they became shorter."""
    base, tuned, low, high = (lengths[key] for key in ("base", "tuned", "low", "high"))
    if not has_interval(lengths) or low <= 0 <= high:
        return False
    return bool(tuned >= ratio * base if ratio > 1 else tuned <= ratio * base)


def chose_step(*, keeps_best: bool, evaluations: int, stopped_early: bool) -> bool:
    """Whether the held-out rows, which measure an adapter, have chosen the step that it is of."""
    return stopped_early or (keeps_best and evaluations > 1)


def _points_down(metric: Mapping[str, Any]) -> bool:
    """Whether answers got worse by what anyone would notice, in fewer cases than say anything."""
    if (
        not (metric["name"] in ANSWERS or metric.get("own"))
        or metric["reading"] != "too few cases"
        or metric["change"] is None
    ):
        return False
    return float(metric["change"]) < 0 and abs(metric["change"]) >= noticeable(metric["unit"], metric["base"])


def _told(metrics: Sequence[Mapping[str, Any]]) -> str:
    """The first measure, with its numbers, and how many more."""
    first, shown = metrics[0], written(metrics[0])
    more = f" and {len(metrics) - 1} more" if len(metrics) > 1 else ""
    return f"{first['label']} {shown.base} -> {shown.tuned}{more}"


def badge(reading: str) -> str:
    """The badge of a verdict's reading; a newer version's is shown as it is."""
    return {**_EARLIER_BADGES, **BADGES}.get(reading, reading.replace("_", " ").capitalize())


def word(reading: str) -> str:
    """The word of a verdict's reading, as every face has it."""
    return badge(reading).lstrip(SIGNS)


def are_of_pairs(answers: Mapping[str, Any]) -> bool:
    """Whether answers of base and tuned come with a chosen and a rejected one."""
    return answers.get("rejected") is not None


def answer_groups(answers: Sequence[dict[str, Any]]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """(key, title, answers) by what changed: repaired and broken first. Answers to the prompts of pairs are neither
    right nor wrong, so they are one group; nor are those that the deciding measure can't compare."""
    if any(are_of_pairs(answer) for answer in answers):
        return [("all", "answers", list(answers))]
    kinds = [
        ("repaired", "base wrong, tuned right", False, True),
        ("broken", "base right, tuned wrong", True, False),
        ("wrong", "both wrong", False, False),
        ("right", "both right", True, True),
    ]
    groups = [(key, title, [a for a in answers if rights(a) == (b, t)]) for key, title, b, t in kinds]
    left = [answer for answer in answers if None in rights(answer)]
    return [*groups, *([("unscored", "not compared", left)] if left else [])]


RIGHT = {True: "right", False: "wrong", None: "not compared"}
"""What an answer is, in a word."""


def rights(answer: Mapping[str, Any]) -> tuple[bool | None, bool | None]:
    """Whether base and tuned are right: by the measure that decides the verdict, else by exact match. None: it has
    nothing to compare with."""
    base, tuned = answer.get("decided") or (answer["base_exact"], answer["tuned_exact"])
    return base, tuned


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
