"""The file of a dump: a ZIP with a member for each table, and one that says what they hold and when they were read.

Each member has a checksum, and a file that was cut off has no directory: both are noticed before a row is written.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from loractl.common.errors import SchemaMismatch, UsageError

from ..schema import HEAD

FORMAT = 1
CONTENTS = "contents.json"
_BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class DumpedTable:
    """One table: its rows are in a member with its name."""

    name: str
    columns: Sequence[str]
    rows: int


@dataclass(frozen=True, kw_only=True)
class Dump:
    """What a dump holds."""

    revision: str
    made_at: str  # by the database's clock
    last_event: str  # time of the newest line of a history; "" without one
    newest: int  # number of the newest job; 0 without one
    sequences: Mapping[str, int]  # the last number that each has given
    tables: Sequence[DumpedTable]  # those that others refer to come first

    @property
    def jobs(self) -> int:
        return next((table.rows for table in self.tables if table.name == "jobs"), 0)


def member(table: str) -> str:
    """The name under which a table's rows are in the file."""
    return f"{table}.copy"


def write_contents(archive: zipfile.ZipFile, dump: Dump) -> None:
    """Close a dump."""
    archive.writestr(CONTENTS, json.dumps({"loractl_dump": FORMAT, **asdict(dump)}, indent=1))


def is_dump(file: Path) -> bool:
    """Whether a file may be a dump at all."""
    return zipfile.is_zipfile(file)


def read_dump(file: Path) -> Dump:
    """What the file holds; every byte of it was read. Raises UsageError for another or a damaged file, SchemaMismatch
    when a newer loractl made it."""
    try:
        with zipfile.ZipFile(file) as archive:
            if (broken := archive.testzip()) is not None:
                raise _damaged(file, f"{broken} is not as it was written")
            told = json.loads(archive.read(CONTENTS))
            if told.pop("loractl_dump", None) != FORMAT:
                raise _damaged(file, "its form is not known")
            dump = Dump(**{**told, "tables": [DumpedTable(**table) for table in told["tables"]]})
            there = set(archive.namelist())
    except (zipfile.BadZipFile, zlib.error, KeyError, TypeError, ValueError, EOFError, NotImplementedError) as error:
        raise _damaged(file, str(error).strip("'")) from None
    if missing := [table.name for table in dump.tables if member(table.name) not in there]:
        raise _damaged(file, f"{missing[0]} is missing")
    if dump.revision > HEAD:
        raise SchemaMismatch(dump.revision, HEAD)
    return dump


def blocks_of(archive: zipfile.ZipFile, table: str) -> Iterator[bytes]:
    """A table's rows, as COPY takes them."""
    with archive.open(member(table)) as stream:
        while block := stream.read(_BLOCK):
            yield block


def _damaged(file: Path, why: str) -> UsageError:
    return UsageError(
        f"{file} is not a loractl backup, or is damaged: {why}", "loractl db backup FILE makes one; take an older one"
    )
