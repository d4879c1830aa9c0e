"""Where a step's time goes on the card: products, attention, norms, the rest, and the gaps between kernels.

    python -m tests.gpu.split MODEL ROWS METHOD DEVICE BATCH LENGTH DROPOUT

Prints a line of JSON for steps with recomputation and one without: milliseconds a step by part, and kernels. A kernel's
part is told by its name, so norms that are no kernel of their own count as the rest. On a processor, for the rehearsal,
operators stand for kernels.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from typing import Any

from .solo import UNMEASURED, Course, forget, loop_of

STEPS = 2
"""That are looked at."""

PARTS = {
    "attention": r"flash|fmha|attention|softmax_warp",
    "NF4": r"4bit|quantize",
    "products": r"gemm|gemv|cutlass|xmma|nvjet|splitk|(?<!\w)(?:add|b|badd)?mm(?!\w)",
    "optimizer": r"adam|multi_tensor|foreach|vector_norm",
    "norms": r"norm(?!al)",
    "copies": r"memcpy|memset|copy|(?<!\w)cat(?!\w)",
}
"""Each with the names of its kernels, looked for in this order; what has none of these is elementwise."""


def main() -> None:
    model, rows, method, device, batch, length, dropout = sys.argv[1:]
    for recomputes in (True, False):
        course = Course.of(
            model, rows, method, device, UNMEASURED + STEPS + 1, int(batch), int(length), float(dropout), recomputes
        )
        print(json.dumps({"recomputes": recomputes, **look_at(course)}), flush=True)


def part_of(kernel: str) -> str:
    """The part of a step that a kernel belongs to."""
    return next((part for part, names in PARTS.items() if re.search(names, kernel.lower())), "elementwise")


def split(kernels: Iterable[tuple[str, float, float]], steps: int) -> dict[str, Any]:
    """Milliseconds a step by part. `kernels`: names, and when each began and ended, in microseconds."""
    spans = sorted(kernels, key=lambda one: one[1])
    spent, idle, until = Counter[str](), 0.0, spans[0][1] if spans else 0.0
    for name, began, ended in spans:
        spent[part_of(name)] += max(0.0, ended - max(began, until))  # two at once count once
        idle += max(0.0, began - until)
        until = max(until, ended)
    parts = {part: time / 1e3 / steps for part, time in spent.most_common()}
    return {"parts": parts, "gaps": idle / 1e3 / steps, "kernels": len(spans) // steps}


def look_at(course: Course) -> dict[str, Any]:
    """Steps of the engine, under torch's profiler."""
    from torch.autograd import DeviceType

    forget(course.device)
    seen = _profiler(course.device)
    with tempfile.TemporaryDirectory() as folder:
        loop_of(course, folder, (seen,))[0].run()
    if course.device == "cuda":
        events = [one for one in seen.events() if one.device_type == DeviceType.CUDA]
    else:
        events = [one for one in seen.events() if _is_operator(one) and not _is_operator(one.cpu_parent)]
    return split([(one.name, one.time_range.start, one.time_range.end) for one in events], STEPS)


def _profiler(device: str) -> Any:
    """A callback that looks at STEPS steps, and ends the training after them."""
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback

    from .solo import wait_for

    class Profiler(TrainerCallback):
        def __init__(self) -> None:
            self._seen = profile(activities=[ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU])

        def events(self) -> Any:
            return self._seen.events()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == UNMEASURED:
                wait_for(device)
                self._seen.start()
            if state.global_step == UNMEASURED + STEPS:
                wait_for(device)
                self._seen.stop()
                control.should_training_stop = True

    return Profiler()


def _is_operator(event: Any) -> bool:
    return event is not None and event.name.startswith("aten::")


if __name__ == "__main__":
    main()
