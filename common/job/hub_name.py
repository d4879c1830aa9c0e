"""Names on the hub, recognised by their form: a model or a data set, never a path."""

from __future__ import annotations

import re

REVISION = r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$"
"""A branch, tag or commit of a repository on the hub."""


def is_hub_id(text: str) -> bool:
    """Whether the text may name a repository of the hub: owner/name, or a name alone. A path may not."""
    part = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
    return re.fullmatch(rf"(?:{part}/)?{part}", text) is not None and ".." not in text


def from_address(text: str) -> str:
    """owner/name, where the text is the address of a model's page on the hub; else the text as it is."""
    page = re.fullmatch(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([^/?#]+/[^/?#]+)/?", text)
    return page[1] if page and is_hub_id(page[1]) else text


def is_hub_data(text: str) -> bool:
    """Whether the text may name a data set of the hub, at a revision after an @ or at its main branch.

    It needs an owner: a name alone may be a reader of the datasets library (json, csv, text, ...), and that takes any
    files next to it.
    """
    name, pinned, revision = text.partition("@")
    known = re.fullmatch(REVISION, revision) is not None and ".." not in revision if pinned else True
    return is_hub_id(name) and "/" in name and known
