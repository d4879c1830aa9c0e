"""One run: jobs come in, faults go on, and at the end the history is gathered and checked."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from loractl.common.artifacts import ArtifactStore
from loractl.common.errors import WrongState
from loractl.common.job.status import Status
from loractl.common.store.store import Store
from loractl.common.store.tables import Job
from loractl.worker.device.occupancy import RUN_VARIABLE

from ..quick_trainer import SLOW
from .acts import gave_way_to_shorter
from .checker import check, examine
from .deck import GANG_FAULTS, script
from .faults import MAX_RETRIES, Injector
from .history import Broken, History, Sighting, changes, read, record
from .lab import USERS, Lab, lab
from .people import People
from .successes import unshown
from .trainer import LEAVES, POISONED, STEP_S

BATCH = 10
"""Job files of one `loractl submit`."""

CHAINED = 0.2
"""Of the jobs, those that start after others."""

LONG = 6

FILLING, FILLED = 1200, 10_000
"""Steps of the jobs that hold every card at first, and where their numbers begin."""

GANGS = 5
"""One job in so many is on two cards of a box, where the plan has such."""

POISONED_SHARE = 0.04
"""Of jobs whose loss is not a number from their third step on."""

START_S = 60.0
"""So long the first job may take to run: a storm before that shows nothing."""

MORE = 4
"""Times a storm's time: if other tests keep the cores busy, no job may end within 37 s of faults. Then no more faults
are dealt, or they would come faster than jobs get on; a bad box stays bad to the end."""

TICK_S = 0.1
"""Between two looks for what a fault may hit: each walks over the processes of a box."""

SEE_S = 2.0
"""Between two looks at who is there."""

PEOPLE_GAP = 2.0
"""Times the time between two faults: the time between two things that people ask for."""

LEFT_S = 20.0
"""A process of an attempt may outlive the attempt's end so long: a frozen node has to wake, a node to sweep."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How large a run is."""

    jobs: int
    seed: int
    boxes: int = 3
    cards: int = 2
    lease_s: float = 6.0
    gap_s: float = 2.5  # between faults
    steps: tuple[int, int] = (4, 60)  # of a job, 50 ms each
    long_steps: tuple[int, int] = (160, 320)  # of one in LONG: a frozen node wakes while its job runs elsewhere
    backlog: int = 40  # waiting jobs before submit pauses
    calm_s: float = 240.0  # after the last fault everything must have ended within so long
    storm_s: float | None = None  # a storm ends after this time, with the jobs that came in; None: with all of them.
    # On a busy machine the faults that last go on, at most MORE times as long, until each kind of operation succeeded
    # and a job gave way to a shorter one
    probes: int = 0  # of the recovery of Valkey and PostgreSQL, after the storm
    s3: bool = False  # the store is a bucket
    sqlite: bool = False  # in place of PostgreSQL, for one box
    gangs: bool = False  # one job in GANGS is on two cards of a box
    first: tuple[str, ...] = ()  # faults that are dealt before all others


@dataclass(kw_only=True)
class Outcome:
    """What a run showed."""

    plan: Plan
    broken: list[Broken]
    history: History
    faults: Counter[str]
    seconds: float
    refused: Counter[str]  # writes that came too late, by what was dropped
    noticed: list[float]  # s from a hit to the end of the attempt as worker_lost
    resumed: list[float]  # s from there to the next attempt's start
    postgres_back: list[float]  # s from PostgreSQL's answer to the next heartbeat
    probes: dict[str, list[float]]
    released: int  # held jobs that a person let go on
    let_go: int  # jobs that a person let start without the one that they were to start after
    mended: int  # cards and boxes that loractl drained and a person opened again
    failed_submits: int
    held: int  # statements of the hostile login that were let through
    disk: str
    lacks: frozenset[str]  # faults that were not to be had
    log: list[str]


@dataclass
class _Run:
    plan: Plan
    lab: Lab
    store: Store
    injector: Injector
    people: People
    printed: list[int] = field(default_factory=list)
    done_submitting: threading.Event = field(default_factory=threading.Event)
    enough: threading.Event = field(default_factory=threading.Event)  # no more jobs
    stop: threading.Event = field(default_factory=threading.Event)
    seen: dict[tuple[str, int], dt.datetime] = field(default_factory=dict)  # mark and process -> when at last
    released: int = 0
    let_go: int = 0
    mended: int = 0
    failed_submits: int = 0
    trouble: list[BaseException] = field(default_factory=list)


def with_s3(seed: int) -> bool:
    """Whether the store is a bucket in the run of this seed: in one of three. CHAOS_STORE says s3 or folder."""
    return (os.environ.get("CHAOS_STORE") or random.Random(seed + 3).choice(("s3", "folder", "folder"))) == "s3"


def storm(plan: Plan, say: Callable[[str], None] = lambda line: None) -> Outcome:
    """Run it whole."""
    began = time.monotonic()
    with lab(plan.boxes, plan.cards, plan.lease_s, s3=plan.s3, sqlite=plan.sqlite) as place:
        record(place.writer)
        store = Store(place.writer)
        injector = Injector(place, store)
        people = People(place, store, injector, seed=plan.seed + 3, gap_s=PEOPLE_GAP * plan.gap_s)
        run = _Run(plan, place, store, injector, people)
        _fill(run)
        works = (_submit_all, _look_after, _see_processes, _ask)
        threads = [threading.Thread(target=_guard, args=(run, work)) for work in works]
        for thread in threads:
            thread.start()
        try:
            stuck = _blow(run, say)
            probes = _probe(run, say) if plan.probes and not stuck else {}
        finally:
            run.stop.set()
            run.enough.set()
            for thread in threads:
                thread.join()
        if run.trouble:
            raise run.trouble[0]
        left = _after(run)
        return _gather(run, stuck, left, probes, time.monotonic() - began)


def _fill(run: _Run) -> None:
    """Let long jobs hold every card as the first short ones come, whose time is known from one that has ended."""
    folder, rng = run.lab.folder / "jobs", random.Random(run.plan.seed + 4)
    for count, steps in ((1, 4), (run.plan.boxes * run.plan.cards, FILLING)):
        plan = replace(run.plan, long_steps=(steps, steps), gangs=False)
        files = [_job_file(folder, LONG * (FILLED + count + one) + 1, rng, plan) for one in range(count)]
        for file in files if count > 1 else ():
            file.write_text(file.read_text().replace("labels: {", f"labels: {{{SLOW}: 'yes', "))
        numbers, complaint = run.lab.submit(files, USERS[0])
        assert len(numbers) == count, complaint
        run.printed += numbers
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            jobs = run.store.jobs.numbered(numbers).values()
            if all(job.status.is_terminal or (count > 1 and (job.step or 0) > 1 / STEP_S) for job in jobs):
                break
            time.sleep(TICK_S)


def _guard(run: _Run, work: Callable[[_Run], None]) -> None:
    try:
        work(run)
    except Exception as error:  # noqa: BLE001  raised again by the thread that waits
        run.trouble.append(error)
        run.stop.set()


def _submit_all(run: _Run) -> None:
    """Queue the jobs through the real command; a file whose number was not printed is handed in again."""
    rng = random.Random(run.plan.seed + 1)
    files = [_job_file(run.lab.folder / "jobs", number, rng, run.plan) for number in range(run.plan.jobs)]
    while files and not run.stop.is_set() and not run.enough.is_set():
        if _unended(run, "awaits IS NULL") >= run.plan.backlog:  # a blocked one keeps no card busy
            time.sleep(0.5)
            continue
        batch = files[: rng.randint(1, BATCH)]
        _chain(batch, run.printed, rng)
        numbers, complaint = run.lab.submit(batch, rng.choice(USERS))
        run.printed += numbers
        files = files[len(numbers) :]  # they are queued in order
        if complaint:
            run.failed_submits += 1
            time.sleep(0.5)
    run.done_submitting.set()


def _chain(batch: Sequence[Path], printed: Sequence[int], rng: random.Random) -> None:
    """Let some start after one of the last jobs, or after the one before them in their submit. Drawn anew when they are
    handed in again: by then that one may have been printed."""
    for before, file in zip([None, *batch], batch, strict=False):
        said = file.read_text().partition("after:")[0]
        file.write_text(said)
        if rng.random() >= CHAINED:
            continue
        named = [str(number) for number in rng.sample(printed[-12:], min(len(printed), rng.randint(1, 2)))]
        named += [before.stem.replace("job-", "chaos-")] if before is not None and rng.random() < 0.5 else []
        if named:
            file.write_text(f"{said}after: [{', '.join(named)}]\nafter_any: {str(rng.random() < 0.3).lower()}\n")


def _ask(run: _Run) -> None:
    """What people ask for, until there is enough."""
    run.people.work(run.enough, run.stop)


def _job_file(folder: Path, number: int, rng: random.Random, plan: Plan) -> Path:
    folder.mkdir(exist_ok=True)
    model = folder / f"model-{number // 4 % 2}"
    if not model.exists():
        model.mkdir()
        shape = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 400,
            "torch_dtype": "float32",
        }  # fmt: skip
        (model / "config.json").write_text(json.dumps(shape))
    data = folder / f"data-{number % 5}.jsonl"
    if not data.exists():
        rows = [{"prompt": f"{row} of {number}", "completion": str(row)} for row in range(12)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fate = rng.random()
    leaves = fate < 0.1
    labels = f"{{{LEAVES}: 'yes'}}" if leaves else f"{{{POISONED}: 'yes'}}" if fate > 1 - POISONED_SHARE else "{}"
    gang = plan.gangs and number % GANGS == 2
    is_long = number % LONG == 1 or (gang and number % 2)  # a fault finds every second gang still there
    steps = rng.randint(*(plan.long_steps if is_long else plan.steps))
    path = folder / f"job-{number}.yaml"
    yields = ("true", "auto", "false")[number % 3]
    cards = "resources: {cards: 2, parallel: sharded}\n" if gang else ""
    path.write_text(
        f"name: chaos-{number}\nbase_model: {model}\nmethod: lora\ndataset: {{path: {data}, max_length: 16}}\n"
        f"training: {{max_steps: {steps}, save_steps: 5, per_device_train_batch_size: 1}}\n"
        f"max_retries: {MAX_RETRIES}\npreemptible: {yields}\nlabels: {labels}\n{cards}"
    )
    return path


def _unended(run: _Run, also: str = "true") -> int:
    """How many jobs wait or run and meet a condition. If the database is away: more than any limit."""
    try:
        with run.lab.engine.connect() as connection:
            query = f"SELECT count(*) FROM jobs WHERE status IN ('queued', 'running') AND {also}"
            return int(connection.execute(text(query)).scalar_one())
    except DBAPIError:
        return 1 << 30


def _look_after(run: _Run) -> None:
    """What a person does meanwhile: mend boxes that were drained, and let jobs go on that were held."""
    while not run.stop.wait(1.0):
        run.mended += run.injector.mend()
        with contextlib.suppress(DBAPIError):
            for job in run.store.jobs.matching(statuses=[Status.QUEUED]):
                with contextlib.suppress(WrongState):
                    if job.is_blocked:
                        run.let_go += _let_go(run.store, job)
                    elif job.held and job.job_id not in run.people.holding:
                        run.store.jobs.release(job.job_id, "chaos")
                        run.released += 1


def _let_go(store: Store, job: Job) -> bool:
    """Start a job without the one that it waits for, where that one has failed or was cancelled."""
    from loractl.scheduler.change.amendment import amendment

    awaited = store.jobs.numbered([job.awaits or 0]).get(job.awaits or 0)
    ended = awaited is not None and awaited.status in (Status.FAILED, Status.CANCELLED)
    if ended and not job.after_any:
        store.jobs.edit(amendment(store, job.job_id, ["after=[]"]), "chaos")
    return ended and not job.after_any


def _see_processes(run: _Run) -> None:
    """Note each process of an attempt as long as it is there: none may outlive the attempt for long."""
    while not run.stop.wait(SEE_S):
        for process in run.lab.processes():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                run.seen[process.environ().get(RUN_VARIABLE, ""), process.pid] = dt.datetime.now(dt.UTC)


def _blow(run: _Run, say: Callable[[str], None]) -> list[str]:
    """Deal faults until all jobs are in and nearly all have ended; then heal, and wait for the rest."""
    plan = run.plan
    faults = script(plan.seed, plan.gap_s, _without(run), plan.first)
    until = time.monotonic() + START_S
    while time.monotonic() < until and not run.stop.is_set() and not _has_begun(run):
        run.injector.tick()
        time.sleep(TICK_S)
    began = time.monotonic()
    few, said, looked = run.plan.boxes * run.plan.cards, began, began
    fault = next(faults)
    due = began
    while not run.stop.is_set():
        now = time.monotonic()
        if now >= due and not (_is_long(run, now - began) and run.injector.active):
            run.injector.offer(fault)
            fault = next(faults)
            due = now + fault.gap_s
        run.injector.tick()
        if now - said > 15:
            said = now
            say(f"{now - began:5.0f} s  {_state(run)}  faults {run.injector.done.total()}")
        if run.done_submitting.is_set() and _unended(run) <= few:
            break
        if now - looked > SEE_S:
            looked = now
            if _has_blown(run, now - began):
                break
        time.sleep(TICK_S)
    run.enough.set()
    run.injector.heal_all()
    say(f"{time.monotonic() - began:5.0f} s  calm  {_state(run)}")
    deadline = time.monotonic() + run.plan.calm_s
    while time.monotonic() < deadline and not run.stop.is_set():
        run.injector.tick()
        if run.done_submitting.is_set() and run.people.done.is_set() and _unended(run) == 0:
            return []
        time.sleep(0.1)
    return [f"after {run.plan.calm_s:.0f} s of calm: {_state(run)}"]


def _is_long(run: _Run, seconds: float) -> bool:
    """Whether a storm of a set time has had it: those that last go on, and another is dealt only once none does."""
    return run.plan.storm_s is not None and seconds > run.plan.storm_s


def _has_blown(run: _Run, seconds: float) -> bool:
    """Whether a storm of a set time is over: it must show something."""
    if run.plan.storm_s is None or not _is_long(run, seconds):
        return False
    if seconds > MORE * run.plan.storm_s:
        return True
    try:
        return _has_yielded(run) and not unshown(changes(run.lab.engine), run.injector.spans_so_far())
    except DBAPIError:
        return False


def _has_yielded(run: _Run) -> bool:
    """Whether a job gave way to a shorter one, which the end asks for, too."""
    of = text("SELECT 1 FROM attempts WHERE reason = 'preempted' AND message LIKE '%much shorter%' LIMIT 1")
    with run.lab.engine.connect() as connection:
        return connection.execute(of).first() is not None


def _has_begun(run: _Run) -> bool:
    with run.lab.engine.connect() as connection:
        return connection.execute(text("SELECT job_id FROM attempts LIMIT 1")).first() is not None


def _without(run: _Run) -> frozenset[str]:
    return run.lab.lacks if run.plan.gangs else run.lab.lacks | GANG_FAULTS


def _state(run: _Run) -> str:
    try:
        with run.lab.engine.connect() as connection:
            rows = connection.execute(text("SELECT status, count(*) FROM jobs GROUP BY status ORDER BY status"))
            return ", ".join(f"{count} {status}" for status, count in rows)
    except DBAPIError:
        return "the database is away"


def _after(run: _Run) -> list[str]:
    """All jobs have ended: no trainer may remain, and nothing at all once the boxes have stopped."""
    deadline, left = time.monotonic() + LEFT_S, []
    while time.monotonic() < deadline:
        left = [p for p in run.lab.processes() if _mark(p)]
        if not left:
            break
        time.sleep(0.5)
    found = [f"{_words(p)} of job {_mark(p)} remains {LEFT_S:.0f} s after the last job's end" for p in left]
    for box in run.lab.boxes:
        if box.runs and box.process:
            box.process.terminate()
    for box in run.lab.boxes:
        if box.process is not None:
            box.process.wait(timeout=60)
    time.sleep(0.5)
    return found + [f"{_words(p)} remains after the worker" for p in run.lab.processes()]


def _mark(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("LORACTL_JOB")
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None


def _words(process: psutil.Process) -> str:
    try:
        return f"process {process.pid} ({' '.join(process.cmdline())[:80]})"
    except psutil.NoSuchProcess:
        return f"process {process.pid}"


def _probe(run: _Run, say: Callable[[str], None]) -> dict[str, list[float]]:
    """In a quiet lab: a service goes down for some seconds, and comes back; how long until a new job starts?"""
    found: dict[str, list[float]] = {}
    rng = random.Random(run.plan.seed + 2)
    for number in range(run.plan.probes):
        for name, service in (("Valkey", run.lab.valkey), ("PostgreSQL", run.lab.postgres)):
            if name == "Valkey":
                run.lab.valkey.kill(wipe=True)
            else:
                run.lab.postgres.crash()
            _pause(run, 5.0)
            service.start()
            back = dt.datetime.now(dt.UTC)
            file = _job_file(run.lab.folder / "jobs", 100_000 + number, rng, run.plan)
            numbers: list[int] = []
            while not numbers and not run.stop.is_set():
                numbers, _ = run.lab.submit([file], USERS[0])
            run.printed += numbers
            while _unended(run) and not run.stop.is_set():
                _pause(run, 0.2)
            job = run.store.attempts.of_job(numbers[0])[0]
            found.setdefault(name, []).append((job.started_at - back).total_seconds())
            say(f"{name} back: a new job started after {found[name][-1]:.1f} s")
    return found


def _pause(run: _Run, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        run.injector.tick()
        time.sleep(0.1)


def _gather(run: _Run, stuck: list[str], left: list[str], probes: dict[str, list[float]], seconds: float) -> Outcome:
    injector, store = run.injector, ArtifactStore(run.lab.disk.artifacts.as_uri())
    injector.end()
    rows = read(run.lab.engine)
    wrong = {
        job_id: what
        for job_id, job in rows["jobs"].items()
        if job["status"] == Status.SUCCEEDED
        and job["adapter_uri"] is not None
        and (what := examine(store, job, run.lab.store_url)) is not None
    }
    history = History(
        **rows,
        printed=[*run.printed, *run.people.printed],
        acts=tuple(run.people.acts),
        cancelled=dict(injector.cancelled),
        lease_s=run.plan.lease_s,
        hits=tuple(injector.losses),
        sightings=tuple(Sighting(run=mark, pid=pid, at=at) for (mark, pid), at in run.seen.items() if mark),
        asked=frozenset(injector.asked),
        trainers_killed=injector.trainers_killed,
        torn=frozenset(injector.torn),
        windows=tuple(injector.windows),
        spans=tuple(injector.spans),
        boxes=frozenset(box.name for box in run.lab.boxes),
        poisoned=frozenset(job for job, row in rows["jobs"].items() if POISONED in row["spec"]["labels"]),
        bad=frozenset(injector.went_bad),
        artifacts=wrong,
        left=tuple(left),
        stuck=(*stuck, *injector.stuck),
    )
    logs = "".join(box.log.read_text(errors="replace") for box in run.lab.boxes)
    noticed, resumed = _recoveries(history, injector)
    return Outcome(
        plan=run.plan,
        broken=[*check(history), *_unyielding(history)],
        history=history,
        faults=injector.done,
        seconds=seconds,
        refused=_refused(logs),
        noticed=noticed,
        resumed=resumed,
        postgres_back=_beats_after(history, injector.postgres_back),
        probes=probes,
        released=run.released,
        let_go=run.let_go,
        mended=run.mended,
        failed_submits=run.failed_submits,
        held=len(injector.said),
        disk=f"{'S3, its files on ' if run.plan.s3 else ''}{run.lab.disk.kind}",
        lacks=_without(run),
        log=[*injector.log, *_last_lines(logs)],
    )


def _unyielding(history: History) -> list[Broken]:
    """A run in which no job gave way to a shorter one proves nothing of that."""
    return [] if gave_way_to_shorter(history) else [Broken(promise=0, what="no job gave way to a much shorter one")]


def _refused(logs: str) -> Counter[str]:
    """Writes that the guard turned away, as the supervisors told them."""
    beats = len(re.findall(r"the lease of attempt \d+ was lost, its result is dropped", logs))
    finishes = len(re.findall(r"^\S+ job \d+ \S+: lost \(", logs, re.MULTILINE))
    return Counter({"heartbeats": beats, "finishes": finishes})


def _last_lines(logs: str) -> list[str]:
    return [line for line in logs.splitlines() if re.search(r"Error|Traceback|supervisor failed", line)][-60:]


def _recoveries(history: History, injector: Injector) -> tuple[list[float], list[float]]:
    attempts = {(a.job_id, a.attempt): a for a in history.attempts}
    noticed, resumed = [], []
    for loss in injector.losses:
        lost, following = attempts.get((loss.job_id, loss.attempt)), attempts.get((loss.job_id, loss.attempt + 1))
        if lost is None or lost.ended_at is None or lost.reason != "worker_lost" or lost.ended_at < loss.at:
            continue
        noticed.append((lost.ended_at - loss.at).total_seconds())
        if following is not None:
            resumed.append((following.started_at - lost.ended_at).total_seconds())
    return noticed, resumed


def _beats_after(history: History, times: list[dt.datetime]) -> list[float]:
    """From each time to the next heartbeat of an attempt that was running then."""
    found = []
    for at in times:
        beats = (
            c.at
            for c in history.changes
            if c.what == "job" and c.at > at and c.old and c.new and c.old["token"] and c.old["token"] == c.new["token"]
        )
        first = next(beats, None)
        if first is not None:
            found.append((first - at).total_seconds())
    return found
