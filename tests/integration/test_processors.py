"""One machine as several: what a processor lacks is hidden from the libraries, and nothing that is promised changes.

oneDNN, MKL and torch each have a variable for the instructions that they may use at most. With MKL_CBWR=COMPATIBLE
products in fp32 depend on the number of rows on processors where they otherwise do not, so packs must find that out.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .. import warm
from ..conftest import ROOT

KINDS = {
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "AVX-512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
    "AVX-512 with bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
    "as it is": {},
    "rounds by rows": {"MKL_CBWR": "COMPATIBLE"},
}
NEEDS = {"AVX-512": "avx512f", "AVX-512 with bf16": "avx512_bf16"}

PROMISES = [
    "tests/integration/test_engine.py",
    "tests/integration/test_lean.py",
    "tests/integration/test_trainings.py",
    "tests/integration/test_resume_proof.py",
    "tests/acceptance/test_reproduce.py",
]
"""What must hold on every processor: bits of a resume, a reproduced job, and the Trainer's."""

TRAININGS = "tests/integration/test_trainings.py::test_"


def machine(kind: str, threads: int) -> dict[str, str]:
    """The environment of a process on such a machine. Skips what this one can't be."""
    about = Path("/proc/cpuinfo").read_text().split()
    if kind in NEEDS and NEEDS[kind] not in about:
        pytest.skip(f"this processor has no {NEEDS[kind]}")
    outer = ("PYTEST_", "MKL_", "WARM_SERVERS_OF_THE_RUN")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
    return {**kept, **KINDS[kind], "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "test"),
    [
        ("rounds by rows", "recomputation_changes_no_bit[lora in fp32-evaluated-1]"),
        ("AVX-512", "a_checkpoint_is_resumed_bit_for_bit[nf4]"),
    ],
)
def test_a_training_is_the_same_bit_for_bit_on_another_processor(
    warm_start: dict[str, str], kind: str, test: str
) -> None:
    """The cheapest of all below, at two threads, in a process that has its imports behind it."""
    program = f"import pytest, sys; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', {TRAININGS + test!r}]))"
    start = [
        sys.executable,
        "-SE",
        str(warm.__file__),
        "--python",
        warm.HEAVY,
        warm_start[warm.SOCKET],
        "-u",
        "-c",
        program,
    ]
    environment = {**machine(kind, 2), warm.SOCKET: warm_start[warm.SOCKET]}
    done = subprocess.run(start, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-4000:] + done.stderr[-1000:]


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_all_that_promises_bits_keeps_them_on_every_processor(kind: str, threads: int) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *PROMISES]
    environment = {**machine(kind, threads), "TESTS": ""}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stdout[-8000:]
