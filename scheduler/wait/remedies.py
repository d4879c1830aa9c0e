"""What would make a waiting job start now, according to the placement rule; or at all, if no card could hold it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from loractl.common.job.method import Method, Need
from loractl.common.placement.cards import could_start
from loractl.common.placement.lines import Waiting
from loractl.common.placement.refusals import out_of_reach, with_labels
from loractl.common.store.fleet import FleetView, waiting_of
from loractl.common.units import gib

from .cards import largest_program

if TYPE_CHECKING:
    from loractl.common.job.spec import JobSpec
    from loractl.common.memory.fit import Fit
    from loractl.common.store.tables import Job


Trial = Callable[[Waiting], str | None]
"""The card that the placement rule would give a waiting job in another form, all else unchanged; None: no card."""


def remedies(job: Job, view: FleetView, rule: Trial) -> tuple[str, ...]:
    """What would make it start now, in sentences: another method, a smaller form, or no other programs on a card."""
    return (
        *_other_method(job, view, rule),
        *_smaller_job(job, view, rule),
        *_without_programs(job, view),
    )


def ways_out(job: Job, view: FleetView) -> tuple[str, ...]:
    """What would let a job start if no card of this fleet could ever hold it. Sentences; the last way is to cancel."""
    me, cards = waiting_of(vars(job), view.now), view.cards.values()
    labelled = with_labels(cards, me.requires)
    largest = max(labelled, key=lambda card: card.usable, default=None)

    def could_hold(changed: Waiting) -> str | None:
        return None if largest is None or out_of_reach(changed, cards) is not None else largest.node

    edit, ways = f"loractl edit {job.job_id} --set", list[str]()
    if not me.methods:
        ways.append(f"Without that limit: {edit} resources.max_vram=null")
    if not labelled:
        ways.append(f"On any box: {edit} 'resources.node_labels={{}}'")
    if not me.alone:
        ways.append(f"On one card, if that holds it: {edit} resources.cards=1")
    ways += (*_other_method(job, view, could_hold, "could"), *_smaller_job(job, view, could_hold, "could"))
    return (*ways, f"Or drop it: loractl cancel {job.job_id}")


def _other_method(job: Job, view: FleetView, rule: Trial, may: str = "would") -> Iterator[str]:
    me = waiting_of(vars(job), view.now)
    if Method.QLORA in me.methods or job.vram_qlora is None:
        return
    node = rule(replace(me, methods=(Method.QLORA,)))
    if node is not None:
        now = " now" if may == "would" else ""
        yield f"It {may} start{now} on {node} with method: qlora (plan {gib(job.vram_qlora)} GiB)."


def _smaller_job(job: Job, view: FleetView, rule: Trial, may: str = "would") -> Iterator[str]:
    from pydantic import ValidationError

    from loractl.common.job.spec import JobSpec  # pydantic's models take 80 ms to build

    try:
        spec, told = JobSpec.model_validate(job.spec), set[str]()
    except ValidationError:  # the claim sets it aside
        return
    me = waiting_of(vars(job), view.now)
    permitted = me.methods
    room = max((card.room if may == "would" else card.usable for card in view.cards.values()), default=0)
    for key, text, needs in _smaller_forms(spec, permitted, room):
        kind = key.partition("=")[0]
        need = Need(lora=needs.get(Method.LORA), qlora=needs.get(Method.QLORA))
        methods = tuple(method for method in permitted if method in needs)
        node = rule(replace(me, need=need, methods=methods)) if methods and kind not in told else None
        if node is not None:
            told.add(kind)
            as_ = f"as {methods[0].value} " if len(permitted) > 1 and len(methods) == 1 else ""
            plan = f"(plan {gib(min(needs[method] for method in methods))} GiB)"
            now = " now" if may == "would" else ""
            yield f"It {may} start{now} on {node} {as_}with {text} {plan}."
            yield f"Try: loractl plan {job.job_id} --set {key}"


def _smaller_forms(spec: JobSpec, methods: Sequence[Method], room: int) -> list[tuple[str, str, dict[Method, int]]]:
    """Smaller forms of the job that a card with `room` bytes would hold: key=value, words, need by method."""
    from loractl.common.memory.config import read_shape
    from loractl.common.memory.fit import largest_fit
    from loractl.common.memory.plan import plan

    shape = read_shape(spec.base_model, spec.revision)
    if shape is None or room <= 0:
        return []
    smaller: dict[str, tuple[str, dict[Method, int]]] = {}
    for method in methods:
        fit = largest_fit(shape, spec, method, room)
        for key, text, changed in (*shorter_rows(spec, fit), *fewer_rows(spec, fit)):
            smaller.setdefault(key, (text, {}))[1][method] = plan(shape, changed, method).need_bytes
    return [(key, *form) for key, form in smaller.items()]


def shorter_rows(spec: JobSpec, fit: Fit) -> Iterator[tuple[str, str, JobSpec]]:
    """The job with a max_length that fits, in steps of 64 tokens: key=value, words, the job."""
    if fit.max_length is None or fit.max_length >= spec.dataset.max_length:
        return
    length = max(8, fit.max_length // 64 * 64) if fit.max_length >= 64 else fit.max_length
    changed = spec.model_copy(update={"dataset": spec.dataset.model_copy(update={"max_length": length})})
    yield f"dataset.max_length={length}", f"max_length {length}", changed


def fewer_rows(spec: JobSpec, fit: Fit) -> Iterator[tuple[str, str, JobSpec]]:
    """The job with a micro-batch that fits and the same effective batch: key=value, words, the job."""
    most = min(fit.micro_batch or 0, spec.training.per_device_train_batch_size - 1)
    batch = spec.training.micro_batch(most)
    if not batch:
        return
    accumulation = spec.training.effective_batch // batch
    update = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    changed = spec.model_copy(update={"training": spec.training.model_copy(update=update)})
    keys = " --set ".join(f"training.{name}={value}" for name, value in update.items())
    rows = "1 row" if batch == 1 else f"{batch} rows"
    yield keys, f"{rows} at once, accumulating {accumulation}", changed


def _without_programs(job: Job, view: FleetView) -> Iterator[str]:
    outside = without_others(job, view)
    if outside is not None:
        yield f"It would fit now on {outside[0]} without {outside[1]}."


def without_others(job: Job, view: FleetView) -> tuple[str, str] | None:
    """(card, program) where the job would fit now if other people's programs were not there."""
    me, cards = waiting_of(vars(job), view.now), view.cards.values()
    for card in cards:
        if card.outside == 0 or could_start(me, card, cards):
            continue
        if could_start(me, replace(card, outside=0), cards) and view.nodes[card.node].outside:
            return card.node, largest_program(view, card)
    return None
