"""All checks of doctor in parallel, each in bounded time: a service that hangs becomes a line, not a hang. They are
made as this user, or as the user of the worker's service."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote, urlsplit

from loractl.common.errors import LoractlError, UsageError
from loractl.common.settings import Settings, load_settings, mistyped_variables

from ..place import SERVICE, SERVICE_USER, Place
from .box import see_cards, see_disk, see_models
from .condition import Condition, Diagnosis, Level, broken, failed, fine, skipped, warning
from .services import see_boxes, see_clock, see_database, see_logins, see_messages, see_queue, see_revision, see_store

PATIENCE_S = 10.0
"""The default time limit of a check."""

CARDS_S = 200.0
"""A self-test imports torch, which takes a minute from a slow disk."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """A part of the installation, and how to check it."""

    name: str
    look: Callable[[Settings], Iterable[Condition]]
    needs: str | None = None  # an earlier check that must not have failed
    least_s: float = 0.0  # it may take this time even if less patience is asked for


CHECKS = (
    Check(name="database", look=see_database),
    Check(name="revision", look=see_revision, needs="database"),
    Check(name="logins", look=see_logins, needs="revision"),
    Check(name="clock", look=see_clock, needs="database"),
    Check(name="queue", look=see_queue),
    Check(name="store", look=see_store),
    Check(name="disk", look=see_disk),
    Check(name="models", look=see_models),
    Check(name="boxes", look=see_boxes, needs="revision"),
    Check(name="messages", look=see_messages, needs="revision"),
    Check(name="cards", look=see_cards, least_s=CARDS_S),
)


def diagnose(patience_s: float = PATIENCE_S, names: Collection[str] = ()) -> Diagnosis:
    """Run all checks, or these and those that they need. Whatever is wrong becomes a condition.

    Raises UsageError for a check that does not exist.
    """
    checks = _chosen(names)
    try:
        settings = load_settings()
    except LoractlError as error:
        unread = [skipped(check.name, "not checked: the settings can't be read") for check in checks]
        return Diagnosis(conditions=(failed("settings", error), *unread))
    runs: dict[str, _Run] = {}
    for check in checks:
        if check.needs is None:
            runs[check.name] = _Run(check, settings, patience_s)
    found = [fine("settings", f"{settings.home}, as {settings.user}")]
    slips = mistyped_variables().items()
    found += [warning("settings", f"{name} is not a setting", f"did you mean {meant}?") for name, meant in slips]
    for check in checks:
        if check.needs is not None:
            if not all(c.level in (Level.OK, Level.WARNING) for c in found if c.check == check.needs):
                found.append(skipped(check.name, f"not checked without the {check.needs}"))
                continue
            runs[check.name] = _Run(check, settings, patience_s)
        found += runs[check.name].end()
    hung = tuple(name for name, run in runs.items() if run.hangs)
    secrets = _secrets(settings)
    return Diagnosis(conditions=tuple(_without(secrets, condition) for condition in found), hung=hung)


def _chosen(names: Collection[str]) -> tuple[Check, ...]:
    known = {check.name: check for check in CHECKS}
    if unknown := sorted(set(names) - set(known)):
        raise UsageError(f"there is no check {unknown[0]}", f"checks: {', '.join(known)}")
    wanted = set(names or known)
    for check in reversed(CHECKS):
        if check.name in wanted and check.needs is not None:
            wanted.add(check.needs)
    return tuple(check for check in CHECKS if check.name in wanted)


class _Run:
    """A check in a thread that can be abandoned: a call that hangs in the kernel can't be ended."""

    def __init__(self, check: Check, settings: Settings, patience_s: float) -> None:
        self._check = check
        self._settings = settings
        self._patience_s = max(patience_s, check.least_s)
        self._until = time.monotonic() + self._patience_s
        self._found: list[Condition] = []
        self._thread = threading.Thread(target=self._look, name=f"check of the {check.name}", daemon=True)
        self._thread.start()

    def _look(self) -> None:
        try:
            for condition in self._check.look(self._settings):
                self._found.append(condition)
        except Exception as error:  # noqa: BLE001  whatever one check meets, the others must be told as well
            self._found.append(failed(self._check.name, error))

    @property
    def hangs(self) -> bool:
        return self._thread.is_alive()

    def end(self) -> list[Condition]:
        """What it found; no answer in time is a condition, too."""
        self._thread.join(max(0.0, self._until - time.monotonic()))
        if not self.hangs:
            return self._found
        name = self._check.name
        hint = "it hangs, or is very slow: look at its server and the way there; --patience gives it more time"
        return [*self._found, broken(name, f"no answer within {self._patience_s:g} s", hint)]


def _secrets(settings: Settings) -> list[str]:
    """Passwords in the settings, as written there and decoded."""
    found = [os.environ.get(name) for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "PGPASSWORD")]
    found.append(settings.s3.secret_key if settings.s3 else None)
    for url in (settings.database_url, settings.redis_url or ""):
        found += [urlsplit(url).password, *re.findall(r"[?&]\w*password=([^&]*)", url)]
    return [text for word in found if word for text in {word, unquote(word)} if len(text) >= 6]


def _without(secrets: Iterable[str], condition: Condition) -> Condition:
    """The condition without passwords, in case a library's message repeats one."""
    sentence, hint = condition.sentence, condition.hint
    for secret in secrets:
        sentence, hint = sentence.replace(secret, "***"), hint and hint.replace(secret, "***")
    return replace(condition, sentence=sentence, hint=hint)


def service_diagnosis(checks: tuple[str, ...] = ()) -> Diagnosis:
    """The findings for this box's worker, with its settings and as its user. Raises UsageError without one,
    LoractlError."""
    if os.geteuid() != 0:
        raise UsageError(
            "--service needs root", "only root reads the service's settings: sudo loractl doctor --service"
        )
    return diagnosed(SERVICE, SERVICE.variables(), checks)


def diagnosed(place: Place, variables: dict[str, str], checks: tuple[str, ...] = ()) -> Diagnosis:
    """What doctor finds with these variables. Raises LoractlError if the user can't even start loractl."""
    command = [sys.executable, "-P", "-c", "from loractl.scheduler.cli.main import main; main()", "doctor", "--json"]
    command += [word for check in checks for word in ("--check", check)]
    service_s: dict[str, Any] = {"user": SERVICE_USER, "group": SERVICE_USER, "extra_groups": []}
    try:
        done = subprocess.run(
            command, env=place.environment(variables), capture_output=True, text=True, cwd="/",
            stdin=subprocess.DEVNULL, **(service_s if place.service else {}),
        )  # fmt: skip
        answer = json.loads(done.stdout)
    except (OSError, ValueError) as error:
        who = f"the user {SERVICE_USER}" if place.service else "this user"
        raise LoractlError(
            f"{who} can't run {sys.executable}", "install loractl where it can read, as in /opt/loractl"
        ) from error
    found = [Condition(**{**line, "level": Level(line["level"])}) for line in answer["checks"]]
    return Diagnosis(conditions=tuple(found))
