"""How much torch's allocator may take of a reservation, whatever the card's context takes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest

from loractl.common.job.method import Method
from loractl.common.job.spec import JobSpec
from loractl.common.memory.context import CONTEXT_BYTES, context_excess
from loractl.common.memory.families import shape_of
from loractl.common.memory.plan import WORKSPACE_BYTES, plan
from loractl.worker.attempt.order import common_environment, device_environment, environment
from loractl.worker.attempt.workplace import Workplace
from loractl.worker.base.gauge import LEAST_BYTES, allocator_room
from loractl.worker.device.devices import CpuDevice, NvmlDevice

MIB, GIB = 2**20, 2**30
TINY = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip


@pytest.mark.parametrize("context", [None, 150 * MIB, 500 * MIB, 730 * MIB])
@pytest.mark.parametrize("method", [Method.LORA, Method.QLORA])
def test_a_tiny_job_keeps_its_plan_on_every_card(method: Method, context: int | None) -> None:
    """cuBLAS's workspaces are 64 MiB on Hopper, where a context is larger than planned."""
    spec = JobSpec.model_validate(
        {
            "name": "tiny",
            "base_model": "/m",
            "dataset": {"path": "d.jsonl", "max_length": 64},
            "training": {"max_steps": 1},
        }
    )
    shape = shape_of(TINY)
    assert shape is not None
    planned = plan(shape, spec, method)
    room = allocator_room(planned.need_bytes, context)
    assert room >= planned.tensor_bytes + WORKSPACE_BYTES
    assert room <= planned.need_bytes - min(CONTEXT_BYTES, context or CONTEXT_BYTES)


@pytest.mark.parametrize(("start", "after"), [(150, 150), (300, 480), (480, 520), (520, 730), (None, 480)])
def test_what_a_process_takes_beyond_its_limit_is_what_a_card_keeps_free_for_it(start: int | None, after: int) -> None:
    """Its allocator is given what its context leaves of the limit at the start; kernels are loaded later."""
    limit, begun = 4096 * MIB, None if start is None else start * MIB
    process = allocator_room(limit, begun) + after * MIB
    assert process - limit <= context_excess({"context": begun, "context_after": after * MIB})


def test_what_is_learned_from_other_jobs_leaves_room_for_a_computation() -> None:
    assert allocator_room(400 * MIB, None) == LEAST_BYTES > WORKSPACE_BYTES


@pytest.mark.parametrize("own", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", None])
def test_a_trainer_on_a_card_has_blocks_that_grow(own: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if own is not None:
        monkeypatch.setenv(own, "backend:native")
    claim, settings = SimpleNamespace(job_id=1, token="t"), SimpleNamespace(home="/h", trainer_ram=None)
    card, processor = NvmlDevice(index=0, uuid="GPU-a", name="a card", total=GIB), CpuDevice(total=GIB)
    seen = [
        environment(SimpleNamespace(device=device, settings=settings, node="n:0", threads=1), claim)  # type: ignore[arg-type]
        for device in (card, processor)
    ]
    assert seen[0].get("PYTORCH_ALLOC_CONF") == {
        None: "expandable_segments:True", "PYTORCH_ALLOC_CONF": "backend:native", "PYTORCH_CUDA_ALLOC_CONF": None
    }[own]  # fmt: skip
    assert "expandable_segments:True" not in seen[1].values()


@pytest.mark.parametrize("set_by_owner", [True, False])
@pytest.mark.parametrize(
    ("name", "ours", "owners", "on"),
    [
        # attention that needs no plan for each length
        pytest.param("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1", "0", "card", id="attention"),
        # oneDNN keeps 1,024 kernels, some thirty for each number of tokens: what a plan could not know
        pytest.param("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128", "1024", "processor", id="kernels"),
    ],
)
def test_a_trainer_has_settings_for_its_kind_of_device_unless_the_owner_has_set_them(
    name: str, ours: str, owners: str, on: str, set_by_owner: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = owners if set_by_owner else None
    monkeypatch.delenv(name, raising=False)
    if own is not None:
        monkeypatch.setenv(name, own)
    devices = {"card": NvmlDevice(index=0, uuid="GPU-a", name="a card", total=GIB), "processor": CpuDevice(total=GIB)}
    seen = {kind: device_environment(device, "1", 1).get(name) for kind, device in devices.items()}
    assert seen == dict.fromkeys(devices, own) | {on: own or ours}


@pytest.mark.parametrize("own", ["glibc.malloc.hugetlb=0", None])
def test_a_trainer_on_a_processor_asks_for_large_pages_unless_the_box_s_owner_says_otherwise(
    own: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if own is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", own)
    card, processor = NvmlDevice(index=0, uuid="GPU-a", name="a card", total=GIB), CpuDevice(total=GIB)
    assert device_environment(processor, "1", 1)["GLIBC_TUNABLES"] == (own or "glibc.malloc.hugetlb=1")
    assert device_environment(card, "1", 1).get("GLIBC_TUNABLES") == own


def test_threads_share_a_heap_where_the_memory_of_a_trainer_has_a_limit(
    quick_place: Callable[[str], Workplace],
) -> None:
    place = quick_place("")
    limited = replace(place, settings=replace(place.settings, trainer_ram=GIB))
    assert [common_environment(one).get("MALLOC_ARENA_MAX") for one in (place, limited)] == [None, "1"]


FULL_ONCE = """
import resource
import torch
from loractl.worker.base.gauge import in_batches
from loractl.worker.base.gauge import data_bytes, hold_to

hold_to(1 << 30, "cpu", "cpu")
rows = [torch.ones(20 + n, 256, dtype=torch.bfloat16) for n in range(64)]
weight = torch.ones(256, 256, dtype=torch.bfloat16)
tries = []
limit, hard = resource.getrlimit(resource.RLIMIT_DATA)

def work(chosen):
    tries.append(len(chosen))
    if len(tries) == 1:
        resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + (1 << 20), hard))
    try:
        for n in chosen:
            torch.nn.functional.linear(rows[n], weight)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))

in_batches(list(range(64)), 64, work)
torch.nn.functional.linear(torch.ones(300, 256, dtype=torch.bfloat16), weight)
print(tries)
"""


@pytest.mark.long
def test_a_kernel_that_got_no_memory_is_compiled_once_there_is_some() -> None:
    """Where the processor has instructions for bf16; else there is no kernel of the library that could be compiled."""
    done = subprocess.run([sys.executable, "-c", FULL_ONCE], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() in ("[64, 32, 32]", "[64]"), done.stdout + done.stderr


NO_ROOM_FOR_A_THREAD = """
import resource
import torch
from loractl.worker.base import gauge
from loractl.worker.base.gauge import data_bytes, hold_to, in_own_thread, is_out_of_memory

hold_to(1 << 30, "cpu", "cpu")
own, gauge.start_threads = gauge.start_threads, lambda: torch.empty(1 << 32)  # more than there is, for any OpenMP
limit, hard = resource.getrlimit(resource.RLIMIT_DATA)
resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + (16 << 20), hard))
try:
    in_own_thread(lambda: None)
except Exception as error:
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    print(is_out_of_memory(error), type(error).__name__)
gauge.start_threads = own
print(in_own_thread(lambda: "tried again"))
"""


@pytest.mark.long
def test_a_thread_that_gets_no_memory_is_out_of_memory() -> None:
    done = subprocess.run([sys.executable, "-c", NO_ROOM_FOR_A_THREAD], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["True RuntimeError", "tried again"], done.stdout + done.stderr


NO_ROOM_FOR_ITS_FIRST_CALL = """
import resource
import time
from loractl.worker.base.gauge import hold_to, in_own_thread, is_out_of_memory

hold_to(1 << 30, "cpu", "cpu")
in_own_thread(lambda: None)
time.sleep(0.5)  # once it has ended, its stack is the next thread's
limit, hard = resource.getrlimit(resource.RLIMIT_DATA)
resource.setrlimit(resource.RLIMIT_DATA, (1, hard))
try:
    in_own_thread(lambda: None)
except Exception as error:
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    print(is_out_of_memory(error), error)
print(in_own_thread(lambda: "tried again"))
"""


@pytest.mark.long
def test_a_thread_that_can_call_nothing_is_out_of_memory_and_not_waited_for() -> None:
    """It starts, since it gets the stack of an earlier one, and ends at its first call."""
    command = [sys.executable, "-c", NO_ROOM_FOR_ITS_FIRST_CALL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["True no memory for a thread", "tried again"], done.stdout + done.stderr


KERNEL_REPLACED = """
import warnings
from loractl.worker.base.gauge import hold_to, is_out_of_memory

hold_to(1 << 30, "cpu", "cpu")
try:
    warnings.warn("mkldnn_matmul failed, switching to baddbmm:could not create a primitive (Triggered internally)")
except UserWarning as error:
    print(is_out_of_memory(error))
"""


@pytest.mark.long
def test_a_kernel_without_memory_that_torch_would_replace_by_a_slow_loop_is_out_of_memory() -> None:
    """torch's own warning, which its operation raises once it is an error."""
    done = subprocess.run([sys.executable, "-c", KERNEL_REPLACED], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "True", done.stdout + done.stderr
