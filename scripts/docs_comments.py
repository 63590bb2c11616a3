"""Let the API pages show the fields of records: the comments beside fields take the place of docstrings.

An extension of griffe, which reads the sources for `mkdocs build`. Docstrings in the sources stay as they are.
"""

from typing import Any

import griffe

from scripts.docs_pages import comments_of


class FieldComments(griffe.Extension):
    """Gives each member of a class without a docstring the comment beside it, or alone above it."""

    def on_class_members(self, *, cls: griffe.Class, **rest: Any) -> None:
        """Read the comments of one class."""
        for name, comment in comments_of("\n".join(cls.lines)).items():
            member = cls.members.get(name)
            if (
                isinstance(member, griffe.Object)
                and member.is_attribute
                and member.docstring is None
                and comment
            ):
                member.docstring = griffe.Docstring(comment, lineno=member.lineno, parent=member)
