"""Trainings in a pack against the same ones after each other: python -m benchmarks.packs MODEL ROWS CASE [CASE ...]

CASE is a base and the tokens of each member's micro-batch: `bf16:64,64,64,64`; `4x128` stands for four rows of 128. In
one process on one thread, a step of the pack and a step of each member alone come in turn. Told are CPU seconds of both
(the median of the steps after the first), their ratio, whether all weights are the same bit for bit, the least ratio at
which members of different people end sooner in the mean, and what the pack rule thinks of it before it has measured
anything. `memory:4` instead tells the largest resident set of four members of 256 tokens in one process, beside that of
one; `memory-recomputing:4` with gradient checkpointing.
"""

from __future__ import annotations

import gc
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STEPS = 6
"""The first one is not measured: it compiles kernels."""


def main() -> None:
    model, rows, *cases = sys.argv[1:]
    model, rows = str(Path(model).resolve()), str(Path(rows).resolve())
    for case in cases:
        kind, _, given = case.partition(":")
        if kind.startswith("memory"):
            _tell_memory(model, rows, kind, int(given))
        elif kind.startswith("peak"):
            print(_peak(model, rows, int(given), recompute="recomputing" in kind))
        else:
            print(_compare(model, rows, kind, given.split(",")), flush=True)


@dataclass
class Side:
    """Members, and what their steps took."""

    packs: list[Any]
    members: list[Any]
    costs: list[float] = field(default_factory=list)

    def step(self) -> None:
        gc.collect()
        began = time.process_time()
        for pack in self.packs:
            for ending in pack.step():
                raise ending.error or RuntimeError("a member ended")
        self.costs.append(time.process_time() - began)


def _compare(model: str, rows: str, kind: str, shapes: list[str]) -> str:
    import torch

    from loractl.common.placement.pack_rule import PackedJob, PassLaw, join_verdict

    torch.set_num_threads(1)
    lab = Lab(model, rows, kind)
    together, alone = lab.side(shapes, one_pack=True), lab.side(shapes, one_pack=False)
    for _ in range(STEPS):
        together.step()
        alone.step()
    same = all(
        torch.equal(a, b)
        for mine, theirs in zip(together.members, alone.members, strict=True)
        for a, b in zip(mine.trained, theirs.trained, strict=True)
    )
    pack, single = (statistics.median(side.costs[1:]) for side in (together, alone))
    count, tokens = len(shapes), [_tokens(shape) for shape in shapes]
    jobs = [PackedJob(tokens=number, sweep="s") for number in tokens]
    verdict = join_verdict(PassLaw.start(quantised=kind == "nf4"), jobs[1:], jobs[0])
    return (
        f"{kind} {count} jobs, {', '.join(shapes):40s} one by one {single:6.2f} s, pack {pack:6.2f} s, "
        f"{single / pack:5.2f}x, same bits: {'yes' if same else 'NO'}; others need {2 * count / (count + 1):.2f}x; "
        f"rule {verdict.speed_up:.2f}x"
    )


def _tokens(shape: str) -> int:
    count, _, length = shape.rpartition("x")
    return int(count or 1) * int(length)


class Lab:
    """One base, and members on it that learn rows of a given number of tokens."""

    def __init__(self, model: str, rows: str, kind: str, *, recompute: bool = False) -> None:
        from loractl.common.job.method import Method
        from loractl.common.job.spec import JobSpec
        from loractl.worker.base.arithmetic import choose_precision
        from loractl.worker.base.model import load_base, load_tokenizer
        from loractl.worker.data.prepared import prepare_data
        from loractl.worker.engine.passes.choice import shared_base

        asked = {
            "name": "b", "base_model": model, "method": "qlora" if kind == "nf4" else "lora",
            "dataset": {"path": rows, "max_length": 256}, "training": {"dtype": "bfloat16"},
            "lora": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0},
        }  # fmt: skip
        self._spec, self._method = JobSpec.model_validate(asked), Method(asked["method"])
        data = prepare_data(self._spec.dataset, rows, None, None, load_tokenizer(model), None)
        self._tokens = [pair for row in data.train.rows for pair in zip(row.input_ids, row.labels, strict=True)]
        self._precision, self._recompute = choose_precision("cpu", "bfloat16"), recompute
        base = shared_base(load_base(model, self._method, "cpu", self._precision), self._precision)
        assert base is not None
        self._base = base

    def side(self, shapes: list[str], *, one_pack: bool) -> Side:
        from loractl.worker.engine.pack import Pack

        members = [self._member(number, shape) for number, shape in enumerate(shapes)]
        packs = [Pack()] if one_pack else [Pack() for _ in members]
        for pack, member in zip(itertools.cycle(packs), members, strict=False):
            pack.join(member)
        return Side(packs=packs, members=members)

    def _member(self, number: int, shape: str) -> Any:
        from transformers import TrainingArguments, set_seed

        from loractl.worker.base.arithmetic import compute_in
        from loractl.worker.base.lora import add_adapter
        from loractl.worker.data.tokens import TokenRow
        from loractl.worker.engine.member import MemberRows, PackMember
        from loractl.worker.engine.passes.shared import SharedPass

        count, _, length = shape.rpartition("x")
        batch, size = int(count or 1), int(length)
        pairs = itertools.cycle(self._tokens[number * 5000 :])
        rows = []
        for n in range(batch * (STEPS + 2)):
            ids, labels = zip(*itertools.islice(pairs, size), strict=True)
            rows.append(TokenRow(number=n, input_ids=[*ids], labels=[*labels]))
        set_seed(number)
        model = add_adapter(self._base.view(), self._spec, self._method)
        compute_in(model, self._precision)
        arguments = TrainingArguments(
            output_dir=tempfile.mkdtemp(), max_steps=STEPS + 2, per_device_train_batch_size=batch, bf16=True,
            use_cpu=True, save_strategy="no", report_to=[], optim="adamw_torch_fused", learning_rate=1e-3,
            train_sampling_strategy="sequential", activation_checkpointing=self._recompute, disable_tqdm=True,
        )  # fmt: skip
        return PackMember(SharedPass(self._base, model), arguments, MemberRows(train=rows, held_out=[]))


def _tell_memory(model: str, rows: str, kind: str, count: int) -> None:
    peak = kind.replace("memory", "peak")
    several, one = (_child(model, rows, f"{peak}:{n}") for n in (count, 1))
    print(
        f"peak RSS: {count} members in one process {several:.0f} MiB, {count} processes of one {count * one:.0f} MiB "
        f"({several / count / one:.2f})"
    )


def _child(model: str, rows: str, case: str) -> float:
    command = [sys.executable, "-m", "benchmarks.packs", model, rows, case]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return float(done.stdout.splitlines()[-1])


def _peak(model: str, rows: str, count: int, *, recompute: bool) -> float:
    import torch

    torch.set_num_threads(1)
    side = Lab(model, rows, "bf16", recompute=recompute).side(["256"] * count, one_pack=True)
    for _ in range(2):
        side.step()
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
