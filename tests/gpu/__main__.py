"""make gpu: the experiments on this machine's first card, in 8 minutes at most; writes docs/gpu.md.

python -m tests.gpu docs/gpu.md [long]

`long`: 40 minutes, the speeds at 8B, LoRA at 8B, and plans of all families.
"""

from __future__ import annotations

import datetime as dt
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from loractl.common.queue.valkey import stop_embedded
from loractl.common.settings import load_settings

from .experiments import EXPERIMENTS
from .page import page
from .rig import Figure, Rig, make_rig

BUDGET_S, LONG_S = 8 * 60.0, 40 * 60.0


def main() -> int:
    import torch

    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # the first card is NVML's first, and not the fastest
    if not torch.cuda.is_available():
        print("make gpu needs an NVIDIA card and a torch with CUDA; nothing was run, docs/gpu.md stays as it is")
        return 1
    name = _name_of_card()
    began, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="loractl-gpu-"))
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LORACTL_", "AWS_"))}
    long = sys.argv[2:] == ["long"]
    rig = make_rig(folder, kept, device="cuda", small=False, budget_s=LONG_S if long else BUDGET_S, long=long)
    try:
        figures = run(rig)
    finally:
        stop_embedded(load_settings(rig.cli.environment))
        shutil.rmtree(folder, ignore_errors=True)
    when = f"{dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M} UTC, torch {torch.__version__}"
    text = page(figures, name, when, time.monotonic() - began, sum(rig.workshop.seconds))
    Path(sys.argv[1]).write_text(text)
    print(text)
    return 0 if well(figures) else 1


def _name_of_card() -> str:
    """Asked of the driver: this process starts no context, which would be one more program on the card."""
    import pynvml

    pynvml.nvmlInit()
    return str(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0)))


def well(figures: Mapping[str, Sequence[Figure]]) -> bool:
    """Whether every line is as it should be, and nothing is missing but what had no time."""
    reached = all(part or not EXPERIMENTS[name].always for name, part in figures.items())
    return reached and all(figure.ok for part in figures.values() for figure in part)


def run(rig: Rig) -> dict[str, list[Figure]]:
    """All experiments for which there is time. What one raises is its last line; the next one goes on."""
    figures: dict[str, list[Figure]] = {name: [] for name in EXPERIMENTS}
    for name, experiment in EXPERIMENTS.items():
        began = time.monotonic()
        if (0 if experiment.always else experiment.seconds) > rig.left:
            continue
        try:
            for figure in experiment.run(rig):
                figures[name].append(figure)
        except Exception as error:  # noqa: BLE001  an hour of a card is dear: the other experiments go on
            figures[name].append(Figure(what="it ended with an error", value=repr(error), ok=False))
        print(f"{name}: {time.monotonic() - began:.0f} s", *figures[name], sep="\n  ", flush=True)
    return figures


if __name__ == "__main__":
    sys.exit(main())
