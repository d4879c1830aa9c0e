"""The memory plan of an architecture not known by name: one training step on tensors without content.

The model is built on the meta device and wrapped like in the recipe. Then its tensors are swapped for fake ones, and a
step runs while a dispatch mode counts the bytes of live storages. It needs neither weights nor a GPU, and takes
seconds. The same trace is the oracle against which common/memory/plan.py is tested.

The tensors are fake CPU ones, since a torch built for CPUs has no fake CUDA ones. Where CUDA's operators hold other
tensors than the CPU's, CUDA's replace them (see _AsOnCuda and LiveBytes).
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from loractl.common.job.method import Method
from loractl.common.job.spec import JobSpec
from loractl.common.memory.plan import Plan, traced_plan
from loractl.common.memory.step import Lengths, checkpoints_activations, micro_batch, planned_labels
from loractl.common.memory.weights import optimizer_name
from loractl.worker.base.arithmetic import Precision, compute_in
from loractl.worker.base.lora import add_adapter
from loractl.worker.base.source import source_of
from loractl.worker.data.tokens import IGNORED, TokenRow
from loractl.worker.engine.loss import window_of
from loractl.worker.engine.optimizer import state_sizes
from loractl.worker.engine.passes.lean import LeanPass, RowsBehindEachOther

from .kinds import trained_kind

BLOCK = 512
"""CUDA's caching allocator rounds a tensor up to a multiple of this many bytes (kMinBlockSize in
c10/cuda/CUDACachingAllocator)."""

CUTS = (2, 4)
"""Layers of the two cut models that are traced: every further layer costs half of their difference."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Bytes of one traced training step."""

    weights: int  # of the base as held in memory
    adapter: int
    state: int  # of the optimizer
    peak: int  # all of these, plus gradients, activations and the loss

    @property
    def own(self) -> int:
        """What the step itself took: activations, logits, operators' temporary memory."""
        return self.peak - self.weights - 2 * self.adapter - self.state


def trace_plan(model: str | Path, spec: JobSpec, method: Method, lengths: Lengths | None = None) -> Plan:
    """The plan of any decoder that transformers builds from the config of a folder or a hub id.

    Evaluation is not traced. Raises what transformers and peft raise for a config that they refuse.
    """
    from transformers import AutoConfig

    options = trained_kind(spec).settings(planned_labels(spec, lengths)) | source_of(str(model), spec.revision)
    config = AutoConfig.from_pretrained(str(model), trust_remote_code=False, **options)
    halves = spec.kind.halves
    tokens = halves * (lengths.text or lengths.train // halves if lengths else spec.dataset.max_length)
    batch = micro_batch(spec, lengths)
    spec = spec.model_copy(update={"training": spec.training.model_copy(update={"per_device_train_batch_size": batch})})
    layers = config.get_text_config().num_hidden_layers
    if layers <= CUTS[1]:
        trace = trace_step(config, spec, method, tokens)
        return traced_plan(trace.weights, trace.adapter, trace.state, trace.own, method)
    small, large = (trace_step(cut(config, count), spec, method, tokens) for count in CUTS)

    def whole(name: str) -> int:
        first, second = getattr(small, name), getattr(large, name)
        return int(second + (layers - CUTS[1]) * (second - first) / (CUTS[1] - CUTS[0]))

    return traced_plan(whole("weights"), whole("adapter"), whole("state"), whole("own"), method)


def trace_step(config: Any, spec: JobSpec, method: Method, tokens: int, *, lean: bool = False) -> Trace:
    """One step on rows of `tokens` tokens, with gradients of an earlier micro-batch if the job accumulates them.

    `lean`: like the engine's step for a family whose rows it can tell apart; else with padding, as for any other.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = build(config, spec, method)
    model.train()
    if every := checkpoints_activations(spec):
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs={
                "use_reentrant": False,
                "context_fn": lambda: (contextlib.nullcontext(), _AsOnCuda()),  # recomputing runs outside the mode
            },
            every_n_layers=every,
        )
    batch = spec.training.per_device_train_batch_size
    laid_rows = _rows(batch, tokens, spec.kind.halves)
    laid = RowsBehindEachOther.of(laid_rows, torch.device("cpu"))
    (window,) = window_of(trained_kind(spec).loss(spec), [laid_rows])
    precision = Precision(base=_dtype(spec), amp=None if spec.training.dtype == "float32" else "bf16")
    texts = batch * spec.kind.halves
    with FakeTensorMode(allow_non_fake_inputs=True), _masks(padded=texts > 1 or spec.training.packing):
        constants = _make_fake(model)
        compute_in(model, precision)
        trained = [p for p in model.parameters() if p.requires_grad]
        live = LiveBytes()
        live.watch([*model.parameters(), *model.buffers(), *constants])
        adapter = sum(_rounded(p.nbytes) for p in trained)
        weights = live.now - adapter
        sizes = state_sizes(model, optimizer_name(spec, method))
        state = [torch.empty(size, dtype=torch.uint8) for size in sizes]
        live.watch(state)
        held = live.now - weights - adapter
        rows = torch.zeros((texts, batch * tokens // texts), dtype=torch.int64)
        count = torch.tensor(1)
        passing = LeanPass(model, precision, loss=trained_kind(spec).loss(spec), fuses=False) if lean else None
        learned = list[torch.Tensor]()

        def step() -> None:
            if passing is not None:
                passing.learn_rows(laid, window, torch.autograd.backward)
                return
            inputs = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
            torch.autograd.backward(trained_kind(spec).traced_loss(model, inputs, count))

        with _AsOnCuda(), live:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)  # as an earlier micro-batch leaves it
                parameter.register_post_accumulate_grad_hook(learned.append)
            live.peak = live.now
            step()
        # text passes no vision tower, so its layers never have a gradient
        idle = {id(p) for p in trained} - {id(p) for p in learned}
        peak = live.peak - sum(_rounded(p.nbytes) for p in trained if id(p) in idle)
    return Trace(weights=weights, adapter=adapter, state=held, peak=peak)


def _rows(batch: int, tokens: int, halves: int) -> list[TokenRow]:
    """Rows without content, with all but the first token of each text learned. `halves`: texts per row."""
    text = tokens // halves
    labels = [IGNORED, *[0] * (text - 1)] * halves
    starts = tuple(range(text, text * halves, text))
    return [TokenRow(number=n, input_ids=[0] * len(labels), labels=labels, starts=starts) for n in range(batch)]


def _dtype(spec: JobSpec) -> torch.dtype:
    return torch.float32 if spec.training.dtype == "float32" else torch.bfloat16


def build(config: Any, spec: JobSpec, method: Method) -> Any:
    """The model with its adapter on the meta device, in NF4 wherever bitsandbytes would use it."""
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    asked = spec.training.attn_implementation
    options = {} if asked in ("auto", "flash_attention_2") else {"attn_implementation": asked}
    dtype, kind = _dtype(spec), trained_kind(spec)
    with torch.device("meta"):
        base = kind.built(copy.deepcopy(config), dtype=dtype, **options)
        if method is Method.QLORA:
            quantization = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
            base = replace_with_bnb_linear(base, kind.unquantised(base), quantization)
        return add_adapter(base, spec, method)


def cut(config: Any, layers: int) -> Any:
    """The config of the same model with fewer layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return config


def _make_fake(model: Any) -> list[torch.Tensor]:
    """Swap every tensor for a fake one of its size, tied tensors for the same one. NF4 layers get packed ones; their
    constants are returned."""
    from bitsandbytes.nn import Linear4bit

    seen: dict[int, Any] = {}
    constants: list[torch.Tensor] = []
    for module in model.modules():
        if isinstance(module, Linear4bit):
            constants += _pack(module)
        for name, parameter in module._parameters.items():
            if parameter is None or (isinstance(module, Linear4bit) and name == "weight"):
                continue
            if id(parameter) not in seen:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                seen[id(parameter)] = torch.nn.Parameter(fake, requires_grad=parameter.requires_grad)
            module._parameters[name] = seen[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return constants


def _pack(layer: Any) -> list[torch.Tensor]:
    """Give an NF4 layer what bitsandbytes' quantize_4bit leaves: packed weights and their nested scales."""
    from bitsandbytes.functional import QuantState

    weights = layer.in_features * layer.out_features
    blocks = -(-weights // 64)
    packed = torch.nn.Parameter(torch.empty(((weights + 1) // 2, 1), dtype=torch.uint8), requires_grad=False)
    nested = QuantState(
        absmax=torch.empty(-(-blocks // 256)), blocksize=256, code=torch.empty(256), dtype=torch.float32
    )
    state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8),
        shape=torch.Size((layer.out_features, layer.in_features)),
        code=torch.empty(16),
        blocksize=64,
        quant_type="nf4",
        dtype=torch.bfloat16,
        offset=torch.empty(()),
        state2=nested,
    )
    packed.quant_state = state
    layer._parameters["weight"] = packed
    return [state.absmax, state.code, state.offset, nested.absmax, nested.code]


@contextlib.contextmanager
def _masks(*, padded: bool) -> Iterator[None]:
    """transformers leaves out the causal mask if no row is padded, which it can't see on a fake tensor."""
    from transformers import masking_utils

    def without(
        mask: Any, queries: int, keys: int, *_: Any, local_attention_size: int | None = None, **__: Any
    ) -> bool:
        return not padded and (local_attention_size is None or keys < local_attention_size)

    kept = masking_utils._ignore_causal_mask_sdpa
    masking_utils._ignore_causal_mask_sdpa = without
    try:
        yield
    finally:
        masking_utils._ignore_causal_mask_sdpa = kept


class _AsOnCuda(TorchFunctionMode):
    """Operators that keep other tensors on a CPU than on CUDA, as CUDA has them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            kwargs = {**kwargs, "dropout_p": 0.0}  # fused kernels keep a seed, the CPU's fallback keeps the scores
        if func in (F.grouped_mm, torch._grouped_mm):
            return _GroupedProduct.apply(*args[:2])
        if func is F.softmax and kwargs.get("dtype") is torch.float32 and args[0].dtype != torch.float32:
            return torch._softmax(args[0], kwargs["dim"], True)  # casts inside the kernel
        if func in _FP32_UNDER_AUTOCAST and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_widened, args), tree_map(_widened, kwargs)
        return func(*args, **kwargs)


_FP32_UNDER_AUTOCAST = {
    F.layer_norm,
    F.softmax,
    F.log_softmax,
    F.cross_entropy,
    F.softplus,
    torch.softmax,
    torch.Tensor.softmax,
    torch.pow,
    torch.Tensor.pow,
    torch.Tensor.__pow__,
    torch.rsqrt,
    torch.exp,
    torch.sum,
    torch.Tensor.sum,
    torch.cumsum,
}
"""CUDA's autocast runs these in fp32, the CPU's does not (pytorch.org/docs/stable/amp.html, op reference)."""


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else value


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """CUDA keeps a mask of one byte per element."""
    return torch.native_dropout(input, p, training)[0] if training and p > 0 else input


class _GroupedProduct(torch.autograd.Function):
    """Experts' matrix product: its fake kernel supports only bf16, the real one fp32 as well."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows if weights.requires_grad else None, weights)
        ctx.shape = rows.shape
        return rows.new_empty(rows.shape[0], weights.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        rows, weights = ctx.saved_tensors
        return gradient.new_empty(ctx.shape), None if rows is None else torch.empty_like(weights)


class LiveBytes(TorchDispatchMode):
    """Bytes of the live storages, each counted once and rounded like the allocator does."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, int] = {}

    def watch(self, tensors: Any) -> None:
        for tensor in tree_iter(tensors):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen[key] = _rounded(storage.nbytes())
        self.now += self._seen[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self._seen.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:  # two thirds of all calls
            return args[0].fake_device
        out = func(*args, **(kwargs or {}))
        self.watch(out)
        self.peak = max(self.peak, self.now + _inside(str(func), args))
        return out


_DEVICE = torch.ops.prim.device.default


def _inside(operator: str, args: Any) -> int:
    """Bytes that CUDA's kernel takes while it runs: a 16-bit copy of NF4 weights; gradient times output of a softmax
    (aten/src/ATen/native/cuda/SoftMax.cu)."""
    if operator.startswith("bitsandbytes.gemm_4bit"):
        return 2 * int(args[2][0]) * int(args[2][1])
    return 4 * int(args[0].numel()) if operator.startswith("aten._softmax_backward_data") else 0


def _rounded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
