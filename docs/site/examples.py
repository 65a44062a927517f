"""Docstrings as mkdocstrings expects them."""

import re
from typing import Any

from griffe import Extension, Object


class Examples(Extension):
    """Reads "Example:" as the section that griffe calls "Examples:"."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Renames the section in one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
