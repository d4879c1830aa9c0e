"""A worker's questions to the hub: which commit a revision means now, or why the hub refuses."""

from __future__ import annotations

import contextlib
import enum
import functools
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

ANSWER_TIMEOUT_S = 10.0
"""A hub that takes longer than this to name a commit counts as down."""


CONFIG = "config.json"


class Refusal(enum.StrEnum):
    """Why the hub refused a request; the values complete "base_model x can't be loaded: ..."."""

    AWAY = "the hub can't be reached"
    OFFLINE = "it is not in this worker's cache, and HF_HUB_OFFLINE keeps the worker from the hub"
    GATED = "it is gated: its owner must give this worker's account access (HF_TOKEN)"
    NO_REPOSITORY = "the hub has no such name, or hides it from this worker (HF_TOKEN)"
    NO_REVISION = "the hub has no such revision: a branch, a tag or a commit"


@dataclass(frozen=True, kw_only=True)
class Pinned:
    """A model on the hub at one commit, so that its tokenizer and its weights match."""

    folder: Path  # of its files in the cache
    cached: bool  # the hub is down: there are only the files that this box has

    @property
    def commit(self) -> str:
        return self.folder.name

    def options(self) -> dict[str, Any]:
        """For transformers' from_pretrained and its relatives.

        Without `local_files_only` transformers would ask six times in 23 s for each file that the model does not have.
        """
        return {"revision": self.commit, "local_files_only": self.cached}


@functools.cache
def pin(base_model: str, revision: str | None) -> Pinned:
    """Ask the hub, once per process, which commit the revision (None: main) means; if it is down, ask the cache.

    Raises OSError if neither knows it; `refusal` explains that error.
    """
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        with reaching_the_hub():
            HfApi().model_info(base_model, revision=revision, timeout=ANSWER_TIMEOUT_S)
            config = hf_hub_download(base_model, CONFIG, revision=revision)  # so that the cache knows the revision too
    except RemoteEntryNotFoundError as error:
        raise FileNotFoundError(f"it has no {CONFIG} on the hub") from error
    except OSError as error:
        cached = try_to_load_from_cache(base_model, CONFIG, revision=revision)
        if refusal(error) not in (Refusal.AWAY, Refusal.OFFLINE) or not isinstance(cached, str):
            raise
        return Pinned(folder=Path(cached).parent, cached=True)
    return Pinned(folder=Path(config).parent, cached=False)


@contextlib.contextmanager
def cached_if_away(name: str, revision: str | None) -> Iterator[bool]:
    """Let datasets read its cache at once if the hub is down. Else it asks six times in 23 s for each data set.

    Yields whether it is down; then the library takes the newest commit that it has, requested or not. Raises OSError if
    the hub refuses the data set.
    """
    import datasets
    from huggingface_hub import HfApi

    before, away = datasets.config.HF_HUB_OFFLINE, False
    try:
        with reaching_the_hub():
            HfApi().dataset_info(name, revision=revision, timeout=ANSWER_TIMEOUT_S)
    except OSError as error:
        if refusal(error) not in (Refusal.AWAY, Refusal.OFFLINE):
            raise
        datasets.config.HF_HUB_OFFLINE = away = True
    try:
        yield away
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def known_commit(name: str, revision: str | None) -> str | None:
    """What a data set's revision (None: main) meant when the hub was last asked; a commit is its own name."""
    from huggingface_hub.constants import HF_HUB_CACHE

    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    ref = Path(HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}" / "refs" / (revision or "main")
    return ref.read_text("utf-8").strip() if ref.is_file() else None


@contextlib.contextmanager
def reaching_the_hub() -> Iterator[None]:
    """Raise ConnectionError for an error of the client's transport: httpx, or httpx2 since huggingface_hub 2."""
    try:
        yield
    except Exception as error:
        if any(kind.__name__ == "TransportError" for kind in type(error).__mro__):
            raise ConnectionError(f"the hub can't be reached: {error}") from error
        raise


def refusal(error: BaseException) -> Refusal | None:
    """The hub's refusal in an error or in its causes. Only AWAY is temporary."""
    from huggingface_hub import is_offline_mode

    why = next((why for each in chain_of(error) if (why := _refusal_of(each)) is not None), None)
    return Refusal.OFFLINE if why is Refusal.AWAY and is_offline_mode() else why


def _refusal_of(error: BaseException) -> Refusal | None:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return Refusal.GATED
    if isinstance(error, errors.RepositoryNotFoundError):
        return Refusal.NO_REPOSITORY
    if isinstance(error, errors.RevisionNotFoundError):
        return Refusal.NO_REVISION
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        return Refusal.AWAY if status >= 500 or status == HTTPStatus.TOO_MANY_REQUESTS else None
    # LocalEntryNotFoundError: the hub was not asked, or did not answer
    away = (ConnectionError, TimeoutError, socket.gaierror, errors.LocalEntryNotFoundError)
    return Refusal.AWAY if isinstance(error, away) else None


def chain_of(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes, up to the first."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__
