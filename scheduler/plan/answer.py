"""What a job will need from a card: its plan part by part, the cards that hold it, how long it takes there, and the
largest job that fits; and how accurate plans were, predicted against measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loractl.common.errors import LoractlError, UsageError
from loractl.common.job.file import load_spec, override_spec
from loractl.common.job.method import MOST_CARDS, Method, Need, Roomy, Ways, choose_method, within
from loractl.common.job.spec import JobSpec
from loractl.common.job.status import Status
from loractl.common.memory.config import read_shape
from loractl.common.memory.correction import Accuracy, accuracy, learned, learned_roomy, peaks_like
from loractl.common.memory.fit import Fit, largest_fit, plan_roomy
from loractl.common.memory.need_key import need_key
from loractl.common.memory.plan import Plan, plan, predict
from loractl.common.memory.shape import Shape
from loractl.common.memory.step import Lengths, Stack
from loractl.common.placement.cards import MARGIN_BYTES, Card
from loractl.common.placement.duration import Forecast, TimeAccuracy, Undone, extent_of, forecast, time_accuracy
from loractl.common.store.store import Store
from loractl.common.units import GIB, duration, gib
from loractl.scheduler.submit.data import counted_data
from loractl.scheduler.submit.lengths import row_lengths
from loractl.scheduler.submit.need import check_adapter, fleet_stack, open_methods, stored_hashes

from .solutions import CardGroup, PlannedForm, Solution, in_another_form, on_more_cards, with_one_row


@dataclass(frozen=True, kw_only=True)
class PlanAccuracy:
    """Predicted against measured: peaks by device model, method and family; times by device model and by what the
    prediction rested on."""

    rows: tuple[Accuracy, ...]
    times: tuple[TimeAccuracy, ...] = ()

    def as_json(self) -> dict[str, list[dict[str, Any]]]:
        """`memory`: each row's `device_name`, `method`, `family`, `count`, and of measured over planned the `ratio`
        (the mean), `spread` and `worst`; `factor`: what later plans are multiplied by, null while there are too few
        measurements. `time`: each row's `device_name`, `basis`, `count`, of taken over predicted, both as if alone on
        the card, the `ratio` (the median), and the factor by which predictions were off: `off` at the median, `worst`
        at the 90th percentile."""
        return {
            "memory": [{**vars(row), "factor": row.factor} for row in self.rows],
            "time": [vars(row) for row in self.times],
        }


def plan_accuracy(store: Store) -> PlanAccuracy:
    """What all measured attempts say about the plans' accuracy."""
    times = tuple(time_accuracy(store.attempts.predicted()))
    return PlanAccuracy(rows=tuple(accuracy(store.attempts.measured())), times=times)


@dataclass(frozen=True, kw_only=True)
class CardTime:
    """How long a job takes on one model of card that it has alone, and how far off such predictions were."""

    device_name: str
    method: Method
    forecast: Forecast
    accuracy: TimeAccuracy | None  # None: no attempt with such a prediction has ended

    def as_json(self) -> dict[str, Any]:
        """`device_name`, `method`, `seconds`, `step_seconds` (null where it rests on whole jobs or on nothing),
        `basis`, `attempts` (that it is the median of), `off` and `judged_by`: the factor by which such predictions were
        off at the median, and of how many attempts."""
        told = self.forecast
        return {
            "device_name": self.device_name,
            "method": self.method.value,
            "seconds": told.seconds,
            "step_seconds": told.step_s,
            "basis": told.basis.value,
            "attempts": told.count,
            "off": None if self.accuracy is None else self.accuracy.off,
            "judged_by": 0 if self.accuracy is None else self.accuracy.count,
        }


@dataclass(frozen=True, kw_only=True)
class JobToPlan:
    """A job file, or a submitted job, with changes."""

    title: str
    spec: JobSpec
    data: Mapping[str, Any]  # its stored data sets; empty: none stored
    user: str = ""
    step: int = 0  # that its stored checkpoint has kept
    status: Status | None = None  # of a submitted job
    row: QueuedNeed | None = None  # of a job that waits unchanged
    patience_s: float = 0.0  # how long QLoRA will not do


@dataclass(frozen=True, kw_only=True)
class QueuedNeed:
    """What a waiting job's row asks for: a plan made now does not know how long its rows were for its last trainer."""

    need: Need
    ways: Ways
    begun: bool  # an attempt may have counted its tokens


@dataclass(frozen=True, kw_only=True)
class CardRoom:
    """Whether a card holds the job."""

    word: str  # fits, tight (once others have left it, or its patience has ended), never
    card: str
    total_gib: str
    how: str  # the method, or how much is missing
    method: Method | None = None  # None: it never holds the job

    def as_json(self) -> dict[str, Any]:
        """`fits`: the word; `card`; `of`: the card's size in GiB; `how`."""
        return {"fits": self.word, "card": self.card, "of": self.total_gib, "how": self.how}


@dataclass(frozen=True, kw_only=True)
class LargestFit:
    """The largest form that fits a card, by method."""

    room: int  # bytes
    which: str  # card that is
    by_method: Mapping[Method, Fit]


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """What a job waits for: submit reserves for rows of max_length, and a trainer that has counted them needs less."""

    need: Need  # of one card
    ways: Ways
    choice: Method | None  # on the best card, or on the cards of a box; None: nothing holds it
    box: CardGroup | None  # whose cards would hold it together, if one does not or may not
    begun: bool  # it has had a trainer
    max_length: int
    longest: int | None  # tokens of the longest row, if counted


@dataclass(frozen=True, kw_only=True)
class MemoryNeed:
    """What a job will need, before it runs."""

    title: str
    plans: Mapping[Method, Plan]  # by method open to it
    reserved: Need  # the plans, corrected by what was measured
    roomy: Roomy = field(default_factory=Roomy)  # the same without recomputing
    submitted: Submitted | None = None  # what it waits for, if that differs
    choice: Method | None  # on the best card; None: no card holds it
    lengths: Lengths | None  # of the rows, if counted
    rows: Mapping[str, int] | None = None  # how many are used, if counted
    planned_for: str  # what the rows' lengths were taken to be, in a sentence
    measured: tuple[int, ...]  # peaks of jobs just like it, in bytes
    cards: tuple[CardRoom, ...]
    on_gpu: bool = True  # False: planned for a CPU, since the fleet has nothing else
    largest: LargestFit | None  # if asked for
    times: tuple[CardTime, ...] = ()  # by model of card, the fastest first
    one_holds: bool = False  # one card would hold it, but no box holds it on as many as it asks for
    solutions: tuple[Solution, ...] = ()  # if no card holds it alone; all of them if asked for
    status: Status | None = None  # of a submitted job
    patience_s: float = 0.0  # how long it waits for a card that holds LoRA before it runs with QLoRA

    def as_json(self) -> dict[str, Any]:
        """The plan by method, the choice, the lengths and the cards.

        `methods`: for each open one `peak_bytes`, `margin_bytes`, `parts` (bytes by part), `reserved_bytes`,
        `submitted_bytes` (of one card, what it waits for: until a trainer has counted its rows, for rows of
        max_length), `roomy` (without recomputing, or with `half` of every second block: `micro_batch`, `bytes`, the
        fastest first), and with --solve `largest` (`micro_batch`, `max_length`, and `all_rows`: whether the rows limit
        the micro-batch, not the memory); `choice`: the method that the best card would take, or null; `lengths`: in
        tokens the longest rows' `train` and `evaluate`, with `rows` and `labels`, or null; `rows`: how many are used,
        `train`, `held_out` and, if there are any, `final`, and of those too long `cut` and `left_out`, or null;
        `planned_for`: a sentence; `device`: gpu or cpu; `cards`: one entry a card; `times`: how long it takes, one
        entry a model of card, the fastest first; `solutions`: if no card holds it alone, what would (`settings` as
        KEY=VALUE, `words`, `method`, `cards`, `parallel`, `bytes` of each); all with --solve.
        """
        return {
            "methods": {method.value: self._method(method, planned) for method, planned in self.plans.items()},
            "choice": None if self.choice is None else self.choice.value,
            "lengths": None
            if self.lengths is None
            else {name: of for name, of in vars(self.lengths).items() if name != "longest"},
            "rows": None if self.rows is None else dict(self.rows),
            "planned_for": self.planned_for,
            "device": "gpu" if self.on_gpu else "cpu",
            "cards": [card.as_json() for card in self.cards],
            "times": [one.as_json() for one in self.times],
            "solutions": [solution.as_json() for solution in self.solutions],
        }

    def _method(self, method: Method, planned: Plan) -> dict[str, Any]:
        return {
            "peak_bytes": planned.peak_bytes,
            "margin_bytes": planned.margin_bytes,
            "parts": planned.parts,
            "reserved_bytes": self.reserved.of(method),
            "submitted_bytes": (self.reserved if self.submitted is None else self.submitted.need).of(method),
            "roomy": [
                {"micro_batch": form.micro_batch, "bytes": form.bytes, "half": form.half}
                for form in self.roomy.of(method)
            ],
            **({} if self.largest is None else {"largest": vars(self.largest.by_method[method])}),
        }


def job_to_plan(store: Store, job: str, overrides: tuple[str, ...], user: str = "") -> JobToPlan:
    """The job file of this name, which `user` would submit, else the submitted job of this number. Raises SpecError,
    JobNotFound."""
    if not job.isdigit() or Path(job).exists():
        found = load_spec(Path(job), overrides)
        patience_s = found.lora_patience or 0.0
        return JobToPlan(title=Path(job).name, spec=found, user=user, data={}, patience_s=patience_s)
    row = store.jobs.get(int(job))
    spec = override_spec(row.spec, overrides, f"job {job}")
    asks, patience_s = None, 0.0
    if row.status is Status.QUEUED and spec.lora_patience is not None and row.lora_until is not None:
        patience_s = max(0.0, (row.lora_until - store.now()).total_seconds())
    if row.status is Status.QUEUED and not overrides:
        need = Need(lora=row.vram_lora, qlora=row.vram_qlora)
        asks = QueuedNeed(need=need, ways=Ways.read(row.gangs), begun=row.attempt > 0)
    title = f"{job} {row.name}"
    return JobToPlan(
        title=title,
        spec=spec,
        user=row.user,
        data=row.data,
        step=0 if row.checkpoint is None else row.checkpoint["step"],
        status=row.status,
        row=asks,
        patience_s=patience_s,
    )


def memory_need(
    store: Store,
    job: JobToPlan,
    card: int | None,
    *,
    solve: bool,
    devices: str | None = None,
    announce: Callable[[], None] = lambda: None,
) -> MemoryNeed:
    """What the job needs, from the fleet's cards or from one of a given size. `devices`: see own_devices; `announce`:
    see row_lengths.

    Raises LoractlError if the base can't be planned here, UsageError for a job or a question that makes no sense.
    """
    spec = job.spec
    check_adapter(spec)
    shape = _shape(spec)
    counted = row_lengths(spec, announce)
    methods = open_methods(spec)
    fleet = [] if card is not None else list(store.cards.fleet().cards.values())
    stack = fleet_stack(store, devices) if card is None else Stack()
    plans = {method: plan(shape, spec, method, counted.lengths, stack=stack) for method in methods}
    key = need_key(spec, dict(job.data) or stored_hashes(spec))
    measured = store.attempts.measured(key, shape.family) if stack.on_gpu else []  # peaks of cards alone
    planned = {method: plans[method].need_bytes if method in plans else None for method in (Method.LORA, Method.QLORA)}
    planned_need = Need(lora=planned[Method.LORA], qlora=planned[Method.QLORA])
    need = learned(planned_need, key, measured)
    admitted = within(methods, need, spec.resources.max_vram)
    cards, choice = _alone(card, fleet, admitted, need)
    places = _such_cards(card) if card is not None else fleet
    asked = PlannedForm(spec=spec, methods=methods, planned=planned_need, need=need, lengths=counted.lengths)
    ways = asked.ways(spec) if stack.on_gpu else Ways()
    solutions: list[Solution] = []
    one_holds = False
    if choice is None or not ways.alone:
        boxes, method = asked.boxes(ways, places)
        several = [_room_of(box) for box in boxes]
        if not ways.alone and not several:
            several = [CardRoom(word="never", card=f"{spec.resources.cards} cards", total_gib="–", how="of no box")]
        cards, one, choice = (*cards, *several) if ways.alone else tuple(several), choice, method
        one_holds = one is not None and choice is None
        if stack.on_gpu and (one is None or choice is None):
            solutions += on_more_cards(asked, boxes, places)
        if stack.on_gpu and one is None and solve:
            solutions += with_one_row(asked, places, min((found.cards for found in solutions), default=MOST_CARDS + 1))
        if stack.on_gpu and (one is None or choice is None) and solve:
            solutions += in_another_form(asked, shape, _room(card, fleet)[0], places)
    first = job.row
    if first is None and counted.lengths is not None and job.status in (None, Status.QUEUED):
        whole = predict(spec, stack=stack)
        long = replace(asked, planned=whole, need=learned(whole, key, measured), lengths=None)
        first = QueuedNeed(need=long.need, ways=long.ways(spec) if stack.on_gpu else Ways(), begun=False)
    return MemoryNeed(
        title=job.title,
        plans=plans,
        reserved=need,
        roomy=_roomy(
            spec, need, planned_need, learned_roomy(plan_roomy(spec, counted.lengths, stack=stack), key, measured)
        ),
        submitted=None if first is None or first.need == need else _submitted(asked, first, card, fleet),
        choice=choice,
        lengths=counted.lengths,
        rows=counted.rows,
        planned_for=counted.sentence,
        measured=tuple(peaks_like(key, choice or methods[0], measured)),
        cards=tuple(_after_patience(room, job.patience_s) for room in cards),
        on_gpu=stack.on_gpu,
        times=_times(store, job, shape, choice or methods[0], key),
        largest=_largest(shape, spec, methods, counted.lengths, _room(card, fleet), stack) if solve else None,
        one_holds=one_holds,
        solutions=tuple(solutions),
        status=job.status,
        patience_s=job.patience_s if Method.QLORA in methods else 0.0,
    )


def _times(store: Store, job: JobToPlan, shape: Shape, method: Method, key: str) -> tuple[CardTime, ...]:
    """How long the job takes on each model of card that the fleet has, or had when something was measured there."""
    runs = store.attempts.timed(job.spec.base_model, store.now())
    extent = extent_of(job.spec, job.data or counted_data(job.spec), shape.active_parameters)
    left = Undone(
        user=job.user, base_model=job.spec.base_model, method=method, need_key=key, extent=extent, step=job.step
    )
    devices = {node.device_name for node in store.cards.nodes()} or {run.device for run in runs}
    judged = {(one.device_name, one.basis): one for one in time_accuracy(store.attempts.predicted())}
    found = [(device, forecast(left, device, runs)) for device in sorted(devices)]
    return tuple(
        CardTime(device_name=device, method=method, forecast=told, accuracy=judged.get((device, told.basis)))
        for device, told in sorted(found, key=lambda one: one[1].seconds)
    )


def _roomy(spec: JobSpec, need: Need, planned: Need, roomy: Roomy) -> Roomy:
    """The forms that the job's own limit leaves; none for a job that must have several cards."""
    most = spec.resources.max_vram
    if spec.resources.cards not in (1, "auto"):
        return Roomy()
    forms = roomy.with_half(need, planned, spec.training.per_device_train_batch_size)
    return forms.that(lambda form: most is None or form.bytes <= most)


def _after_patience(room: CardRoom, patience_s: float) -> CardRoom:
    """A card takes no job with QLoRA that still waits for one that holds LoRA."""
    if not patience_s or room.method is not Method.QLORA:
        return room
    return replace(room, word="tight", how=f"{room.how}, once it has waited {duration(patience_s)} for lora")


def _submitted(asked: PlannedForm, first: QueuedNeed, card: int | None, fleet: Sequence[Card]) -> Submitted:
    spec, lengths, form = asked.spec, asked.lengths, replace(asked, need=first.need)
    _, choice = _alone(card, fleet, within(asked.methods, first.need, spec.resources.max_vram), first.need)
    box = None
    if choice is None or not first.ways.alone:
        boxes, choice = form.boxes(first.ways, _such_cards(card) if card is not None else fleet)
        box = min((box for box in boxes if box.method is choice), key=lambda box: box.way.cards, default=None)
    return Submitted(
        **vars(first),
        choice=choice,
        box=box,
        max_length=spec.dataset.max_length,
        longest=None if lengths is None else max(lengths.train, lengths.evaluate),
    )


def _shape(spec: JobSpec) -> Shape:
    shape = read_shape(spec.base_model, spec.revision)
    if shape is None:
        raise LoractlError(
            f"base_model {spec.base_model} can't be planned here: there is no config.json of a known architecture",
            "that file is enough, in a folder or in the hub's cache; without it the job gets its own card",
        )
    return shape


def _alone(
    card: int | None, fleet: Sequence[Card], admitted: Sequence[Method], need: Need
) -> tuple[tuple[CardRoom, ...], Method | None]:
    """Whether one card holds the job: one of a given size, or one of the fleet's."""
    return _on_one(card, admitted, need) if card is not None else _on_fleet(fleet, admitted, need)


def _on_one(size: int, admitted: Sequence[Method], need: Need) -> tuple[tuple[CardRoom, ...], Method | None]:
    """Whether a card of this size holds the job, and the method that it would take."""
    room = max(0, size - MARGIN_BYTES)
    method = choose_method(admitted, need, room)
    how = f"with {method.value}" if method else f"{gib(_short(admitted, need, room))} GiB short"
    word = "fits" if method else "never"
    return (CardRoom(word=word, card="a card", total_gib=f"{size / GIB:.0f}", how=how, method=method),), method


def _on_fleet(
    cards: Sequence[Card], admitted: Sequence[Method], need: Need
) -> tuple[tuple[CardRoom, ...], Method | None]:
    """Every card, and the method that the best of them would take."""
    methods = [choose_method(admitted, need, card.usable) for card in cards]
    rooms = tuple(_card_room(card, method, admitted, need) for card, method in zip(cards, methods, strict=True))
    best = min((admitted.index(method) for method in methods if method is not None), default=None)
    return rooms, None if best is None else admitted[best]


def _such_cards(size: int) -> list[Card]:
    """As many cards of this size as a job may have, in one box."""
    return [Card(node=f"a box:{n}", total=size, margin=MARGIN_BYTES, gangs=True) for n in range(MOST_CARDS)]


def _room_of(box: CardGroup) -> CardRoom:
    return CardRoom(
        word="fits" if box.now else "tight",
        card=box.words,
        total_gib=f"{box.smallest / GIB:.0f}",
        how=f"with {box.method.value}, {box.way.parallel.value}: {gib(box.size)} GiB of each",
        method=box.method,
    )


def _card_room(card: Card, method: Method | None, admitted: Sequence[Method], need: Need) -> CardRoom:
    def room(word: str, how: str) -> CardRoom:
        return CardRoom(word=word, card=card.node, total_gib=f"{card.total / GIB:.0f}", how=how, method=method)

    if method is None:
        return room("never", f"{gib(_short(admitted, need, card.usable))} GiB short")
    size = need.of(method)
    if size is None or size > card.capacity:
        return room("tight", f"with {method.value}, once others have left it")
    now = card.open and card.slots and size <= card.free
    return room("fits", f"with {method.value}{'' if now else f', {gib(card.free)} GiB are free now'}")


def _short(methods: Sequence[Method], need: Need, limit: int) -> int:
    """How many bytes are missing for the method that needs the least."""
    return min((size for m in methods if (size := need.of(m)) is not None), default=limit) - limit


def _room(card: int | None, fleet: Sequence[Card]) -> tuple[int, str]:
    """The bytes that the largest form must fit into, and the card that has them."""
    if card is not None:
        return card - MARGIN_BYTES, f"a card of {card / GIB:.0f} less what is kept free"
    return max((other.usable for other in fleet), default=0), "the largest card"


def _largest(
    shape: Shape,
    spec: JobSpec,
    methods: Sequence[Method],
    lengths: Lengths | None,
    space: tuple[int, str],
    stack: Stack,
) -> LargestFit:
    room, which = space
    if room <= 0:
        raise UsageError("--solve needs a card to fit into", "add --gpu 24GiB, or start a worker")
    fits = {method: largest_fit(shape, spec, method, room, lengths, stack=stack) for method in methods}
    return LargestFit(room=room, which=which, by_method=fits)
