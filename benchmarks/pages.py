"""Pages of the documentation of which a part is written from benchmark rows."""

from __future__ import annotations

from pathlib import Path


def between(page: str, start: str, end: str, content: str) -> str:
    """The page with ``content`` between its two markers; ValueError unless it has each once, in this order."""
    if page.count(start) != 1 or page.count(end) != 1 or page.index(start) > page.index(end):
        raise ValueError(f"the page must hold {start} and {end} once each, in this order")
    before, rest = page.split(start)
    return f"{before}{start}\n{content}\n{end}{rest.split(end)[1]}"


def rewrite(path: Path, new: str, check: bool) -> int:
    """The page as it must be, written; or with ``check`` only 1 where it is not."""
    if check:
        return int(path.read_text(encoding="utf-8") != new)
    path.write_text(new, encoding="utf-8")
    return 0
