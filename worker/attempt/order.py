"""A trainer's order: the disk checked for room, the data fetched, the checkpoints found, and what its process may see.

A disk that fills up later would lose the steps since the last checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from loractl.common.adapter_config import CONFIG, check_adapter_config
from loractl.common.artifacts import WEIGHTS
from loractl.common.binding import checkpoint_binding, result_binding
from loractl.common.channels import VARIABLES
from loractl.common.errors import (
    AdapterNotFound,
    ArtifactError,
    JobNotFound,
    ServiceUnreachable,
    StoreFailed,
    WrongState,
)
from loractl.common.files import remove_tree
from loractl.common.job.ancestor import ancestor_job, misfits
from loractl.common.job.method import Method
from loractl.common.job.names import Reference
from loractl.common.job.spec import JobSpec
from loractl.common.job.status import Stage
from loractl.common.memory.config import read_shape
from loractl.common.memory.step import planned_labels
from loractl.common.memory.weights import adapter_state_bytes, adapter_tensors, optimizer_name
from loractl.common.store.records import Claim
from loractl.common.units import GIB
from loractl.worker.device.devices import Device, find_device, torch_settings
from loractl.worker.device.occupancy import (
    CARD_VARIABLE,
    JOB_VARIABLE,
    RANK_VARIABLE,
    RUN_VARIABLE,
    card_mark,
    run_mark,
)
from loractl.worker.protocol.marker import is_complete
from loractl.worker.protocol.messages import Ancestor, KnownFile, Rank, Start, Taught
from loractl.worker.protocol.trust import Refused, check_checkpoint, check_claim, may_run_code

from .attempt import SupervisedAttempt
from .log import FILE_LIMIT
from .result import BEGUN_FROM, make_room
from .workplace import Workplace

LEAST_BYTES = GIB
"""Free bytes that any run needs: the estimate leaves out tokenizers and other users of the disk."""

CHECKPOINTS = 4
"""Checkpoints of a run on the disk at once: the engine keeps 2 and writes one more before it drops the older, and
another may still be uploading to the artifact store."""

TOKENISED = 6
"""Bytes of tokens for a byte of data, an upper bound: a token takes 4 bytes in each of two columns. That is 2 where it
has about 4 characters; shorter tokens, and the numbers of short rows, take more."""


def bytes_to_write(spec: JobSpec, method: Method, data_bytes: int = 0) -> int:
    """An upper bound of what an attempt may write into its folder and the cache, never below LEAST_BYTES.

    Checkpoints of adapter (fp32) and optimizer state, the result's adapter, the log, the data in tokenised form. For a
    model without a config.json on this box, LEAST_BYTES.
    """
    shape = read_shape(spec.base_model, spec.revision)
    adapter = state = 0
    if shape is not None:
        tensors = list(adapter_tensors(shape, spec, planned_labels(spec, None)))
        adapter = 4 * sum(elements * count for elements, count in tensors)
        state = adapter_state_bytes(optimizer_name(spec, method), tensors)
    writes = CHECKPOINTS * (adapter + state) + adapter + 2 * FILE_LIMIT + TOKENISED * data_bytes
    return max(LEAST_BYTES, writes)


def require_space(folder: Path, needed: int) -> None:
    """Raises OSError (ENOSPC) with a sentence if the disk of `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        resolved = folder.resolve()
        disk = next(path for path in (resolved, *resolved.parents) if path.is_mount())  # where a person must free space
        raise OSError(errno.ENOSPC, f"needs {needed / GIB:.1f} GiB on {disk}, {free / GIB:.1f} are free")


log = logging.getLogger("loractl.worker")

ADDRESSES = ("LORACTL_DATABASE_URL", "LORACTL_REDIS_URL", "LORACTL_ARTIFACTS_URL", VARIABLES)
"""Variables with addresses and passwords of services. Any AWS or PostgreSQL variable may hold one or point to it."""

CELERY_S = ("CELERY_", "celery_", "_MP_FORK_")
"""What Celery writes into its process's environment once it consumes: a trainer does not need it."""


def prepare(place: Workplace, attempt: SupervisedAttempt) -> Start:
    """Fetch the data and write the trainer's order."""
    claim, folder = attempt.claim, attempt.folder
    spec, cache = claim.spec, place.settings.cache_dir
    place.artifacts.check()  # its data may be in the cache, and the training for nothing
    check_claim(spec, claim.data, place.settings, marked=bool(place.artifacts.mark))
    if claim.checkpoint is not None:
        check_checkpoint(claim.job_id, claim.checkpoint)
    _require_space(place, folder, bytes_to_write(spec, claim.method))

    if claim.data:
        names = sorted({Path(name).name for key, name in spec.data_sets().items() if key in claim.data})
        attempt.say(Stage.PREPARING, f"fetches {', '.join(names)}")
    named = _fetched(place, spec.data_sets(), claim.data)
    more = [f"more.{number}" for number in range(len(spec.dataset.more))]
    hashes = {key: stored["sha256"] for key, stored in claim.data.items()}
    data = [Path(path) for path in named.values() if Path(path).is_file()]
    _require_space(place, folder, bytes_to_write(spec, claim.method, sum(path.stat().st_size for path in data)))
    earlier = sorted(folder.parent.glob("attempt-*/checkpoints"), key=lambda p: p.stat().st_mtime, reverse=True)
    earlier += stored_checkpoint(place, attempt)
    return Start(
        job_id=claim.job_id,
        attempt=claim.attempt,
        user=claim.user,
        node=place.node,
        gpu=place.device.uuid,
        device=place.device.trains_on,
        device_name=place.device.name,
        spec=spec,
        run_code=may_run_code(spec, place.settings),
        init_from=_ancestor(place, attempt),
        parallel=claim.parallel,
        ranks=_ranks(place, claim),
        lm_eval_tasks=str(place.settings.lm_eval_tasks) if place.settings.lm_eval_tasks else None,
        method=claim.method,
        method_why=claim.method_why,
        vram_planned=claim.vram_planned,
        vram_reserved=claim.vram_reserved,
        # A plan is for a card: RAM is limited only if the box's owner says so.
        memory_limit=claim.vram_reserved if place.device.trains_on == "cuda" else place.settings.trainer_ram,
        adjustment=attempt.heard.adjustment,
        changes=[*claim.changes, *attempt.heard.changes],
        day=claim.submitted_at.date(),  # an attempt on another day, or box, has the same rows
        data_path=named["path"],
        data_sha256=hashes.get("path"),
        more_paths=[named[key] for key in more],
        more_sha256=[hashes.get(key) for key in more],
        eval_path=named.get("eval_path"),
        eval_sha256=hashes.get("eval_path"),
        final_path=named.get("final_path"),
        regression_path=named.get("regression"),
        regression_sha256=hashes.get("regression"),
        output_dir=str(folder / "result"),
        checkpoint_dir=str(folder / "checkpoints"),
        earlier_checkpoints=[str(p) for p in earlier],
        cache_dir=str(cache),
        kept=[
            KnownFile(key=row.key, sha256=row.sha256, job_id=row.job_id, at=row.at)
            for row in place.store.cards.kept_files(place.settings.host)
        ],
    )


def _fetched(place: Workplace, named: dict[str, str], data: dict[str, Any]) -> dict[str, str]:
    """Where data sets are: on this box if they are stored, else on the hub. Raises ArtifactError."""
    folder, kept = place.settings.cache_dir / "datasets", {key: data[key] for key in named.keys() & data.keys()}
    files = {key: place.artifacts.fetch_dataset(one["uri"], one["sha256"], folder) for key, one in kept.items()}
    return {key: str(files.get(key, name)) for key, name in named.items()}


def _ranks(place: Workplace, claim: Claim) -> list[Rank]:
    """A process for each of several cards; none for a job on one. The trainer starts the processes for the other
    cards."""
    if len(claim.shares) < 2:
        return []
    prefix = f"{place.settings.host}:"
    cards = [
        (s, place.device if s.node == place.node else find_device(place.settings, s.node.removeprefix(prefix)))
        for s in claim.shares
    ]
    return [
        Rank(
            rank=number,
            node=share.node,
            gpu=card.uuid,
            device=card.trains_on,
            environment=card.environment() | ({RANK_VARIABLE: card_mark(place.settings, share.node)} if number else {}),
            memory_limit=share.bytes if card.trains_on == "cuda" else place.settings.trainer_ram,
        )
        for number, (share, card) in enumerate(cards)
    ]


def _ancestor(place: Workplace, attempt: SupervisedAttempt) -> Ancestor | None:
    """Fetch the adapter that the job starts from. Raises Refused if it is gone or does not fit, ArtifactError."""
    spec, store = attempt.claim.spec, place.store
    if spec.lora.init_from is None:
        return None
    if (job_id := ancestor_job(spec)) is None:
        raise Refused("lora.init_from: the row does not name it by a job's number")
    try:
        row, job = store.adapters.get(Reference(job_id=job_id)), store.jobs.get(job_id)
    except (AdapterNotFound, JobNotFound, WrongState):
        raise Refused(f"lora.init_from: the adapter of job {job_id} was removed") from None
    if wrong := misfits(spec, JobSpec.model_validate(job.spec)):
        raise Refused(f"lora.init_from: {wrong[0]} (job {job_id})")
    folder = attempt.folder / BEGUN_FROM
    attempt.say(Stage.PREPARING, f"fetches the adapter of {row.name} (job {job_id}) to begin from")
    files = place.artifacts.pull(result_binding(store, job), folder, "adapter/")
    check_adapter_config(folder / CONFIG)
    weights = files[WEIGHTS.removeprefix("adapter/")].sha256
    return Ancestor(path=str(folder), job_id=job_id, name=row.name, sha256=weights, taught=_taught(place, job_id))


def _taught(place: Workplace, job_id: int) -> list[Taught]:
    """What a job's adapter was trained on, and those before it from which it was begun."""
    known: dict[int, Taught] = {}
    number: int | None = job_id
    while number is not None and number not in known:
        known[number] = _taught_by(place, number)
        number = place.store.adapters.ancestors([number]).get(number)
    return list(known.values())


def _taught_by(place: Workplace, job_id: int) -> Taught:
    try:
        job = place.store.jobs.get(job_id)
        spec = JobSpec.model_validate(job.spec)
        check_claim(spec, job.data, place.settings, marked=bool(place.artifacts.mark))
        named = {key: name for key, name in spec.data_sets().items() if key not in ("final_path", "regression")}
        paths = _fetched(place, named, job.data)
    except (JobNotFound, ValidationError, Refused, ArtifactError) as error:
        log.warning("what job %s was trained on is not at hand: %s", job_id, error)
        return Taught(job_id=job_id)
    return Taught(job_id=job_id, dataset=spec.dataset, paths=paths)


def _require_space(place: Workplace, folder: Path, needed: int) -> None:
    """Raises OSError (ENOSPC) if fewer bytes are free, even after removing what ended jobs left on this box."""
    make_room(place, folder, needed)
    require_space(folder, needed)


def environment(place: Workplace, claim: Claim) -> dict[str, str]:
    """The trainer's environment: only its device, its share of the cores, and no address or password of a service."""
    return {**common_environment(place), RUN_VARIABLE: run_mark(claim.token), JOB_VARIABLE: str(claim.job_id)}


def common_environment(place: Workplace) -> dict[str, str]:
    """The common environment of all trainers on the device: it names no job and no attempt."""
    bare = bare_environment(place, "")
    del bare[JOB_VARIABLE]
    if place.device.trains_on != "cuda" and place.settings.trainer_ram is not None:
        bare.setdefault(*ONE_HEAP)
    card = card_mark(place.settings, place.node)
    return {**bare, CARD_VARIABLE: card, "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}


ONE_HEAP = ("MALLOC_ARENA_MAX", "1")
"""glibc gives threads heaps of their own. What a failed try frees in its thread's heap stays writable, so it counts in
the process's limit, and is of no use to the thread that trains: 16 rows that did not fit left 371 MiB."""


def bare_environment(place: Workplace, name: str) -> dict[str, str]:
    """The environment of a process on the place's device that counts as ours."""
    return device_environment(place.device, name, place.threads)


SPINS = "10000"
"""How often a thread of a trainer looks for the next piece of work before it sleeps: tens of microseconds. OpenMP's own
300,000 waste a core that other programs want: next to two of them on two cores a step took 3.7 times as long as alone,
and 2.4 times with this; alone both are equally fast."""


HUGE_PAGES = "glibc.malloc.hugetlb=1"
"""Asks Linux for pages of 2 MiB, if it gives them on request. A step creates and frees tensors of many MiB: with pages
of 4 KiB it had 200,000 page faults, with these 12,000, and took 0.92 of the time (SmolLM2-135M, 8 rows of 256)."""


def device_environment(device: Device, name: str, threads: int) -> dict[str, str]:
    """The environment of a process on the device that counts as ours, under this name instead of a job's."""
    hidden = (*ADDRESSES, *CELERY_S, "AWS_", "PG")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    if device.trains_on != "cuda":
        kept.setdefault("GLIBC_TUNABLES", HUGE_PAGES)
    if "OMP_WAIT_POLICY" not in kept:
        kept.setdefault("GOMP_SPINCOUNT", SPINS)
    kept |= torch_settings(device, kept)
    return {**kept, **device.environment(), JOB_VARIABLE: name, "OMP_NUM_THREADS": str(threads)}


def stored_checkpoint(place: Workplace, attempt: SupervisedAttempt) -> list[Path]:
    """Fetch the newest checkpoint from the artifact store, unless it is here. Another box may have written it.

    One that does not match its row is refused, and the history says so. One that this attempt has found broken is
    removed there. Raises StoreFailed: an attempt that begins anew would replace what the next one may well get.
    """
    claim, kept, folder = attempt.claim, attempt.claim.checkpoint, attempt.stored
    here = [] if kept is None else folder.parent.glob(f"attempt-*/checkpoints/checkpoint-{kept.step}")
    if kept is None or any(map(is_complete, here)):
        return []
    target, note = folder / "checkpoints" / f"checkpoint-{kept.step}", attempt.unwritten.note
    if str(target) in attempt.heard.withdrawn:
        with contextlib.suppress(ArtifactError, ServiceUnreachable):  # no row names it: it goes with the job's others
            place.artifacts.remove_checkpoint(kept.prefix)
        return [target.parent]
    remove_tree(folder)
    try:
        place.artifacts.pull(checkpoint_binding(kept), target)
    except StoreFailed:
        raise
    except ArtifactError as error:
        log.warning("job %s: the checkpoint of step %s is lost: %s", claim.job_id, kept.step, error.sentence)
        note("refused", f"the stored checkpoint of step {kept.step} is not resumed: {error.sentence}")
        return []
    if kept.manifest_sha256 is None:
        note("data", f"the stored checkpoint of step {kept.step} is not bound to its row: an earlier version stored it")
    return [target.parent]
