"""What a job takes without recomputing: in its own micro-batches, or in smaller parts of its batch."""

from __future__ import annotations

from dataclasses import replace

from loractl.common.job.adjustment import Adjustment, adjusted, in_its_room
from loractl.common.job.method import Method
from loractl.common.job.need import Roomy, RoomyForm
from loractl.common.job.spec import JobSpec

from .config import read_shape
from .plan import plan
from .shape import Shape
from .step import Lengths, Stack, micro_batch

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
    rows = training.per_device_train_batch_size
    while rows:
        form = RoomyForm(micro_batch=rows, bytes=0, planned=0)
        runs = adjusted(spec, in_its_room(spec, Adjustment(), form))
        size = plan(shape, runs, method, lengths, stack=stack).need_bytes
        forms.append(replace(form, bytes=size, planned=size))
        rows = training.micro_batch(min(rows, micro_batch(spec, lengths)) // 2)
        if training.exact or rows * _length(spec, lengths) * _block_weights(shape) < LEAST_WORK:
            break
    return tuple(forms)


def _length(spec: JobSpec, lengths: Lengths | None) -> int:
    return lengths.train if lengths else spec.kind.halves * spec.dataset.max_length


def _block_weights(shape: Shape) -> int:
    """Of its linear layers; experts' are left out, as each sees few tokens."""
    return max((sum(layer.weights for layer in block.linears) for block in shape.blocks if block.text), default=0)
