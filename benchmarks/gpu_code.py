"""The machine code of the CUDA kernels, counted for GPUs that nobody here has: no GPU is needed, nothing is run on one.

    pip install nvidia-cuda-nvrtc-cu12 triton     NVRTC of CUDA 12 compiles for 6.0 on; Triton brings nvdisasm and cuobjdump
    python -m benchmarks.gpu_code                 prints the tables, writes benchmarks/results/gpu-code.json

For each architecture, kernel and kind of codebook (`table`: looked up, 32 copies; `segments`: computed): instructions per
weight in the inner loop (both sides of its branches), registers, shared memory, and how many blocks a multiprocessor holds.

For each card, the least time for one token times 16384 x 4096 in blocks of 64: what memory takes at its published bandwidth,
and what issuing the instructions takes, with all schedulers busy in every cycle of the published boost clock. Both are
bounds, from below: a real kernel waits besides, and pipes narrower than the schedulers (conversions, 16-bit packing, shared
memory) are left out.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from octavo.ops.gpu import cuda_launch, nvrtc
from octavo.ops.gpu.kernels import cuda_mma, cuda_simt, cuda_wgmma

OUT = Path(__file__).parent / "results" / "gpu-code.json"
TOOLKIT = "12"
ROWS, COLUMNS, BLOCK = 16384, 4096, 64


class Limits(NamedTuple):
    """Of a multiprocessor (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability")."""

    warps: int
    blocks: int
    shared_kb: int
    reserved: int  # bytes of shared memory that each block costs besides
    issued: int  # warp instructions in a cycle


LIMITS = {
    "6.0": Limits(64, 32, 64, 0, 2),
    "6.1": Limits(64, 32, 96, 0, 4),
    "7.0": Limits(64, 32, 96, 0, 4),
    "7.5": Limits(32, 16, 64, 0, 4),
    "8.0": Limits(64, 32, 164, 1024, 4),
    "8.6": Limits(48, 16, 100, 1024, 4),
    "8.9": Limits(48, 24, 100, 1024, 4),
    "9.0": Limits(64, 32, 228, 1024, 4),
}
REGISTERS = 65536


class Card(NamedTuple):
    """Published figures: multiprocessors, boost clock, memory."""

    capability: str
    multiprocessors: int
    gigahertz: float
    gigabytes: float


CARDS = {
    "Tesla P100 PCIe": Card("6.0", 56, 1.303, 732),
    "GTX 1080 Ti": Card("6.1", 28, 1.582, 484),
    "Tesla V100 PCIe": Card("7.0", 80, 1.380, 900),
    "Tesla T4": Card("7.5", 40, 1.590, 320),
    "RTX 2080 Ti": Card("7.5", 68, 1.545, 616),
    "A100 40 GB": Card("8.0", 108, 1.410, 1555),
    "RTX 3060": Card("8.6", 28, 1.777, 360),
    "RTX 3090": Card("8.6", 82, 1.695, 936),
    "RTX 4060": Card("8.9", 24, 2.460, 272),
    "RTX 4090": Card("8.9", 128, 2.520, 1008),
    "H100 SXM": Card("9.0", 132, 1.830, 3350),
}


class Case(NamedTuple):
    """A kernel as a launcher compiles it."""

    kernel: str
    name: str
    parameters: dict[str, int]
    dynamic: int = 0  # bytes of shared memory given at the launch
    least: tuple[int, int] = (6, 0)
    only: tuple[int, int] | None = None


def cases() -> list[Case]:
    """Of each kernel the instances for one and for most tokens, for tall matrices, as the launchers choose them."""
    found = []
    for tokens in (1, 8):
        rows, depth = cuda_simt.TILINGS[tokens][0]
        found.append(
            Case(f"cuda_simt, {tokens}", "linear_simt", {"TOKENS": tokens, "ROWS": rows, "DEPTH": depth})
        )
    for tokens, tilings in cuda_mma.TILINGS.items():
        tiles, groups, depth = tilings[0]
        sizes = {"M_TILES": tiles, "N_TILES": tokens // 8, "WARPS_M": groups, "DEPTH": depth}
        found.append(Case(f"cuda_mma, {tokens}", "linear_mma", sizes, least=cuda_mma.CAPABILITY))
    for tokens, (tile, depth, stages, groups) in cuda_wgmma.TILINGS.items():
        sizes = {"TOKENS": tile, "DEPTH": depth, "STAGES": stages, "GROUPS": groups, "WARPS": 8 * groups}
        shared = cuda_wgmma.dynamic_shared(tile, stages, groups)
        case = Case(f"cuda_wgmma, {tokens}", "linear_wgmma", sizes, shared, only=cuda_wgmma.CAPABILITY)
        found.append(case)
    found.append(Case("cuda_decode", "decode_rows", {"DEPTH": 4}))
    return found


def tool(name: str) -> str:
    """A program of the CUDA toolkit that Triton's wheel brings along."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def inner_loop(listing: str, kernel: str) -> list[str]:
    """Instructions of the longest loop that holds no other, by opcode, from nvdisasm's listing."""
    text = listing.split(f".text.{kernel}:", 1)[1].split(".section", 1)[0]
    opcodes, labels, loops = [], {}, []
    for line in text.splitlines():
        label = re.match(r"\.(L_\w+):", line)
        if label:
            labels[label.group(1)] = len(opcodes)
        found = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z]\w*)([^;]*)", line)
        if not found:
            continue
        target = re.search(r"\.(L_\w+)", found.group(2))
        if found.group(1) == "BRA" and target and target.group(1) in labels:
            loops.append((labels[target.group(1)], len(opcodes)))
        opcodes.append(found.group(1))
    inner = [
        (first, last)
        for first, last in loops
        if not any(first <= start and end <= last and (start, end) != (first, last) for start, end in loops)
    ]
    first, last = max(inner, key=lambda loop: loop[1] - loop[0])
    return opcodes[first : last + 1]


def counted(case: Case, capability: str, segments: bool) -> dict[str, object]:
    """One instance, compiled and counted: float16 input and scales."""
    architecture = capability.replace(".", "") + ("a" if case.only else "")
    parameters = {"X_TYPE": 1, "SCALE": 1, **case.parameters, "SEGMENTS": int(segments)}
    wgmma = case.name == "linear_wgmma"
    source = cuda_launch.source(*(cuda_wgmma.SOURCE if wgmma else (*cuda_launch.COMMON, case.name)))
    defines = tuple(f"-D{key}={value}" for key, value in parameters.items())
    binary = nvrtc.compile_source(source, architecture, defines, TOOLKIT)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        listing, usage = (
            subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout
            for command in ((tool("nvdisasm"), "-c"), (tool("cuobjdump"), "-res-usage"))
        )
    used = re.search(rf"Function {case.name}:\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert used, usage
    registers, stack, shared, local = map(int, used.groups())
    limits = LIMITS[capability]
    # For 9.0 what each block costs besides is in the figure already.
    shared += case.dynamic - (limits.reserved if capability == "9.0" else 0)
    loop = inner_loop(listing, case.name)
    opcodes = Counter(loop)
    # Each weight is one read of shared memory, of the table or of a line.
    weights = opcodes["LDS"]
    warps = case.parameters.get("WARPS", cuda_launch.WARPS)
    fit = {
        "registers": REGISTERS // (-(-registers * 32 // 256) * 256 * warps),
        "shared memory": limits.shared_kb * 1024 // (shared + limits.reserved) if shared else limits.blocks,
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
    }
    limited_by = min(fit, key=lambda key: fit[key])
    return {
        "kernel": case.kernel,
        "capability": capability,
        "codebook": "segments" if segments else "table",
        "instructions per weight": round(len(loop) / weights, 2),
        "registers": registers,
        "spilled": stack + local,
        "shared KB": round(shared / 1024, 1),
        "blocks": fit[limited_by],
        "limited by": limited_by,
        "warps of most": f"{fit[limited_by] * warps} of {limits.warps}",
        "most frequent": dict(opcodes.most_common(8)),
    }


def bounds(rows: list[dict]) -> list[dict]:
    """For each card, the least microseconds of one token times 16384 x 4096, by `cuda_simt`."""
    weights = ROWS * COLUMNS
    read = weights + 2 * weights // BLOCK
    found = []
    for name, card in CARDS.items():
        # What the launchers take for so tall a matrix, whatever the card.
        kernel = "cuda_simt, 1"
        issue = card.multiprocessors * card.gigahertz * 1e3 * LIMITS[card.capability].issued * 32
        row: dict[str, object] = {"card": name, "capability": card.capability}
        row["memory µs"] = round(read / card.gigabytes / 1e3, 1)
        row["16 bits, memory µs"] = round(2 * weights / card.gigabytes / 1e3, 1)
        for kind in ("table", "segments"):
            one = next(
                r
                for r in rows
                if (r["kernel"], r["capability"], r["codebook"]) == (kernel, card.capability, kind)
            )
            row[f"{kind}, issue µs"] = round(weights * one["instructions per weight"] / issue, 1)
        found.append(row)
    return found


def run() -> dict[str, object]:
    rows = []
    for capability in LIMITS:
        number = tuple(map(int, capability.split(".")))
        for case in cases():
            if number < case.least or (case.only and number != case.only):
                continue
            for segments in (False, True):
                rows.append(counted(case, capability, segments))
                print(f"{rows[-1]}", file=sys.stderr, flush=True)
    return {
        "note": "compiled and counted, not run on any card",
        "nvrtc": nvrtc.version(TOOLKIT),
        "nvrtc compiles for": nvrtc.architectures(TOOLKIT),
        "matrix": f"{ROWS} x {COLUMNS}, blocks of {BLOCK}, float16",
        "code": rows,
        "bounds": bounds(rows),
    }


def markdown(rows: list[dict], columns: list[str]) -> str:
    lines = [f"| {' | '.join(columns)} |", "| --- |" + " --- |" * (len(columns) - 1)]
    lines += [f"| {' | '.join(str(row[column]) for column in columns)} |" for row in rows]
    return "\n".join(lines)


def written(result: dict) -> str:
    """As JSON, a row of a table in a line."""
    entries = []
    for key, value in result.items():
        rows = isinstance(value, list) and isinstance(value[0], dict)
        text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]" if rows else json.dumps(value)
        entries.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def side_by_side(rows: list[dict]) -> list[dict]:
    """Table and segments of one instance in one row."""
    found = []
    for table, segments in zip(rows[::2], rows[1::2], strict=True):
        row = {"capability": table["capability"], "kernel, tokens": table["kernel"]}
        for key in ("instructions per weight", "registers", "shared KB", "blocks"):
            row[key] = f"{table[key]} / {segments[key]}"
        found.append(row)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT, help="JSON file")
    options = parser.parse_args(arguments)
    try:
        result = run()
    except nvrtc.CompilationFailed as missing:
        print(f"{missing}\nInstall it: pip install nvidia-cuda-nvrtc-cu12", file=sys.stderr)
        return 2
    options.out.write_text(written(result))
    print("table / segments; compiled and counted, not run on any card\n")
    print(
        markdown(
            side_by_side(result["code"]),
            ["capability", "kernel, tokens", "instructions per weight", "registers", "shared KB", "blocks"],
        )
    )
    print()
    print(markdown(result["bounds"], list(result["bounds"][0])))
    print(f"\nwritten to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
