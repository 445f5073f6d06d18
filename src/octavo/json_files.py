"""Files that hold one JSON object: configurations, indices, what a run notes. Any file may hold anything.

Example:
    >>> read_object(Path("model/config.json"))["model_type"]
    'gptj'
"""

import json
from pathlib import Path
from typing import Any


def read_object(path: str | Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it holds something else, saying what. (Also where it is nested too deep, or no text.)
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{path}: its JSON is nested too deep") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found
