"""loractl adapters: look after the stored adapters."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from loractl.common.errors import ArtifactError, ExitCode, UsageError, WrongState
from loractl.common.job.names import check_tag, parse_reference
from loractl.common.store.records import Page
from loractl.common.text import clean_line
from loractl.common.units import amount
from loractl.scheduler.cli.lazy import Commands, LazyGroup
from loractl.scheduler.cli.named import AdapterName
from loractl.scheduler.cli.output import paged, show, show_page
from loractl.scheduler.cli.screen import detect_screen
from loractl.scheduler.cli.session import open_session, open_stores

COMMANDS: Commands = {
    "delete": (
        "loractl.scheduler.adapters.command:delete",
        "Remove adapters and their reports for good; tagged ones are refused.",
    ),
    "list": ("loractl.scheduler.adapters.command:list_adapters", "List them with their tags."),
    "pull": ("loractl.scheduler.adapters.command:pull", "Copy an adapter into a new folder, verified."),
    "push": (
        "loractl.scheduler.adapters.command:push",
        "Push an adapter to a hub, its report as the model card; private without --public.",
    ),
    "show": (
        "loractl.scheduler.adapters.command:show_adapter",
        "Show where an adapter comes from: base, data, job, versions.",
    ),
    "tag": (
        "loractl.scheduler.adapters.command:tag",
        "Tag an adapter as NAME:TAG; loractl gc keeps it.",
    ),
    "untag": ("loractl.scheduler.adapters.command:untag", "Forget a tag; the adapter stays."),
    "bind": (
        "loractl.scheduler.adapters.command:bind",
        "Bind results that an earlier version stored to their rows.",
    ),
    "merge": (
        "loractl.worker.commands.merge:merge",
        "Merge base and adapter into a full model, and prove that it is the same.",
    ),
}


@click.group(cls=LazyGroup, lazy={"Commands": COMMANDS}, invoke_without_command=True)
@paged("adapters, the newest")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def adapters(ctx: click.Context, limit: int, after: int | None, as_json: bool) -> None:
    """Manage stored adapters: list, tag, pull, push, merge, delete.

    ADAPTER is a job's number (12), a job's name for the newest of that name (support, the same as support:latest), or a
    name and a tag (support:prod).
    """
    if ctx.invoked_subcommand is None:
        print_adapters(limit, after, as_json)


@click.command("list")
@paged("adapters, the newest")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_adapters(limit: int, after: int | None, as_json: bool) -> None:
    """List them with their tags."""
    print_adapters(limit, after, as_json)


def print_adapters(limit: int, after: int | None, as_json: bool) -> None:
    """Print a page of the stored adapters, as JSON or as a table."""
    from .answer import adapter_list
    from .text import adapters_text

    _, store = open_session()
    answer = adapter_list(store, Page(limit=limit, after=after))
    show_page(answer, as_json, lambda: adapters_text(answer, detect_screen()))


@click.command("show")
@click.argument("adapter", type=AdapterName(), metavar="ADAPTER")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show_adapter(adapter: str, as_json: bool) -> None:
    """Show where an adapter comes from: base, data, job, versions."""
    from .answer import lineage
    from .text import lineage_text

    _, store, artifacts = open_stores()
    answer = lineage(store, artifacts, adapter)
    show(answer, as_json, lambda: lineage_text(answer))


@click.command()
@click.argument("names", nargs=-1, required=True, type=AdapterName(), metavar="ADAPTER...")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), metavar="DIR")
@click.option("--gguf", is_flag=True, help="Also write adapter.gguf, for llama.cpp and ollama.")
@click.option("--vllm", is_flag=True, help="Print the command that serves them with vLLM.")
def pull(names: tuple[str, ...], folder: Path, gguf: bool, vllm: bool) -> None:
    """Copy an adapter into a new folder, verified.

    peft's PeftModel.from_pretrained loads it from there. Of several, each gets a folder of its own in DIR.
    """
    from loractl.common.binding import result_binding
    from loractl.common.job.kinds import kind_of

    from .answer import check_new, pull_adapter, stored_adapter

    check_new(folder)
    _, store, artifacts = open_stores()
    adapters = {one.job_id: (one, job) for one, job in (stored_adapter(store, name) for name in names)}
    bases = {(one.base_model, job.spec.get("revision")) for one, job in adapters.values()}
    if vllm and len(bases) > 1:
        told = ", ".join(sorted(clean_line(base) for base, _ in bases))
        raise UsageError(f"one vLLM serves one base, and these adapters are on {told}", "pull those on one base")
    folders = {
        job_id: folder if len(adapters) == 1 else folder / f"{job_id}-{one.name}"
        for job_id, (one, _) in adapters.items()
    }
    for job_id, (stored, job) in adapters.items():
        own, base = folders[job_id], clean_line(stored.base_model)
        files = pull_adapter(artifacts, result_binding(store, job), job_id, own)
        size = sum(file.size for file in files.values())
        click.echo(f"The adapter of job {job_id} ({len(files)} files, {amount(size)}) is in {own}.")
        if not kind_of(job.spec.get("task_type")).writes:  # its base needs the head and the labels first
            click.echo(f"How to load the classifier: {own}/README.md", err=True)
        elif not vllm:
            click.echo(f"Load it on {base}:  PeftModel.from_pretrained(base, {str(own)!r})", err=True)
        if gguf:
            from .runtimes import write_gguf

            file = write_gguf(own, stored.base_model, job.spec.get("revision"))
            click.echo(f"For llama.cpp, on a GGUF of {base}:  llama-server -m BASE.gguf --lora {file}")
    if vllm:
        from .runtimes import vllm_command

        ((base_model, revision),) = bases
        named = {f"{one.name}-{job_id}": folders[job_id] for job_id, (one, _) in adapters.items()}
        click.echo(vllm_command(named, base_model, revision))


@click.command()
@click.argument("adapter", type=AdapterName(), metavar="ADAPTER")
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--public", is_flag=True, help="Everybody may read it. Default: private.")
@click.option("--base-name", metavar="OWNER/NAME", help="What a base that is a folder is called on the hub.")
@click.option("--to", type=click.Path(path_type=Path, file_okay=False), metavar="DIR", help="Write it there instead.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def push(adapter: str, repository: str, public: bool, base_name: str | None, to: Path | None, as_json: bool) -> None:
    """Push an adapter to a hub as one commit, its report as the model card.

    The card has no rows, and no names of people, machines, jobs or folders. The token is that of huggingface_hub:
    HF_TOKEN, or what `hf auth login` has stored; HF_ENDPOINT names another hub. --to writes what would be pushed into a
    new folder, and pushes nothing.
    """
    from .answer import check_new
    from .push import PushRequest, push_adapter

    request = PushRequest(adapter=adapter, repository=repository, public=public, base_name=base_name, to=to)
    if to is not None:
        check_new(to)
    settings, store, artifacts = open_stores()
    answer = push_adapter(request, store, artifacts, settings.user, lambda text: click.echo(f"Note: {text}", err=True))
    show(answer, as_json, lambda: answer.sentence)


@click.command()
@click.argument("adapter", type=AdapterName(), metavar="ADAPTER")
@click.argument("name", metavar="TAG")
def tag(adapter: str, name: str) -> None:
    """Tag an adapter as NAME:TAG; loractl gc keeps it."""
    _, colon, alone = name.rpartition(":")
    check_tag(alone)
    if colon:
        what = f"{name!r} is a name and a tag; the name is always that of the adapter's job"
        raise UsageError(what, f"loractl adapters tag {adapter} {alone}")
    settings, store = open_session()
    row, before = store.adapters.tag(parse_reference(adapter), name, settings.user)
    moved = f"; it was job {before}" if before not in (None, row.job_id) else ""
    click.echo(f"{clean_line(row.name)}:{name} is the adapter of job {row.job_id} now{moved}.")


@click.command()
@click.argument("name", metavar="NAME:TAG")
def untag(name: str) -> None:
    """Forget a tag; the adapter stays."""
    reference = parse_reference(name)
    if reference.name is None or ":" not in name:
        raise UsageError(f"{name!r} is not of the form NAME:TAG", "like support:prod")
    check_tag(reference.tag)
    settings, store = open_session()
    click.echo(f"{reference} is forgotten; it was job {store.adapters.untag(reference, settings.user)}.")


@click.command()
@click.argument("names", nargs=-1, required=True, type=AdapterName(), metavar="ADAPTER...")
@click.option("--yes", is_flag=True, help="Do not ask.")
def delete(names: tuple[str, ...], yes: bool) -> None:
    """Remove adapters and their reports for good; tagged ones are refused."""
    from loractl.common.job.ancestor import may_go_without

    from .answer import stored_adapter

    settings, store, artifacts = open_stores()
    adapters = {adapter.job_id: adapter for adapter, _ in (stored_adapter(store, name) for name in names)}.values()
    for adapter in adapters:
        if adapter.tags_set:
            named = f"{adapter.name}:{adapter.tags_set[0]}"
            hint = f"first: loractl adapters untag {named}"
            raise WrongState(f"the adapter of job {adapter.job_id} is tagged {named}", hint)
        if descendants := store.adapters.descendants(adapter.job_id):
            jobs = ", ".join(map(str, descendants[:5])) + (", ..." if descendants[5:] else "")
            raise WrongState(
                f"job {jobs} is to begin from the adapter of job {adapter.job_id}", "wait for it, or cancel it"
            )
        if followers := store.jobs.followers(adapter.job_id):
            first = store.jobs.get(followers[0])
            anyway = f"wait for it, cancel it, or: loractl edit {first.job_id} --set after=[]"
            raise WrongState(
                f"job {first.job_id} is to start after job {adapter.job_id}, whose adapter it may read",
                anyway if may_go_without(first.spec, first.awaits) else "wait for it, or cancel it",
            )
    what = ", ".join(f"{clean_line(a.name)} (job {a.job_id}, {amount(a.size)})" for a in adapters)
    if not yes:
        click.confirm(f"Remove {what} with its report, for good?", abort=True, err=True)
    for adapter in adapters:
        if not store.results.remove(adapter.job_id, settings.user, "loractl adapters delete"):
            raise WrongState(f"the adapter of job {adapter.job_id} was removed or tagged by somebody else just now")
        artifacts.remove(adapter.prefix)
        click.echo(f"The adapter of job {adapter.job_id} ({clean_line(adapter.name)}) is removed.")


@click.command()
@click.argument("names", nargs=-1, metavar="[ADAPTER]...")
def bind(names: tuple[str, ...]) -> None:
    """Bind results of earlier versions to their rows, as they are now; without ADAPTER all of them.

    Each file is read and compared with its manifest, and the weights with their row. From then on every reader refuses
    a result that somebody has changed in the store.
    """
    from .answer import bind_result, results_to_bind

    settings, store, artifacts = open_stores()
    failed = False
    for job_id in results_to_bind(store, names):
        try:
            bind_result(store, artifacts, settings.user, job_id)
            click.echo(f"The result of job {job_id} is bound to its row.")
        except ArtifactError as error:
            failed = True
            click.echo(clean_line(f"Error: job {job_id} is not bound: {error.sentence}"), err=True)
    sys.exit(ExitCode.FAILED if failed else ExitCode.OK)
