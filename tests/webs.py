"""A lab of three boxes for the tests of its page, put together through the store: cards, jobs, results."""

from __future__ import annotations

import copy
import datetime as dt
import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import insert, update

from loractl.common.adapter_config import CONFIG
from loractl.common.artifacts import WEIGHTS, ArtifactStore, attempt_prefix, manifest_sha256
from loractl.common.job.method import Need, Parallel, SharedNeed, Ways
from loractl.common.job.names import Reference
from loractl.common.job.status import Reason, Stage
from loractl.common.job.sweep import NewSweep
from loractl.common.store.database import make_engine
from loractl.common.store.records import Claim, Progress, StoredResult
from loractl.common.store.store import Store
from loractl.common.store.tables import LEASES, FleetRound, LabelSet, Usage
from loractl.common.units import GIB
from loractl.scheduler.web.pages.shelf import ReportShelf

from .acceptance.test_report_page import report
from .models import weights_of
from .unit.factories import NOON, node_state, spec, submission

CARDS = {
    "kestrel:0": ("NVIDIA GeForce RTX 4090", 24), "kestrel:1": ("NVIDIA GeForce RTX 4090", 24),
    "heron:0": ("NVIDIA RTX A6000", 48), "heron:1": ("NVIDIA RTX A6000", 48), "heron:2": ("NVIDIA RTX A6000", 48),
    "osprey:0": ("NVIDIA A100-SXM4-80GB", 80),
}  # fmt: skip

SWEEP_RATES = (5e-5, 1e-4, 2e-4)


@dataclass
class SeededLab:
    """The store, where its results are, and a clock."""

    store: Store
    artifacts: ArtifactStore
    now: dt.datetime

    @property
    def shelf(self) -> ReportShelf:
        return ReportShelf(self.store, lambda: self.artifacts)

    def pass_(self, seconds: float) -> None:
        self.now += dt.timedelta(seconds=seconds)
        see_cards(self.store)


def reader(url: str, clock: Callable[[], dt.datetime]) -> Store:
    """A store on the same database that can only read."""
    return Store(make_engine(url, read_only=True), clock=clock)


def seed(url: str, folder: Path, now: dt.datetime | None = None) -> SeededLab:
    """Boxes, and jobs that run, wait, are held, can never run, failed, and have ended well; a sweep of six."""
    lab = reopen(url, folder, now or dt.datetime.now(dt.UTC))
    lab.store.lab.set("changes", "open")
    end, lab.now = lab.now, lab.now - dt.timedelta(hours=3)
    past(lab)
    for name, user, node, size, steps in (
        ("med-summ-70b", "priya", "osprey:0", 61, 1200), ("sql-gen-32b", "wei", "heron:0", 31, 800),
        ("triage-lr1e4", "mara", "kestrel:0", 17, 420), ("dialect-asr-post", "lena", "heron:0", 12, 0),
    ):  # fmt: skip
        run(lab, name, user, node, size, steps=steps)
    for name, user, size, keys in (
        ("med-qa-7b", "priya", 21, {}), ("sql-gen-r64", "wei", 39, {"priority": 5}),
        ("llama-70b-lora", "jonas", 92, {}), ("triage-dpo", "tomás", 46, {}),
    ):  # fmt: skip
        queue(lab, name, user, size, **keys)
    held = queue(lab, "sql-gen-long", "wei", 33)
    lab.store.jobs.hold(held, "wei", "until the new data are there")
    lab.store.cards.drain("heron:2", "lena", "replacing a fan")
    lab.pass_((end - lab.now).total_seconds())
    return lab


def one_of_each(url: str, artifacts: ArtifactStore) -> None:
    """A small lab with a row of each kind."""
    engine = make_engine(url)
    lab = SeededLab(store=Store(engine), artifacts=artifacts, now=NOON)
    lab.store = Store(engine, clock=lambda: lab.now)
    see_cards(lab.store)
    finish(lab, "ended", "mara", 2.5, 0.9, "kestrel:0")
    failed = run(lab, "failed", "mara", "kestrel:0", 9, steps=30)
    lab.store.attempts.finish(failed, Reason.BAD_DATA, "data/law.jsonl: row 4120: there is no answer", Progress())
    run(lab, "runs", "mara", "kestrel:1", 9, steps=30)
    members = [replace(submission(lora=95, qlora=None), spec=spec(name="member", lora={"r": r})) for r in (8, 16)]
    lab.store.sweeps.submit(
        NewSweep(name="sweep", varied={"lora.r": "8,16"}, rungs=(0.25, 0.5), trials=2, seed=1), members
    )
    queue(lab, "waits", "wei", 92)
    way = SharedNeed(cards=2, parallel=Parallel.DATA, need=Need(lora=50 * GIB, qlora=None))
    job = replace(submission(lora=92, qlora=None, user="wei", name="shared"), ways=Ways(gangs=(way,)))
    lab.store.jobs.submit(replace(job, data={"path": {"uri": "datasets/x", "sha256": "x", "rows": 10, "tokens": 100}}))
    lab.store.adapters.tag(Reference(name="ended"), "prod", "mara")
    lab.store.usage.set_quota("wei", 1.0, 86400, soft=True)
    lab.store.lab.set("store", "mark")
    queue(lab, "blocked", "wei", 1, after=[failed.job_id])
    with engine.begin() as connection:
        connection.execute(insert(LabelSet).values(label_set="x", labels={"team": "nlp"}))
        connection.execute(update(Usage).values(label_set="x"))
    engine.dispose()


def past(lab: SeededLab) -> None:
    """Eleven jobs that have ended: a sweep of six, three alone, one that failed, one that went on twice."""
    see_cards(lab.store)
    _sweep(lab)
    for name, user, losses in (
        ("triage-r32", "mara", (4.49, 0.25)), ("sql-gen-r16", "wei", (2.1, 1.4)), ("dialect-r8", "lena", (3.0, 2.98)),
    ):  # fmt: skip
        finish(lab, name, user, *losses)
    failed = run(lab, "law-cite", "jonas", "kestrel:1", 9, steps=30)
    lab.store.attempts.finish(failed, Reason.BAD_DATA, "data/law.jsonl: row 4120: there is no answer", Progress())
    resumed(lab)


def reopen(url: str, folder: Path, now: dt.datetime) -> SeededLab:
    """A lab that was put together before."""
    lab = SeededLab(store=Store(make_engine(url)), artifacts=ArtifactStore(folder.as_uri()), now=now)
    lab.store = Store(make_engine(url), clock=lambda: lab.now)
    return lab


def see_cards(store: Store, **changed: dict[str, Any]) -> None:
    """Every card's worker writes its row, and one has gone round for all."""
    with store.begin(read_only=False) as tx:
        tx.put(FleetRound, "name", {"name": LEASES, "at": tx.now(), "settled_at": tx.now()})
    jobs = {job.job_id: job for job in store.cards.fleet().running.values()}
    for node, (name, size) in CARDS.items():
        used = {str(n): int(0.9 * (job.vram_reserved or 0)) for n, job in jobs.items() if job.node == node}
        outside: list[dict[str, Any]] = []
        if node == "heron:1":
            outside = [{"pid": 4711, "user": "tomás", "name": "vllm serve", "bytes": 41 * GIB}]
        state = {
            "device_name": name, "total": size * GIB, "margin": GIB // 2, "max_jobs": 4, "used": used, "load": 91,
            "temperature": 61, "outside": outside, "outside_bytes": sum(p["bytes"] for p in outside),
        }  # fmt: skip
        store.cards.see(node_state(node, **{**state, **changed.get(node, {})}))


def queue(lab: SeededLab, name: str, user: str, size: float, **keys: Any) -> int:
    """A job that waits, and tells a channel."""
    keys = {"base_model": "org/Llama-3.1-8B", "method": "lora", "notify": ["ops"], **keys}
    return lab.store.jobs.submit(submission(lora=size, qlora=None, user=user, name=name, **keys))


def run(lab: SeededLab, name: str, user: str, node: str, size: float, *, steps: int = 0, of: int = 1500) -> Claim:
    """A job that runs on a card, so far."""
    queue(lab, name, user, size)
    return begin(lab, node, steps=steps, of=of, size=size)


def begin(lab: SeededLab, node: str, *, steps: int, of: int, size: float = 8) -> Claim:
    """What waits is claimed by that card, and has trained so many steps."""
    others = frozenset(CARDS) - {node}
    claim = lab.store.attempts.claim(node, distrusted=others)
    assert isinstance(claim, Claim), f"nothing for {node}: {claim}"
    lab.store.attempts.beat(
        claim, Progress(stage=Stage.PREPARING, events=(("data", "900 rows, 100 held out"),), log="loading\n")
    )
    if steps:
        train(lab, claim, 0, steps, of, size)
    return claim


def train(lab: SeededLab, claim: Claim, first: int, last: int, of: int, size: float, floor: float = 0.6) -> None:
    """The steps of a training: losses, held-out losses, a log."""
    losses = [
        (s, "loss", floor + 2 * math.exp(-s / 200) + 0.08 * math.sin(s * 1.7)) for s in range(first + 5, last + 1, 5)
    ]
    held = [(s, "eval_loss", floor + 0.15 + 2 * math.exp(-s / 220)) for s in range(first + 100, last + 1, 100)]
    lab.pass_(last - first)
    lab.store.attempts.beat(
        claim,
        Progress(
            stage=Stage.TRAINING, step=last, total_steps=of, loss=losses[-1][2] if losses else None,
            tokens_per_second=3480.0, eta_seconds=float(of - last), eta_spread_seconds=90.0,
            vram_process=int(0.93 * size * GIB), metrics=(*losses, *held),
            log="".join(f"step {s}: loss {v:.3f}\n" for s, _, v in losses),
        ),
    )  # fmt: skip


def resumed(lab: SeededLab) -> None:
    """A job that was lost once, ran out of memory once, and went on each time."""
    first = run(lab, "triage-long", "mara", "kestrel:0", 14, steps=200)
    lab.store.attempts.finish(first, Reason.OUT_OF_MEMORY, "out of memory at step 200", Progress())
    second = begin(lab, "heron:2", steps=0, of=900)
    lab.store.attempts.beat(second, Progress(resumed_from_step=180))
    train(lab, second, 180, 520, 900, 17)
    lab.store.attempts.finish(second, Reason.WORKER_LOST, "heron was silent for 60 s", Progress())
    third = begin(lab, "heron:2", steps=0, of=900)
    lab.store.attempts.beat(third, Progress(resumed_from_step=500))
    train(lab, third, 500, 900, 900, 17)
    store_result(lab, third, 2.5, 0.9)


def finish(lab: SeededLab, name: str, user: str, base: float, tuned: float, node: str = "heron:2") -> int:
    """A job that has ended well, with a result that is stored."""
    claim = run(lab, name, user, node, 17, steps=600, of=600)
    store_result(lab, claim, base, tuned)
    return claim.job_id


def store_result(lab: SeededLab, claim: Claim, base: float, tuned: float, /, **changes: Any) -> None:
    """Its adapter and its report, as a worker stores them."""
    job = lab.store.jobs.get(claim.job_id)
    value = the_report(job.job_id, job.name, job.user, base, tuned)
    value.update(changes)
    prefix = attempt_prefix(claim.job_id, claim.attempt)
    folder = Path(tempfile.mkdtemp(prefix="result-"))
    (folder / WEIGHTS).parent.mkdir(parents=True)
    (folder / WEIGHTS).write_bytes(weights_of(f"job {claim.job_id}"))
    (folder / "adapter" / CONFIG).write_text(
        json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]})
    )
    (folder / "report.json").write_text(json.dumps(value))
    (folder / "log.txt").write_text(f"the log of job {claim.job_id}\n")
    manifest = lab.artifacts.put_result(folder, prefix)
    shutil.rmtree(folder)
    sentence = f"{value['verdict']['reading'].replace('_', ' ')}, loss {base:.2f} -> {tuned:.2f}"
    stored = StoredResult(
        adapter_uri=f"{lab.artifacts.url}/{prefix}/adapter", report_uri=f"{lab.artifacts.url}/{prefix}/report.json",
        adapter_size=168_000_000, adapter_sha256=manifest[WEIGHTS].sha256, manifest_sha256=manifest_sha256(manifest),
    )  # fmt: skip
    done = Progress(metrics=((600, "held_out_loss", tuned),))
    assert lab.store.attempts.finish(claim, Reason.OK, sentence, done, stored)


def the_report(job_id: int, name: str, user: str, base: float, tuned: float) -> dict[str, Any]:
    """A report with losses by row, a metric in percent, and answers of all four kinds."""
    value = copy.deepcopy(report())
    change = tuned - base
    reading = "better" if change < -0.1 else "no clear change"
    loss = {
        **value["evaluation"]["metrics"][0], "base": base, "tuned": tuned, "change": change, "low": change - 0.12,
        "high": change + 0.12, "cases": 100, "unmeasured": 0, "reading": reading,
    }  # fmt: skip
    exact = {**loss, "name": "exact_match", "label": "exact match", "unit": "%", "higher_is_better": True, "base": 61.2}
    more = round(17.2 * change / -4.24, 1)  # better, where the loss has fallen by so much
    exact |= {"tuned": 61.2 + more, "change": more, "low": more - 3.3, "high": more + 3.2}
    exact |= {"reading": "better" if more > 3.3 else "no clear change"}
    less = -1.0 - job_id % 4 / 2
    rouge = {**exact, "name": "rougeL", "label": "ROUGE-L", "base": 40.0, "tuned": 40.0 + less, "change": less}
    rouge |= {"low": less - 1.1, "high": less + 1.1, "reading": "worse" if less < -1.1 else "no clear change"}
    answer = value["evaluation"]["answers"][0]
    kinds: Sequence[tuple[bool, bool]] = ((False, True), (True, False), (False, False), (True, True))
    answers = [
        {**answer, "row": n, "prompt": f"Ticket {n}: /scratch on heron is full", "expected": "queue: storage",
         "base": "I would ask support." if not base_right else "queue: storage",
         "tuned": "queue: storage" if tuned_right else "queue: network", "base_exact": base_right,
         "tuned_exact": tuned_right}
        for n, (base_right, tuned_right) in enumerate(kinds * 12)
    ]  # fmt: skip
    evaluation = {
        **value["evaluation"],
        "rows": 100,
        "metrics": [loss, exact, rouge],
        "answers": answers,
        "lm_eval": None,
    }
    evaluation["row_losses"] = [[n, 20, 20 * base, 20 * (tuned + 0.05 * math.sin(n * job_id))] for n in range(60)]
    sentence = f"Better than the base: held-out loss {base:.2f} -> {tuned:.2f}."
    verdict = {
        "reading": "better" if reading == "better" else "no_clear_change",
        "why": "",
        "short": "",
        "sentence": sentence,
    }
    job = {**value["job"], "job_id": job_id, "name": name, "user": user}
    data = {**value["data"], "train_rows": 900, "held_out_rows": 100, "held_out_sha256": "d" * 64}
    data["sha256"] = hashlib.sha256(name.encode()).hexdigest()
    return {**value, "job": job, "evaluation": evaluation, "verdict": verdict, "data": data}


def _sweep(lab: SeededLab) -> None:
    points = [(rate, r) for rate in SWEEP_RATES for r in (16, 32)]
    varied = {"training.learning_rate": "5e-5,1e-4,2e-4", "lora.r": "16,32"}
    members = [
        replace(
            submission(lora=17, qlora=None, user="mara", method="lora"),
            spec=spec(
                name="triage-sweep",
                base_model="org/Llama-3.1-8B",
                method="lora",
                training={"learning_rate": rate},
                lora={"r": r},
            ),
        )
        for rate, r in points
    ]
    lab.store.sweeps.submit(NewSweep(name="triage-sweep", varied=varied), members)
    for n, (rate, _r) in enumerate(points):
        claim = begin(lab, "heron:2", steps=0, of=400)
        floor = 0.6 + 0.1 * n + abs(math.log10(rate / 1e-4)) / 2
        train(lab, claim, 0, 400, 400, 15, floor=floor)
        if n < 5:
            store_result(lab, claim, 3.0, floor + 0.2)
        else:
            lab.store.attempts.finish(claim, Reason.DIVERGED, "the loss rose to 80", Progress())
