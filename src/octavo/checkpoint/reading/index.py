"""The index of a sharded checkpoint: `model.safetensors.index.json`, `pytorch_model.bin.index.json`.

    {"metadata": {"total_size": 123}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors",
    ...}}

Example:
    >>> from octavo.checkpoint.reading.index import read_index
    >>> index = Path("model.safetensors.index.json")
    >>> _ = index.write_text('{"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}')
    >>> read_index(index)
    {'lm_head.weight': 'model-00002-of-00002.safetensors'}
"""

import json
from pathlib import Path

from ...wording import few
from ..errors import CheckpointError
from .regular import require_regular


def read_index(path: Path) -> dict[str, str]:
    """Name of a tensor → name of the file that holds it.

    Raises:
        CheckpointError: if the index is malformed, or names a file outside its folder.
    """
    require_regular(path)
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = set(weight_map.values())
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: expected a JSON object with a weight_map of names to files ({error}); download it again"
        ) from None
    for name in names:
        # The index is data: it must not make us read files elsewhere.
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(
                f"{path}: names the file {name!r}; expected plain file names of its own folder"
            )
    return weight_map


def shard_files(path: Path) -> list[str]:
    """Names of the files an index names, sorted, all of which exist. Raises CheckpointError for one that does not."""
    names = sorted(set(read_index(path).values()))
    missing = [name for name in names if not (path.parent / name).exists()]
    if missing:
        raise CheckpointError(
            f"{path.parent}: {len(missing)} of {len(names)} shards named by {path.name} are missing: {few(missing)}; "
            "download them"
        )
    return names


def check_against_index(path: Path, found: dict[str, str]) -> None:
    """Check that every tensor an index names is in the file it names.

    Args:
        found: name → file, as read from the files.

    Raises:
        CheckpointError: naming the first tensors that are not where the index says.
    """
    absent = [f"{name} (in {file})" for name, file in read_index(path).items() if found.get(name) != file]
    if absent:
        raise CheckpointError(
            f"{path} names {len(absent)} tensors that are not in their files: {few(absent)}; the files belong to different "
            "downloads"
        )
