"""From claim to first step, with a spare trainer and without: python -m benchmarks.spare [MODEL] [JOBS].

The installed `loractl`, one worker on the processor for each way, the jobs one after another and the two ways in turn,
so that a slow moment of the machine falls on both. Each pair begins when a spare is ready, so none is imported beside a
job that is measured. Times are those at which the worker says that it claimed and that step 1 is done. Without a
model's folder it is a tiny random Llama.
"""

from __future__ import annotations

import os
import queue
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from tests.models import make_tiny_model, write_job


class Lab:
    """A home with a worker, whose lines are read with their times."""

    def __init__(self, home: Path, *options: str) -> None:
        self.environment = {**os.environ, "LORACTL_HOME": str(home), "LORACTL_DEVICES": "cpu", "HF_HUB_OFFLINE": "1"}
        self.command = str(Path(sys.executable).with_name("loractl"))
        self.spare = "--spare" in options
        self.claimed_at = 0.0  # the first job
        self.run("status")
        self.worker = subprocess.Popen(
            [self.command, "worker", *options], env=self.environment, stderr=subprocess.PIPE, text=True
        )
        self._lines: queue.SimpleQueue[tuple[float, str]] = queue.SimpleQueue()
        self._read_lines: list[tuple[float, str]] = []
        self._job = 0
        self.ready = threading.Semaphore(0)  # the spares that are ready and not taken
        threading.Thread(target=self._read, daemon=True).start()

    def run(self, *args: object) -> None:
        command = [self.command, *map(str, args)]
        subprocess.run(command, env=self.environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def first_step(self, job: Path) -> float:
        """Seconds from the claim of such a job to its first step. Waits for its end."""
        self.run("submit", job, "--set=training.logging_steps=1")
        return self.next_first_step()

    def next_first_step(self) -> float:
        """The same for the next job that was queued before. It may train beside the last one."""
        self._job += 1
        claimed = self.when(rf"job {self._job}\b.*attempt 1 with")
        self.claimed_at = self.claimed_at or claimed
        stepped = self.when(rf"job {self._job}\b.*step 1 of")
        self.when(rf"job {self._job} \S+: succeeded")
        return stepped - claimed

    def when(self, pattern: str) -> float:
        """The time of the first line like this."""
        number = 0
        while True:
            if number == len(self._read_lines):
                self._read_lines.append(self._lines.get(timeout=300))
            at, line = self._read_lines[number]
            if re.search(pattern, line):
                return at
            number += 1

    def end(self) -> None:
        self.worker.terminate()
        self.worker.wait()
        self.run("db", "stop")

    def _read(self) -> None:
        assert self.worker.stderr
        for line in self.worker.stderr:
            self._lines.put((time.perf_counter(), line))
            if "a spare trainer is ready" in line:
                self.ready.release()


def main() -> None:
    model = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    jobs = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    with tempfile.TemporaryDirectory(prefix="lb-") as scratch:
        folder = Path(scratch)
        job = write_job(folder, (model or make_tiny_model(folder / "tiny")).absolute())
        ways = {
            "cold": Lab(folder / "c", "--no-spare"),
            "spare": Lab(folder / "s", "--spare"),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        try:
            for _ in range(jobs):
                assert ways["spare"].ready.acquire(timeout=300)
                for way, lab in ways.items():
                    times[way].append(lab.first_step(job))
                    print(f"{way}: {times[way][-1]:.2f} s", flush=True)
        finally:
            for lab in ways.values():
                lab.end()
    cold, spare = (statistics.median(times[way]) for way in ways)
    print(f"claim to first step, median of {jobs}: cold {cold:.2f} s, spare {spare:.2f} s, ratio {spare / cold:.2f}")


if __name__ == "__main__":
    main()
