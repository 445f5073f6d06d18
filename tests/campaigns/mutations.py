"""Ways to damage a checkpoint, or to make it dangerous. Each returns what it did, and whether the numbers must stay the same.

A mutation of a header or an index either is refused or changes nothing: values are where they were. (What would be another
valid file, as two tensors of one shape in each other's place, is not made.) A mutation of a configuration may give another
valid model."""

import json
import os
import pickle
import random
import shutil
import struct
from pathlib import Path

HUGE = [-1, 0, 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30]
ODD = [
    None,
    True,
    False,
    "",
    "x",
    "../../etc/passwd",
    [],
    {},
    [None],
    {"a": 1},
    1.5,
    1e308,
    -1e308,
    "9" * 400,
    "é\u0000",
    [[[]]],
]
# Keys of configurations that no number depends on, or that tests of their own cover.
_SAFETENSORS_FIELDS = ("dtype", "shape", "data_offsets")


class Bomb:
    """What a pickle runs when it is read by a reader that trusts it."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def mutate(folder: Path, source, rng: random.Random, mark: Path) -> tuple[str, bool]:
    """Damage `folder` in one way. Returns (what was done, whether the numbers must stay)."""
    container = folder / source.container
    kinds = [_truncate, _grow, _special_file, _pickle_in_place]
    if container.suffix == ".safetensors":
        kinds += [_header_field] * 8 + [_header_text, _header_length, _header_bytes]
    elif container.suffix == ".json":
        kinds += [_index] * 4 + [_swap_shards, _special_file]
    else:
        kinds += [_head_bytes] * 6
    if source.config:
        kinds += [_config] * 6 + [_config_text]
    kind = rng.choice(kinds)
    return kind(folder, container, source, rng, mark)


def _truncate(folder, container, source, rng, mark):
    file = _some_weights(folder, container, rng)
    size = file.stat().st_size
    length = rng.choice([0, 1, 7, 8, 9, size - 1, rng.randrange(size)])
    os.truncate(file, length)
    return f"{file.name} cut to {length} of {size} bytes", True


def _grow(folder, container, source, rng, mark):
    file = _some_weights(folder, container, rng)
    with open(file, "ab") as end:
        end.write(rng.randbytes(rng.choice([1, 8, 4096])))
    return f"bytes after the end of {file.name}", True


def _special_file(folder, container, source, rng, mark):
    file = rng.choice([container, *([folder / source.config] if source.config else [])])
    kind = rng.choice(["fifo", "folder", "loop", "dangling", "missing", "no permission"])
    kept = file.read_bytes()
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "loop":
        file.symlink_to(file.name)
    elif kind == "dangling":
        file.symlink_to("/nowhere/at/all")
    elif kind == "no permission" and os.geteuid():
        file.write_bytes(kept)
        file.chmod(0)
    return f"{file.name} is a {kind}", True


def _pickle_in_place(folder, container, source, rng, mark):
    files = [container, folder / "pytorch_model.bin", folder / "training_args.bin", folder / "optimizer.pt"]
    file = rng.choice(files + ([folder / source.config] if source.config else []))
    file.write_bytes(pickle.dumps({"model.norm.weight": Bomb(mark)}))
    # Beside whole weights it is not read at all.
    return f"a pickle with code as {file.name}", True


def _read_header(file: Path) -> tuple[dict, bytes]:
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _write_header(file: Path, raw: bytes, rest: bytes) -> None:
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + rest)


def _header_field(folder, container, source, rng, mark):
    header, rest = _read_header(container)
    name = rng.choice([key for key in header if key != "__metadata__"])
    what = rng.randrange(9)
    if what == 0:
        del header[name]
        text = f"{name} is missing"
    elif what == 1:
        header[rng.choice(["x", "", "../x", name + ".weight", "a" * 5000])] = header.pop(name)
        text = f"{name} has another name"
    elif what == 2:
        field = rng.choice(_SAFETENSORS_FIELDS)
        header[name][field] = value = rng.choice(HUGE + ODD)
        text = f"{name}: {field} = {str(value)[:60]!r}"
    elif what == 3:
        at = rng.randrange(2)
        header[name]["data_offsets"][at] = value = rng.choice(HUGE + ODD)
        text = f"{name}: offset {at} = {str(value)[:60]!r}"
    elif what == 4:
        at = rng.randrange(2)
        header[name]["data_offsets"][at] += rng.choice([-8, -2, -1, 1, 2, 8, 4096])
        text = f"{name}: offset {at} moved"
    elif what == 5:
        shape = header[name]["shape"] or [1]
        shape[rng.randrange(len(shape))] = value = rng.choice(HUGE[3:] + HUGE[:2] + ODD)
        header[name]["shape"] = shape
        text = f"{name}: a dimension = {str(value)[:60]!r}"
    elif what == 6:
        header[name]["shape"] = [1] * rng.choice([3, 65, 1000]) + header[name]["shape"]
        text = f"{name}: more dimensions"
    elif what == 7:
        width = {"F32": ("F64", "U8"), "F16": ("F32", "I8"), "U8": ("F16", "F32"), "BF16": ("F32", "U8")}
        header[name]["dtype"] = rng.choice(width.get(header[name]["dtype"], ("F64",)))
        text = f"{name}: type of another width"
    else:
        header["__metadata__"] = rng.choice(ODD + HUGE)
        text = "metadata of another kind"
    _write_header(container, json.dumps(header).encode(), rest)
    return text, True


def _header_text(folder, container, source, rng, mark):
    header, rest = _read_header(container)
    raw = json.dumps(header)
    name = rng.choice([key for key in header if key != "__metadata__"])
    what = rng.randrange(4)
    if what == 0:
        other = json.dumps({**header[name], "data_offsets": [0, 4]})
        raw = raw[:-1] + f", {json.dumps(name)}: {other}" + "}"
        text = f"{name} twice"
    elif what == 1:
        depth = rng.choice([50, 100_000])
        raw = raw[:-1] + ', "deep": ' + "[" * depth + "]" * depth + "}"
        text = f"lists {depth} deep"
    elif what == 2:
        raw = raw.replace('"shape"', rng.choice(['"Shape"', '"shape\\u0000"', "shape"]), 1)
        text = "a key that is another"
    else:
        raw = rng.choice(["", "{}", "[]", "null", "{", '{"a": NaN}', "\ufeff" + raw, raw + raw])
        text = f"header {raw[:20]!r}"
    _write_header(container, raw.encode(), rest)
    return text, True


def _header_length(folder, container, source, rng, mark):
    data = container.read_bytes()
    value = rng.choice(
        [0, 1, 2**20, 2**31, 2**40, 2**62, 2**63, 2**64 - 1, len(data), rng.randrange(len(data))]
    )
    container.write_bytes(struct.pack("<Q", value) + data[8:])
    return f"header of {value} bytes", True


def _header_bytes(folder, container, source, rng, mark):
    data = bytearray(container.read_bytes())
    length = struct.unpack("<Q", data[:8])[0]
    at = rng.randrange(8, 8 + length)
    # A letter or a digit in another's place may make another valid header; a control character does not.
    data[at] = rng.choice([0, 1, 0x1F, 0x7F, 0x80, 0xFF])
    container.write_bytes(data)
    return f"byte {at} of the header is {data[at]:#x}", False


def _head_bytes(folder, container, source, rng, mark):
    """Of formats that we do not write: anything in the first bytes or the last ones, where their directories are."""
    data = bytearray(container.read_bytes())
    count = rng.choice([1, 1, 1, 4, 16])
    span = min(len(data), 3000)
    for _ in range(count):
        at = rng.randrange(span) if rng.random() < 0.7 else len(data) - 1 - rng.randrange(span)
        data[at] = rng.choice([0, 0xFF, 0x7F, 0x80, data[at] ^ (1 << rng.randrange(8))])
    container.write_bytes(data)
    return f"{count} bytes changed, the last at {at}", False


def _index(folder, container, source, rng, mark):
    index = json.loads(container.read_text())
    weights = index["weight_map"]
    name = rng.choice(list(weights))
    what = rng.randrange(5)
    if what == 0:
        del weights[name]
    elif what == 1:
        weights[name] = rng.choice(
            [
                "../../etc/passwd",
                "/etc/passwd",
                "config.json",
                "",
                ".",
                "nowhere.safetensors",
                "a\u0000b",
                *ODD,
            ]
        )
    elif what == 2:
        weights[rng.choice(["x", "", "model.layers.99.mlp.up_proj.weight"])] = weights[name]
    elif what == 3:
        index["weight_map"] = rng.choice(ODD + HUGE)
    else:
        index["metadata"] = rng.choice(ODD + HUGE)
    container.write_text(json.dumps(index))
    return f"index: {name}, way {what}", True


def _swap_shards(folder, container, source, rng, mark):
    shards = sorted(folder.glob("*.safetensors"))
    a, b = rng.sample(shards, 2)
    moved = folder / "moved"
    a.rename(moved)
    b.rename(a)
    moved.rename(b)
    return f"{a.name} and {b.name} in each other's place", True


def _config(folder, container, source, rng, mark):
    file = folder / source.config
    config = json.loads(file.read_text())
    holder = config.get("quantization_config", config) if rng.random() < 0.4 else config
    key = rng.choice([*holder, "unknown_key"])
    if rng.random() < 0.2:
        holder.pop(key, None)
        text = f"{key} is missing"
    else:
        holder[key] = value = rng.choice(HUGE + ODD)
        text = f"{key} = {str(value)[:60]!r}"
    file.write_text(json.dumps(config))
    return f"{file.name}: {text}", False


def _config_text(folder, container, source, rng, mark):
    file = folder / source.config
    raw = file.read_text()
    raw = rng.choice(
        [
            "",
            "{}",
            "[]",
            "null",
            "{",
            raw[: len(raw) // 2],
            "[" * 100_000,
            '{"a": ' * 5000,
            raw.replace("{", '{"vocab_size": NaN,', 1),
        ]
    )
    file.write_text(raw)
    return f"{file.name}: {raw[:20]!r}", False


def _some_weights(folder: Path, container: Path, rng) -> Path:
    return rng.choice(sorted(folder.glob("*.safetensors"))) if container.suffix == ".json" else container


def copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target, symlinks=True)
