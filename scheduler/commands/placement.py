"""Commands about placement: why a job waits, what it will need, which cards there are, and closing them."""

from __future__ import annotations

import datetime as dt
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loractl.common.errors import LoractlError, UsageError
from loractl.common.text import clean_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loractl.common.job.method import Method
    from loractl.common.job.spec import JobSpec
    from loractl.common.memory.plan import Plan
    from loractl.common.memory.step import Lengths
    from loractl.common.placement.lines import Waiting
    from loractl.common.store.fleet import FleetView
    from loractl.common.store.store import Store
    from loractl.common.store.tables import Job
    from loractl.scheduler.answers.why import Wait

LENGTHS_TIMEOUT_S = 300
"""Counting a large data set's tokens takes as long as the training's own preparation, once."""


@click.command()
@click.argument("job_id", type=int, metavar="JOB")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def why(job_id: int, as_json: bool) -> None:
    """Explain why a job waits, card by card, and when it will start."""
    from loractl.common.job.status import Status
    from loractl.scheduler.answers.why import REPLAYED_JOBS, Tier, card_fits, expected_starts, explain, with_start
    from loractl.scheduler.session import open_session
    from loractl.scheduler.text import fleet as render_fleet
    from loractl.scheduler.text import jobs as render

    _, store = open_session()
    job = store.job(job_id)
    if job.status is not Status.QUEUED:
        place = clean_line(f" on {job.node}" if job.status is Status.RUNNING else f": {job.message}")
        click.echo(
            json.dumps({"job_id": job_id, "status": job.status.value, "word": None, "sentence": job.message})
            if as_json
            else f"Job {job_id} does not wait: it is {job.status.value}{place}. In full: loractl show {job_id}"
        )
        return
    view, waiting = store.fleet(), store.ready(REPLAYED_JOBS + 1)
    starts, fits = expected_starts(view, waiting), card_fits(job, view)
    wait, start = with_start(explain(job, view), job, view, waiting, starts), starts.get(job_id)
    if as_json:
        value = {
            "job_id": job_id,
            "tier": wait.tier.name.lower(),
            "word": wait.word,
            "sentence": wait.sentence,
            "vram_needed": job.vram_needed,
            "expected_start": None if start is None else vars(start),
            "cards": [vars(fit) for fit in fits],
        }
        click.echo(json.dumps(value, default=lambda at: at.isoformat()))
        return
    ahead = "" if wait.tier is Tier.NEVER else _ahead(job, view, waiting)
    helps = _helps(job, wait, view, waiting)
    click.echo(render_fleet.why(job, wait, start, fits, ahead, helps, view.now, render.detect_screen()))


def _ahead(job: Job, view: FleetView, waiting: Sequence[Waiting]) -> str:
    from loractl.scheduler.answers.why import REPLAYED_JOBS, ahead_of, rivals

    ahead = ahead_of(job, view, waiting)
    if not ahead:
        return "Nothing is ahead of it."
    named = ", ".join(f"{other.job_id} ({other.user})" for other in ahead[:3])
    more = f" and {len(ahead) - 3} more" if len(ahead) > 3 else ""
    others = rivals(job, view, waiting)
    total = f"{len(others) + 1}" if len(waiting) <= REPLAYED_JOBS else f"more than {REPLAYED_JOBS}"
    return f"Ahead of it: {named}{more}. Position {len(ahead) + 1} of {total}."


def _helps(job: Job, wait: Wait, view: FleetView, waiting: Sequence[Waiting]) -> list[str]:
    """What would make it start now; each was asked of the rule."""
    from loractl.common.job.method import Method
    from loractl.common.job.need import Need
    from loractl.common.job.spec import JobSpec
    from loractl.common.store.fleet import waiting_of
    from loractl.common.units import gib
    from loractl.scheduler.answers.why import Tier, without_others, would_start

    if wait.tier in (Tier.POLICY, Tier.NEXT):
        return []
    me, found = waiting_of(vars(job), view.now), []
    if Method.QLORA not in me.methods and job.vram_qlora is not None:
        node = would_start(job, view, waiting, me.need, (Method.QLORA,))
        if node is not None:
            found.append(f"It would start now on {node} with method: qlora (plan {gib(job.vram_qlora)} GiB).")
    room = max((card.free for card in view.cards.values() if card.open and card.slots), default=0)
    spec = JobSpec.model_validate(job.spec)
    for key, text, smaller in _smaller(spec, me.methods, room):
        need = Need(lora=smaller.get(Method.LORA), qlora=smaller.get(Method.QLORA))
        methods = tuple(method for method in me.methods if method in smaller)
        node = would_start(job, view, waiting, need, methods) if methods else None
        if node is not None:
            as_ = f"as {methods[0].value} " if len(me.methods) > 1 and len(methods) == 1 else ""
            plan_ = f"(plan {gib(min(smaller[method] for method in methods))} GiB)"
            found.append(f"It would start now on {node} {as_}with {text} {plan_}.")
            found.append(f"Try: loractl plan {job.job_id} --set {key}")
    outside = without_others(job, view)
    if outside is not None:
        found.append(f"It would fit now on {outside[0]} without {outside[1]}.")
    return found


def _smaller(spec: JobSpec, methods: Sequence[Method], room: int) -> list[tuple[str, str, dict[Method, int]]]:
    """Smaller forms of the job that a card with `room` bytes would hold: key=value, words, need by method."""
    from loractl.common.memory.config import read_shape
    from loractl.common.memory.fit import largest_fit
    from loractl.common.memory.plan import plan

    shape = read_shape(spec.base_model, spec.revision)
    if shape is None or room <= 0:
        return []
    found: dict[str, tuple[str, dict[Method, int]]] = {}
    for method in methods:
        fit = largest_fit(shape, spec, method, room)
        options = []
        if fit.max_length is not None and fit.max_length < spec.dataset.max_length:
            length = max(8, fit.max_length // 64 * 64) if fit.max_length >= 64 else fit.max_length
            changed = spec.model_copy(update={"dataset": spec.dataset.model_copy(update={"max_length": length})})
            options.append((f"dataset.max_length={length}", f"max_length {length}", changed))
        batch, now = fit.micro_batch, spec.training.per_device_train_batch_size
        batch = spec.training.micro_batch(min(batch or 0, now - 1))
        if batch:
            accumulation = spec.training.effective_batch // batch
            update = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
            changed = spec.model_copy(update={"training": spec.training.model_copy(update=update)})
            keys = " --set ".join(f"training.{name}={value}" for name, value in update.items())
            rows = "1 row" if batch == 1 else f"{batch} rows"
            options.append((keys, f"{rows} at once, accumulating {accumulation}", changed))
        for key, text, changed in options:
            found.setdefault(key, (text, {}))[1][method] = plan(shape, changed, method).need_bytes
    return [(key, text, needs) for key, (text, needs) in found.items()]


@click.command()
@click.argument("job", required=False, metavar="JOB.yaml|JOB")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, like lora.r=8.")
@click.option("--gpu", metavar="SIZE", help="Plan for a card of this size, like 24GiB, instead of the fleet's.")
@click.option("--solve", is_flag=True, help="Find the largest micro-batch and max_length that fit.")
@click.option("--accuracy", is_flag=True, help="Show predicted against measured peaks of the jobs that ran.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(
    job: str | None, overrides: tuple[str, ...], gpu: str | None, solve: bool, accuracy: bool, as_json: bool
) -> None:
    """Show what a job will need of a card, part by part, before it runs.

    The base model's config.json is enough. Where its tokenizer and the training stack are there as well, the rows' own
    lengths are counted; else every row is taken to be max_length tokens long.
    """
    from loractl.scheduler.session import open_session

    _, store = open_session()
    if accuracy:
        _accuracy(store, as_json)
        return
    if job is None:
        raise UsageError("plan needs a job file or a job's number", "like loractl plan job.yaml")
    _plan(job, overrides, _card_size(gpu), solve, as_json, store)


def _accuracy(store: Store, as_json: bool) -> None:
    from loractl.common.memory.correction import accuracy
    from loractl.scheduler.text import fleet as render_fleet
    from loractl.scheduler.text import jobs as render

    found = accuracy(store.measured())
    if as_json:
        click.echo(json.dumps([{**vars(one), "factor": one.factor} for one in found]))
        return
    click.echo(render_fleet.accuracy_table(found, render.detect_screen()))


def _card_size(text: str | None) -> int | None:
    from loractl.common.units import parse_size

    try:
        return None if text is None else parse_size(text)
    except ValueError as error:
        raise UsageError(f"--gpu: {text!r} {error}") from None


def _plan(job: str, overrides: tuple[str, ...], gpu: int | None, solve: bool, as_json: bool, store: Store) -> None:
    from loractl.common.job.need import Need
    from loractl.common.memory.config import read_shape
    from loractl.common.memory.correction import learned, peaks_like
    from loractl.common.memory.fit import largest_fit
    from loractl.common.memory.plan import plan as memory_plan
    from loractl.common.placement.cards import MARGIN_BYTES
    from loractl.common.units import GIB, gib
    from loractl.scheduler.submission.need import check_adapter, model_family, need_key, open_methods, stored_hashes
    from loractl.scheduler.text import fleet as render_fleet
    from loractl.scheduler.text import jobs as render

    spec, data, title = _spec_of(job, overrides, store)
    shape = read_shape(spec.base_model, spec.revision)
    if shape is None:
        raise LoractlError(
            f"base_model {spec.base_model} can't be planned here: there is no config.json of a known architecture",
            "that file is enough, in a folder or in the hub's cache; without it the job gets a card of its own",
        )
    check_adapter(spec)
    lengths, counted = _lengths(spec, quiet=as_json)
    methods = open_methods(spec)
    plans = {method: memory_plan(shape, spec, method, lengths) for method in methods}
    key = need_key(spec, data or stored_hashes(spec))
    measured = store.measured(key, model_family(spec))
    planned = Need(
        **{method.value: None for method in _all_methods()} | {m.value: p.need_bytes for m, p in plans.items()}
    )
    need = learned(planned, key, measured)
    cards, choice = _where(spec, methods, need, gpu, store)
    if gpu is not None:
        room, which = gpu - MARGIN_BYTES, f"a card of {gpu / GIB:.0f} less what is kept free"
    else:
        room = max((card.usable for card in store.fleet().cards.values()), default=0)
        which = "the largest card"
    if solve and room <= 0:
        raise UsageError("--solve needs a card to fit into", "add --gpu 24GiB, or start a worker")
    fits = {method: largest_fit(shape, spec, method, room, lengths) for method in methods} if solve else {}
    if as_json:
        click.echo(json.dumps(_as_json(plans, need, choice, counted, lengths, fits, cards)))
        return
    like = peaks_like(key, choice or methods[0], measured)
    solved = [f"Largest in {gib(room)} GiB, {which}:"] if fits else []
    solved += [
        f"  {method.value:<5}  per_device_train_batch_size {fit.micro_batch or 'none'}, "
        f"or max_length {fit.max_length or 'none'}"
        for method, fit in fits.items()
    ]
    following = f"Submit it: loractl submit {job}" if not job.isdigit() else f"Its wait: loractl why {job}"
    click.echo(
        render_fleet.plan(
            title,
            {method.value: one for method, one in plans.items()},
            None if choice is None else choice.value,
            like,
            counted,
            cards,
            solved,
            following,
            render.detect_screen(),
        )
    )


def _all_methods() -> tuple[Method, ...]:
    from loractl.common.job.method import Method

    return (Method.LORA, Method.QLORA)


def _spec_of(job: str, overrides: tuple[str, ...], store: Store) -> tuple[JobSpec, dict[str, Any], str]:
    """The spec of a file or of a submitted job, its stored data sets, and what to call it."""
    from loractl.common.job.file import load_spec, override_spec

    if not job.isdigit() or Path(job).exists():
        return load_spec(Path(job), overrides), {}, Path(job).name
    row = store.job(int(job))
    return override_spec(row.spec, overrides, f"job {job}"), row.data, f"{job} {row.name}"


def _lengths(spec: JobSpec, *, quiet: bool) -> tuple[Lengths | None, str]:
    """The rows' own lengths where they can be counted here, and a sentence on what was taken."""
    from loractl.common.memory.step import Lengths

    longest = f"Planned for rows of max_length, {spec.dataset.max_length} tokens"
    folder = Path(spec.base_model)
    tokenizer = any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    if not tokenizer:
        return None, f"{longest}: there is no tokenizer to count them with."
    if not Path(spec.dataset.path).exists() or importlib.util.find_spec("torch") is None:
        what = "the training stack" if Path(spec.dataset.path).exists() else "the data"
        return None, f"{longest}: {what} is not on this machine to count them."
    if not quiet:
        click.echo("Counting tokens ...", err=True)
    found = subprocess.run(
        [sys.executable, "-m", "loractl.worker.data.lengths"],
        input=spec.model_dump_json(),
        capture_output=True,
        text=True,
        timeout=LENGTHS_TIMEOUT_S,
        check=False,
    )
    answer = json.loads(found.stdout) if found.returncode == 0 and found.stdout else {"error": "the count failed"}
    if "error" in answer:
        return None, f"{longest}: {answer['error']}."
    lengths = Lengths(**answer)
    return (
        lengths,
        f"Longest row: {lengths.train} tokens, held out {lengths.evaluate}; max_length is {spec.dataset.max_length}.",
    )


def _where(
    spec: JobSpec, methods: Sequence[Method], need: Any, gpu: int | None, store: Store
) -> tuple[list[tuple[str, str, str, str]], Method | None]:
    """A line for each card (word, card, GiB, what), and the method that the rule would take on the best one."""
    from loractl.common.job.need import choose_method, within
    from loractl.common.placement.cards import MARGIN_BYTES
    from loractl.common.units import GIB, gib

    admitted = within(methods, need, spec.resources.max_vram)
    if gpu is not None:
        room = max(0, gpu - MARGIN_BYTES)
        method = choose_method(admitted, need, room)
        text = f"with {method.value}" if method else f"{gib(_short(admitted, need, room))} GiB short"
        return [("fits" if method else "never", "a card", f"{gpu / GIB:.0f}", text)], method
    rows, best = [], None
    for card in store.fleet().cards.values():
        total = card.usable
        method = choose_method(admitted, need, total)
        if method is None:
            rows.append(
                ("never", card.node, f"{card.total / GIB:.0f}", f"{gib(_short(admitted, need, total))} GiB short")
            )
            continue
        size = need.of(method)
        now = card.open and card.slots and size is not None and size <= card.free
        beside = size is not None and size <= card.capacity
        text = f"with {method.value}" + (
            "" if now else f", {gib(card.free)} GiB are free now" if beside else ", once others have left it"
        )
        rows.append(("fits" if beside else "tight", card.node, f"{card.total / GIB:.0f}", text))
        if best is None or admitted.index(method) < admitted.index(best):
            best = method
    return rows, best


def _short(methods: Sequence[Method], need: Any, limit: int) -> int:
    return min((size for m in methods if (size := need.of(m)) is not None), default=limit) - limit


def _as_json(
    plans: dict[Method, Plan],
    need: Any,
    choice: Method | None,
    counted: str,
    lengths: Lengths | None,
    fits: dict[Method, Any],
    cards: list[tuple[str, str, str, str]],
) -> dict[str, Any]:
    return {
        "methods": {
            method.value: {
                "peak_bytes": one.peak_bytes,
                "margin_bytes": one.margin_bytes,
                "parts": one.parts,
                "reserved_bytes": need.of(method),
                **({"largest": vars(fits[method])} if method in fits else {}),
            }
            for method, one in plans.items()
        },
        "choice": None if choice is None else choice.value,
        "lengths": None if lengths is None else vars(lengths),
        "planned_for": counted,
        "cards": [{"fits": word, "card": node, "of": of, "how": how} for word, node, of, how in cards],
    }


@click.command()
@click.option("--used", is_flag=True, help="Show what jobs hold now beside what their plans reserve.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def gpus(used: bool, as_json: bool) -> None:
    """List the devices of all boxes and what uses them."""
    from loractl.common.store.fleet import NODE_STALE_S
    from loractl.scheduler.session import open_session
    from loractl.scheduler.text import fleet as render_fleet
    from loractl.scheduler.text import jobs as render

    _, store = open_session()
    view = store.fleet()
    if as_json:
        rows = []
        for node in view.nodes.values():
            drained, card = view.drain_of(node.node), view.cards[node.node]
            rows.append(
                {
                    **{c.key: getattr(node, c.key) for c in node.__table__.columns},
                    "free": card.free,
                    "open": card.open,
                    "jobs": [{"job_id": j.job_id, "user": j.user, "reserved": j.reserved} for j in card.running],
                    "drained": None
                    if drained is None
                    else {"user": drained.user, "reason": drained.reason, "until": drained.until},
                }
            )
        click.echo(json.dumps(rows, default=lambda value: value.isoformat()))
        return
    click.echo(render_fleet.devices(view, NODE_STALE_S, render.detect_screen(), used=used))


@click.command()
@click.argument("target", metavar="HOST|CARD")
@click.option("--reason", required=True, help="What a person who waits will read.")
@click.option("--until", metavar="WHEN", help="End by itself: after a duration like 2d, or at 2026-12-24 or ...T18:00.")
@click.option("--now", "at_once", is_flag=True, help="Give running jobs back after a checkpoint, too.")
def drain(target: str, reason: str, until: str | None, at_once: bool) -> None:
    """Keep new jobs from a box or a card, with a reason.

    HOST is a box like heron, CARD one of its cards like heron:2. Running jobs end first, unless --now.
    """
    from loractl.common.job.status import Status
    from loractl.scheduler.session import open_session

    settings, store = open_session()
    known = {node.node for node in store.nodes()} | {node.host for node in store.nodes()}
    if target not in known:
        hint = (
            f"known: {', '.join(sorted(known))}" if known else "no worker has ever started: loractl worker, on the box"
        )
        raise UsageError(f"no worker has reported {target}", hint)
    if not reason.strip() or not reason.isprintable() or len(reason) > 200:
        raise UsageError("--reason must be one line of at most 200 characters")
    store.drain(target, settings.user, reason.strip(), until=_moment(until, store.now()), at_once=at_once)
    running = [
        j for j in store.jobs(statuses=[Status.RUNNING]) if j.node == target or (j.node or "").startswith(f"{target}:")
    ]
    if len(running) == 1:
        what = "is given back after a checkpoint" if at_once else "runs to its end"
    else:
        what = "are given back after a checkpoint" if at_once else "run to their ends"
    ids = ", ".join(str(j.job_id) for j in reversed(running))
    left = f"; job{'s' if len(running) > 1 else ''} {ids} {what}" if running else ""
    click.echo(f"{target} takes no more jobs{left}. End it: loractl undrain {target}")


@click.command()
@click.argument("target", metavar="HOST|CARD")
def undrain(target: str) -> None:
    """Let jobs on to a drained box or card again."""
    from loractl.scheduler.session import open_session

    _, store = open_session()
    if not store.end_drain(target):
        drained = sorted(store.drains())
        raise UsageError(f"{target} is not drained", f"drained: {', '.join(drained)}" if drained else None)
    click.echo(f"{target} takes jobs again.")


def _moment(text: str | None, now: dt.datetime) -> dt.datetime | None:
    """A duration from now, or a local date or time."""
    from loractl.common.units import parse_duration

    if text is None:
        return None
    try:
        return now + dt.timedelta(seconds=parse_duration(text))
    except (ValueError, OverflowError):  # the second: beyond the calendar
        pass
    try:
        moment = dt.datetime.fromisoformat(text).astimezone()
    except ValueError:
        raise UsageError(
            f"--until: {text!r} is no duration and no time", "like 2d, 2026-12-24 or 2026-12-24T18:00"
        ) from None
    if moment <= now:
        raise UsageError(f"--until: {text} is over already")
    return moment
