"""loractl worker: a node for each device of this box, watched."""

from __future__ import annotations

import datetime as dt
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from loractl.common.errors import LoractlError, UsageError
from loractl.common.units import clock, duration, gib, parse_moment, seconds_of, size_of

if TYPE_CHECKING:
    from loractl.common.artifacts import ArtifactStore


class OneOrZero(click.types.BoolParamType):
    """A yes or no, with a short message if the option's variable is anything else."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bool:
        """Raises BadParameter."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            self.fail(f"{value!r} is neither 1 nor 0", param, ctx)


@click.command()
@click.option("--gpus", metavar="LIST", help="Serve only these cards, by index or UUID, like 0,2.")
@click.option(
    "--reserve", metavar="SIZE", default="512MiB", show_default=True, help="Memory to keep free on each card."
)
@click.option(
    "--high-water",
    metavar="TIME",
    default="10min",
    show_default=True,
    help="How long the most memory that other people's programs held counts as theirs.",
)
@click.option(
    "--max-jobs-per-gpu",
    type=click.IntRange(1, 64),
    envvar="LORACTL_MAX_JOBS_PER_GPU",
    show_envvar=True,
    help="Jobs that may share a card.  [default: 1 below 40 GiB, else 4]",
)
@click.option(
    "--max-jobs-per-user",
    type=click.IntRange(1),
    envvar="LORACTL_MAX_JOBS_PER_USER",
    show_envvar=True,
    help="Jobs that one person may run at a time; the smallest limit of all workers applies.",
)
@click.option("--keep-jobs", is_flag=True, help="Let no job here yield its card to a much shorter one.")
@click.option(
    "--label", "labels", multiple=True, metavar="KEY=VALUE", help="A label that resources.node_labels may ask for."
)
@click.option(
    "--fork-server/--no-fork-server",
    default=True,
    show_default=True,
    type=OneOrZero(),
    envvar="LORACTL_FORK_SERVER",
    show_envvar=True,
    help="Fork trainers from a process that has loaded the libraries.",
)
@click.option("--spare/--no-spare", hidden=True, default=None, type=OneOrZero(), envvar="LORACTL_SPARE")  # its old name
@click.option("--keep-warm", hidden=True, envvar="LORACTL_KEEP_WARM")  # without effect: start scripts have it
@click.option("--until", metavar="WHEN", help="Stop by itself at this time, like 18:00, 2026-12-24T18:00 or 4h.")
@click.option("--for", "lasts", metavar="TIME", help="Stop by itself after this time, like 4h.")
@click.option(
    "--grace",
    metavar="TIME",
    help="How long a stop may take: after SIGTERM or SIGUSR1, and before --until.  [default: 3min before an end]",
)
@click.option("--drain-when-idle", is_flag=True, help="End when no job that fits an open device here is left.")
def worker(
    gpus: str | None,
    reserve: str,
    high_water: str,
    max_jobs_per_gpu: int | None,
    max_jobs_per_user: int | None,
    keep_jobs: bool,
    labels: tuple[str, ...],
    fork_server: bool,
    spare: bool | None,
    keep_warm: str | None,
    until: str | None,
    lasts: str | None,
    grace: str | None,
    drain_when_idle: bool,
) -> None:
    """Serve this box's devices: claim waiting jobs that fit and train them.

    Ctrl-C stops after a checkpoint and gives the jobs back; a second one stops at once. In a Slurm allocation, the
    worker stops before the allocation ends.
    """
    if sys.platform != "linux":
        raise LoractlError(
            f"loractl worker needs Linux, and this is {sys.platform}",
            "run it on a GPU box; what submits and reads works here, with a lab's database, queue and store",
        )
    from loractl.worker.protocol.secrecy import hide_environment

    hide_environment()  # before the other imports, which take a second
    from loractl.common.lab_store import open_lab_store
    from loractl.common.queue.hints import queue_away
    from loractl.common.queue.valkey import broker_url
    from loractl.common.settings import load_settings
    from loractl.common.store.database import connect, make_engine
    from loractl.common.store.store import Store
    from loractl.worker.allowance import allowed_cores, threads_of_trainer
    from loractl.worker.device.devices import find_devices, order_of_numbers
    from loractl.worker.node.box import Box

    if keep_warm is not None:
        _warn_of("keep_warm", "has no effect, since a trainer ends with its job")
    if spare is not None:
        _warn_of("spare", "is now --fork-server or LORACTL_FORK_SERVER")
        fork_server = spare
    settings = load_settings()
    settings.require_channels()
    settings.require_home()
    options: dict[str, Any] = {
        "margin": size_of("--reserve", reserve),
        "high_water_s": seconds_of("--high-water", high_water),
        "max_jobs": max_jobs_per_gpu,
        "user_limit": max_jobs_per_user,
        "keeps_jobs": keep_jobs,
        "labels": _labels(labels),
        "fork_server": fork_server,
    }
    now, grace_s = dt.datetime.now(dt.UTC), None if grace is None else seconds_of("--grace", grace)
    window = read_window(until, None if lasts is None else seconds_of("--for", lasts), grace_s, os.environ, now)
    connect(settings).dispose()  # checks that the schema is of this version
    store = Store(make_engine(settings.database_url, kept=0))  # keeps no connection: it is used every ten seconds
    artifacts = open_lab_store(settings, store)
    _require_store(artifacts)
    options["store_mark"] = artifacts.mark
    devices = find_devices(settings, gpus)
    broker_url(settings)
    if (away := queue_away(settings)) is not None:
        click.echo(f"Warning: {away.sentence}: {away.hint}. Until then this box finds jobs by itself.", err=True)
    for device in devices:
        size = f"{gib(device.total)} GiB" if device.total else "closed"
        named = f" ({settings.host}:{device.number}, {device.uuid})" if device.kind == "nvml" else ""
        click.echo(f"Serving {device.name}{named}, {size}.", err=True)
    if devices[0].kind != "cpu" and (order := order_of_numbers()) is not None:
        click.echo(order, err=True)
    if (threads := threads_of_trainer(1)) < allowed_cores():
        click.echo(f"Threads of a trainer, by OMP_NUM_THREADS: at most {threads}.", err=True)
    stops = None
    if window is not None:
        stops, grace_s = window.stops, window.grace_s
        ends = f"{duration(grace_s)} before {clock(window.ends, now)} ({window.said_by})"
        click.echo(f"Stops at {clock(stops, now)}, {ends}.", err=True)
    click.echo("Ctrl-C saves a checkpoint and requeues running jobs.", err=True)
    sys.exit(Box(settings, store, devices, options, stops=stops, grace_s=grace_s).run(drain_when_idle))


def _require_store(artifacts: ArtifactStore) -> None:
    """Raises WrongStore for another store than the lab's; one that is away may come back."""
    from loractl.common.errors import ArtifactError, ServiceUnreachable, WrongStore

    try:
        artifacts.check()
    except WrongStore:
        raise
    except (ArtifactError, ServiceUnreachable) as error:
        click.echo(f"Warning: {error.sentence}.", err=True)


def _warn_of(option: str, what: str) -> None:
    """Say what has become of an option of an earlier release."""
    from click.core import ParameterSource

    by_variable = click.get_current_context().get_parameter_source(option) is ParameterSource.ENVIRONMENT
    named = f"LORACTL_{option.upper()}" if by_variable else f"--{option.replace('_', '-')}"
    click.echo(f"Warning: {named} {what}. The next release refuses it.", err=True)


def _labels(pairs: tuple[str, ...]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair or not pair.isprintable():
            raise UsageError(f"--label {pair} is not of the form KEY=VALUE", "like --label nvlink=yes")
    return {key: value for key, _, value in (pair.partition("=") for pair in pairs)}


GRACE_S = 180.0
"""How long before its end a worker begins to stop by default: time for a step, its checkpoint and the upload."""

END_VARIABLE = "SLURM_JOB_END_TIME"
"""Slurm's variable: when the allocation ends, in seconds since 1970."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """The time until which a worker may run."""

    ends: dt.datetime  # it must have ended by then
    said_by: str  # the option or variable that set the end
    grace_s: float

    @property
    def stops(self) -> dt.datetime:
        """When it begins to stop."""
        return self.ends - dt.timedelta(seconds=self.grace_s)


def read_window(
    until: str | None, lasts_s: float | None, grace_s: float | None, environment: Mapping[str, str], now: dt.datetime
) -> Window | None:
    """The window with the earliest of all given ends; None: no end was given, so the worker stays. Raises UsageError.

    `until`: a time or a duration; `lasts_s`: seconds from now.
    """
    ends: list[tuple[dt.datetime, str]] = []
    if until is not None:
        try:
            ends.append((parse_moment(until, now), "--until"))
        except ValueError as error:
            raise UsageError(f"--until: {until!r} {error}", "like 18:00, 2026-12-24T18:00 or 4h") from None
    if lasts_s is not None:
        ends.append((now + dt.timedelta(seconds=lasts_s), "--for"))
    if (text := environment.get(END_VARIABLE)) is not None:
        ends.append((_slurm_end(text), END_VARIABLE))
    if not ends:
        return None
    (end, said_by), grace_s = min(ends), GRACE_S if grace_s is None else grace_s
    left_s = (end - now).total_seconds()
    if left_s <= 0:
        raise UsageError(f"{said_by}: that time has passed", _STALE if said_by == END_VARIABLE else None)
    if left_s <= grace_s:
        raise UsageError(
            f"{said_by}: only {duration(left_s)} are left, but a stop may take {duration(grace_s)}",
            "choose a later end or a shorter stop, like --grace 30s",
        )
    return Window(ends=end, said_by=said_by, grace_s=grace_s)


_STALE = f"this shell was started in an allocation that has ended: unset {END_VARIABLE}"


def _slurm_end(text: str) -> dt.datetime:
    try:
        return dt.datetime.fromtimestamp(int(text), dt.UTC)
    except (ValueError, OverflowError, OSError):
        raise UsageError(
            f"{END_VARIABLE} is not a time in seconds since 1970: {text[:40]!r}",
            f"unset {END_VARIABLE}, and use --until",
        ) from None
