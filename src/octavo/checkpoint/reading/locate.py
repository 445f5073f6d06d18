"""Find a checkpoint's files: in a folder, as one file, or on the hub.

Example:
    >>> from octavo.checkpoint.reading.locate import locate
    >>> locate("model").files
    [PosixPath('model/model.safetensors')]
"""

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...json_files import read_object
from ..errors import CheckpointError
from .regular import require_regular
from .side_files import SENTENCE_MODULES, SIDECARS, choose_side_files, sentence_parts

SAFETENSORS_INDEX = "model.safetensors.index.json"
BIN_INDEX = "pytorch_model.bin.index.json"
SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.[a-z]+)$")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+){0,1}$")


@dataclass(frozen=True)
class Location:
    """Where a checkpoint lies.

    Attributes:
        format: "safetensors", "bin" or "gguf".
        folder: the folder of its files.
        files: files with weights. With an index they are the ones it names, found or not.
        index: the index of a sharded checkpoint, if it has one.
    """

    format: str
    folder: Path
    files: list[Path]
    index: Path | None = None


@dataclass(frozen=True)
class Hub:
    """What is wanted of a hub id.

    Attributes:
        revision: branch, tag or commit.
        subfolder: the folder of the model within the repository (or within a local folder).
        trust_remote_code: whether code (*.py) is wanted as well.
        options: what huggingface_hub's download takes: cache_dir, token, force_download, local_files_only.
    """

    revision: str | None = None
    subfolder: str = ""
    trust_remote_code: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


NEWEST = Hub()


def locate(src: str | Path, hub: Hub = NEWEST) -> Location:
    """Find the files of a checkpoint.

    Args:
        src: a folder, a file, or a hub id, which is downloaded into the hub's cache (only the files that are needed).
        hub: how a hub id is downloaded; its sub-folder also counts for a folder.

    Raises:
        CheckpointError: if there is no checkpoint there.
    """
    location = _locate(src, hub)
    for path in (*location.files, *((location.index,) if location.index else ())):
        require_regular(path)
    return location


def _locate(src: str | Path, hub: Hub) -> Location:
    path = Path(src).expanduser()
    if path.is_file():
        return _locate_file(path)
    if path.is_dir():
        return _locate_in_folder(path / hub.subfolder)
    text = str(src)
    repository, _, name = text.rpartition("/")
    if text.endswith(".gguf") and HUB_ID.match(repository) and not path.is_absolute():
        return _locate_file(download(repository, hub, only=name) / name)
    return _locate_in_folder(download(_hub_id(src), hub) / hub.subfolder)


def _hub_id(src: str | Path) -> str:
    """What is found nowhere here, as a hub id. Raises CheckpointError if it cannot be one."""
    text = str(src)
    if not HUB_ID.match(text) or Path(text).expanduser().is_absolute() or text.startswith("."):
        raise CheckpointError(
            f"{src}: no such file or folder, and not a hub id of the form organization/name"
        )
    return text


def _locate_file(path: Path) -> Location:
    folder = path.parent
    if path.suffix == ".gguf":
        shard = SHARD.match(path.name)
        if shard and int(shard["count"]) > 1:
            raise CheckpointError(
                f"{path} is part {int(shard['number'])} of {int(shard['count'])} of a split GGUF; "
                "join the parts first: llama-gguf-split --merge FIRST_PART WHOLE.gguf"
            )
        return Location("gguf", folder, [path])
    if path.name.endswith(".index.json"):
        return _indexed("safetensors" if "safetensors" in path.name else "bin", folder, path)
    if path.suffix == ".safetensors":
        return Location("safetensors", folder, [path])
    if path.suffix in PICKLE_SUFFIXES:
        return Location("bin", folder, [path])
    raise CheckpointError(f"{path}: expected a .safetensors, .bin or .gguf file")


def locate_config(src: str | Path) -> Path | None:
    """The config.json of a folder, of a file's folder, or of a hub id, of which nothing else is fetched; None for a GGUF file
    without one.

    Raises:
        CheckpointError: if there is none.
    """
    path = Path(src).expanduser()
    if path.exists():
        _refuse_adapter(path)
        config = (path if path.is_dir() else path.parent) / "config.json"
        if config.is_file():
            return config
        if path.suffix == ".gguf":
            return None
        raise CheckpointError(f"{src}: expected a model's folder with a config.json, found none in it")
    return download(_hub_id(src), only="config.json") / "config.json"


def locate_adapter(adapter: str | Path) -> None:
    """Check that a PEFT adapter is there: a folder, or a name that may be a hub id.

    Raises:
        CheckpointError: if it is neither.
    """
    folder = Path(adapter).expanduser()
    if folder.exists():
        if not (folder / "adapter_config.json").is_file():
            raise CheckpointError(
                f"{adapter}: expected a PEFT adapter folder, found no adapter_config.json in it"
            )
    elif folder.is_absolute() or str(adapter).startswith(".") or str(adapter).count("/") != 1:
        raise CheckpointError(f"{adapter}: no such folder, and not a hub id of the form organization/name")


def _refuse_adapter(folder: Path) -> None:
    """Raise CheckpointError if a folder is an adapter's, saying what one is for."""
    if not (folder / "adapter_config.json").is_file() or (folder / "config.json").exists():
        return
    try:
        base = str(read_object(folder / "adapter_config.json").get("base_model_name_or_path") or "MODEL")
    except (OSError, ValueError):
        base = "MODEL"
    raise CheckpointError(
        f"{folder} is an adapter, which goes on top of the model that it was trained on: "
        f"octavo generate {shlex.quote(base)} --adapter {shlex.quote(str(folder))} PROMPT; octavo merge makes one model of both"
    )


def _locate_in_folder(folder: Path) -> Location:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    _refuse_adapter(folder)
    # Safetensors first: where a folder has both, they hold the same weights and a pickle is slower to open.
    for format_, index, single, suffixes in (
        ("safetensors", SAFETENSORS_INDEX, "model.safetensors", (".safetensors",)),
        ("bin", BIN_INDEX, "pytorch_model.bin", PICKLE_SUFFIXES),
    ):
        if (folder / index).exists():
            return _indexed(format_, folder, folder / index)
        if (folder / single).exists():
            return Location(format_, folder, [folder / single])
        found = sorted(p for p in folder.iterdir() if p.suffix in suffixes and p.name != "training_args.bin")
        if not found:
            continue
        shards = [SHARD.match(p.name) for p in found]
        if all(shards):
            _require_all_shards(folder, found)
            return Location(format_, folder, found)
        if len(found) == 1:
            return Location(format_, folder, found)
        raise CheckpointError(
            f"{folder}: {len(found)} {suffixes[0]} files and no {index}; give the one file that is meant"
        )
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1:
        return _locate_file(ggufs[0])
    if ggufs:
        raise CheckpointError(
            f"{folder} holds {len(ggufs)} GGUF files; name one of them: " + ", ".join(p.name for p in ggufs)
        )
    raise CheckpointError(
        f"{folder}: no weights here; expected model.safetensors, pytorch_model.bin, an index of shards, or a .gguf file"
    )


def _indexed(format_: str, folder: Path, index: Path) -> Location:
    from .index import shard_files

    return Location(format_, folder, [folder / name for name in shard_files(index)], index)


def _require_all_shards(folder: Path, found: list[Path]) -> None:
    shards = [SHARD.match(p.name) for p in found]
    counts = {int(m["count"]) for m in shards if m}
    have = {int(m["number"]) for m in shards if m}
    if len(counts) != 1 or have != set(range(1, counts.pop() + 1)):
        raise CheckpointError(
            f"{folder}: shards are missing or mixed: found "
            + ", ".join(p.name for p in found)
            + "; download again"
        )


def download(repository: str, hub: Hub = NEWEST, only: str | None = None) -> Path:
    """Bring what is needed of a hub repository into the hub's cache; returns the folder.

    Args:
        repository: "organization/name".
        hub: which revision of it, which sub-folder, and what huggingface_hub has to know.
        only: one file, instead of the weights in the best format there.

    Raises:
        CheckpointError: if the repository cannot be reached and is not in the cache, or holds no weights.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # A failed connection is an error of the hub's HTTP library, whichever that is in this version: the class that its
    # own errors descend from.
    network = next((base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"), OSError)
    unreachable_errors: tuple[type[BaseException], ...] = (OSError, OfflineModeIsEnabled, network)
    revision, options = hub.revision, dict(hub.options)
    if options.pop("local_files_only", False):
        return _cached(repository, hub, "local_files_only is set")
    try:
        token = {"token": options["token"]} if "token" in options else {}
        files = HfApi(**token).list_repo_files(repository, revision=revision)
        within = f"{hub.subfolder}/" if hub.subfolder else ""
        files = [name.removeprefix(within) for name in files if name.startswith(within)]
        parts: list[str] = []
        if SENTENCE_MODULES in files and not only:
            modules = hf_hub_download(repository, within + SENTENCE_MODULES, revision=revision, **options)
            parts = sentence_parts(Path(modules))
        wanted = [only] if only else wanted_files(files, parts, hub.trust_remote_code)
        if not wanted:
            raise CheckpointError(f"{repository} on the hub holds no safetensors, .bin or GGUF weights")
        patterns = [within + name for name in wanted]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns, **options))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repository} is gated: accept its terms on the hub, then `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        at = f" at revision {revision}" if revision else ""
        raise CheckpointError(
            f"{repository}: no such file or folder here, and no such repository{at} on the hub"
        ) from error
    except unreachable_errors as unreachable:
        return _cached(repository, hub, f"the hub cannot be reached ({type(unreachable).__name__})")


def _cached(repository: str, hub: Hub, why: str) -> Path:
    """The folder of a repository in the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    options = {**hub.options, "local_files_only": True}
    try:
        return Path(snapshot_download(repository, revision=hub.revision, **options))
    except (LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{repository}: no such file or folder here, {why}, and its cache does not hold it; check the path, or connect "
            "once to download it"
        ) from error


def wanted_files(files: list[str], parts: Iterable[str] = (), trust_remote_code: bool = False) -> list[str]:
    """Of a repository's files, those that a conversion needs: one format of weights, config.json, and what belongs to the
    model besides (`octavo.checkpoint.reading.side_files`).

    Weights only at the top: sub-folders hold other formats or other models.
    """
    top = [name for name in files if "/" not in name]
    aside = choose_side_files(files, parts, trust_remote_code)
    for weights in (
        [n for n in top if n.startswith("model") and n.endswith((".safetensors", ".safetensors.index.json"))],
        [n for n in top if n.startswith("pytorch_model") and n.endswith((".bin", ".bin.index.json"))],
        [n for n in top if n.endswith(".safetensors")],
    ):
        if weights:
            return weights + [name for name in top if name in ("config.json", *SIDECARS)] + aside
    ggufs = [n for n in top if n.endswith(".gguf")]
    if len(ggufs) > 1:
        raise CheckpointError(
            "the repository holds several GGUF files; append one to its id: " + ", ".join(sorted(ggufs))
        )
    return ggufs
