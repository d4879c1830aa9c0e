"""loractl completion: the line that turns on shell completion."""

from __future__ import annotations

import click

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
