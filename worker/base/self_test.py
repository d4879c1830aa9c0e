"""The self-test of a card, in its own process, since a card or a driver may end it.

    python -m loractl.worker.base.self_test cuda GPU-...

It does on a small scale what a training does: a context, a product of matrices, a layer in NF4 forwards and backwards,
a step of the paged 8-bit optimizer; and it looks for itself in NVML. Everything except the context also runs on a CPU.
"""

from __future__ import annotations

import re
import sys
import time
from typing import Any, Literal

import torch

from loractl.worker.protocol.messages import SelfTestReport

from .arithmetic import choose_precision
from .gauge import in_a_sentence, is_out_of_memory, nvml_process
from .kernels import load_kernels

WIDTH = 512
"""Rows and columns of the matrices. From 100,000 elements on bitsandbytes keeps an optimizer's state in managed
memory, which must work as well."""

LEARNING_RATE = 0.01

TOLERANCE = 0.02
"""Relative error of a product: bf16 has 8 bits of mantissa."""

NF4_ERROR = 0.15
"""The most that quantised weights may differ from normally distributed ones; 0.09 is what NF4 costs."""

LISTED_WITHIN_S = 2.0
"""NVML lists a new process after a moment."""

_KNOWN = {
    "driver on your system is too old": "the driver is older than this torch needs (CUDA {cuda}): update the driver, or"
    " install a torch that was built for an older CUDA",
    "Found no NVIDIA driver": "CUDA finds no driver though NVML does: in a container, give it the driver's compute part"
    " (NVIDIA_DRIVER_CAPABILITIES=compute,utility)",
    "No CUDA GPUs are available": "CUDA sees no card though NVML does: look at the rights of /dev/nvidia*, and at"
    " NVIDIA_DRIVER_CAPABILITIES in a container",
    "no kernel image is available": "this torch has no code for a card of compute capability {capability}: install one"
    " that has",
    "busy or unavailable|exclusive|prohibited": "another process has the card for itself: end it, or nvidia-smi -c"
    " DEFAULT",
    "system not yet initialized": "NVIDIA's fabric manager does not run: systemctl start nvidia-fabricmanager",
    "uncorrectable ECC": "its memory is damaged (an uncorrectable ECC error): reset it; if it comes again, replace it",
    "version mismatch": "NVIDIA's library and kernel driver have different versions: reboot the box",
}
"""Messages of CUDA, torch and bitsandbytes, and what they mean for the box's owner."""


class WrongResultOnCard(Exception):
    """The card computes, but gets wrong results."""


def main() -> None:
    """Test the device of this process and print the report."""
    device, gpu = sys.argv[1:]
    assert device in ("cuda", "cpu")
    print(test("cuda" if device == "cuda" else "cpu", gpu).model_dump_json(), flush=True)  # noqa: T201  it is the answer


def test(device: Literal["cuda", "cpu"], gpu: str) -> SelfTestReport:
    """Do on a small scale what a training does; any failure becomes the report's fault."""
    began, facts = time.monotonic(), {"torch": torch.__version__, "cuda": torch.version.cuda}
    found: dict[str, Any] = {}
    try:
        if device == "cuda":
            _start_context(found, gpu)
        _multiply(device, found)
        _run_nf4(device)
        _step_in_8_bit(device)
        fault = None
        if device == "cuda":  # the process's memory: placement keeps free what a context takes beyond a plan
            found["process"] = size = nvml_process(gpu).bytes
            if size is not None:
                found["context_after"] = size - torch.cuda.memory_reserved()
    except Exception as error:  # noqa: BLE001  whatever it is, the card can't train, and its owner must read why
        fault = _in_words(error, {**facts, **found})
    return SelfTestReport(fault=fault, seconds=round(time.monotonic() - began, 1), **facts, **found)


def _start_context(found: dict[str, Any], gpu: str) -> None:
    if torch.version.cuda is None:
        raise AssertionError("Torch not compiled with CUDA enabled")
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    found["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    found["driver"] = _driver()
    deadline = time.monotonic() + LISTED_WITHIN_S
    while not (seen := nvml_process(gpu)).listed and time.monotonic() < deadline:
        time.sleep(0.1)
    found["sees_us"] = seen.listed
    if seen.bytes is not None:
        found["context"] = seen.bytes - torch.cuda.memory_reserved()


def _driver() -> str | None:
    import pynvml

    try:
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None  # only for people


def _multiply(device: str, found: dict[str, Any]) -> None:
    """A product in the format of trainings, compared with the CPU's in fp32."""
    dtype = choose_precision(device).base
    left, right = _matrix(0), _matrix(1)
    mine, other = left.to(device, dtype), right.to(device, dtype)
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    product = mine @ other
    if device == "cuda":
        torch.cuda.synchronize()
        found["workspaces"] = torch.cuda.memory_allocated() - before - product.nbytes
    _compare("a product of matrices", product, left @ right)


def _run_nf4(device: str) -> None:
    """A layer in NF4, forwards and backwards, compared with its own dequantised weights."""
    load_kernels()
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit

    dtype, weights = choose_precision(device).base, _matrix(2)
    layer = Linear4bit(WIDTH, WIDTH, bias=False, compute_dtype=dtype, quant_type="nf4", compress_statistics=True)
    layer.weight = Params4bit(weights.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    layer = layer.to(device)
    read_back = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float().cpu()
    if _error(read_back, weights) > NF4_ERROR:
        raise WrongResultOnCard("weights in NF4 are not what was quantised")
    given = _matrix(3).to(device, dtype).requires_grad_()
    answer = layer(given)
    answer.sum().backward()
    _compare("a layer in NF4", answer, _matrix(3) @ read_back.t())
    _compare("a layer in NF4, backwards,", given.grad, torch.ones(WIDTH, WIDTH) @ read_back)


def _step_in_8_bit(device: str) -> None:
    """A first step of AdamW moves each weight by the learning rate, against its gradient."""
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    weights = torch.nn.Parameter(_matrix(4).to(device))
    before, kind = weights.detach().clone(), PagedAdamW8bit if device == "cuda" else AdamW8bit
    optimizer = kind([weights], lr=LEARNING_RATE, weight_decay=0.0)
    weights.grad = torch.ones_like(weights)
    optimizer.step()
    moved = before - weights.detach()
    _compare("a step of the 8-bit optimizer", moved, torch.full((WIDTH, WIDTH), LEARNING_RATE))


def _matrix(seed: int) -> torch.Tensor:
    return torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed))


def _compare(what: str, mine: torch.Tensor | None, wanted: torch.Tensor) -> None:
    error = torch.inf if mine is None else _error(mine.detach().float().cpu(), wanted)
    if not error <= TOLERANCE:
        raise WrongResultOnCard(f"{what} comes out wrong, by {error:.0%}")


def _error(mine: torch.Tensor, wanted: torch.Tensor) -> float:
    """The relative error of all elements together; nan if one is nan."""
    return float((mine - wanted).norm() / wanted.norm())


def _in_words(error: Exception, facts: dict[str, Any]) -> str:
    """Why the card can't train, in a sentence, with the next step."""
    said = str(error)
    if "not compiled with CUDA" in said:
        return f"torch {facts['torch']} on this box has no CUDA build: install one that has"
    if is_out_of_memory(error):
        return f"there is no room for its self-test ({in_a_sentence(error)}): see who holds the memory in nvidia-smi"
    if isinstance(error, WrongResultOnCard):
        return f"{said}: look for Xid in dmesg, reset the card, then test it with dcgmi diag"
    for pattern, words in _KNOWN.items():
        if re.search(pattern, said):
            return words.format(**{"cuda": "?", "capability": "?", **facts})
    first = next((line.strip() for line in said.splitlines() if line.strip()), type(error).__name__)
    return f"its self-test failed: {first[:300]}"


if __name__ == "__main__":
    main()
