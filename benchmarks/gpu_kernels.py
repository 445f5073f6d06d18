"""Part "kernels": `linear` for the shapes of GPT-J-6B and Llama-3-8B, 1 to 2048 tokens, against what else there is.

Microseconds a call, in 16 bits. "octavo" is what users get; the columns after it force one of its kernels, which shows where
they cross: on the table, and ("segments") computing the codebook. "of copy" is the share of the measured copy bandwidth at
which octavo reads the matrix at one token.
"""

import functools

import torch
import torch.nn.functional as F

from octavo.ops import gpu
from octavo.ops.gpu import choose, kernels
from octavo.ops.gpu.device import capability
from octavo.ops.gpu.kernels import panels

from .gpu_common import Report, copies_for, copy_bandwidth, matrix, measure

SHAPES = {
    "GPT-J q, k, v, out": (4096, 4096),
    "GPT-J fc_in": (16384, 4096),
    "GPT-J fc_out": (4096, 16384),
    "GPT-J head": (50400, 4096),
    "Llama k, v": (1024, 4096),
    "Llama gate, up": (14336, 4096),
    "Llama down": (4096, 14336),
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
PANEL_MEGABYTES = (16, 32, 64, 128, 256)
BLOCK = 64


def run(report: Report, device: str, tiny: bool) -> None:
    dtype = torch.bfloat16 if device == "cpu" or capability(0) >= (8, 0) else torch.float16
    bandwidth = copy_bandwidth(device)
    report.fact(copy_bandwidth_gb_s=bandwidth / 1e9, type=str(dtype), block=BLOCK)
    shapes = {"tiny": (48, 128)} if tiny else SHAPES
    tokens = (1, 8, 64, 512) if tiny else TOKENS
    for name, (rows, columns) in shapes.items():
        contestants = build(rows, columns, dtype, device)
        for count in tokens:
            if report.late(3):
                report.fact(cut_short=True)
                return
            report.add(**one(name, rows, columns, count, contestants, dtype, device, bandwidth))
        del contestants
        if device != "cpu":
            torch.cuda.empty_cache()
    panel_sizes(report, dtype, device, tiny)
    summary(report)


def build(rows, columns, dtype, device):
    """name → calls over several copies of the weights: name → list of functions of x (None where it takes no more tokens)."""
    copies = copies_for(rows * columns, device)
    packed = [matrix(rows, columns, BLOCK, device) for _ in range(copies)]
    dense = [torch.randn(rows, columns, device=device).to(dtype) for _ in range(max(2, copies // 2))]
    found = {
        "cuBLAS": [lambda x, w=w: F.linear(x, w) for w in dense],
        "octavo": [lambda x, m=m: gpu.linear(x, *m, BLOCK) for m in packed],
    }
    for name, kernel in kernels.named().items():
        if kernel.operation != "linear":
            continue
        found[name] = [lambda x, m=m, n=name: forced(n, x, m) for m in packed]
        # What panels are decoded by is part "lookup".
        if kernel.segmented is not None and kernel.instance is not None:
            found[f"{name}, segments"] = [
                lambda x, m=m, n=name: forced(n, x, m, segments=True) for m in packed
            ]
    found |= others(rows, columns, dense, dtype, device)
    return found


def forced(name, x, packed, **options):
    kernel = kernels.named()[name]
    why_not = kernel.unsupported_reason(choose.product(x.dtype, x.shape[0], *packed[:2], BLOCK))
    if why_not or (name == "triton_gemm" and x.shape[0] > 512):
        raise NotImplementedError(why_not)
    out = torch.empty(x.shape[0], packed[0].shape[0], dtype=x.dtype, device=x.device)
    kernel.run(x, *packed, BLOCK, None, out, **options)
    return out


def others(rows, columns, dense, dtype, device):
    """Other 8-bit products, where they are installed. (`_weight_int8pack_mm` is PyTorch's own, which torchao uses.)"""
    found = {}
    int8 = [torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=device) for _ in dense]
    scales = torch.rand(rows, device=device).to(dtype)
    found["_weight_int8pack_mm"] = [lambda x, w=w: torch._weight_int8pack_mm(x, w, scales) for w in int8]
    if device == "cpu":
        return found
    try:
        import bitsandbytes as bnb

        states = [bnb.functional.quantize_blockwise(w, blocksize=4096) for w in dense]
        found["published way (bitsandbytes)"] = [
            lambda x, q=q, s=s: F.linear(x, bnb.functional.dequantize_blockwise(q, s).to(x.dtype))
            for q, s in states
        ]
        layers = []
        for weight in dense:
            layer = bnb.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False, threshold=0.0)
            layer.weight = bnb.nn.Int8Params(weight.half().cpu(), requires_grad=False, has_fp16_weights=False)
            layers.append(layer.to(device))
        found["LLM.int8"] = [lambda x, layer=layer: layer(x.half()) for layer in layers]
    except ImportError:
        pass
    # Whatever another package raises while it is set up: its column is missing, the others are measured.
    except Exception as failure:
        print(f"bitsandbytes: {failure}")
    return found


def one(name, rows, columns, tokens, contestants, dtype, device, bandwidth):
    x = torch.randn(tokens, columns, device=device).to(dtype)
    row = {"matrix": name, "shape": f"{rows}x{columns}", "tokens": tokens}
    with torch.no_grad():
        for contestant, calls in contestants.items():
            # Small enough to stay within the part's time at 2048 tokens.
            some = calls[: max(2, len(calls) // max(1, tokens // 64))]
            row[contestant] = ""
            try:
                row[contestant] = measure(
                    [lambda call=call: call(x) for call in some], device, milliseconds=8
                )
            # Not for this many tokens, not in this version, not capturable: the cell stays empty.
            except Exception as failure:
                if not isinstance(failure, NotImplementedError):
                    print(f"{name} {tokens} {contestant}: {type(failure).__name__}: {str(failure)[:200]}")
                if device != "cpu":
                    torch.cuda.synchronize()
    if row["cuBLAS"] and row["octavo"]:
        row["speed-up"] = row["cuBLAS"] / row["octavo"]
        if tokens == 1:
            read = rows * columns + 2 * rows * -(-columns // BLOCK)
            row["of copy"] = read / (row["octavo"] * 1e-6) / bandwidth
    return row


def panel_sizes(report: Report, dtype, device, tiny) -> None:
    """Which workspace is best for many tokens: microseconds for each size, and for `linear_transposed`."""
    rows, columns = (64, 128) if tiny else (16384, 4096)
    packed = [matrix(rows, columns, BLOCK, device) for _ in range(2)]
    for tokens in (64,) if tiny else (512, 2048):
        x = torch.randn(tokens, columns, device=device).to(dtype)
        back = torch.randn(tokens, rows, device=device).to(dtype)
        for size in PANEL_MEGABYTES[: 1 if tiny else None]:
            if report.late(3):
                return
            arguments = (x, back, torch.empty_like(back), torch.empty_like(x), size << 20)
            forward = [functools.partial(_panels, m, *arguments) for m in packed]
            backward = [functools.partial(_panels_transposed, m, *arguments) for m in packed]
            row = {"matrix": f"panels of {size} MiB", "shape": f"{rows}x{columns}", "tokens": tokens}
            row["panels"] = measure(forward, device, milliseconds=8)
            row["transposed"] = measure(backward, device, milliseconds=8)
            report.add(**row)


def _panels(packed, x, back, out, out_back, size) -> None:
    panels.linear(x, *packed, BLOCK, None, out, size)


def _panels_transposed(packed, x, back, out, out_back, size) -> None:
    panels.linear_transposed(back, *packed, BLOCK, out_back, size)


def summary(report: Report) -> None:
    """The issue's targets, as far as this part can tell."""
    compared = [row for row in report.rows if row.get("speed-up")]
    one_token = [row for row in compared if row["tokens"] == 1]
    large = [row for row in one_token if eval_size(row["shape"]) >= 4096 * 16384]
    if large:
        report.fact(one_token_speed_up=min(r["speed-up"] for r in large), target_one_token_speed_up=1.7)
        report.fact(one_token_of_copy=min(r["of copy"] for r in large), target_one_token_of_copy=0.8)
    if compared:
        worst = min(compared, key=lambda row: row["speed-up"])
        report.fact(
            slowest=f"{worst['speed-up']:.2f}x: {worst['matrix']}, {worst['tokens']} tokens",
            target_slowest=0.95,
        )


def eval_size(shape: str) -> int:
    rows, columns = shape.split("x")
    return int(rows) * int(columns)
