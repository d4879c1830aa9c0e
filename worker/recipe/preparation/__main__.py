"""The process that prepares data during other trainings: an order on stdin, files in a folder, its end on stdout.

    python -m loractl.worker.recipe.preparation FOLDER

If the box runs out of memory, the kernel kills this process, and no training.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import threading
import traceback
from pathlib import Path
from typing import NoReturn

from loractl.common.errors import DataError
from loractl.common.job.status import Reason
from loractl.worker.base.failure import TrainingFailed, explain
from loractl.worker.protocol.messages import Ended, Start, decode_order, encode
from loractl.worker.recipe.order_desk import EXIT_ORPHANED

MOST_OF_RAM = 0.5
"""Share of the box's RAM that a preparation may take if its owner sets no limit."""


def main() -> NoReturn:
    """Prepare one order's data."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries' output goes to the log
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    order = decode_order(sys.stdin.readline())
    assert isinstance(order, Start)
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    channel.write(encode(_prepared(order, Path(sys.argv[1]))))
    channel.flush()
    sys.stderr.flush()
    os._exit(0)  # everything is written: memory needs no cleanup


def _end_with_stdin() -> None:
    while os.read(0, 1024):
        pass
    os._exit(EXIT_ORPHANED)


def _prepared(order: Start, folder: Path) -> Ended:
    """Prepare; the end has the same reason and sentence as in the trainer."""
    from loractl.worker.base.model import load_tokenizer
    from loractl.worker.base.quiet import quieten
    from loractl.worker.data.prompt import templated

    from .handover import prepare_rows, write_handover

    quieten()
    spec = order.spec
    limited = order.device == "cpu" and order.memory_limit is not None
    try:
        tokenizer = templated(load_tokenizer(spec.base_model, spec.revision), spec.dataset.template)
        _hold_to(order.memory_limit if limited else None)  # after the imports, which depend on the tokenizer's kind
        write_handover(prepare_rows(order, spec, tokenizer), spec, folder)
    except DataError as error:
        return Ended(job_id=order.job_id, reason=Reason.BAD_DATA, message=error.with_hint)
    except TrainingFailed as error:
        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        return Ended(job_id=order.job_id, reason=error.reason, message=error.sentence)
    except Exception as error:  # noqa: BLE001  the last place that can name the failure, as in the trainer
        traceback.print_exc()
        reason, message = explain(error, own_limit=limited)
        return Ended(job_id=order.job_id, reason=reason, message=message)
    return Ended(job_id=order.job_id, reason=Reason.OK, message="")


def _hold_to(limit: int | None) -> None:
    """Make allocations fail beyond this many bytes on top of the libraries; None: beyond a share of the box's RAM."""
    from loractl.worker.base.gauge import data_bytes

    if limit is None:
        limit = int(MOST_OF_RAM * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = data_bytes() + limit
    resource.setrlimit(resource.RLIMIT_DATA, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


if __name__ == "__main__":
    main()
