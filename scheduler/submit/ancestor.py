"""The jobs that a job starts after, and the adapter that it starts from: found, compared with it, named by number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from loractl.common.errors import AdapterNotFound, JobNotFound, UsageError, WrongState
from loractl.common.fingerprint import may_be_published
from loractl.common.job.ancestor import misfits
from loractl.common.job.file import override_spec
from loractl.common.job.names import parse_reference
from loractl.common.job.sections import AncestorJob
from loractl.common.job.spec import JobSpec
from loractl.common.job.sweep import no_best
from loractl.common.store.store import Store


def settle_predecessors(
    spec: JobSpec,
    store: Store | None,
    beside: Mapping[str, JobSpec] | None = None,
    job_id: int | None = None,
    before: JobSpec | None = None,
) -> JobSpec:
    """The spec with the number of the job whose adapter it starts from, since names and tags move, and with that job
    among those that it starts after if it may not have ended yet. It says publish: false if that job's adapter, or one
    merged into its base, may not be published: whatever happens to their rows and folders.

    `store`: None where a dry run has no database to ask; then only names are checked. `beside`: the jobs of the same
    submit by name, whose numbers are not known yet. `job_id`: of a job submitted before, `before`: its spec until now;
    the jobs after which that starts may have been removed since.
    Raises JobNotFound, AdapterNotFound, UsageError for a job that does not exist, one submitted later, and an adapter
    of another base, rank or layers.
    """
    if not may_be_published(spec.base_model):
        spec = spec.model_copy(update={"publish": False})
    beside, begun = beside or {}, spec.lora.init_from
    if strangers := [name for name in _named(spec) if name not in beside]:
        raise UsageError(
            f"{spec.name}: after names {strangers[0]}, which is not a job of this submit",
            "submit both files together, or write the number of a job that is queued already",
        )
    if store is None:
        return spec
    if isinstance(begun, AncestorJob) and begun.sweep is not None:
        return _begun_from_best(spec, store, begun.sweep, before)
    if isinstance(begun, AncestorJob) and begun.job is not None:
        after = list(dict.fromkeys([*spec.after, begun.job]))
        named = begun if isinstance(begun.job, str) else str(begun.job)  # a name has no number before it is written
        lora = spec.lora.model_copy(update={"init_from": named})
        spec = spec.model_copy(update={"after": after, "lora": lora})
    numbers = [one for one in spec.after if isinstance(one, int)]
    known = {*store.jobs.numbered(numbers), *([] if before is None else before.after)}
    if missing := [number for number in numbers if number not in known]:
        raise JobNotFound(missing[0], f"{spec.name}: after names job {missing[0]}, which does not exist")
    if job_id is not None and (later := [number for number in numbers if number >= job_id]):
        raise UsageError(
            f"job {job_id} can't wait for job {later[0]}: a job waits for those that were submitted before it",
            f"queue it again: loractl submit --like {job_id} --after {later[0]}",
        )
    if isinstance(begun, AncestorJob) and begun.job is not None:
        ancestor = beside[begun.job] if isinstance(begun.job, str) else _spec_of(store, begun.job)
        spec = _begun_from(spec, ancestor, f"job {begun.job}")
    elif isinstance(begun, str):
        spec = _settle_stored(spec, begun, store)
    return spec


def _begun_from_best(spec: JobSpec, store: Store, sweep_id: int, before: JobSpec | None) -> JobSpec:
    """It starts after all members, however they end; each of them must fit it. Raises SweepNotFound, UsageError."""
    if before is not None and before.lora.init_from == spec.lora.init_from:
        members = [one for one in before.after if isinstance(one, int)]  # the sweep may have lost some since
    else:
        sweep = store.sweeps.get(sweep_id)
        if sweep.unlike is not None:
            raise UsageError(f"{spec.name}: lora.init_from: {no_best(sweep)}", "name a member: {job: 12}")
        members = [member.job_id for member in sweep.members]
    if spec.after not in ([], members):
        what = f"{spec.name}: lora.init_from names a sweep, and the job starts after its members"
        raise UsageError(what, "leave after out")
    for job_id, row in sorted(store.jobs.numbered(members).items()):
        member = override_spec(row.spec, (), f"job {job_id}")
        spec = _begun_from(spec, member, f"job {job_id} of sweep {sweep_id}")
    return spec.model_copy(update={"after": members, "after_any": True})


def _settle_stored(spec: JobSpec, text: str, store: Store) -> JobSpec:
    reference = parse_reference(text)
    if reference.job_id in spec.after:  # it waits for that job: the adapter need not exist yet
        assert reference.job_id is not None
        return _begun_from(spec, _spec_of(store, reference.job_id), f"job {reference.job_id}")
    try:
        row = store.adapters.get(reference)
    except (AdapterNotFound, WrongState) as error:
        hint = "loractl adapters lists them"
        if (awaited := _awaited_as(spec, text, store)) is not None:
            hint = f"for the adapter that job {awaited} will have: lora: {{init_from: {{job: {awaited}}}}}"
        raise UsageError(f"lora.init_from: {error.sentence}", hint) from error
    spec = _begun_from(spec, _spec_of(store, row.job_id), f"{row.name} (job {row.job_id})")
    lora = spec.lora.model_copy(update={"init_from": str(row.job_id)})
    return spec.model_copy(update={"lora": lora})


def _awaited_as(spec: JobSpec, name: str, store: Store) -> int | str | None:
    """The job of this name that the spec starts after, as it names it; None: there is none."""
    rows = store.jobs.numbered([one for one in spec.after if isinstance(one, int)])
    return next((one for one in spec.after if (one if isinstance(one, str) else rows[one].name) == name), None)


def _spec_of(store: Store, job_id: int) -> JobSpec:
    return override_spec(store.jobs.get(job_id).spec, (), f"job {job_id}")


def _begun_from(spec: JobSpec, ancestor: JobSpec, name: str) -> JobSpec:
    """If the ancestor may not be published, neither may the job. Raises UsageError if its spec contradicts that."""
    if wrong := misfits(spec, ancestor):
        raise UsageError(
            f"{spec.name} can't begin from {name}: {'; '.join(wrong)}",
            "write what that adapter has, or leave lora.init_from out",
        )
    return spec.model_copy(update={"publish": spec.publish and ancestor.publish})


def in_order(specs: Sequence[JobSpec]) -> list[int]:
    """The order of the jobs of one submit, each after those of them that it names.

    Raises UsageError for a cycle, and for a name that two of them have.
    """
    counts = Counter(spec.name for spec in specs)
    for spec in specs:
        if twice := next((name for name in _named(spec) if counts[name] > 1), None):
            raise UsageError(f"{spec.name}: two jobs of this submit are called {twice}", "give them different names")
    places = {spec.name: place for place, spec in enumerate(specs)}
    found: dict[int, None] = {}  # keeps the order; a chain may be longer than Python lets a function call itself
    for place in range(len(specs)):
        path = {place: _places(specs[place], places)} if place not in found else {}
        while path:
            last = next(reversed(path))
            before = next((at for at in path[last] if at not in found), None)
            if before is None:
                found[last] = None
                del path[last]
            elif before in path:
                ring = " -> ".join(specs[at].name for at in [*list(path)[list(path).index(before) :], before])
                raise UsageError(f"these jobs wait for each other: {ring}", "remove one of the names in after")
            else:
                path[before] = _places(specs[before], places)
    return list(found)


def _places(spec: JobSpec, places: Mapping[str, int]) -> Iterator[int]:
    return (places[name] for name in _named(spec) if name in places)


def _named(spec: JobSpec) -> list[str]:
    begun = spec.lora.init_from
    named = [*spec.after, *([begun.job] if isinstance(begun, AncestorJob) and begun.job is not None else [])]
    return [name for name in named if isinstance(name, str)]
