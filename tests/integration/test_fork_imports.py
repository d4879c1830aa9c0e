"""What a fork server imports asks no card for anything: in a process whose torch believes that it has one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, sys, types, traceback
import torch
from loractl.worker.base.kernels import load_kernels
from loractl.worker.recipe.fork_server import import_all
from loractl.worker.recipe.trainer import _load

asked = []
def lazy_init():
    asked.append("".join(traceback.format_stack()[-4:]))
    raise RuntimeError("CUDA is brought up")
def count():
    asked.append("".join(traceback.format_stack()[-4:]))
    return 1
torch.cuda.is_available = count
torch.cuda.device_count = count
torch.cuda._lazy_init = lazy_init
torch._C._cuda_getCurrentRawStream = None  # bitsandbytes binds the name; a torch for processors does not have it

if not (child := os.fork()):  # on `cpu` the question is torch's, so this shows that bitsandbytes does ask it
    import_all("cpu", load_kernels)
    print("".join(asked), flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
nvml = sys.modules["pynvml"] = types.ModuleType("pynvml")
nvml.nvmlInit = nvml.nvmlShutdown = nvml.nvmlDeviceGetHandleByUUID = lambda *_: None
nvml.nvmlDeviceGetCudaComputeCapability = lambda card: (8, 6)
import_all("cuda", _load)
assert "bitsandbytes" in sys.modules and "peft" in sys.modules and torch.cuda.is_available is count
assert torch.compile.__module__ == "torch" and "torch._inductor.compile_fx" not in sys.modules, "it takes a second"
sys.exit("".join(asked) or 0)
"""


@pytest.mark.long
def test_no_import_brings_up_cuda_where_the_driver_tells_the_capability() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "GPU-1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "cuda_specs.py" in done.stdout, done.stdout[-3000:]
