"""What is quantized and how: `OctavoConfig`, which goes to and from a model's config.json.

Example:
    >>> from octavo.config import OctavoConfig
    >>> OctavoConfig(skip=["lm_head"]).to_dict()["block_size"]
    64
"""

import fnmatch
import json
import re
from dataclasses import dataclass, field
from typing import Any

FORMAT_VERSION = 1
CODEBOOKS = ("fitted", "dynamic")
SCALE_TYPES = ("auto", "float16", "float32")
# 64 halves the error of 4096 for a quarter of a bit more; the published format has 4096.
DEFAULT_BLOCK_SIZE = {"fitted": 64, "dynamic": 4096}


@dataclass
class OctavoConfig:
    """How a model's matrices are stored.

    Args:
        codebook: "fitted" (a table fitted to each matrix; the least error) or "dynamic" (the table of the
            published 8-bit checkpoints).
        block_size: weights of one row that share a scale. Default: 64 for "fitted", 4096 for "dynamic".
        skip: patterns of parameters that stay in float. A pattern is compared with whole components of a
            parameter's name: "lm_head", "mlp.gate", "model.layers.0", "*.q_proj", "layers.[0-3].mlp".
        scales: type of the scales: "float16", "float32", or "auto": float16 for a fitted codebook where the scales
            fit its normal range, else float32.
        format_version: version of the file format; this code reads and writes 1.

    Raises:
        ValueError: on an unknown option or value, naming it and what would be valid.
    """

    codebook: str = "fitted"
    block_size: int | None = None
    skip: list[str] = field(default_factory=list)
    scales: str = "auto"
    format_version: int = FORMAT_VERSION
    quant_method: str = "octavo"

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"Octavo format_version: expected {FORMAT_VERSION}, found {self.format_version!r}. This model was written by "
                "another version of Octavo: upgrade with `pip install -U octavo`"
            )
        if self.quant_method != "octavo":
            raise ValueError(f"quant_method: expected 'octavo', found {self.quant_method!r}")
        if self.codebook not in CODEBOOKS:
            raise ValueError(f"codebook: expected one of {', '.join(CODEBOOKS)}, found {self.codebook!r}")
        if self.scales not in SCALE_TYPES:
            raise ValueError(f"scales: expected one of {', '.join(SCALE_TYPES)}, found {self.scales!r}")
        if self.block_size is None:
            self.block_size = DEFAULT_BLOCK_SIZE[self.codebook]
        # A bool is an int to Python, and True would pass for a block of one weight.
        if not isinstance(self.block_size, int) or isinstance(self.block_size, bool) or self.block_size < 1:
            raise ValueError(f"block_size: expected a positive integer, found {self.block_size!r}")
        if isinstance(self.skip, str):
            self.skip = [self.skip]
        if not isinstance(self.skip, list | tuple | set) or not all(
            isinstance(name, str) for name in self.skip
        ):
            raise ValueError(f"skip: expected a list of names, found {self.skip!r:.100}")
        self.skip = list(self.skip)

    @property
    def row_block(self) -> int:
        """`block_size`, the codebook's default filled in."""
        return self.block_size or DEFAULT_BLOCK_SIZE[self.codebook]

    def skips(self, name: str) -> bool:
        """Whether a pattern of `skip` matches the parameter `name`."""
        return any(matches(pattern, name) for pattern in self.skip)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any):
        """Read from config.json's `quantization_config`. Raises ValueError on an option that is not known."""
        # The version first: an unknown version explains unknown options.
        if config_dict.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
            cls(format_version=config_dict["format_version"])
        known = set(cls.__dataclass_fields__)
        unknown = sorted(set(config_dict) - known)
        if unknown:
            raise ValueError(
                f"quantization_config holds unknown options {unknown}; known are {sorted(known)}. A newer Octavo "
                "may have written it: upgrade with `pip install -U octavo`"
            )
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """As config.json holds it."""
        return {
            "quant_method": self.quant_method,
            "format_version": self.format_version,
            "codebook": self.codebook,
            "block_size": self.block_size,
            "scales": self.scales,
            "skip": list(self.skip),
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """All options: a file states every one, so that a later default does not change its meaning."""
        return self.to_dict()

    def to_json_string(self, use_diff: bool = True) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` matches `name` at whole components: "gate" matches "mlp.gate.weight", not "mlp.gate_proj.weight".

    `*`, `?` and `[...]` are those of the shell; `*` also crosses dots.
    """
    # translate() anchors its end; an optional run of further components may follow here.
    body = fnmatch.translate(pattern).removesuffix(r"\Z").removesuffix(r"\z")
    return re.search(rf"(?:^|\.){body}(?:\.|$)", name) is not None


def stored_block_size(columns: int, blocks: int, block_size: int) -> int:
    """Block size of a stored matrix, from its row length and its number of scales per row.

    It is the config's `block_size` where that gives `blocks` scales; else, as in published checkpoints, whose blocks of
    4096 run across rows, rows are cut into `blocks` equal parts.

    Raises:
        ValueError: if neither holds.
    """
    if blocks == -(-columns // block_size):
        return block_size
    if blocks > 0 and columns % blocks == 0:
        return columns // blocks
    raise ValueError(
        f"rows of {columns} weights with {blocks} scales fit neither blocks of {block_size} nor equal blocks: "
        "the file is damaged or does not belong to this config.json"
    )
