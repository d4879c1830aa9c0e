"""The memory plan: a training's peak in device memory, part by part, from the model's config.json and the job alone.

It follows the recipe as it runs (worker/base/model.py, worker/engine): lean steps under bf16 autocast, or steps as
transformers' Trainer takes them where a job asks for that or a model needs it; peft's LoRA layers, bitsandbytes' NF4.
What each operator keeps for the backward pass was read from a traced step (worker/recipe/traced_plan.py). The plan is
tested against such steps, too. Its numbers are not fitted to runs. docs/memory-plan.md has the formulas in one place.
"""

from __future__ import annotations

from dataclasses import dataclass

from loractl.common.job.method import Method, Need, Parallel
from loractl.common.job.spec import JobSpec
from loractl.common.units import thousands

from .activations import (
    answered_bytes,
    block_cost,
    classes,
    embedding_gradient_bytes,
    evaluation_bytes,
    loss_bytes,
    stored_bytes,
    stranded_bytes,
)
from .config import read_shape
from .context import CONTEXT_BYTES
from .shape import Shape
from .step import HEAD_CHUNK, Lengths, Stack, Step
from .weights import (
    GATHERED_BLOCKS,
    adapter_state_bytes,
    adapter_tensors,
    optimizer_name,
    sharded_bytes,
    update_bytes,
    weight_bytes,
    with_head,
)

MIB = 2**20

PROCESSOR_BYTES = 620 * MIB
"""What a trainer on a processor holds besides its tensors: Python, torch and the other libraries (534 MiB once they
are imported), and the kernels that oneDNN compiles. Measured on x86."""

WORKSPACE_BYTES = 2 * 32 * MIB
"""cuBLAS's workspaces, which torch's allocator holds: one for the forward pass's thread and one for the backward
pass's. 32 MiB each on Hopper, 8 on others (aten/src/ATen/cuda/CublasHandlePool.cpp); the upper end."""

HEAP_SHARE = 0.7
"""Share of the activations that a processor's heap holds besides them where blocks are recomputed: tensors of a few
MiB that come and go leave holes. Measured with glibc: 0.67 to 0.92 in fp32, 0.2 to 0.9 in bf16 on a processor with
tiles (AMX); without recomputing none."""

CHECKPOINTING = {0: "no checkpointing", 1: "checkpointing", 2: "checkpointing of every second block"}

LINK_BYTES = 32 * 2 * 5 * MIB
"""What NCCL holds of a card for its rings: 32 channels at most, in both directions, each with buffers of 4 MiB
(NCCL_BUFFSIZE) and those of its two protocols for small messages. Fewer channels on PCIe; the upper end."""

MARGIN_SHARE = 0.05
"""Share of what the training allocates that is kept free on top, for fragmentation that the allocator's part does not
cover. A round number about the size of the plan's mean error by reserved memory (docs/memory-plan.md)."""

SLAB_BYTES = 4 * MIB
"""Of a weight that a processor widens at a time (worker/engine/passes/wide.py)."""

SEGMENT_BYTES = 20 * MIB
"""Smaller tensors share segments of this size (kLargeBuffer in c10/cuda/CUDACachingAllocator): on average half of the
last one of each pool stays empty."""

TRACED_SLACK = 0.25
"""Share of a traced step's own memory that is added for blocks the allocator can't use; where the tensors are known by
name this is counted, and comes to 5 to 30% of activations and logits."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes by part at the training's peak, and a note on each."""

    method: Method
    parts: dict[str, int]
    margin_bytes: int
    notes: dict[str, str]

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def tensor_bytes(self) -> int:
        """What the training allocates: without the context and what the allocator can't use."""
        return self.peak_bytes - self.parts["context"] - self.parts["allocator"]

    @property
    def need_bytes(self) -> int:
        """What a card must have free."""
        return self.peak_bytes + self.margin_bytes


def predict(spec: JobSpec, lengths: Lengths | None = None, *, stack: Stack | None = None) -> Need:
    """The job's need by method; unknown where the base model is not here, or its architecture is not known."""
    shape = read_shape(spec.base_model, spec.revision)
    if shape is None:
        return Need(lora=None, qlora=None)
    lora, qlora = (plan(shape, spec, method, lengths, stack=stack).need_bytes for method in (Method.LORA, Method.QLORA))
    return Need(lora=lora, qlora=qlora)


def plan(
    shape: Shape, spec: JobSpec, method: Method, lengths: Lengths | None = None, *, stack: Stack | None = None
) -> Plan:
    """The plan of a job on a GPU, or where `stack` says so on a processor, or on each of several cards.

    Without `lengths` every row is taken to be dataset.max_length tokens long. Raises ValueError where the stack's cards
    can't share a step's rows evenly.

    The peak is the largest of five moments: the loss, the backward pass through one block, the end of the backward pass
    if an embedding is trained, the optimizer's step, and the evaluation of one held-out row (larger batches of it are
    halved where they don't fit).
    """
    stack = stack or Stack()
    step = Step.of(shape, spec, method, lengths, stack)
    if step.labels:
        shape = with_head(shape, step.labels)
    form = {"double_quant": stack.double_quant, "full": step.full, "whole_rest": step.whole_rest}
    weights, shared = weight_bytes(shape, method, **form), {}
    tensors = list(adapter_tensors(shape, spec, step.labels))
    adapter = 4 * sum(size * count for size, count in tensors)  # peft keeps them in fp32 (autocast_adapter_dtype)
    optimizer = optimizer_name(spec, method, on_gpu=stack.on_gpu)
    state = adapter_state_bytes(optimizer, tensors)
    if stack.parallel is Parallel.SHARDED:
        sharded = sharded_bytes(shape, method, stack.cards, **form)
        weights, shared = sharded.kept, {"gathered": sharded.gathered}
    if stack.cards > 1:
        shared["buckets"] = adapter  # a copy of all gradients, in which the cards' are summed
    # gradients stay from one micro-batch of a step to the next
    held = weights + sum(shared.values()) + 2 * adapter + state
    peak = _peak(shape, step, update_bytes(optimizer, adapter, tensors))
    sizes = {
        "weights": weights,
        "adapter": adapter,
        "gradients": adapter,
        "optimizer": state + peak.update,
        "activations": peak.training - peak.logits - peak.update,
        "logits": peak.logits,
        "evaluation": max(0, evaluation_bytes(shape, spec, step) - adapter - peak.training),
        "context": _context_bytes(stack),
        **shared,
        **({"widened": _widened_bytes(shape, step)} if step.widens else {}),
        "allocator": _unusable_bytes(step, stack, peak),
    }
    parts = {name: int(size) for name, size in sizes.items()}
    margin = int(MARGIN_SHARE * (held + peak.training))
    notes = _notes(shape, step, stack, optimizer, trained=adapter // 4, at_loss=peak.logits > 0)
    return Plan(method=method, parts=parts, margin_bytes=margin, notes={name: notes[name] for name in parts})


def _unusable_bytes(step: Step, stack: Stack, peak: _Peak) -> float:
    if stack.on_gpu:
        return peak.unusable + SEGMENT_BYTES + WORKSPACE_BYTES
    return HEAP_SHARE * (peak.training - peak.logits - peak.update) if step.checkpoints else 0


def _widened_bytes(shape: Shape, step: Step) -> int:
    """The widest layer's backward pass in fp32: its input, the gradient of its answer and that of its input."""
    layers = [layer for block in shape.blocks if block.text for layer in block.linears]
    widest = max((2 * layer.inputs + layer.outputs for layer in layers), default=0)
    return 4 * step.tokens * widest + SLAB_BYTES


def _context_bytes(stack: Stack) -> int:
    if not stack.on_gpu:
        return PROCESSOR_BYTES
    return CONTEXT_BYTES + (LINK_BYTES if stack.cards > 1 else 0)


@dataclass(frozen=True, kw_only=True)
class _Peak:
    """Bytes at the worst moment of a step, besides weights, adapter, gradients and the optimizer's state."""

    training: float  # all parts together
    logits: float  # the loss's part; 0 where it is freed before the peak
    update: float  # the optimizer's own part, where its step is the peak
    unusable: float  # cached by the allocator on top, without use


def _peak(shape: Shape, step: Step, update: float) -> _Peak:
    """The largest of four moments: the loss, one block's backward pass, the end of the backward pass where an embedding
    is trained, and the optimizer's step of `update` bytes."""
    blocks = [(block_cost(shape, block, step), block.count) for block in shape.blocks if block.text]
    stored = stored_bytes(shape, blocks, step)
    if step.keeps_logits:
        stored += step.tokens * classes(shape, step) * (2 if step.autocast else step.wide)
    ends = loss_bytes(shape, step)
    at_loss = stored + ends
    # The last block may be recomputed, while all others' activations are there. What it has kept is gone when the one
    # before it is recomputed.
    recomputed = step.checkpoints > 0 and (shape.layers - 1) % step.checkpoints == 0
    at_block = stored + max(cost.peak(recomputed) for cost, _ in blocks)
    at_end = embedding_gradient_bytes(shape, step)
    training = max(at_loss, at_block, at_end, update)
    forward = at_loss + answered_bytes(shape, step) + max(cost.forward for cost, _ in blocks)
    reserved = max(forward, at_block + stranded_bytes(shape, step, ends), update)
    return _Peak(
        training=training,
        logits=ends if at_loss >= max(at_block, at_end, update) else 0,
        update=update if update > max(at_loss, at_block, at_end) else 0,
        unusable=max(0.0, reserved - training),
    )


def traced_plan(weights: int, adapter: int, state: int, own: int, method: Method) -> Plan:
    """The plan from bytes that a traced step took; `own` is what it needed besides weights, adapter and state."""
    parts = {
        "weights": weights,
        "adapter": adapter,
        "gradients": adapter,
        "optimizer": state,
        "activations": own,
        "logits": 0,
        "evaluation": 0,
        "context": CONTEXT_BYTES,
        "allocator": int(TRACED_SLACK * own) + SEGMENT_BYTES + WORKSPACE_BYTES,
    }
    words = dict.fromkeys(parts, "traced") | {"logits": "within activations", "evaluation": "not planned"}
    margin = int(MARGIN_SHARE * (weights + 2 * adapter + state + own))
    return Plan(method=method, parts=parts, margin_bytes=margin, notes=words)


def _notes(shape: Shape, step: Step, stack: Stack, optimizer: str, *, trained: int, at_loss: bool) -> dict[str, str]:
    """`trained`: parameters. `at_loss`: whether the loss is the peak."""
    rows = f"{step.batch} x {step.length} tokens"
    if step.tokens != step.batch * step.length:
        rows = f"{step.batch} rows with {thousands(step.tokens)} tokens in all, the longest with {step.length}"
    rows += " a card" if stack.cards > 1 else ""
    weights = "fp32" if step.full else "bf16"
    if step.quantised:
        rest = "fp32" if step.whole_rest else "bf16"
        weights = (
            f"nf4, {_count(shape.other_parameters)} in {rest}" if shape.linear_parameters else f"{rest}: no nf4 here"
        )
    chunks = f", {HEAD_CHUNK} tokens at a time" if step.lean else ""
    chunks += ", and the head's gradient" if step.saved_head else ""
    freed = "" if at_loss else ", freed before the peak"
    part = f", blocks over {stack.cards}" if stack.parallel is Parallel.SHARDED else ""
    return {
        "weights": f"{_count(shape.parameters)} parameters, {weights}{part}",
        "adapter": f"{_count(trained)} trained, fp32",
        "gradients": "fp32",
        "optimizer": optimizer,
        "activations": f"{rows}, {CHECKPOINTING[step.checkpoints]}",
        "logits": f"{thousands(step.labels)} labels{freed}"
        if step.labels
        else f"{thousands(shape.vocab)} words, fp32{chunks}{freed}",
        "evaluation": f"rows of {step.evaluated} tokens, beyond what training holds",
        "context": "CUDA and its kernels" if stack.on_gpu else "Python, torch and its kernels",
        "gathered": f"{GATHERED_BLOCKS} blocks, whole for a while",
        "buckets": "gradients on their way between cards, fp32",
        "widened": "a layer's tensors in fp32, where the processor is faster so",
        "allocator": "cuBLAS, and cached blocks that the loss can't use" if stack.on_gpu else "holes in the heap",
    }


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"
