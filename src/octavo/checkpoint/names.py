"""From a checkpoint's names to the model's own, as transformers itself maps them.

transformers renames tensors while it loads them, and merges or splits some (experts stored one by one become one 3-D
parameter). The rules are its `WeightRenaming`s and `WeightConverter`s; they are applied here as
`transformers.core_model_loading.convert_and_load_state_dict_in_model` does, but to names first and to data group by group.

Example:
    >>> from octavo.checkpoint.names import map_names
    >>> from octavo.checkpoint.skeleton import build_skeleton
    >>> names = map_names(build_skeleton(source.model_config()), source)
    >>> names.groups[0].outputs, names.unexpected
    ({'lm_head.bias': (4096,)}, [])
"""

import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..model import holds_transpose
from ..wording import few
from .errors import CheckpointError
from .reading.source import Source


@dataclass
class Group:
    """Tensors of a checkpoint that become one parameter of the model together, or, split, several.

    Attributes:
        first: the parameter, or the first of several.
        sources: names in the checkpoint, by the pattern of the rule they matched, in order.
        converter: the rule that merges or splits them; None for a plain tensor.
        outputs: name in the model → shape.
    """

    first: str
    sources: dict[str, list[str]] = field(default_factory=dict)
    converter: Any = None
    outputs: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def source_names(self) -> list[str]:
        return [name for names in self.sources.values() for name in names]

    def realize(self, model: Any, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """The model's tensors by name, read through `read` and merged or split.

        Raises:
            CheckpointError: if the rule does not fit the tensors.
        """
        if self.converter is None:
            return {self.first: read(self.source_names[0])}
        converter = deepcopy(self.converter)
        for pattern, names in self.sources.items():
            for name in names:
                converter.add_tensor(self.first, name, pattern, partial(read, name))
        try:
            made = converter.convert(self.first, model=model, config=model.config)
        except (RuntimeError, ValueError, AttributeError, KeyError, IndexError) as error:
            raise CheckpointError(
                f"{self.first}: {few(self.source_names)} do not combine into it: {error}"
            ) from error
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    @property
    def experts(self) -> int | None:
        """Number of matrices stored one by one that are stacked into one parameter; None if it is anything else."""
        if self.converter is None or len(self.outputs) != 1:
            return None
        stack, *rest = self.converter.operations
        counts = {len(names) for names in self.sources.values()}
        if type(stack).__name__ != "MergeModulelist" or stack.dim != 0 or len(counts) != 1:
            return None
        joined = len(rest) == 1 and type(rest[0]).__name__ == "Concatenate" and rest[0].dim == 1
        if not joined and (rest or len(self.sources) != 1):
            return None
        return counts.pop()

    def read_expert(self, index: int, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """Matrix `index` of a stack, without reading the others."""
        ordered = [self.sources[p][index] for p in self.converter.source_patterns if p in self.sources]
        parts = [read(name) for name in ordered]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=0)


@dataclass
class Names:
    """How a checkpoint fills a model: groups in natural order of names, and names that have no place in the model."""

    groups: list[Group]
    unexpected: list[str]


def map_names(model: Any, source: Source) -> Names:
    """Map every tensor of a checkpoint to the model's parameters and buffers.

    Args:
        model: a transformers model, on the meta device.
        source: the checkpoint; no data is read.

    Raises:
        CheckpointError: if tensors do not combine, or have another shape than the model's.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    rules = source.transforms(model)
    if rules is None:
        rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    expected = model.state_dict()
    prefix = model.base_model_prefix
    groups: dict[str, Group] = {}
    unexpected = []
    for name in sorted(source.tensors, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if renamed not in expected and name in expected:
            # Saved under the model's own names already: a rule meant for older names must not apply.
            renamed, pattern = rename_source_key(name, [], [], prefix, expected)
        if renamed not in expected:
            unexpected.append(name)
            continue
        group = groups.setdefault(renamed, Group(renamed, converter=by_pattern.get(pattern or "")))
        group.sources.setdefault(pattern or name, []).append(name)
    for group in groups.values():
        _complete(group, model, source, expected)
    return Names(list(groups.values()), _not_ignored(model, unexpected))


def stored_names(model: Any) -> Callable[[str, bool], str]:
    """A function of a name in the model, and whether it is quantized: the name for a file, from which transformers' own renamings
    lead back to the model's.

    That is the model's own, as a rule. Where a renaming meant for published names spoils it ("shared_expert." is a pattern
    that also matches "shared_experts"), it is the published one.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightRenaming, rename_source_key

    renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    # A prefix is taken off where it is found; whether one belongs there, the reverse rule cannot know.
    reverse: Any = [
        rule.reverse_transform() for rule in renamings[::-1] if not isinstance(rule, PrefixChange)
    ]

    def renamed(name: str, rules: Any) -> str:
        return rename_source_key(name, rules, [])[0]

    def stored(name: str, quantized: bool) -> str:
        suffix = "_qdata" if quantized else ""
        whole = f"{name}{suffix}"
        for candidate in (whole, renamed(whole, reverse)):
            if candidate.endswith(suffix) and renamed(candidate, renamings) == whole:
                return candidate.removesuffix(suffix)
        return name

    return stored


def _complete(group: Group, model: Any, source: Source, expected: dict[str, torch.Tensor]) -> None:
    """Find a group's outputs by running its rule on shapes alone; check them against the model."""
    if group.converter is None and len(group.source_names) > 1:
        raise CheckpointError(
            f"{source.folder}: {' and '.join(group.source_names[:2])} both become the model's {group.first}"
        )

    def shape_only(name: str) -> torch.Tensor:
        return torch.empty(source.tensors[name].shape, dtype=source.tensors[name].dtype, device="meta")

    for name, value in group.realize(model, shape_only).items():
        if name not in expected:
            raise CheckpointError(
                f"{source.folder}: {group.source_names[0]} would become {name}, which the model lacks"
            )
        shape = tuple(expected[name].shape)
        turned = source.rows_are_outputs and _is_turned(model, name, source, group)
        if tuple(value.shape) != ((*shape[:-2], shape[-1], shape[-2]) if turned else shape):
            raise CheckpointError(
                f"{source.folder}: tensor {group.source_names[0]}: expected shape {list(shape)} (config.json), found "
                f"{list(value.shape)}; the weights and config.json belong to different models"
            )
        group.outputs[name] = tuple(value.shape)


def _is_turned(model: Any, name: str, source: Source, group: Group) -> bool:
    """Whether the model holds the transpose of what an Octavo file has as [out, in]."""
    return group.source_names[0] in source.quantized and holds_transpose(
        model.get_submodule(name.rpartition(".")[0])
    )


def _not_ignored(model: Any, names: list[str]) -> list[str]:
    """Those of `names` that transformers would warn about."""
    patterns = [
        *(model._keys_to_ignore_on_load_unexpected or ()),
        r"rotary_emb\.inv_freq",
        r"(^|\.)position_ids$",
    ]
    ignored = re.compile("|".join(f"({pattern})" for pattern in patterns))
    return [name for name in names if not ignored.search(name)]
