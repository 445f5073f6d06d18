"""Part "correctness": every operation and every kernel against float64, on fresh random inputs with poisoned outputs.

A row a case: the error, PyTorch's own error on the same input (what it may reach), and whether two runs gave the same
bits. Any case beyond its limit makes the part fail, after the others were run.
"""

import torch
import torch.nn.functional as F

from octavo.ops import gpu, reference
from octavo.ops.gpu import choose, kernels

from .gpu_common import Report, matrix

TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOKENS = (1, 2, 5, 8, 16, 31, 64, 128, 300)
# (rows, columns, block), types, tokens. Every instance is compiled first, so the odd shapes get fewer.
CASES = [
    ((4096, 4096, 64), TYPES, TOKENS),
    # More tiles than an H100 has resident blocks: each block walks over several.
    ((50400, 4096, 64), ["bfloat16"], (1, 8, 64)),
    ((515, 1037, 64), ["float16"], (1, 2, 40, 300)),  # rows that no 16-byte load can read
    ((1000, 11008, 32), ["bfloat16"], (1, 5, 31, 300)),
    ((4100, 2560, 128), ["float16"], (1, 8, 16, 300)),
    ((768, 3072, 4096), ["bfloat16"], (1, 16, 64)),  # one block, longer than the row
]
ENCODED_BLOCKS = (64, 4096)
TINY_CASES = [((32, 128, 64), TYPES, (1, 3, 40)), ((35, 77, 32), ["float16"], (1, 3, 40))]


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    if not torch.isfinite(found).all():
        return float("inf")
    return ((found.double() - exact).norm() / exact.norm()).item()


def run(report: Report, device: str, tiny: bool) -> None:
    bad = []
    for (rows, columns, block), types, counts in TINY_CASES if tiny else CASES:
        qdata, absmax, code = matrix(rows, columns, block, device)
        weight = reference.dequantize(qdata, absmax, code, block, torch.float32)
        for type_name in types:
            dtype = TYPES[type_name]
            rounded = weight.to(dtype)
            for tokens in counts:
                if report.late(5):
                    report.fact(cut_short=True)
                    # A part that ends early has still to say what it found wrong.
                    raise_wrong(bad)
                    return
                x = torch.randn(tokens, columns, device=device).to(dtype)
                bias = torch.randn(rows, device=device).to(dtype)
                exact = F.linear(x.double(), weight.double(), bias.double())
                naive = error(F.linear(x, rounded, bias), exact)
                call = choose.product(dtype, tokens, qdata, absmax, block)
                for name, kernel in kernels.named().items():
                    if kernel.operation != "linear" or kernel.unsupported_reason(call):
                        continue
                    # Never chosen for these.
                    if name == "triton_gemm" and kernel.place(call) is None:
                        continue
                    for options in ({}, {"segments": True}) if kernel.segmented else ({},):
                        outputs = [
                            torch.full((tokens, rows), float("nan"), dtype=dtype, device=device) for _ in "12"
                        ]
                        for out in outputs:
                            kernel.run(x, qdata, absmax, code, block, bias, out, **options)
                        found = error(outputs[0], exact)
                        limit = 1e-5 if dtype == torch.float32 else 1.1 * naive + 1e-6
                        same = torch.equal(*outputs)
                        what = f"{name}, segments" if options else name
                        shape = (rows, columns, block)
                        bad += check(report, what, type_name, shape, tokens, found, naive, limit, same)
                back = torch.randn(tokens, rows, device=device).to(dtype)
                exact = back.double() @ weight.double()
                found = error(gpu.linear_transposed(back, qdata, absmax, code, block), exact)
                naive = error(back @ rounded, exact)
                limit = 1e-5 if dtype == torch.float32 else 1.1 * naive + 1e-6
                bad += check(
                    report, "transposed", type_name, (rows, columns, block), tokens, found, naive, limit, True
                )
            exact_bits = torch.equal(
                gpu.dequantize(qdata, absmax, code, block, dtype),
                reference.dequantize(qdata, absmax, code, block, dtype),
            )
            ids = torch.randint(0, rows, (3, 7), device=device)
            exact_bits &= torch.equal(gpu.embedding(ids, qdata, absmax, code, block, dtype), rounded[ids])
            bad += check(
                report,
                "decode",
                type_name,
                (rows, columns, block),
                21,
                0.0 if exact_bits else 1.0,
                0,
                0,
                True,
            )
        if block in ENCODED_BLOCKS:
            bad += encode(report, weight[: 8 if tiny else 600], code, block, types)
    report.fact(kernels={name: verdict for name, verdict in gpu.verify.verdicts().items() if not verdict[0]})
    report.fact(worst=max((row["error / torch's"] for row in report.rows if row["torch's"]), default=0.0))
    raise_wrong(bad)


def raise_wrong(bad: list[str]) -> None:
    if bad:
        raise AssertionError(f"{len(bad)} cases are wrong: {bad[:10]}")


def check(report, kernel, type_name, shape, tokens, found, naive, limit, same) -> list[str]:
    """Note a case; its name if it is wrong."""
    ok = found <= limit and same
    ratio = found / naive if naive else 0.0
    # Thousands of good cases are summed up by their worst; what is wrong is listed one by one.
    key = {"kernel": kernel, "type": type_name}
    row = next((r for r in report.rows if r["kernel"] == kernel and r["type"] == type_name), None)
    if row is None:
        report.add(**key, cases=0, wrong=0, error=0.0, **{"torch's": 0.0, "error / torch's": 0.0}, where="")
        row = report.rows[-1]
    row["cases"] += 1
    row["wrong"] += not ok
    if ratio >= row["error / torch's"] or not ok:
        row.update({"error": found, "torch's": naive, "error / torch's": ratio})
        row["where"] = f"{shape[0]}x{shape[1]}/{shape[2]} {tokens} tokens" + ("" if same else ", bits differ")
    report.write()
    return [] if ok else [f"{kernel} {type_name} {row['where']}"]


def encode(report: Report, weight: torch.Tensor, code: torch.Tensor, block: int, types) -> list[str]:
    """Quantize and histogram, byte for byte."""
    bad = []
    for type_name in types:
        dtype = TYPES[type_name]
        for scales in (torch.float16, torch.float32):
            w = weight.to(dtype)
            found = (*gpu.quantize(w, code, block, scales), gpu.histogram(w, block, 8193, scales))
            wanted = (
                *reference.quantize(w, code, block, scales),
                reference.histogram(w, block, 8193, scales),
            )
            wrong = sum(not torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
            shape = (*w.shape, block)
            bad += check(report, "encode", type_name, shape, 0, float(wrong), 0, 0, True)
    return bad
