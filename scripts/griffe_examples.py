"""For the site: "Example:" in a docstring is what griffe calls "Examples:", the section whose doctests are shown as code."""

import re

import griffe


class Examples(griffe.Extension):
    """Renames the sections while docstrings are collected."""

    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
