"""What is checked before anything of a job is stored or queued, and what only a worker's box can know."""

from __future__ import annotations

import difflib
import os
import urllib.error
import urllib.request
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from loractl.common.errors import UsageError
from loractl.common.job.names import is_hub_id
from loractl.common.memory.config import find_config, hub_is_off

from .base_model import check_base, holds_model, right_to_read

if TYPE_CHECKING:
    from loractl.common.job.spec import JobSpec
    from loractl.common.settings import Settings

HUB_TIMEOUT_S = 3.0
"""Seconds that a submit waits for the hub's answer about a name."""


def check_addresses() -> Settings:
    """Refuse settings and URLs that a later step would refuse. No service is asked. Raises UsageError."""
    from loractl.common.queue.valkey import broker_url
    from loractl.common.settings import load_settings

    settings = load_settings()
    broker_url(settings, start=False)
    return settings


def check_model(spec: JobSpec, settings: Settings) -> list[str]:
    """Refuse a base that no worker can load. Returns lines about what is doubtful and what is not checked here.

    Raises UsageError.
    """
    base, unchecked, doubts = Path(spec.base_model), [], []
    if base.is_absolute() and (closed := _closed(base)) is not None:
        doubts.append(_no_model(f"{base} can't be read: {closed}", right_to_read(base), settings))
    elif base.is_absolute() and not base.exists():
        doubts.append(_not_here(base, settings))
    elif base.is_absolute():
        if base.is_dir() and not holds_model(base):
            needed = "a model's folder has config.json and *.safetensors, or a *.gguf"
            doubts.append(_no_model(f"base_model {base} holds no model", needed, settings))
        elif missing := check_base(base):
            unchecked.append(f"{' and '.join(missing)} of {base}, not on this machine")
    elif not is_hub_id(spec.base_model):
        what = f"base_model {spec.base_model} is neither a folder here nor a name on the hub"
        raise UsageError(what, "name a folder, relative to the job file, or a hub id like owner/name")
    elif find_config(spec.base_model, spec.revision) is None:
        told = _ask_the_hub(f"models/{spec.base_model}")
        if told is None:
            unchecked.append(
                f"base_model {spec.base_model}: there is no folder of this name next to the job file, and the hub "
                "can't be reached"
            )
        elif not told:
            doubts.append(
                f"Warning: the hub shows no base_model {spec.base_model} to this machine: it is mistyped, or private "
                "(then the workers need HF_TOKEN)."
            )
    return [*doubts, *(f"Not checked: {what}. The worker will check it." for what in unchecked)]


def _not_here(base: Path, settings: Settings) -> str:
    """A warning: another machine may have it. An error if the workers are on this machine."""
    beside = [path.name for path in base.parent.iterdir() if path.is_dir()] if base.parent.is_dir() else []
    close = difflib.get_close_matches(base.name, beside, n=1)
    meant = f"did you mean {base.parent / close[0]}?" if close else ""
    if settings.embedded_database:
        otherwise = "name an existing folder, relative to the job file, or a hub id like owner/name"
        raise UsageError(f"there is no base_model {base}", meant or otherwise)
    return f"Warning: there is no {base} on this machine; every worker needs it at that path{meant and f': {meant}'}."


def _closed(base: Path) -> str | None:
    """Why this person can't look into an existing folder; None: they can."""
    try:
        if base.is_dir():
            next(base.iterdir(), None)
    except PermissionError as error:
        return error.strerror
    return None


def _no_model(what: str, needed: str, settings: Settings) -> str:
    """As _not_here, for an existing folder that is empty, something else's, or closed."""
    if settings.embedded_database:
        raise UsageError(what, needed)
    return f"Warning: {what} on this machine; every worker needs one at that path: {needed}."


def _ask_the_hub(name: str) -> bool | None:
    """Whether the hub shows it to this machine; None if it does not answer, or must not be asked."""
    if hub_is_off():
        return None
    where = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    if not where.startswith(("http://", "https://")):
        return None
    request = urllib.request.Request(f"{where}/api/{quote(name)}", method="HEAD")  # noqa: S310  the scheme is checked
    if token := os.environ.get("HF_TOKEN"):
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S):  # noqa: S310
            return True
    except urllib.error.HTTPError as error:
        absent = error.code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND)
        return False if absent else None
    except (OSError, ValueError):
        return None
