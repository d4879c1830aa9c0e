"""The pictures of docs/images: a lab put together through the store, its page by `loractl web`, taken by Chromium.

    python -m tests.pictures docs/images

The server's clock stands, and so does the browser's: a second run takes the same pictures. They are compared with
nothing, so that a change of the page needs no new picture before somebody wants one.
"""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import itertools
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from sqlalchemy import func, select, update

from loractl.common.job.method import Need, Parallel, SharedNeed, Ways
from loractl.common.job.names import parse_reference
from loractl.common.job.status import Reason, Status
from loractl.common.store.database import make_engine
from loractl.common.store.records import Claim, Progress
from loractl.common.store.schema import upgrade
from loractl.common.store.store import Store
from loractl.common.store.tables import Adapter, Job
from loractl.common.units import GIB
from loractl.scheduler.web.site import FRESH_S

from . import webs
from .browser import Browser, browser
from .unit.factories import node_state, submission

NOON = dt.datetime(2026, 1, 14, 12, 4, tzinfo=dt.UTC)
"""When all pictures were taken."""

VIEWS = {
    "adapters": "/adapters?adapter={triage-r32}", "lab": "/", "job": "/jobs/{triage-long}",
    "chain": "/jobs/{helpdesk-law}", "sweep": "/sweeps/1", "usage": "/usage",
}  # fmt: skip
"""The page of each picture, with names in place of jobs' numbers."""

BASE = "org/Llama-3.1-8B"

SHAPES = {"light": ("light", 1280), "dark": ("dark", 1280), "narrow": ("light", 400)}
"""The browser's scheme and its window's width."""

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""A folder in memory, for the disk would take most of the time."""

LOOKS = 60
"""At the adapters, before the server must have read all reports."""

MOST_HEIGHT = 1600
"""Of a picture, in pixels: answers and logs further down repeat what is above."""

SERVE = """
import datetime, functools, sys
from loractl.common.store import store
from loractl.scheduler.cli.main import main
now = datetime.datetime.fromisoformat(sys.argv.pop(1))
store.Store = functools.partial(store.Store, clock=lambda: now)
main()
"""
"""The command with a clock that stands."""

STILL = """
const now = %d;
Date = class extends Date { constructor(...given) { given.length ? super(...given) : super(now); } };
Date.now = () => now;
window.setTimeout = () => 0;
"""
"""The browser's clock, which stands too: no page asks for a newer one."""


SHADES = """(async () => {
  const image = new Image();
  image.src = "data:image/png;base64,%s";
  await image.decode();
  const pen = new OffscreenCanvas(image.width, image.height).getContext("2d");
  pen.drawImage(image, 0, 0);
  const pixels = new Uint32Array(pen.getImageData(0, 0, image.width, image.height).data.buffer);
  const count = new Map(), parts = (shade) => [shade & 255, shade >> 8 & 255, shade >> 16 & 255];
  for (const shade of pixels) count.set(shade, (count.get(shade) || 0) + 1);
  const far = (a, b) => parts(a).reduce((sum, part, n) => sum + (part - parts(b)[n]) ** 2, 0);
  const often = [...count.keys()].sort((a, b) => count.get(b) - count.get(a) || a - b), kept = [];
  for (const shade of often)
    if (kept.length < 256 && kept.every((other) => far(shade, other) > 30)) kept.push(shade);
  const nearest = (shade) => kept.reduce((best, other, n) => far(shade, other) < far(shade, kept[best]) ? n : best, 0);
  const place = new Map(often.map((shade) => [shade, nearest(shade)]));
  let text = "";
  for (const shade of pixels) text += String.fromCharCode(place.get(shade));
  return [image.width, image.height, kept.map(parts), btoa(text)]; })()"""
"""A PNG's pixels as numbers of at most 256 of its shades: the edges of letters have thousands."""


def take(folder: Path) -> list[Path]:
    """Take all pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    home = Path(tempfile.mkdtemp(prefix="loractl-pictures-", dir=MEMORY))
    try:
        jobs = seed(home)
        with served(home) as address, browser() as page:
            page.call("Emulation.setTimezoneOverride", timezoneId="UTC")
            page.call("Page.addScriptToEvaluateOnNewDocument", source=STILL % (NOON.timestamp() * 1000))
            _read_reports(page, address)
            return [
                _picture(page, address + view.format_map(jobs), folder / f"web-{name}-{shape}.png", *SHAPES[shape])
                for name, view in VIEWS.items()
                for shape in SHAPES
            ]
    finally:
        shutil.rmtree(home)


def _read_reports(page: Browser, address: str) -> None:
    """The first pages are drawn while the server still reads reports; wait until it has them all."""
    for _ in range(LOOKS):
        page.open(f"{address}/adapters")
        if not page.value("document.body.innerText.includes('report not read')"):
            return
        time.sleep(FRESH_S)  # the server draws a page once for all who ask within this time
    raise SystemExit(f"{address}/adapters still reads reports")


def _picture(page: Browser, address: str, file: Path, scheme: str, width: int) -> Path:
    page.colours(scheme)
    page.size(width, 480)
    page.open(address)
    page.wait("!document.getElementById('live').hidden")  # the script has run
    page.picture(file, most_height=MOST_HEIGHT)
    _shrink(page, file)
    return file


def _shrink(page: Browser, file: Path) -> None:
    """Write a PNG again with a palette, which takes a third."""
    page.open("data:text/html,<title>shades</title>")
    width, height, palette, pixels = page.value(SHADES % base64.b64encode(file.read_bytes()).decode())
    rows = base64.b64decode(pixels)
    lines = b"".join(b"\0" + rows[n : n + width] for n in range(0, len(rows), width))
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0), b"PLTE": bytes(itertools.chain(*palette)),
        b"IDAT": zlib.compress(lines, 9), b"IEND": b"",
    }  # fmt: skip
    chunks = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts.items()
    )
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


@contextlib.contextmanager
def served(home: Path) -> Iterator[str]:
    """The address of the lab's page, by the command itself."""
    environment = {**os.environ, "LORACTL_HOME": str(home), "LORACTL_USER": "mara", "TZ": "UTC"}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, NOON.isoformat(), "web", "--port", "0"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://localhost:\d+", line)
        assert found is not None, line
        yield found[0]
    finally:
        process.terminate()
        process.communicate(timeout=20)


def seed(home: Path) -> dict[str, int]:
    """The lab; returns the number of each job, by name."""
    url = f"sqlite:///{home / 'loractl.db'}"
    engine = make_engine(url)
    upgrade(engine)
    lab = webs.reopen(url, home / "artifacts", NOON - dt.timedelta(days=6))
    _last_week(lab)
    lab.pass_((NOON - dt.timedelta(hours=6) - lab.now).total_seconds())
    webs.past(lab)
    _running(lab)
    _chain(lab)
    _waiting(lab)
    lab.pass_((NOON - lab.now).total_seconds())
    _see_cards(lab.store)
    with engine.begin() as connection:
        uri = func.replace(Adapter.uri, lab.artifacts.url, "file:///srv/lab/artifacts")
        connection.execute(update(Adapter).values(uri=uri))  # this machine's folder has another name in each run
        numbers = {name: number for number, name in connection.execute(select(Job.job_id, Job.name))}
    engine.dispose()
    return numbers


def _last_week(lab: webs.SeededLab) -> None:
    """Four jobs that took hours (the last one failed), and weekly quotas.

    None is lena's: her jobs of today are expected to be short, so they share a card and do not wait for an empty one.
    """
    webs.see_cards(lab.store)
    for name, user, hours, size in (
        ("med-ner", "priya", 19, 40), ("sql-gen-r8", "wei", 11, 31), ("dialect-r4", "tomás", 6, 17),
    ):  # fmt: skip
        claim = webs.run(lab, name, user, "osprey:0", size, steps=600, of=600)
        lab.pass_(hours * 3600)
        webs.store_result(lab, claim, 2.6, 2.2)
    lost = webs.run(lab, "law-ner", "jonas", "osprey:0", 52, steps=400)
    lab.pass_(4 * 3600)
    lab.store.attempts.finish(lost, Reason.OUT_OF_MEMORY, "out of memory at step 400", Progress())
    lab.store.jobs.cancel(lost.job_id, "jonas")
    lab.store.usage.set_quota("priya", 24.0, 7 * 86400, soft=False)
    lab.store.usage.set_quota("wei", 4.0, 7 * 86400, soft=True)


def _running(lab: webs.SeededLab) -> None:
    """A large job, one on two cards, two that share a card, and one that has just started."""
    _see_cards(lab.store)
    lab.store.cards.drain("swift:0", "lena", "replacing a fan")
    lab.store.adapters.tag(parse_reference("triage-r32"), "prod", "mara")
    webs.run(lab, "med-summ-70b", "priya", "osprey:0", 61, steps=1200)
    way = SharedNeed(cards=2, parallel=Parallel.SHARDED, need=Need(lora=int(31.2 * GIB), qlora=None))
    pair = submission(lora=60, qlora=None, user="wei", name="sql-gen-70b", base_model=BASE, method="lora")
    lab.store.jobs.submit(replace(pair, ways=Ways(alone=False, gangs=(way,))))
    _see_cards(lab.store)
    shared = lab.store.attempts.claim("heron:0", gangs=True)
    assert isinstance(shared, Claim)
    webs.train(lab, shared, 0, 800, 1500, 31.2)
    for name, user, size, steps in (("triage-lr1e4", "mara", 11, 420), ("tickets", "lena", 9, 220)):
        webs.run(lab, name, user, "kestrel:0", size, steps=steps)
    webs.run(lab, "dialect-asr-post", "lena", "heron:0", 12)


def _chain(lab: webs.SeededLab) -> None:
    """A job that runs on a card whose worker stops in the evening, one after it, and one after both that and a job that
    failed."""
    webs.run(lab, "helpdesk-sft", "jonas", "kestrel:1", 17, steps=300)
    failed = next(job.job_id for job in lab.store.jobs.matching(statuses=[Status.FAILED]) if job.name == "law-cite")
    first = max(job.job_id for job in lab.store.jobs.matching(statuses=[Status.RUNNING]))
    second = webs.queue(lab, "helpdesk-dpo", "jonas", 19, after=[first])
    webs.queue(lab, "helpdesk-law", "jonas", 19, after=[failed, second])


def _waiting(lab: webs.SeededLab) -> None:
    """Jobs that wait for memory, for another program's end, for a person, and for a card that the lab has not."""
    for name, user, size, keys in (
        ("med-qa-7b", "priya", 21, {}), ("sql-gen-r64", "wei", 39, {"priority": 5}),
        ("llama-70b-lora", "jonas", 92, {}), ("triage-dpo", "tomás", 46, {}),
    ):  # fmt: skip
        webs.queue(lab, name, user, size, **keys)
    held = webs.queue(lab, "sql-gen-long", "wei", 33)
    lab.store.jobs.hold(held, "wei", "until the new data are there")


def _see_cards(store: Store) -> None:
    """As the tests' lab, with a box that is drained, a card whose worker stops, and workers that serve gangs."""
    evening = {"until": NOON.replace(hour=18, minute=0), "window_s": 10 * 3600.0}
    cards: dict[str, dict[str, Any]] = {name: {"gangs": True} for name in webs.CARDS}
    cards["kestrel:1"] |= evening
    for name, load in (("kestrel:0", 97), ("heron:0", 88), ("heron:1", 34), ("heron:2", 86)):
        cards[name]["load"] = load
    shared = store.cards.fleet().cards["heron:2"].running
    cards["heron:2"]["used"] = {str(job.job_id): int(0.9 * job.reserved) for job in shared}
    webs.see_cards(store, **cards)
    state = {"device_name": "NVIDIA GeForce RTX 3090", "total": 24 * GIB, "margin": GIB // 2, "load": 0}
    store.cards.see(node_state("swift:0", **state))


if __name__ == "__main__":
    for file in take(Path(sys.argv[1] if sys.argv[1:] else "docs/images")):
        print(f"{file}: {file.stat().st_size / 1000:.0f} KB")
