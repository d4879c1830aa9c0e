"""report.html as data: what a result holds is checked before a person's browser gets it.

A worker has written the page, and a worker may have been someone else's. A page of loractl shows text, tables and
lines, so nothing else is served, and our own policy precedes every byte that is.
"""

from __future__ import annotations

from html.parser import HTMLParser

from loractl.common.errors import ArtifactError

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
"""Nothing runs, nothing is loaded, nothing is sent."""

_HEAD = f'<!doctype html>\n<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'

_TAGS = frozenset(
    {
        "html", "head", "meta", "title", "style", "body", "main", "header", "footer", "section", "div", "p", "span",
        "small", "b", "i", "em", "strong", "h1", "h2", "h3", "h4", "pre", "code", "ul", "ol", "li", "dl", "dt", "dd",
        "table", "thead", "tbody", "tfoot", "tr", "th", "td", "label", "input", "svg", "g", "path", "circle", "rect",
        "line", "polyline", "text",
    }
)  # fmt: skip
_ATTRIBUTES = frozenset(
    {
        "lang", "charset", "name", "content", "http-equiv", "class", "id", "style", "title", "role", "for", "type",
        "checked", "colspan", "rowspan", "aria-label", "aria-hidden", "viewbox", "x", "y", "x1", "y1", "x2", "y2",
        "cx", "cy", "r", "rx", "ry", "d", "points", "width", "height", "fill", "stroke", "text-anchor",
    }
)  # fmt: skip


def guarded(page: bytes, job_id: int) -> bytes:
    """The page of a report, in which nothing runs. Raises ArtifactError for a page that loractl can't have written."""
    try:
        text = page.decode("utf-8")
    except UnicodeDecodeError:
        raise _refused(job_id, "it is not UTF-8 text") from None
    reader = _PageReader()
    reader.feed(text)
    reader.close()
    if reader.wrong is not None:
        raise _refused(job_id, f"it holds {reader.wrong}")
    return (_HEAD + text).encode()


def _refused(job_id: int, why: str) -> ArtifactError:
    return ArtifactError(
        f"the page of job {job_id} is not loractl's: {why}",
        f"don't open it; loractl report {job_id} prints what report.json says",
    )


class _PageReader(HTMLParser):
    """Looks for what no page of loractl has. Text is harmless, and is not read."""

    def __init__(self) -> None:
        super().__init__()
        self.wrong: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _TAGS:
            self._find(f"<{tag}>")
        for name, value in attrs:
            if name not in _ATTRIBUTES:
                self._find(f"<{tag} {name}=...>")
            elif name == "http-equiv" and (value or "").lower() != "content-security-policy":
                self._find("<meta http-equiv=...>")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem is not None and "<" in data:  # a browser may see tags there: it parses styles in pictures so
            self._find(f"tags in <{self.cdata_elem}>")

    def handle_comment(self, data: str) -> None:
        self._find("a comment")

    def handle_pi(self, data: str) -> None:
        self._find("a processing instruction")

    def unknown_decl(self, data: str) -> None:
        self._find("a declaration")

    def handle_decl(self, decl: str) -> None:
        if decl.lower() != "doctype html":
            self._find("a declaration")

    def _find(self, what: str) -> None:
        if self.wrong is None:
            self.wrong = "".join(c if c.isprintable() else "?" for c in what[:60])
