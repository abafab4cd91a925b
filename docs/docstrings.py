"""For the site: a docstring's parts stand apart, as its parser wants them; in the sources they need no empty lines."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_PART = re.compile(r"(?<!\n)\n(?=[A-Z][a-z]+:(?:\n| ))")
_PARAGRAPH = re.compile(r"^([A-Z][a-z]+): (.+(?:\n    .+)*)", re.MULTILINE)


class Parts(Extension):  # type: ignore[misc]
    """Puts an empty line before each part; ``Source: ...`` and its like become paragraphs."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = _PART.sub("\n\n", obj.docstring.value).replace("\nExample:\n", "\nExamples:\n")
            obj.docstring.value = _PARAGRAPH.sub(
                lambda part: f"**{part[1]}:** " + part[2].replace("\n    ", "\n"), text
            )
