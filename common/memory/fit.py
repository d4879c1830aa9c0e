"""The fit: how large a micro-batch or how long a row a card holds, in which ways several cards may share a job, and
what the job takes without recomputing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from loractl.common.job.adjustment import Adjustment, adjusted, in_its_room
from loractl.common.job.method import Method, Need, Parallel, Roomy, RoomyForm, SharedNeed, Ways, least_need
from loractl.common.job.spec import JobSpec
from loractl.common.units import GIB

from .config import read_shape
from .correction import Measured, learned, learned_roomy
from .need_key import need_key
from .plan import plan, predict
from .shape import Shape
from .step import Lengths, Stack, longest_row, micro_batch

NEVER_DIVIDED = 8 * GIB
"""A job that needs less of one card is not divided unless it asks for that: nearly every card holds it."""

NO_CARD_HAS = 2**50
"""Bytes: the need of a method that the job's own max_vram rules out on these cards."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What a job needs of one card, and its keys to measured peaks."""

    need: Need  # what is reserved for it, by method: the plan, corrected by measured peaks
    planned: Need  # the plan alone
    roomy: Roomy = field(default_factory=Roomy)  # beyond its need
    need_key: str | None = None
    family: str | None = None
    parameters: int | None = None  # of its base, that a token passes; None: not known here


def memory_plan(
    spec: JobSpec, data: dict[str, Any], stack: Stack, measured: Callable[[str, str | None], Sequence[Measured]]
) -> MemoryPlan:
    """`data`: its stored data sets. `measured`: gives the peaks of jobs of a need key and a family."""
    key, shape = need_key(spec, data), read_shape(spec.base_model, spec.revision)
    family = None if shape is None else shape.family
    planned, peaks = predict(spec, stack=stack), measured(key, family)
    roomy = learned_roomy(plan_roomy(spec, stack=stack), key, peaks)
    return MemoryPlan(
        need=learned(planned, key, peaks),
        planned=planned,
        roomy=roomy,
        need_key=key,
        family=family,
        parameters=None if shape is None else shape.active_parameters,
    )


def plan_ways(
    spec: JobSpec, methods: Sequence[Method], planned: Need, need: Need, lengths: Lengths | None = None
) -> Ways:
    """On how many cards the job may run. `planned`, `need`: of one card, the latter corrected by measured peaks, which
    corrects the others in proportion."""
    cards, wanted = spec.resources.cards, spec.resources.parallel
    if cards == 1:
        return Ways()
    shape = read_shape(spec.base_model, spec.revision)
    if cards == "auto":
        if shape is None or (least_need(methods, need) or 0) <= NEVER_DIVIDED:
            return Ways()
        counts = [count for count in spec.training.even_cards if count > 1]
    else:
        counts = [cards]
    hows = [Parallel(wanted)] if wanted != "auto" else [Parallel.DATA, Parallel.SHARDED]
    if cards == "auto":
        hows = [Parallel.SHARDED]
    ways = [
        SharedNeed(cards=n, parallel=how, need=_each(shape, spec, n, how, planned, need, lengths))
        for n in counts
        for how in hows
    ]
    least = [(way, least_need(methods, way.need)) for way in ways]
    open_ways = tuple(way for way, size in least if size is None or size < NO_CARD_HAS)
    return Ways(alone=cards == "auto", gangs=open_ways)


def _each(
    shape: Shape | None,
    spec: JobSpec,
    cards: int,
    parallel: Parallel,
    planned: Need,
    need: Need,
    lengths: Lengths | None,
) -> Need:
    """What each of `cards` cards needs, by method."""
    if shape is None:
        return Need(lora=None, qlora=None)
    stack, most = Stack(cards=cards, parallel=parallel), spec.resources.max_vram or NO_CARD_HAS

    def size(method: Method) -> int:
        before, now = planned.of(method), need.of(method)
        learned = now / before if before and now else 1.0
        each = int(plan(shape, spec, method, lengths, stack=stack).need_bytes * learned)
        return each if each <= most else NO_CARD_HAS

    return Need(lora=size(Method.LORA), qlora=size(Method.QLORA))


LEAST_WORK = 10**11
"""Weights of a block times tokens of a micro-batch, from which on smaller micro-batches pay. Each reads the base
again, dequantises it where it is in NF4, and starts all kernels again. Counted for a 4090 (`python -m
benchmarks.budget roomy`), a step takes of one that recomputes: 8B in NF4, 4 rows of 1,024, 0.74, with 2 and 1 of them
at once 0.77 and 0.84 (work 4.5e11 and 2.2e11); 8B, 2 of 8 rows of 256, 0.75, in NF4 0.91 (1.1e11); 1B in NF4, 2 of 4
rows of 1,024, 0.79 (1.2e11), 1 of them 0.86 (0.6e11). Below, Python takes longer to start the kernels, at 20 us each,
than the card to run them: 8B in NF4, 1 of 8 rows of 256, 1.14 (0.6e11)."""


def plan_roomy(spec: JobSpec, lengths: Lengths | None = None, *, stack: Stack | None = None) -> Roomy:
    """The forms of a job on one GPU, the fastest first; none if the job itself says whether it recomputes, or if its
    base is not known. Nothing is corrected by measured peaks.

    In exact mode no micro-batch changes: it would round differently.
    """
    stack, shape = stack or Stack(), read_shape(spec.base_model, spec.revision)
    if shape is None or not stack.on_gpu or spec.training.gradient_checkpointing is not None:
        return Roomy()
    return Roomy(
        lora=_forms(shape, spec, Method.LORA, lengths, stack), qlora=_forms(shape, spec, Method.QLORA, lengths, stack)
    )


def _forms(shape: Shape, spec: JobSpec, method: Method, lengths: Lengths | None, stack: Stack) -> tuple[RoomyForm, ...]:
    training, forms = spec.training, list[RoomyForm]()
    rows, length = training.per_device_train_batch_size, lengths.train if lengths else longest_row(spec)
    while rows:
        form = RoomyForm(micro_batch=rows, bytes=0, planned=0)
        runs = adjusted(spec, in_its_room(spec, Adjustment(), form))
        size = plan(shape, runs, method, lengths, stack=stack).need_bytes
        forms.append(replace(form, bytes=size, planned=size))
        rows = training.micro_batch(min(rows, micro_batch(spec, lengths)) // 2)
        if training.exact or rows * length * _block_weights(shape) < LEAST_WORK:
            break
    return tuple(forms)


def _block_weights(shape: Shape) -> int:
    """Of its linear layers; experts' are left out, as each sees few tokens."""
    return max((sum(layer.weights for layer in block.linears) for block in shape.blocks if block.text), default=0)


MOST = 2**24
"""Where the search for the largest length or micro-batch ends: more than any model takes."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The largest values that fit, each with the job's other key as it is; None where nothing fits."""

    micro_batch: int | None
    max_length: int | None
    all_rows: bool = False  # the micro-batch holds every row to train on: rows are the limit, not memory


def largest_fit(
    shape: Shape,
    spec: JobSpec,
    method: Method,
    limit: int,
    lengths: Lengths | None = None,
    *,
    stack: Stack | None = None,
) -> Fit:
    """The largest micro-batch at the job's length, and the largest max_length at its micro-batch, in `limit` bytes.

    A max_length beyond the longest row changes nothing, so the search takes rows of any length.
    """

    def batch_fits(size: int) -> bool:
        training = spec.training.model_copy(update={"per_device_train_batch_size": size})
        return (
            plan(shape, spec.model_copy(update={"training": training}), method, lengths, stack=stack).need_bytes
            <= limit
        )

    def length_fits(size: int) -> bool:
        dataset = spec.dataset.model_copy(update={"max_length": size})
        return plan(shape, spec.model_copy(update={"dataset": dataset}), method, stack=stack).need_bytes <= limit

    rows = lengths.rows if lengths else None
    batch = _largest(batch_fits, 1, rows or MOST)
    all_rows = batch is not None and batch == rows
    return Fit(micro_batch=batch, max_length=_largest(length_fits, 8, MOST), all_rows=all_rows)


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


def _largest(fits: Callable[[int], bool], least: int, most: int) -> int | None:
    """The largest number up to `most` for which a monotone condition holds, by doubling and halving; None if `least`
    is too much."""
    if not fits(least):
        return None
    low, high = least, 2 * least
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
