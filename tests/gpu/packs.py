"""Packs on one base against the same trainings one by one, in one process.

    python -m tests.gpu.packs MODEL ROWS KIND DEVICE CARD SHAPE [SHAPE ...]

KIND is bf16 or nf4, a SHAPE like 4x256: four members, each of one row of 256 tokens. Prints a line of JSON a shape, and
a last one with what the pack rule makes of all passes that were measured. One by one is a member alone, as many times:
members are alike in shape. Its first and last member are trained alone, too, to see by what a pack moves their results.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .lab import Lab
from .solo import UNMEASURED, forget
from .steps import Steps, steps_of

STEPS = 3
"""That are measured."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A lab on the device."""

    lab: Any
    model: str
    kind: str
    device: str
    card: str

    def compare(self, count: int, length: int) -> dict[str, Any]:
        """A pack of so many members, and what they take and learn alone."""
        forget(self.device)
        shape = str(length)
        seconds, ours = self.train(range(count), shape, self.memory)
        forget(self.device)
        alone = {n: self.train([n], shape) for n in (0, count - 1)}
        one = statistics.median(took for took, _ in alone.values())
        pairs = [(ours.results[n], result.results[0]) for n, (_, result) in alone.items()]
        return {
            "members": count,
            "tokens": length,
            "pack": seconds,
            "one": one,
            **(ours.memory or {}),
            "planned": self.planned(count, length),
            "loss": max(abs(a.loss - b.loss) / abs(b.loss) for a, b in pairs),
            "weight": max(a.farthest(b) for a, b in pairs),
            "moved": max(a.away(b) for a, b in pairs),
        }

    def train(
        self, members: Sequence[int], shape: str, look: Callable[[], Any] = lambda: None
    ) -> tuple[float, Trained]:
        """The median step of these in one pass, and what the first and last of them have become."""
        import torch

        from loractl.worker.base.arithmetic import evaluating

        def weights(loop: Any) -> list[Any]:
            return [p.detach().cpu().clone() for p in loop.trained]

        def held_out(loop: Any) -> float:
            with evaluating(loop.model):
                return float(loop.forward.held_out_loss(loop.rows.held_out))

        make = [functools.partial(self.lab.loop, number, shape) for number in members]
        with steps_of(torch.device(self.device), *make) as steps:
            ends = sorted({0, len(members) - 1})
            begun = {n: steps.run(weights, n) for n in ends}
            took = [self._step(steps) for _ in range(UNMEASURED + STEPS)][UNMEASURED:]
            memory = steps.run(lambda loop: look())
            results = {
                n: Result(loss=steps.run(held_out, n), weights=steps.run(weights, n), begun=begun[n]) for n in ends
            }
        return statistics.median(took), Trained(results=results, memory=memory)

    def _step(self, steps: Steps) -> float:
        steps.run(lambda loop: self._wait())
        began = time.perf_counter()
        steps.step()
        steps.run(lambda loop: self._wait())
        return time.perf_counter() - began

    def _wait(self) -> None:
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()

    def memory(self) -> dict[str, int | None]:
        """The allocator's peaks, and what the driver shows of this process."""
        import torch

        from loractl.worker.base.gauge import nvml_process

        if self.device == "cpu":
            return {"allocated": 0, "reserved": 0, "process": None}
        peaks = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        return {**peaks, "process": nvml_process(self.card).bytes}

    def planned(self, count: int, length: int) -> int:
        """A job with the base, and the own parts of the others, as placement adds them up."""
        from loractl.common.job.method import Method
        from loractl.common.job.spec import JobSpec
        from loractl.common.memory.context import CONTEXT_BYTES
        from loractl.common.memory.plan import predict
        from loractl.common.memory.step import Lengths
        from loractl.common.placement.hosts import own_part

        training = {"dtype": "bfloat16", "per_device_train_batch_size": 1, "optim": "adamw_torch_fused"}
        asked = {"name": "p", "base_model": self.model, "method": "qlora" if self.kind == "nf4" else "lora"}
        lora, dataset = {"r": 8, "lora_alpha": 16}, {"path": "x.jsonl", "max_length": length}
        spec = JobSpec.model_validate({**asked, "lora": lora, "dataset": dataset, "training": training})
        need = predict(spec, Lengths(train=length, evaluate=length)).of(Method(asked["method"]))
        assert need is not None, "the family has a plan"
        base = sum(weight.nbytes for weight in self.lab.base.model.parameters()) + CONTEXT_BYTES
        return int(need + (count - 1) * own_part(need, base))


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one member has become."""

    loss: float
    weights: list[Any]
    begun: list[Any]

    def farthest(self, other: Result) -> float:
        """The largest difference of a weight."""
        return max(float((a - b).abs().max()) for a, b in zip(self.weights, other.weights, strict=True))

    def away(self, other: Result) -> float:
        """How far all weights are from another's, as a share of the way that these have come."""
        apart = sum(float((a - b).square().sum()) for a, b in zip(self.weights, other.weights, strict=True))
        way = sum(float((a - b).square().sum()) for a, b in zip(other.weights, self.begun, strict=True))
        return float((apart / way) ** 0.5)


@dataclass(frozen=True, kw_only=True)
class Trained:
    results: dict[int, Result]
    memory: dict[str, int | None] | None


def verdicts(found: list[dict[str, Any]], *, quantised: bool) -> list[dict[str, Any]]:
    """What the pack rule says of each shape: before a pass was measured, and once all of these were."""
    from loractl.common.placement.pack_rule import MeasuredPass, PackedJob, PassLaw, join_verdict

    start = law = PassLaw.start(quantised=quantised)
    for row in found:
        for count, seconds in ((1, row["one"]), (row["members"], row["pack"])):
            law = law.learn(MeasuredPass(tokens=count * row["tokens"], members=count, seconds=seconds))
    answers = []
    for row in found:
        sweep = [PackedJob(tokens=row["tokens"], sweep="s")] * row["members"]
        others = [PackedJob(tokens=row["tokens"])] * row["members"]
        first = join_verdict(start, sweep[1:], sweep[0])
        alike, apart = join_verdict(law, sweep[1:], sweep[0]), join_verdict(law, others[1:], others[0])
        answers.append({"first": first.speed_up, "fitted": alike.speed_up, "sweep": alike.pays, "others": apart.pays})
    return answers


def main() -> None:
    model, rows, kind, device, card, *shapes = sys.argv[1:]
    lab = Lab(model, rows, kind, recompute=True, device=device, longest=128)
    bench, found = Bench(lab=lab, model=model, kind=kind, device=device, card=card), []
    for shape in shapes:
        found.append(bench.compare(*map(int, shape.split("x"))))
        print(json.dumps(found[-1]), flush=True)
    print(json.dumps({"rule": verdicts(found, quantised=kind == "nf4")}), flush=True)


if __name__ == "__main__":
    main()
