"""A table of rows from the Hugging Face hub, by the library `datasets`.

Example:
    >>> load_table("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "--text wikitext-2")  # doctest: +SKIP
"""

from typing import Any

from .wording import one_line


def load_table(name: str, configuration: str, split: str, named: str) -> Any:
    """The rows of a data set.

    Args:
        name, configuration, split: of the data set; "" for the configuration that is its default.
        named: what errors call it: the option and what the user gave.

    Raises:
        ImportError: if `datasets` is not installed.
        ValueError: if the hub does not give it.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"{named}: no such file; for a data set of the Hugging Face hub, `pip install datasets`"
        ) from error
    try:
        return load_dataset(name, configuration or None, split=split)
    except Exception as error:  # the hub's libraries raise classes of many families
        raise ValueError(
            f"{named}: neither a file here nor a data set of the Hugging Face hub ({name!r}, configuration "
            f"{configuration or 'default'}, split {split}): {one_line(error)}; give a file, or connect once to download it"
        ) from error
