"""What a job needs, reported again once the lengths of its own rows are known."""

from __future__ import annotations

from dataclasses import replace

import torch

from loractl.common.job.adjustment import adjusted, is_roomy, without_room
from loractl.common.job.method import Need, Parallel
from loractl.common.job.spec import JobSpec
from loractl.common.job.status import Reason
from loractl.common.memory.config import read_shape
from loractl.common.memory.fit import plan_roomy
from loractl.common.memory.plan import predict
from loractl.common.memory.step import Lengths, Stack, is_lean
from loractl.common.memory.weights import sharded_bytes, weight_bytes
from loractl.common.units import gib
from loractl.worker.base.arithmetic import choose_precision
from loractl.worker.base.failure import TrainingFailed
from loractl.worker.base.gauge import limit_to
from loractl.worker.base.shared_heads import are_fused
from loractl.worker.data.lengths import lengths_of
from loractl.worker.data.prepared import PreparedData
from loractl.worker.engine.passes.wide import multiplies_wide
from loractl.worker.protocol.messages import Planned, Start

from .run import Run
from .traced_plan import trace_plan


def tell_need(run: Run, data: PreparedData) -> None:
    """Report what the job needs for its own rows' lengths and the card's arithmetic, which submit could not know.

    An architecture that the plan does not know is traced, if memory is one card's. Raises TrainingFailed(out_of_memory)
    if the trace, the plan in a wider type than submit planned, or the base's weights alone need more than the card
    gives: no weight is loaded yet.
    """
    order, spec = run.order, _for_any_attempt(run)
    lengths, stack = lengths_of(data), _stack(run)
    need = predict(spec, lengths, stack=stack)
    given = order.vram_reserved
    size = need.of(order.method)
    if size is not None or given is None or order.gpu == "cpu" or order.ranks:
        _tell(run, need, lengths, stack)
        if stack.full and run.on_gpu and not order.ranks and size and given and size > given:
            why = f"{_family(spec)} overflows float16, and this card has no bfloat16"
            what = f"in float32 it needs {gib(size)} GiB, the card gives {gib(given)} GiB"
            raise TrainingFailed(Reason.OUT_OF_MEMORY, f"{why}: {what}")
        least = 0 if order.gpu == "cpu" else _weights(order)
        if given is not None and given < least:  # a row may say anything: its need is the submitter's word
            what = f"its base alone takes {gib(least)} GiB, the card gives {gib(given)} GiB"
            raise TrainingFailed(Reason.OUT_OF_MEMORY, what)
        return
    try:
        traced = trace_plan(spec.base_model, spec, order.method, lengths).need_bytes
    except Exception as error:  # noqa: BLE001  a trace is a help; what is wrong with the model, its loading says better
        run.note("plan", f"no plan by trace: {str(error).strip().splitlines()[0] if str(error).strip() else error!r}")
        return
    _tell(run, replace(need, **{order.method.value: traced}), lengths, stack)
    if traced > given:
        raise TrainingFailed(
            Reason.OUT_OF_MEMORY, f"its plan by trace is {gib(traced)} GiB, the card gives {gib(given)} GiB"
        )


def tell_padded(run: Run, data: PreparedData, why: str) -> None:
    """Report that rows are padded, and what the job then needs if its plan was for lean steps: for its later attempts,
    and so that its measured peak is compared with the right plan. This attempt keeps what it has."""
    run.note("engine", f"trains with padded rows: {why}")
    shape, spec = read_shape(run.spec.base_model, run.spec.revision), _for_any_attempt(run)
    if shape is None or not is_lean(shape, spec):
        return
    lengths, method = lengths_of(data), run.order.method
    before, need = (predict(spec, lengths, stack=replace(_stack(run), padded=padded)) for padded in (False, True))
    size, lean = need.of(method), before.of(method)
    run.note("plan", f"with padded rows it needs {gib(size)} GiB by its plan, not {gib(lean)}")
    _planned(run, need, lengths, replace(_stack(run), padded=True))


def _weights(order: Start) -> int:
    """Bytes of the base on each of the job's cards, in the narrowest form in which it may be loaded; 0: not known."""
    shape = read_shape(order.spec.base_model, order.spec.revision)
    if shape is None:
        return 0
    if order.parallel is Parallel.SHARDED:
        return sharded_bytes(shape, order.method, len(order.ranks), whole_rest=False).kept
    return weight_bytes(shape, order.method, whole_rest=False)


def _for_any_attempt(run: Run) -> JobSpec:
    """The job as later attempts start it: the room to do without recomputing belongs to this attempt."""
    return adjusted(run.order.spec, without_room(run.order.spec, run.adjustment))


def _stack(run: Run) -> Stack:
    """How this device computes. A simulated card is planned as a card, though a CPU trains there."""
    order, spec = run.order, run.spec
    stack = Stack(on_gpu=order.gpu != "cpu", widens=multiplies_wide())
    if stack.on_gpu and not run.on_gpu:
        return stack
    kind = choose_precision(order.device, spec.training.dtype, _family(spec)).base
    full = spec.training.dtype == "auto" and kind is torch.float32
    shape = read_shape(spec.base_model, spec.revision)
    grouped = shape is None or are_fused(torch.device(order.device), kind, shape.head_dim)
    return replace(stack, full=full, grouped=grouped)


def _family(spec: JobSpec) -> str:
    """The base's `model_type`, if the plan knows it."""
    shape = read_shape(spec.base_model, spec.revision)
    return "" if shape is None else shape.family


def _planned(run: Run, need: Need, lengths: Lengths, stack: Stack) -> int | None:
    """Report the better plan. Returns what it says about this attempt."""
    order, spec = run.order, _for_any_attempt(run)
    roomy = None if order.ranks else plan_roomy(spec, lengths, stack=stack).as_json()
    running = None
    if is_roomy(order.spec, run.adjustment):
        running = predict(run.spec, lengths, stack=stack).of(order.method)
    run.tell(Planned(job_id=order.job_id, lora=need.lora, qlora=need.qlora, roomy=roomy, running=running))
    return need.of(order.method) if running is None else running


def _tell(run: Run, need: Need, lengths: Lengths, stack: Stack) -> None:
    size = _planned(run, need, lengths, stack)
    if run.on_gpu:
        limit_to(lowered_limit(run.order, size), run.order.device, run.order.gpu)  # the rest goes to other jobs


def lowered_limit(order: Start, size: int | None) -> int | None:
    """Bytes of the card that this attempt keeps once its need, `size`, is known better: the rest goes to other jobs.

    The reservation is the plan times a factor learned from measured peaks, and keeps that ratio.
    """
    given = order.memory_limit
    if size is None or given is None:
        return given
    learned = order.vram_reserved / order.vram_planned if order.vram_reserved and order.vram_planned else 1.0
    return min(given, int(size * learned))
