"""How long the commands take that people type all day, as whole processes, and what they import.

    .venv/bin/python -m benchmarks.startup [runs]

Prints medians in ms and ratios to `python -c "import click"` in the same run: absolute times belong to the machine.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HEAVY = ("click", "yaml", "pydantic", "sqlalchemy", "alembic", "kombu", "celery", "redis", "fsspec", "torch")
JOB = "name: bench\nbase_model: gpt2\ndataset: {path: data.jsonl}\n"
ROW = '{"prompt": "a%d", "completion": "b"}\n'


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    with tempfile.TemporaryDirectory(prefix="lb-") as scratch:
        folder = Path(scratch)
        (folder / "job.yaml").write_text(JOB)
        (folder / "data.jsonl").write_text("".join(ROW % n for n in range(20)))
        environment = {**os.environ, "LORACTL_HOME": str(folder / "home")}
        command = str(Path(sys.executable).with_name("loractl"))
        rows = {
            "python -c 'import click'": [sys.executable, "-c", "import click"],
            "loractl --help": [command, "--help"],
            "loractl status": [command, "status"],
            "loractl submit": [command, "submit", str(folder / "job.yaml")],
        }
        subprocess.run(rows["loractl submit"], env=environment, check=True, capture_output=True)  # makes the home
        # in turn, so that a slow moment of the machine falls on all of them
        times: dict[str, list[float]] = {name: [] for name in rows}
        for _ in range(runs):
            for name, args in rows.items():
                began = time.perf_counter()
                subprocess.run(args, env=environment, check=True, capture_output=True)
                times[name].append(1000 * (time.perf_counter() - began))
        base = statistics.median(times["python -c 'import click'"])
        print(f"{'command':<28}{'median ms':>10}{'min':>7}{'max':>7}{'ratio':>7}  imports")
        for name, values in times.items():
            median = statistics.median(values)
            seen = " ".join(imported(rows[name], environment))
            print(f"{name:<28}{median:>10.0f}{min(values):>7.0f}{max(values):>7.0f}{median / base:>7.1f}  {seen}")
        subprocess.run([command, "db", "stop"], env=environment, check=True, capture_output=True)


def imported(args: list[str], environment: dict[str, str]) -> list[str]:
    """Which of the heavy packages the command loads, by Python's own import log."""
    traced = [sys.executable, "-X", "importtime", *(args[1:] if args[0] == sys.executable else args)]
    log = subprocess.run(traced, env=environment, check=True, capture_output=True, text=True).stderr
    loaded = {line.rpartition("|")[2].strip() for line in log.splitlines()}
    return [name for name in HEAVY if name in loaded]


if __name__ == "__main__":
    main()
