"""The processes of a gang besides the leader's, which starts them: to the supervisor they are all one trainer.

They end with the leader, whose end closes their stdin. If one of them ends too early, the leader says why and ends.
"""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO

from loractl.common.job.status import Reason
from loractl.worker.allowance import kernel_kills, kernel_kills_since
from loractl.worker.protocol.exit_reason import exit_reason
from loractl.worker.protocol.messages import Ended, Peaks, Rank, Start, Told, encode, told_in

TRAINER = "loractl.worker.recipe.trainer"

LINK_LOST = "its link to the job's other processes broke"
"""What a rank says when another is gone. It is never the cause."""

GRACE_S = 3.0
"""How long the leader has, after another rank's failure, to notice it by its broken link and to end in order. A card's
kernel may wait forever instead."""

LAST_LINES = 40


class OtherRanks:
    """The other ranks of a training, from their start."""

    def __init__(self, order: Start, tell: Callable[[Told], None], trainer: str = TRAINER) -> None:
        """`trainer`: the module that each of them runs."""
        self._tell, self._trainer = tell, trainer
        self._folder = tempfile.TemporaryDirectory(prefix="gang-", dir=Path(order.output_dir).parent)  # only for us
        self.order = order.model_copy(update={"meeting": str(Path(self._folder.name) / "meeting")})
        self._said: queue.SimpleQueue[Ended] = queue.SimpleQueue()  # from failed ranks
        self._peaks = Peaks()
        self._settled = threading.Event()
        self._watchers = [self._begin(rank) for rank in order.ranks if rank.rank != order.rank]

    def settle(self, ended: Ended) -> Ended:
        """The leader's end as the job's: if another rank has failed, with that rank's reason."""
        self._settled.set()
        if ended.reason in (Reason.TRAINER_ERROR, Reason.EVALUATION_FAILED) and ended.withdrawn is None:
            with contextlib.suppress(queue.Empty):  # then it was the leader's own error
                ended = self._said.get(timeout=GRACE_S)
        if ended.reason is Reason.OK:
            for watcher in self._watchers:
                watcher.join(timeout=GRACE_S)
        self._folder.cleanup()
        own = ended.peaks
        return ended if own is None else ended.model_copy(update={"peaks": self._peaks.above(own)})

    def _begin(self, rank: Rank) -> threading.Thread:
        kills = kernel_kills()
        process = subprocess.Popen(
            [sys.executable, "-m", self._trainer],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, **rank.environment},
        )
        assert process.stdin is not None
        own = {"rank": rank.rank, "node": rank.node, "gpu": rank.gpu, "device": rank.device}
        order = self.order.model_copy(update={**own, "memory_limit": rank.memory_limit})
        process.stdin.write(encode(order))
        process.stdin.flush()
        watcher = threading.Thread(
            target=self._watch, args=(rank, process, kills), name=f"rank {rank.rank}", daemon=True
        )
        watcher.start()
        return watcher

    def _watch(self, rank: Rank, process: subprocess.Popen[str], kills: int | None) -> None:
        """Watch a process until it has ended; end the leader's if it failed and the leader does not notice."""
        lines: deque[str] = deque(maxlen=LAST_LINES)
        assert process.stdout is not None and process.stderr is not None
        printer = threading.Thread(target=_print, args=(rank, process.stderr, lines), daemon=True)
        printer.start()
        ended = None
        for line in process.stdout:
            message = told_in(line)
            if isinstance(message, Ended):
                ended = message
        code = process.wait()
        printer.join(timeout=GRACE_S)
        if ended is None:
            limited = rank.device == "cpu" and rank.memory_limit is not None
            killed, on_card = kernel_kills_since(kills), rank.device == "cuda"
            why = exit_reason(code, lines, kernel_kills=killed, limited=limited, on_card=on_card)
            ended = Ended(job_id=self.order.job_id, **why)
        if ended.peaks is not None:
            self._peaks = self._peaks.above(ended.peaks)
        if ended.reason is Reason.OK or ended.message == LINK_LOST:
            return
        told = {"message": f"rank {rank.rank} on {rank.node}: {ended.message}", "card": rank.node}
        cause = ended.model_copy(update=told)
        self._said.put(cause)
        if not self._settled.wait(GRACE_S):
            self._tell(cause)
            os._exit(1)


def _print(rank: Rank, pipe: IO[str], lines: deque[str]) -> None:
    """Pass on a rank's output, under its name."""
    for line in pipe:
        lines.append(line)
        sys.stderr.write(f"[rank {rank.rank}] {line}")
        sys.stderr.flush()
