"""A push of a stored adapter: what is checked and asked first, the files, and one commit on the hub or a folder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loractl.common.artifacts import ArtifactStore
from loractl.common.errors import LoractlError
from loractl.common.model_card import License, Published
from loractl.common.store.store import Store
from loractl.common.units import amount

from . import hub
from .publication import (
    Publishable,
    check_repository,
    datasets_of,
    final_sentence,
    folder_license,
    publishable,
    write_publication,
)

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
    published = Published(
        repository=request.repository,
        base=base,
        license=_license(chosen, base, note if place is None else None),
        datasets=datasets_of(chosen),
        final=final_sentence(store, artifacts, chosen.job_id, user),
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
