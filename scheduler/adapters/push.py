"""A push of a stored adapter: what is checked and asked first, its files without the lab's names, its report as their
model card, and one commit on the hub or a folder.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loractl.common.adapter_config import CONFIG, LINEAGE, SUFFIXES, portable_name
from loractl.common.artifacts import ArtifactStore, Binding
from loractl.common.binding import result_binding
from loractl.common.errors import ArtifactError, LoractlError, UsageError, WrongState
from loractl.common.job.ancestor import ancestor_job
from loractl.common.job.names import is_hub_data, is_hub_id
from loractl.common.job.spec import JobSpec
from loractl.common.model_card import License, Published, hub_card
from loractl.common.store.store import Store
from loractl.common.store.tables import Job
from loractl.common.units import amount
from loractl.scheduler.report.answer import report

from . import hub
from .answer import pull_adapter, stored_adapter

Note = Callable[[str], None]
"""Takes a sentence that a person should read before the push."""


@dataclass(frozen=True, kw_only=True)
class PushRequest:
    """What a person asks to push, and where to. Raises UsageError for a name that is none of a repository."""

    adapter: str
    repository: str
    public: bool = False
    base_name: str | None = None  # what a base that is a folder is called on the hub
    to: Path | None = None  # an empty or new folder: the files are written there, and nothing is pushed

    def __post_init__(self) -> None:
        check_repository(self.repository, "OWNER/NAME")
        if self.base_name is not None:
            check_repository(self.base_name, "--base-name")


@dataclass(frozen=True, kw_only=True)
class PushAnswer:
    """What a push has sent, or what it would send."""

    job_id: int
    files: Mapping[str, int]  # bytes of each, by name
    pushed: hub.Pushed | None  # None: they are in `folder` alone
    folder: Path | None

    def as_json(self) -> dict[str, Any]:
        """`job_id`; `files`: bytes by name; `folder`: where they are with --to; else the `repository` (owner/name),
        whether it is `private`, the `commit`, whether the repository had all of it before (`already_there`), `url`."""
        place, pushed = None if self.pushed is None else self.pushed.repository, self.pushed
        return {
            "job_id": self.job_id,
            "files": dict(self.files),
            "folder": None if self.folder is None else str(self.folder),
            "repository": None if place is None else place.name,
            "private": None if place is None else place.private,
            "commit": None if pushed is None else pushed.commit,
            "already_there": None if pushed is None else pushed.is_old,
            "url": None if pushed is None else pushed.url,
        }

    @property
    def sentence(self) -> str:
        """Where the files are now."""
        what = f"adapter of job {self.job_id} ({len(self.files)} files, {amount(sum(self.files.values()))})"
        if self.pushed is None:
            return f"What would be pushed of the {what} is in {self.folder}."
        return f"The {what} is pushed: {self.pushed.sentence}"


def push_adapter(request: PushRequest, store: Store, artifacts: ArtifactStore, user: str, note: Note) -> PushAnswer:
    """Push it, or write it to the folder that the request names.

    Raises what `publishable`, `hub.find_repository` and `hub.push` raise.
    """
    chosen = publishable(store, artifacts, request.adapter)
    base = chosen.base_on_hub(request.base_name)
    if base is None:
        note("the base is a folder; the card can't name it on the hub without --base-name.")
    place = None if request.to is not None else hub.find_repository(request.repository, public=request.public)
    if place is not None and request.public and place.private:
        note(f"{request.repository} stays private: a push does not change who may read it.")
    known = _license(chosen, base, note if place is None else None)
    final = report(store, artifacts, chosen.job_id, user).final  # this counts as a look at its final rows
    published = Published(
        repository=request.repository,
        base=base,
        license=known,
        datasets=datasets_of(chosen),
        final="" if final is None else final.sentence,
    )
    with tempfile.TemporaryDirectory(prefix="loractl-") as aside:
        folder = Path(aside) if request.to is None else request.to
        files = write_publication(artifacts, chosen, published, folder)
        message = f"Adapter with weights of sha256 {chosen.report['adapter']['sha256'][:12]}"
        pushed = None if place is None else hub.push(folder, files, place, message)
    return PushAnswer(job_id=chosen.job_id, files=files, pushed=pushed, folder=request.to)


def _license(chosen: Publishable, base: str | None, note: Note | None) -> License | None:
    """The base's license; None if it is not known. Without `note`, a hub that does not answer is an error."""
    known = folder_license(Path(chosen.spec.base_model)) if chosen.local_base else None
    if known is not None or base is None:
        return known
    try:
        return hub.base_license(base, None if chosen.local_base else chosen.commit)
    except LoractlError as error:
        if note is None:
            raise
        note(f"the base's license is not known: {error.sentence}.")
        return None


CARD = "README.md"


@dataclass(frozen=True, kw_only=True)
class Publishable:
    """A stored adapter that may leave the lab."""

    job_id: int
    stored: Binding
    spec: JobSpec
    data: Mapping[str, Any]  # the job's stored data sets
    report: dict[str, Any]

    @property
    def local_base(self) -> bool:
        """Whether its base is a folder, so that its name on the hub is unknown."""
        return Path(self.spec.base_model).is_absolute()

    @property
    def commit(self) -> str | None:
        """The commit of a base from the hub."""
        commit = (self.report.get("base") or {}).get("commit") or self.spec.revision
        return None if commit is None else str(commit)

    def base_on_hub(self, base_name: str | None) -> str | None:
        """The base's name on the hub, if known; `base_name`: the name given for a folder. Raises
        UsageError."""
        if not self.local_base:
            if base_name not in (None, self.spec.base_model):
                what = f"--base-name is for a base that is a folder; this one is {self.spec.base_model}"
                raise UsageError(what, "leave --base-name out")
            return self.spec.base_model
        return base_name


def publishable(store: Store, artifacts: ArtifactStore, text: str) -> Publishable:
    """A named adapter, if it may leave the lab.

    Raises what `stored_adapter` raises, WrongState if its job or its base forbids it, ArtifactError.
    """
    from loractl.common.job.file import override_spec

    adapter, job = stored_adapter(store, text)
    spec, stored = override_spec(job.spec, (), f"job {job.job_id}"), result_binding(store, job)
    if not spec.publish:
        raise _must_stay(adapter.job_id, "its job says publish: false")
    if (ancestor := _kept_ancestor(store, job)) is not None:
        raise _must_stay(adapter.job_id, f"it was begun from that of job {ancestor}, whose job says publish: false")
    told = artifacts.read_report(stored)
    if (told.get("base") or {}).get("publish") is False:
        raise _must_stay(adapter.job_id, "an adapter that must stay is merged into its base")
    return Publishable(job_id=job.job_id, stored=stored, spec=spec, data=job.data, report=told)


def _kept_ancestor(store: Store, job: Job) -> int | None:
    """An ancestor whose row, as it is now, says that it must stay: an edit may have changed it after this job's
    submit."""
    from loractl.common.job.file import override_spec

    row: Job | None = job
    while row is not None:
        spec = override_spec(row.spec, (), f"job {row.job_id}")
        if row is not job and not spec.publish:
            return row.job_id
        begun_from = ancestor_job(spec, row.ancestor)
        row = None if begun_from is None else store.jobs.numbered([begun_from]).get(begun_from)
    return None


def check_repository(name: str, option: str) -> None:
    """Raises UsageError unless it is OWNER/NAME."""
    if "/" not in name or not is_hub_id(name):
        raise UsageError(f"{option}: {name!r} is not of the form OWNER/NAME", "like our-lab/support-agent")


def write_publication(
    artifacts: ArtifactStore, adapter: Publishable, published: Published, folder: Path
) -> dict[str, int]:
    """Write the files to push into an empty folder: verified files, with the base's public name, and the model card.

    Returns the size of each file in bytes. Raises ArtifactError, LoractlError if a file names a folder of the lab.
    """
    pull_adapter(artifacts, adapter.stored, adapter.job_id, folder)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        if path.suffix not in SUFFIXES or path.name in (CARD, LINEAGE):
            path.unlink()
    base = published.base or portable_name(adapter.spec.base_model)
    _rewrite(folder / CONFIG, lambda settings: {**settings, "base_model_name_or_path": base})
    if (tokenizer := folder / "tokenizer_config.json").exists():
        _rewrite(tokenizer, lambda settings: {k: v for k, v in settings.items() if not _is_place(k, v)})
    (folder / CARD).write_text(hub_card(adapter.report, adapter.spec, published), "utf-8")
    _check_places(folder, adapter.spec)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def datasets_of(adapter: Publishable) -> tuple[str, ...]:
    """The data sets of the hub that it was trained on."""
    trained = {key: text for key, text in adapter.spec.data_sets().items() if key == "path" or key.startswith("more.")}
    named = [text.partition("@")[0] for key, text in trained.items() if key not in adapter.data and is_hub_data(text)]
    return tuple(dict.fromkeys(named))


def folder_license(folder: Path) -> License | None:
    """The license that a model's folder names, in the front matter of its README.md or in its config.json."""
    import yaml

    try:
        head = (folder / CARD).read_text("utf-8").split("\n---")[0].removeprefix("---")
        known = hub.license_in(yaml.safe_load(head))
    except (OSError, ValueError, yaml.YAMLError):
        known = None
    if known is None:
        try:
            known = hub.license_in(json.loads((folder / "config.json").read_text("utf-8")))
        except (OSError, ValueError, RecursionError):
            return None
    return known


def _must_stay(job_id: int, why: str) -> WrongState:
    return WrongState(
        f"the adapter of job {job_id} must stay in the lab: {why}",
        f"loractl status {job_id} --full shows its settings; what is made of such an adapter inherits publish: false",
    )


def _rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Raises ArtifactError unless the file is a JSON object: a worker may have stored anything."""
    try:
        settings = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ArtifactError(f"the adapter's {path.name} is not a JSON object", "loractl reproduce JOB makes it again")
    path.write_text(json.dumps(change(settings), indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")


def _is_place(key: str, value: Any) -> bool:
    """Whether a tokenizer's setting is the path of a file on the box that saved it."""
    return key.endswith(("_path", "_file")) and isinstance(value, str) and value.startswith("/")


def _check_places(folder: Path, spec: JobSpec) -> None:
    """Raises LoractlError if a rewritten file names a folder of the lab."""
    places = [text for text in (spec.base_model, *spec.data_sets().values()) if Path(text).is_absolute()]
    for name in (CARD, CONFIG, "tokenizer_config.json"):
        text = (folder / name).read_text("utf-8") if (folder / name).exists() else ""
        if found := next((place for place in places if place in text), None):
            raise LoractlError(f"{name} names {found}, a place of this lab: nothing is pushed", "report this as a bug")
