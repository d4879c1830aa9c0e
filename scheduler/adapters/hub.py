"""The hub, through huggingface_hub: who we are, what is there already, and one commit with all files.

Only that library looks for the token (HF_TOKEN, or the file that `hf auth login` writes), and nothing prints it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loractl.common.errors import LoractlError, ServiceUnreachable, UsageError
from loractl.common.model_card import License
from loractl.common.settings import redacted
from loractl.common.text import clean_line

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

TIMEOUT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Repository:
    """A model's repository on the hub before a push."""

    name: str  # owner/name
    private: bool
    head: str | None  # its newest commit; None: the push creates the repository


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """The outcome of a push."""

    repository: Repository
    commit: str
    url: str

    @property
    def is_old(self) -> bool:
        """Whether the repository had all of it before."""
        return self.commit == self.repository.head

    @property
    def sentence(self) -> str:
        """Where it is now, and who may see it."""
        seen = "private" if self.repository.private else "public"
        same = "already has it, in" if self.is_old else "has it, as"
        return f"{self.repository.name} ({seen}) {same} commit {self.commit[:12]}: {self.url}"


def find_repository(name: str, *, public: bool) -> Repository:
    """The repository to push to, as it exists or will be created.

    Raises UsageError for a public repository without `public`, LoractlError if the hub refuses the token,
    ServiceUnreachable.
    """
    api = _api()
    with _asking(name):
        api.whoami()
    try:
        with _asking(name):
            found = api.model_info(name, timeout=TIMEOUT_S)
    except NotThere:
        return Repository(name=name, private=not public, head=None)
    if not found.private and not public:
        raise UsageError(
            f"{name} is public: everybody could read the adapter", "add --public, or name another repository"
        )
    return Repository(name=name, private=bool(found.private), head=found.sha)


def base_license(base: str, commit: str | None) -> License | None:
    """The license of a base on the hub, from its model card; None if the card names none, or the hub hides it.

    Raises LoractlError, ServiceUnreachable.
    """
    api = _api(signed=False)
    try:
        with _asking(base):
            card = api.model_info(base, revision=commit, timeout=TIMEOUT_S).card_data
    except NotThere:
        return None
    return None if card is None else license_in(card.to_dict())


def license_in(told: Any) -> License | None:
    """The license in a model's metadata; None if there is none, or several."""
    if not isinstance(told, Mapping):
        return None
    name = told.get("license")
    if isinstance(name, list) and len(name) == 1:
        name = name[0]
    if not isinstance(name, str) or not name.strip().isprintable() or not name.strip():
        return None
    more = {key: told[key] for key in ("license_name", "license_link") if isinstance(told.get(key), str)}
    if "://" not in more.get("license_link", "://"):  # a file in the base's own repository
        del more["license_link"]
    return License(id=name.strip(), more=more)


def push(folder: Path, files: Mapping[str, int], repository: Repository, message: str) -> Pushed:
    """Add one commit with all files of a folder, all of them or none. Raises LoractlError, ServiceUnreachable."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    api = _api()
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in files]
    if repository.head is None:
        with _asking(repository.name):
            api.create_repo(repository.name, private=repository.private)
    with _asking(repository.name, "" if repository.head else "; the repository was made"):
        done = api.create_commit(repository.name, operations, commit_message=message)
    with _asking(repository.name, f"; commit {done.oid[:12]} was made, and not looked at"):
        there = {file.path: file for file in api.get_paths_info(repository.name, list(files), revision=done.oid)}
    for name, size in files.items():
        if getattr(there.get(name), "size", None) != size:  # a .gitignore of the repository may leave files out
            raise LoractlError(
                f"{repository.name} did not take {name} in commit {done.oid[:12]}", "look at its .gitignore"
            )
    return Pushed(repository=repository, commit=done.oid, url=clean_line(redacted(done.commit_url)))


class NotThere(LoractlError):
    """The hub has no such repository, or hides it from the token."""


def _api(*, signed: bool = True) -> Any:
    """`signed`: with a token, which must exist."""
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        what = "loractl adapters push needs huggingface_hub"
        raise LoractlError(what, "pip install 'loractl[hub]'") from error
    return HfApi(token=True if signed else None)


@contextlib.contextmanager
def _asking(name: str, state: str = "") -> Iterator[None]:
    """The hub's refusals in a sentence that repeats nothing of the token. `state`: what the push has left behind."""
    try:
        yield
    except Exception as error:
        if (told := _refusal(error, name, state)) is None:
            raise
        raise told from None


def _refusal(error: Exception, name: str, state: str) -> LoractlError | None:
    """What an error of the hub, the network or the library means; None for any other error."""
    from huggingface_hub import constants, errors

    for each in _chain(error):
        if isinstance(each, errors.LocalTokenNotFoundError):
            return LoractlError("this machine has no token for the hub", _LOGIN)
        if isinstance(each, errors.HfHubHTTPError):
            return _by_status(each, name, state)
        if isinstance(each, errors.OfflineModeIsEnabled):
            return LoractlError("HF_HUB_OFFLINE keeps this machine from the hub", "unset it, and push again")
        if any(kind.__name__ == "TransportError" for kind in type(each).__mro__):  # httpx, or httpx2
            return _away(type(each).__name__ + state)
    without = None if constants.HF_HUB_DISABLE_XET else _WITHOUT_XET
    if isinstance(error, (ConnectionError, TimeoutError)):  # from hf_xet, even if the hub has no Xet
        return _away(f"{type(error).__name__} while files were uploaded{state}", without)
    if isinstance(error, (ValueError, RuntimeError)):
        return LoractlError(f"the push to {name} failed: {_said(str(error))}{state}", without or "nothing was pushed")
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _said(text: str) -> str:
    """What a hub or a library says, in one line and without the token."""
    from huggingface_hub import get_token

    token = get_token()
    return clean_line(text.replace(token, "***") if token else text)[:200]


_WITHOUT_XET = "a hub without Xet storage, and a proxy that blocks it, need HF_HUB_DISABLE_XET=1"
_LOGIN = "hf auth login, or set HF_TOKEN to a token that may write"


def _by_status(error: HfHubHTTPError, name: str, state: str) -> LoractlError:
    status = error.response.status_code
    if status == HTTPStatus.UNAUTHORIZED and not _hidden(error):
        return LoractlError(f"the hub does not know the token{state}", _LOGIN)
    if status == HTTPStatus.FORBIDDEN:
        return LoractlError(
            f"the token may not write to {name}{state}", "take a token with the right to write, or a name of your own"
        )
    if status == HTTPStatus.NOT_FOUND or _hidden(error):
        return NotThere(f"the hub has no {name}, or hides it from this token{state}", "check the name and the token")
    if status in (HTTPStatus.CONFLICT, HTTPStatus.PRECONDITION_FAILED):
        what = f"{name} was made or changed meanwhile, or is hidden from this token{state}"
        return LoractlError(what, "look at it, and push again")
    if status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        why = "too many requests" if status == HTTPStatus.TOO_MANY_REQUESTS else f"status {status}"
        return _away(f"{why}{state}", "wait some minutes, and push again")
    said = f": {_said(error.server_message)}" if error.server_message else ""
    return LoractlError(f"the hub refuses the push to {name} (status {status}){said}{state}", "nothing was pushed")


def _hidden(error: HfHubHTTPError) -> bool:
    """Whether a 401 is about the repository: the hub does not say whether it is there."""
    from huggingface_hub import errors

    return isinstance(error, errors.RepositoryNotFoundError)


def _away(why: str, hint: str | None = None) -> ServiceUnreachable:
    from huggingface_hub import constants

    away = ServiceUnreachable("the hub", redacted(constants.ENDPOINT), "HF_ENDPOINT", why)
    away.hint = hint or away.hint
    return away
