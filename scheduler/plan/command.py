"""loractl plan: what a job will need from a card, and for how long, before it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from loractl.common.errors import UsageError
from loractl.common.job.status import Status
from loractl.common.units import size_of
from loractl.scheduler.cli.named import Setting
from loractl.scheduler.cli.output import show
from loractl.scheduler.cli.screen import detect_screen
from loractl.scheduler.cli.session import open_session

if TYPE_CHECKING:
    from .answer import MemoryNeed


@click.command()
@click.argument("job", required=False, metavar="JOB.yaml|JOB")
@click.option(
    "--set", "overrides", multiple=True, type=Setting(), metavar="KEY=VALUE", help="Override a key, like lora.r=8."
)
@click.option("--gpu", metavar="SIZE", help="Plan for a card of this size, like 24GiB, instead of the fleet's.")
@click.option("--solve", is_flag=True, help="Find the largest micro-batch and max_length that fit.")
@click.option("--accuracy", is_flag=True, help="Show predicted against measured peaks and times of the jobs that ran.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(
    job: str | None, overrides: tuple[str, ...], gpu: str | None, solve: bool, accuracy: bool, as_json: bool
) -> None:
    """Predict the memory that a job needs, part by part, and how long it takes.

    The base model's config.json is enough. With its tokenizer and the training stack as well, the rows' own lengths
    are counted; else every row is taken to be max_length tokens long.
    """
    settings, store = open_session()
    if accuracy:
        from .answer import plan_accuracy
        from .text import accuracy_text

        measured = plan_accuracy(store)
        show(measured, as_json, lambda: accuracy_text(measured, detect_screen()))
        return
    if job is None:
        raise UsageError("plan needs a job file or a job's number", "like loractl plan job.yaml")
    from loractl.scheduler.submit.need import own_devices

    from .answer import job_to_plan, memory_need
    from .text import need_text

    def announce() -> None:
        if not as_json:
            click.echo("Counting tokens ...", err=True)

    card = None if gpu is None else size_of("--gpu", gpu)
    asked = job_to_plan(store, job, overrides, settings.user)
    answer = memory_need(store, asked, card, solve=solve, devices=own_devices(settings), announce=announce)
    show(answer, as_json, lambda: need_text(answer, following(job, answer, solve=solve), detect_screen()))


def following(job: str, answer: MemoryNeed, *, solve: bool) -> str:
    """The next command. Nobody should submit a job that no card of the lab holds."""
    if answer.status is not None:
        return _of_submitted(job, answer.status)
    if answer.choice is not None or not answer.cards:
        return f"Submit it: loractl submit {job}"
    changed = [one for one in answer.solutions if one.settings]
    if changed and (solve or changed[0].cards > 1):
        settings = " ".join(f"--set {setting}" for setting in changed[0].settings)
        return f"It fits on {changed[0].words}: loractl plan {job} {settings}"
    none = "No box holds it on the cards that it asks for" if answer.one_holds else "No card holds it as it is"
    if solve:
        return f"{none}: shorter rows, fewer at once, or a smaller base"
    return f"{none}. What would fit: loractl plan {job} --solve"


def _of_submitted(job: str, status: Status) -> str:
    if status is Status.QUEUED:
        return f"Its wait: loractl why {job}"
    if status is Status.RUNNING:
        return f"How far it is: loractl status {job}"
    return f"It has ended. One like it: loractl submit --like {job}"
