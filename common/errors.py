"""The errors that a person can meet, each with what happened, what to do next and an exit code.

LoractlError                    1  failed
├── SpecError                   2  the job file is wrong (holds every problem found)
├── DataError                   2  a data set is wrong (file, row, what was expected)
├── UsageError                  2  a command was used wrongly
├── JobNotFound                 3  no such job
├── AdapterNotFound             3  no such adapter
├── SweepNotFound               3  no such sweep
├── ServiceUnreachable          4  database, Redis or artifact store can't be reached
│   ├── ServiceRefused          4  it answers, and refuses the user or the password
│   └── WrongStore              4  the artifact store is another one than the lab's
├── Forbidden                   1  the database's user has no right to do that
├── ValueRefused                1  the database refuses a value that its column may not hold
├── NameTaken                   1  another box has this one's name
├── CardTaken                   1  another worker serves the card under another name
├── SchemaMismatch              1  the database is older or newer than this loractl
│   └── SchemaTooOld            1  it is older than any that this loractl upgrades
├── ArtifactError               1  an artifact can't be written or does not match its manifest
│   ├── ReportUnknown           1  a stored report has another form than loractl's
│   ├── ResultTaken             1  another result is there
│   └── NotStorable             1  no store would take it, now or later
└── WrongState                  1  the job's state does not allow that

The command line (`loractl.scheduler.cli.main.main`) prints an error that reaches it, and exits with its code. A
supervisor ends the attempt with a reason instead; a server answers with the sentence. Other code catches an error only
to continue.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .text import without_passwords

if TYPE_CHECKING:
    from pathlib import Path


class ExitCode(enum.IntEnum):
    """What a command's exit status means."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    UNREACHABLE = 4
    INTERRUPTED = 130


class LoractlError(Exception):
    """A problem with one sentence for people and a hint with the next step. Neither shows the password of a URL."""

    exit_code = ExitCode.FAILED

    def __init__(self, sentence: str, hint: str | None = None) -> None:
        sentence, hint = without_passwords(sentence), None if hint is None else without_passwords(hint)
        super().__init__(sentence)
        self.sentence = sentence
        self.hint = hint
        if hint:
            self.add_note(f"Hint: {hint}")  # in the traceback that a script or a notebook shows


class UsageError(LoractlError):
    """A command was used wrongly."""

    exit_code = ExitCode.USAGE


@dataclass(frozen=True, kw_only=True)
class SpecProblem:
    """One thing that is wrong in a job file: where, which key, what, and what to do."""

    file: str
    line: int | None
    key: str
    what: str
    hint: str | None = None

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.key}: {self.what}" if self.key else f"{place}: {self.what}"


class SpecError(LoractlError):
    """A job file has one or more problems; all of them are listed, in the order of their lines."""

    exit_code = ExitCode.USAGE

    def __init__(self, problems: list[SpecProblem]) -> None:
        self.problems = sorted(problems, key=lambda p: (p.line or 0, p.key))
        super().__init__("\n".join(str(p) for p in self.problems))


class DataError(LoractlError):
    """A data set can't be trained on: which file, which row, and what was expected there.

    `kind` is that of its finding (common/data/findings.py).
    """

    exit_code = ExitCode.USAGE

    def __init__(
        self, file: str | Path, what: str, *, row: int | None = None, hint: str | None = None, kind: str = "unreadable"
    ) -> None:
        self.file = str(file)
        self.row = row
        self.what = what
        self.kind = kind
        place = self.file if row is None else f"{self.file}: row {row}"
        super().__init__(f"{place}: {what}", hint)

    @property
    def with_hint(self) -> str:
        """The sentence with its hint, as a job's row has it."""
        return f"{self.sentence} ({self.hint})" if self.hint else self.sentence


class JobNotFound(LoractlError):
    """There is no job with that number, name, or in that range."""

    exit_code = ExitCode.NOT_FOUND

    def __init__(self, job: int | str, sentence: str | None = None) -> None:
        super().__init__(sentence or f"there is no job {job}", "loractl status -a lists all jobs")


class AdapterNotFound(LoractlError):
    """No stored adapter has that number, name or tag."""

    exit_code = ExitCode.NOT_FOUND

    def __init__(self, reference: str) -> None:
        super().__init__(f"no adapter {reference} is stored", "loractl adapters lists what is stored")


class SweepNotFound(LoractlError):
    """There is no sweep with that number."""

    exit_code = ExitCode.NOT_FOUND

    def __init__(self, sweep_id: int) -> None:
        super().__init__(f"there is no sweep {sweep_id}", "loractl status -a --json names each job's sweep_id")
        self.sweep_id = sweep_id


class ServiceUnreachable(LoractlError):
    """A service that loractl needs did not answer."""

    exit_code = ExitCode.UNREACHABLE

    def __init__(self, service: str, address: str, setting: str, why: str) -> None:
        super().__init__(f"{service} is unreachable at {address}: {why}", f"check that it runs, or set {setting}")
        self.service = service
        self.facts = service, address, setting, why


class ServiceRefused(ServiceUnreachable):
    """A service answered and refused this user."""

    def __init__(self, service: str, address: str, setting: str, why: str) -> None:
        super().__init__(service, address, setting, why)
        self.sentence = f"{service} at {address} refuses this user: {why}"
        self.hint = f"check user and password in {setting}; write special characters as %XX"


class WrongStore(ServiceUnreachable):
    """What is at the artifact store's address is not the lab's store: nothing is read or written there."""

    def __init__(self, address: str, why: str) -> None:
        super().__init__("the artifact store", address, "LORACTL_ARTIFACTS_URL", why)
        self.sentence = f"{address} is not the lab's artifact store: {why}"
        self.hint = (
            "set LORACTL_ARTIFACTS_URL to the lab's store, and see that it is mounted; "
            "if the lab has moved or was restored, its owner runs loractl lab adopt-store"
        )


class Forbidden(LoractlError):
    """The database's user may not do that: one role submits, another one works (docs/deploy.md)."""

    def __init__(self, user: str | None, why: str) -> None:
        super().__init__(
            f"the database does not let {user or 'this user'} do that: {why}",
            "each role has its own rights: docs/deploy.md; LORACTL_DATABASE_URL names the user",
        )


class ValueRefused(LoractlError):
    """A value is too long, out of its bounds, or of another shape than its column's."""

    def __init__(self, what: str) -> None:
        super().__init__(f"the database refuses the value of {what}", "it is too long, out of bounds, or not printable")


class NotYours(Forbidden):
    """Somebody else's job: who may change it is the lab's decision (docs/security.md)."""

    def __init__(self, sentence: str) -> None:
        hint = "the lab's owner names operators, or lets everybody: loractl lab operators --add NAME, loractl lab open"
        LoractlError.__init__(self, sentence, hint)


class NameTaken(LoractlError):
    """Another live box has the same name: each would give back the other's jobs."""

    def __init__(self, node: str) -> None:
        host, _, index = node.rpartition(":")
        super().__init__(
            f"another box is named {host} and serves its device {index}",
            "give each its own name: LORACTL_HOST=...; in a copied LORACTL_HOME, delete run/instance",
        )


class CardTaken(LoractlError):
    """Another live node serves the same card under another name: each would promise memory that the other has."""

    def __init__(self, node: str, server: str) -> None:
        super().__init__(
            f"{server} serves the card of {node}", "stop one of the two workers, or divide the cards: --gpus"
        )


class SchemaMismatch(LoractlError):
    """The database's schema is not the one that this loractl knows."""

    def __init__(self, revision: str | None, wanted: str, *, what: str = "the database") -> None:
        there = "has no loractl tables yet" if revision is None else f"is at revision {revision}"
        newer = revision is not None and revision > wanted
        super().__init__(
            f"{what} {there}, this loractl needs revision {wanted}",
            "upgrade loractl on this machine, then start it again" if newer else "run loractl db upgrade",
        )


class SchemaTooOld(SchemaMismatch):
    """No migration leads from this schema to this loractl's."""

    def __init__(self, revision: str, oldest: str, *, upgrader: str, what: str) -> None:
        """`upgrader`: the loractl that brings it to the `oldest` revision from which this one goes on."""
        LoractlError.__init__(
            self,
            f"{what} is at revision {revision}, and this loractl upgrades from revision {oldest} on",
            f"first run loractl db upgrade of {upgrader}, then this one's",
        )


class ArtifactError(LoractlError):
    """An artifact could not be stored, or what is stored does not match its manifest."""


class StoreFailed(ArtifactError):
    """The store, or the disk in front of it, failed or refused at this moment. What is stored may be whole."""


class ReportUnknown(ArtifactError, KeyError):
    """A stored report has a form that no loractl wrote; a KeyError too, for readers of older reports."""

    def __init__(self, file: str, why: str) -> None:
        super().__init__(
            f"{file} is not a loractl report: {why}", "restore the file from a backup, or run loractl reproduce JOB"
        )


class ResultTaken(ArtifactError):
    """Another result is already there: the job's number was assigned before, and then forgotten."""


class NotStorable(ArtifactError):
    """Something that no store could take, because of its name or its kind."""


class WrongState(LoractlError):
    """The job is not in a state that allows the command."""
