"""What belongs to a model besides its weights and config.json: everything small in its folder that is no weights.

Tokenizers and processors keep their files under more names than a list could hold (`source.spm`, `bpe.codes`,
`1_Pooling/config.json`), so what is left behind is listed, not what comes along: weights in any format, what was said of
another packing of them, hidden files, code unless it is trusted, links that lead out of the folder, and sub-folders that hold
weights of their own, another model's or another format's. A sub-folder that sentence-transformers' modules.json names is part
of the model and comes whole.

Example:
    >>> choose_side_files(["config.json", "tokenizer.json", "onnx/model.onnx", "1_Pooling/config.json", "model.safetensors"])
    ['tokenizer.json', '1_Pooling/config.json']
"""

import json
import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

# Ends of names of files of weights, in any format.
WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|h5|hdf5|keras|msgpack|onnx|onnx_data|gguf|ggml|ot|tflite|pb|npz|pkl|pickle|mlmodel|mlpackage"
    r"|engine|nemo|pte|llamafile|distcp)$|\.onnx_data"
)
# Files in which some methods say how they packed the weights.
SIDECARS = ("quantize_config.json", "quant_config.json", "quantization_config.json", "hf_quant_config.json")
# Written anew, or true of the source only: its index of shards, its packing, an adapter that lies in the same folder.
OURS = frozenset({"config.json", "adapter_config.json", *SIDECARS})
SENTENCE_MODULES = "modules.json"
# No vocabulary is larger; a film or a data set is.
LARGEST = 256 << 20
# A folder with more files below it than this is no model's, but something like a home directory.
MOST = 2000


def choose_side_files(
    names: Iterable[str], parts: Iterable[str] = (), trust_remote_code: bool = False
) -> list[str]:
    """Of the names of a model's files, those that come along.

    Args:
        names: paths relative to the model's folder, with forward slashes.
        parts: sub-folders that are part of the model (`sentence_parts`).
        trust_remote_code: whether code (*.py) comes along.

    Returns:
        Names, in their order.
    """
    names, parts = list(names), set(parts)
    paths = [PurePosixPath(name) for name in names]
    heavy = {path.parts[0] for path in paths if len(path.parts) > 1 and is_weights(path)} - parts
    safe = {path.parent for path in paths if path.suffix == ".safetensors"}
    chosen = []
    for name, path in zip(names, paths, strict=True):
        top = path.parts[0] if len(path.parts) > 1 else ""
        hidden = any(part.startswith(".") or part == "__pycache__" for part in path.parts)
        code = path.suffix in (".py", ".pyc", ".so") and not trust_remote_code
        if hidden or code or top in heavy:
            continue
        if top in parts and len(path.parts) == 2:
            # A small layer's weights, in the safer of two formats.
            if path.suffix == ".safetensors" or not is_weights(path) or path.parent not in safe:
                chosen.append(name)
        elif not is_weights(path) and not (not top and (name in OURS or name.endswith(".index.json"))):
            chosen.append(name)
    return chosen


def is_weights(path: PurePosixPath) -> bool:
    """Whether a file's name is that of weights, in any format."""
    return WEIGHTS.search(path.name) is not None


def sentence_parts(modules: Path) -> list[str]:
    """Sub-folders that sentence-transformers' modules.json names; none if it is missing or says nothing of the kind."""
    try:
        content = json.loads(modules.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    rows = content if isinstance(content, list) else []
    paths = [row.get("path") for row in rows if isinstance(row, dict)]
    return [path for path in paths if isinstance(path, str) and path and "/" not in path and path != ".."]


def side_files(folder: Path, trust_remote_code: bool = False) -> list[Path]:
    """The files of a model's folder that come along, sub-folders included. A warning names what is left for its size."""
    names = []
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        here = Path(root)
        names += [(here / file).relative_to(folder).as_posix() for file in sorted(files)]
        if len(names) > MOST:
            warnings.warn(
                f"{folder} holds more than {MOST} files with its sub-folders, as no model does: only the files beside the "
                "weights come along",
                stacklevel=2,
            )
            names = [path.name for path in sorted(folder.iterdir())]
            break
    parts = sentence_parts(folder / SENTENCE_MODULES)
    chosen = [folder / name for name in choose_side_files(names, parts, trust_remote_code)]
    chosen = [path for path in chosen if path.is_file() and _stays_inside(path, folder)]
    for path in chosen:
        if path.stat().st_size > LARGEST:
            warnings.warn(
                f"{path} is left behind: it takes {path.stat().st_size / 1e6:.0f} MB, more than a tokenizer does; copy it "
                "yourself if the model needs it",
                stacklevel=2,
            )
    return [path for path in chosen if path.stat().st_size <= LARGEST]


def _stays_inside(path: Path, folder: Path) -> bool:
    """Whether a file, its links followed, lies in the folder; the hub's cache keeps every file as a link to its blobs."""
    home = folder.resolve()
    roots = [home, *([home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [])]
    real = path.resolve()
    return any(root in real.parents for root in roots)
