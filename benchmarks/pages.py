"""Pages of the documentation of which a part is written from benchmark rows."""

from __future__ import annotations


def between(page: str, start: str, end: str, content: str) -> str:
    """The page with ``content`` between its two markers; ValueError unless it has each once, in this order."""
    if page.count(start) != 1 or page.count(end) != 1 or page.index(start) > page.index(end):
        raise ValueError(f"the page must hold {start} and {end} once each, in this order")
    before, rest = page.split(start)
    return f"{before}{start}\n{content}\n{end}{rest.split(end)[1]}"
