"""Docstrings as mkdocstrings expects them."""

import re
from textwrap import indent
from typing import Any

from griffe import Attribute, Class, DataclassesExtension, Docstring, Extension, Module, Object


class Docstrings(Extension):
    """Reads "Example:" as the section that griffe calls "Examples:", and puts the fields of a class into one list."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Renames the section in one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Moves what is said of fields and properties into the docstring of their class."""
        DataclassesExtension().on_package(pkg=pkg)  # makes signatures of the fields, while they are there
        list_fields(pkg)


def list_fields(scope: Module | Class) -> None:
    """Does so for all classes of a module, or within a class."""
    fields = []
    for name, member in list(scope.members.items()):
        if member.is_alias:
            continue
        if isinstance(member, Module | Class):
            list_fields(member)
        elif isinstance(scope, Class) and isinstance(member, Attribute) and (text := describe(member)):
            fields.append(text)
            scope.del_member(name)
    if fields:
        own = "" if scope.docstring is None else scope.docstring.value
        section = "Attributes:\n" + indent("\n".join(fields), "  ")
        scope.docstring = Docstring(f"{own.rstrip()}\n\n{section}\n", parent=scope, parser="google")


def describe(field: Attribute) -> str:
    """A field or property as a line of a section "Attributes:"; empty where nothing is said of it."""
    text = "" if field.docstring is None else " ".join(field.docstring.value.split())
    if field.value is not None and "property" not in field.labels:
        value = re.sub(r".*field\(default_factory=(\w+)\)", r"\1()", str(field.value))
        text = f"{text} Default: `{value}`.".strip()
    annotation = "" if field.annotation is None else f" ({field.annotation})"
    return f"{field.name}{annotation}: {text}" if text and field.is_public else ""
