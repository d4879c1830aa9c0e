"""Names that people write: an adapter's (its job's number, the job's name, or name:tag), and a model's or data set's on
the hub, recognised by its form and never a path.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from loractl.common.errors import UsageError

LATEST = "latest"
"""The tag that moves by itself to the newest adapter of a name. A person can't set it."""

REPRODUCES = "reproduces"
"""The label of a job that runs another one again."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True, kw_only=True)
class Reference:
    """An adapter as a person names it. Either a job's number, or a name and a tag."""

    job_id: int | None = None
    name: str | None = None
    tag: str = LATEST

    def __str__(self) -> str:
        return str(self.job_id) if self.job_id is not None else f"{self.name}:{self.tag}"


def parse_reference(text: str) -> Reference:
    """Read 12, support, support:latest or support:prod. Raises UsageError."""
    if re.fullmatch(r"[1-9]\d{0,17}", text, re.ASCII):
        return Reference(job_id=int(text))
    name, colon, tag = text.partition(":")
    if not _NAME.fullmatch(name) or (colon and not _NAME.fullmatch(tag)):
        raise UsageError(f"{text!r} names no adapter", "name it by its job (12), its name (support) or name:tag")
    return Reference(name=name, tag=tag or LATEST)


def check_tag(tag: str) -> None:
    """Raises UsageError for what can't be set as a tag."""
    if tag == LATEST:
        raise UsageError("latest is always the newest adapter of a name and can't be set", "choose another tag")
    if not _NAME.fullmatch(tag):
        raise UsageError(f"{tag!r} is not a tag", "letters, digits, '.', '_' and '-' only, at most 63")


REVISION = r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$"
"""A branch, tag or commit of a repository on the hub."""


def is_hub_id(text: str) -> bool:
    """Whether the text may name a repository of the hub: owner/name, or a name alone. A path may not."""
    part = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
    return re.fullmatch(rf"(?:{part}/)?{part}", text) is not None and ".." not in text


def from_address(text: str, kind: str = "") -> str:
    """owner/name, where the text is the address of a model's page on the hub, or of a data set's ("datasets/"); else
    the text as it is."""
    page = re.fullmatch(rf"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/{kind}([^/?#]+/[^/?#]+)/?", text)
    return page[1] if page and is_hub_id(page[1]) else text


def is_hub_data(text: str) -> bool:
    """Whether the text may name a data set of the hub, at a revision after an @ or at its main branch.

    It needs an owner: a name alone may be a reader of the datasets library (json, csv, text, ...), and that takes any
    files next to it.
    """
    name, pinned, revision = text.partition("@")
    known = re.fullmatch(REVISION, revision) is not None and ".." not in revision if pinned else True
    return is_hub_id(name) and "/" in name and known
