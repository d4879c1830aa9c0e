"""The memory plan beside a traced training step, for cut models of every family: python -m benchmarks.memory_trace
[exact] [FAMILY ...].

Prints what a training allocates as planned and as traced, the error of all of it, and that of its own part: activations
and loss.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

from tests.integration.test_memory_trace import FAMILIES, SETTINGS, compare, job

KIB = 1024


def main() -> None:
    warnings.simplefilter("ignore")
    print(f"{'family':16} method checkpointing  planned KiB   traced KiB   error     own")
    with tempfile.TemporaryDirectory() as folder:
        for family in [word for word in sys.argv[1:] if word != "exact"] or FAMILIES:
            for method, checkpointing, vocab in SETTINGS:
                spec = job(family, checkpointing=checkpointing, exact="exact" in sys.argv)
                planned, trace = compare(family, spec, method, Path(folder), vocab)
                own = (planned - trace.peak) / trace.own
                print(
                    f"{family:16} {method.value:6} {'yes' if checkpointing else 'no':13} {planned // KIB:12,} "
                    f"{trace.peak // KIB:12,} {planned / trace.peak - 1:+7.1%} {own:+7.1%}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
