"""Where a base model is (a hub id at one commit, a folder, a GGUF file), how it may be loaded, and what identifies it:
the hub's commit, and the hashes of the files that were loaded.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import functools
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from loractl.common.fingerprint import SUFFIXES, Fingerprint, digest, fingerprint, may_be_published
from loractl.common.job.status import Reason
from loractl.common.memory.config import HOW_TO_NAME_IT, format_of
from loractl.worker.protocol.trust import Refused, check_model_settings

from .failure import TrainingFailed

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


def identify(base_model: str, revision: str | None, cache: Path) -> dict[str, Any]:
    """Waits for the identity of a base model."""
    return BaseIdentity(base_model, revision, cache).wait()


Traits = frozenset[tuple[Any, ...]]
"""Folder, name, size, times and inode of each of a base's files. If they are unchanged, so is the content; if not, the
content may still be: a link or a permission changes a file's times."""


def traits_of(base_model: str, revision: str | None) -> Traits:
    """The traits of a base's files, which change when the files do. Raises OSError."""
    folder = Path(base_model) if Path(base_model).is_absolute() else pin(base_model, revision).folder
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())
    facts, where = [(path.name, path.stat()) for path in files], str(folder.resolve())
    return frozenset((where, name, f.st_size, f.st_mtime_ns, f.st_ctime_ns, f.st_ino) for name, f in facts)


Dates = dict[str, tuple[int, ...]]
"""Size, date, time of the inode's change and inode of each of a base's files, by name."""


def dates_of(base_model: str) -> Dates:
    """Of the files in a base's folder. Nothing for a folder that can't be read, and for a model on the hub, where a
    commit's files stay as they are."""
    with contextlib.suppress(OSError):
        if Path(base_model).is_absolute():
            return {name: tuple(facts) for _, name, *facts in traits_of(base_model, None)}
    return {}


def are_changed(before: Dates, now: Dates) -> bool:
    """Whether files were changed in between, as `cp` or `git pull` does. A link or a permission alone changes the time
    of an inode's change; a share without lasting inodes, like SMB without server numbers or SSHFS, alone gives a file
    another inode once the kernel has forgotten it. A replaced file has a new inode and a new change time."""
    if before.keys() != now.keys():
        return True
    pairs = ((facts, now[name]) for name, facts in before.items())
    return any(a[:2] != b[:2] or (a[2] != b[2] and a[3] != b[3]) for a, b in pairs)


class BaseIdentity:
    """Hashes a base model's files during its training: a card must not wait minutes for the hash of 140 GB.

    Start it when the base is loaded: until then its files may still be downloading from the hub.
    """

    def __init__(self, base_model: str, revision: str | None, cache: Path) -> None:
        pinned = None if Path(base_model).is_absolute() else pin(base_model, revision)
        self._base_model, self._commit = base_model, None if pinned is None else pinned.commit
        self._folder = Path(base_model) if pinned is None else pinned.folder
        self._cache = cache
        self._files: Fingerprint = {}
        self._error: Exception | None = None
        # it ends with the process: a failing job must not wait for it
        self._thread = threading.Thread(target=self._hash, name="identity", daemon=True)
        self._thread.start()

    def is_known(self, within_s: float) -> bool:
        """Whether the files are hashed, or will be within this time."""
        self._thread.join(within_s)
        return not self._thread.is_alive() and self._error is None

    def wait(self, meanwhile: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """What the report says about the base model: `commit` (None for a folder), `files`, one sha256 for all of them,
        and `publish: false` if an adapter that must stay in the lab is merged into it. `meanwhile` is called each
        second until all is hashed. Raises OSError, and TrainingFailed if a file changed or the folder has gone."""
        while self._thread.is_alive():
            self._thread.join(1.0)
            meanwhile()
        if self._error is not None:
            raise self._error
        terms = {} if may_be_published(str(self._folder)) else {"publish": False}
        return {"commit": self._commit, "sha256": digest(self._files), "files": self._files, **terms}

    def _hash(self) -> None:
        try:
            dates = dates_of(self._base_model)
            self._files = fingerprint(self._folder, self._cache)
            if are_changed(dates, dates_of(self._base_model)):  # the hashes may be of files that nobody has loaded
                what = f"base_model {self._base_model} was changed while its files were hashed"
                raise TrainingFailed(Reason.TRAINER_ERROR, what)
        except Exception as error:  # noqa: BLE001  raised again where it is waited for
            what, away = f"base_model {self._base_model} can't be read", _not_here(self._folder, error)
            self._error = error if away is None else TrainingFailed(Reason.BASE_MISSING, f"{what}: {away}")


def source_of(base_model: str, revision: str | None) -> dict[str, Any]:
    """transformers' options for a model's location: none for a folder, a commit for a model on the hub."""
    return {} if Path(base_model).is_absolute() else pin(base_model, revision).options()


def loading_options(base_model: str, revision: str | None, *, run_code: bool) -> dict[str, Any]:
    """Where a model is loaded from, and whether its own code may run. Raises TrainingFailed.

    An adapter is refused: transformers would instead load the base that its config names, from anywhere.
    """
    from transformers.utils import find_adapter_config_file

    where = source_of(base_model, revision)
    if find_adapter_config_file(base_model, **where) is not None:
        raise TrainingFailed(Reason.BAD_SPEC, f"base_model {base_model} holds an adapter: name the base model itself")
    configs = configs_of(base_model, where)
    try:
        check_model_settings(base_model, *configs)
    except Refused as refused:
        raise TrainingFailed(Reason.BAD_SPEC, refused.sentence) from refused
    if (format := format_of(configs[0])) is not None:
        what = f"base_model {base_model} is quantised with {format}, which can't be trained on"
        raise TrainingFailed(Reason.BAD_SPEC, f"{what}: {HOW_TO_NAME_IT}")
    if run_code and any("--" in json.dumps(config.get("auto_map", {})) for config in configs):
        what = f"base_model {base_model} runs code of another repository, which nobody has allowed"
        raise TrainingFailed(Reason.BAD_SPEC, what)
    # Without an explicit False, transformers asks at the terminal whether to run a model's own code.
    code = {"code_revision": where["revision"]} if where else {}
    return {"trust_remote_code": run_code, **where, **code}


def configs_of(base_model: str, where: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of config.json and tokenizer_config.json; a GGUF file alone has neither."""
    from transformers import PreTrainedConfig
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    if gguf_file_of(base_model) and not (Path(base_model) / "config.json").exists():
        return {}, get_tokenizer_config(base_model, **where)
    return (
        PreTrainedConfig.get_config_dict(base_model, **where)[0],
        get_tokenizer_config(base_model, **where),
    )


def family_of(base_model: str, revision: str | None) -> str:
    """The model's `model_type`, like gemma2; empty if only a GGUF file has it. Raises TrainingFailed."""
    with model_errors(base_model):
        return str(configs_of(base_model, source_of(base_model, revision))[0].get("model_type", ""))


def check_folder(base_model: str) -> None:
    """Say that a folder holds no model: transformers would complain about a tokenizer's backend."""
    folder = Path(base_model)
    if (why := _not_here(folder)) is not None:
        raise TrainingFailed(Reason.BASE_MISSING, f"base_model {base_model} can't be loaded: {why}")
    if folder.is_dir() and not (folder / "config.json").exists() and not list(folder.glob("*.gguf")):
        raise TrainingFailed(
            Reason.MODEL_NOT_FOUND, f"base_model {base_model} is a folder without a model: no config.json, no GGUF file"
        )


def gguf_file_of(base_model: str) -> dict[str, str]:
    """{"gguf_file": name} for a folder that holds exactly one GGUF file and no safetensors."""
    folder = Path(base_model)
    if not folder.is_dir() or list(folder.glob("*.safetensors")):
        return {}
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise TrainingFailed(Reason.MODEL_NOT_FOUND, f"{base_model} holds several GGUF files ({names}): keep one")
    return {"gguf_file": files[0].name} if files else {}


@contextlib.contextmanager
def model_errors(base_model: str) -> Iterator[None]:
    """transformers' many ways to say that a model is missing, as one sentence."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from safetensors import SafetensorError

    try:
        with reaching_the_hub():
            yield
    except (OSError, HFValidationError, HfHubHTTPError, SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        answer = None if Path(base_model).is_absolute() else refusal(error)
        if answer is Refusal.AWAY:
            raise TrainingFailed(Reason.TRAINER_ERROR, f"{answer} for base_model {base_model}") from None
        if answer is not None:  # the sentence says it all: the job's log needs no traceback
            raise TrainingFailed(Reason.MODEL_NOT_FOUND, f"base_model {base_model} can't be loaded: {answer}") from None
        if (away := _not_here(Path(base_model), error)) is not None:
            raise TrainingFailed(Reason.BASE_MISSING, f"base_model {base_model} can't be loaded: {away}") from error
        if Path(base_model).is_absolute() and (closed := _closed(Path(base_model))) is not None:
            change = f"chmod a+x {closed}" if closed in Path(base_model).parents else f"chmod -R a+rX {base_model}"
            why = f"{closed} can't be read by the worker's user; ask its owner for: {change}"
        elif isinstance(error, SafetensorError):
            why = f"its weights can't be read ({error})"
        else:
            why = first_line(error)
        raise TrainingFailed(Reason.MODEL_NOT_FOUND, f"base_model {base_model} can't be loaded: {why}") from error


SHARE_IS_AWAY = {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENODEV}
"""What reading from a share says whose server is away."""


def _not_here(folder: Path, error: Exception | None = None) -> str | None:
    """Why this box lacks a folder that another one has. None: it is here, or is no folder but a name on the hub."""
    if not folder.is_absolute():
        return None
    try:
        if isinstance(error, OSError) and error.errno in SHARE_IS_AWAY:
            raise error
        if not folder.exists():
            return "there is no such folder on this box"
        return "its folder is empty on this box" if folder.is_dir() and not any(folder.iterdir()) else None
    except PermissionError:
        return None  # _closed says whose right is missing
    except OSError as away:
        return f"its disk or share can't be read on this box: {os.strerror(away.errno or errno.EIO)}"


MODEL_FILES = {".json", ".safetensors", ".gguf", ".model", ".jinja", ".py"}
"""How the names of files end that loading a model reads. Another file of the folder explains no error."""


def _closed(folder: Path) -> Path | None:
    """The first that this user may not read: a folder above it, itself, or one of the model's files. safetensors says
    "No such file" of it."""
    for place in (*reversed(folder.parents), folder):
        try:
            os.stat(f"{place}/.")  # noqa: PTH116  pathlib drops the dot, which needs the right to enter
        except PermissionError:
            return place
        except OSError:
            return None
    try:
        for file in sorted(folder.iterdir()):
            if file.suffix in MODEL_FILES and file.is_file():
                file.open("rb").close()
    except PermissionError as error:
        return Path(error.filename)
    except OSError:
        return None  # the sentence says what went wrong first
    return None


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
