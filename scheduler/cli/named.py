"""How a command finds the jobs that a person names: by number, range, name or tag; and what the shell completes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from loractl.common.errors import JobNotFound, LoractlError, UsageError
from loractl.common.store.records import Choice, Page
from loractl.common.text import clean_line, slip_of
from loractl.common.units import LAST_NUMBER

if TYPE_CHECKING:
    from loractl.common.store.store import Store

MOST_OF_A_RANGE = 1000
"""Jobs of a range; a longer one is a typing slip."""

MOST_LISTED = 10
"""Jobs listed when a name means several."""

COMPLETED = 200
"""The newest jobs, whose numbers and names the shell completes."""


def job_named(store: Store, text: str) -> int:
    """The job of a number, of a tag (support:prod), or the only one of a name.

    Raises JobNotFound, AdapterNotFound, and UsageError, with a list, for a name that several jobs have.
    """
    if re.fullmatch(r"\d{1,99}", text, re.ASCII):
        return int(text)
    if ":" in text:
        from loractl.common.job.names import parse_reference

        return store.adapters.get(parse_reference(text)).job_id

    jobs = store.jobs.newest(Choice(name=text), Page(limit=MOST_LISTED))
    if not jobs:
        raise JobNotFound(text)
    if len(jobs) > 1:
        shown = ", ".join(f"{job.job_id} ({job.status.value})" for job in jobs[:MOST_LISTED])
        more = ", ..." if len(jobs) > MOST_LISTED else ""
        raise UsageError(f"several jobs are named {text}: {shown}{more}", "name the one that you mean by its number")
    return jobs[0].job_id


def jobs_named(store: Store, texts: Sequence[str]) -> list[int]:
    """The jobs of numbers, ranges like 3-9, names and tags. A range means those that exist. Raises like job_named."""
    return [job_id for text in texts for job_id in _range(store, text) or [job_named(store, text)]]


def warn_of_unknown_user(store: Store, user: str) -> None:
    """Tell a person that this name is nobody's here: a typing slip, or somebody new."""
    known = store.jobs.users()
    if user not in known and not store.jobs.newest(Choice(user=user), Page(limit=1)):
        close = slip_of(user, known)
        meant = f"; did you mean {clean_line(close)}?" if close else "."
        click.echo(f"Warning: nobody called {clean_line(user)} has submitted a job here{meant}", err=True)


def _range(store: Store, text: str) -> list[int]:
    match = re.fullmatch(r"(\d{1,9})-(\d{1,9})", text, re.ASCII)
    if match is None:
        return []
    first, last = int(match[1]), int(match[2])
    if not first <= last < first + MOST_OF_A_RANGE:
        what = f"the range {text} ends before it begins" if last < first else f"the range {text} has too many jobs"
        raise UsageError(what, f"the smaller number first, and at most {MOST_OF_A_RANGE} jobs, like 3-9")

    page = Page(limit=last - first + 1, after=last + 1 if last < LAST_NUMBER else None)
    found = sorted(job.job_id for job in store.jobs.newest(Choice(), page) if first <= job.job_id <= last)
    if not found:
        raise JobNotFound(text)
    return found


class JobName(click.types.StringParamType):
    """An argument that names a job."""

    name = "job"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The newest jobs' numbers and names, and tags."""
        return completed(incomplete, _known_jobs)


class AdapterName(click.types.StringParamType):
    """An argument that names a stored adapter."""

    name = "adapter"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Names and tags."""
        return completed(incomplete, _known_adapters)


class Setting(click.types.StringParamType):
    """An option that sets a key of the job file."""

    name = "setting"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The keys of a job file, each with its equals sign."""
        from loractl.common.job.spec import spec_keys

        return [CompletionItem(f"{key}=", type="nospace") for key in spec_keys() if key.startswith(incomplete)]


def completed(incomplete: str, known: Callable[[Store], Iterable[tuple[str, str]]]) -> list[CompletionItem]:
    """The choices with this beginning. Completion shows no error: without a database there is nothing to complete."""
    from loractl.common.store.database import DatabaseError

    from .session import open_session

    try:
        _, store = open_session()
        return [CompletionItem(name, help=about) for name, about in known(store) if name.startswith(incomplete)]
    except (LoractlError, DatabaseError):
        return []


def _known_jobs(store: Store) -> Iterator[tuple[str, str]]:
    jobs = store.jobs.newest(Choice(), Page(limit=COMPLETED))
    for job in jobs:
        yield str(job.job_id), f"{job.name} ({job.status.value})"
    for name in dict.fromkeys(job.name for job in jobs):
        yield name, "the job of this name"
    yield from _known_adapters(store)


def _known_adapters(store: Store) -> Iterator[tuple[str, str]]:
    stored = store.adapters.newest(Page(limit=COMPLETED))[:COMPLETED][::-1]
    for name in dict.fromkeys(adapter.name for adapter in stored):
        yield name, "the newest adapter of this name"
    tags = store.adapters.tags([adapter.job_id for adapter in stored])
    for adapter in stored:
        for tag in tags.get(adapter.job_id, ()):
            yield f"{adapter.name}:{tag}", f"job {adapter.job_id}"


_LINES = {
    "bash": 'eval "$(_LORACTL_COMPLETE=bash_source loractl)"',
    "zsh": 'eval "$(_LORACTL_COMPLETE=zsh_source loractl)"',
    "fish": "_LORACTL_COMPLETE=fish_source loractl | source",
}


@click.command()
@click.argument("shell", type=click.Choice(list(_LINES)))
def completion(shell: str) -> None:
    """Print the line that turns on shell completion.

    For bash: loractl completion bash >> ~/.bashrc
    """
    click.echo(_LINES[shell])
