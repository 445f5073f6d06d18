"""Part "lookup": what each way of looking a code up, or of computing it, gives, and the settings of Triton's kernels.

One token times the largest matrix of GPT-J's layers, and the same matrix de-quantized. Every row says which share of the
measured copy bandwidth the reading of the matrix reaches. From these tables come the constants of the records in
`octavo/ops/gpu/kernels`; tilings are the part "settings".
"""

import torch
import torch.nn.functional as F

from octavo.ops.gpu.device import capability, have_triton
from octavo.ops.gpu.kernels import cuda_decode, cuda_mma, cuda_simt

from .gpu_common import Report, copies_for, copy_bandwidth, matrix, measure

COPIES = (1, 2, 4, 8, 16, 32)


def lookups():
    """name → options of the CUDA kernels' launchers."""
    ways: dict[str, dict] = {f"shared memory, {n} copies": {"extra": (("COPIES", n),)} for n in COPIES}
    return {**ways, "segments, computed": {"segments": True}}


def run(report: Report, device: str, tiny: bool) -> None:
    rows, columns = (64, 1024) if tiny else (16384, 4096)
    dtype, block = torch.bfloat16, 64
    if device != "cpu" and capability(0) < (8, 0):
        dtype = torch.float16
    bandwidth = copy_bandwidth(device)
    report.fact(copy_bandwidth_gb_s=bandwidth / 1e9, rows=rows, columns=columns, block=block)
    matrices = [matrix(rows, columns, block, device) for _ in range(copies_for(rows * columns, device))]
    read = matrices[0][0].numel() + 2 * matrices[0][1].numel()
    weights = [torch.randn(rows, columns, device=device).to(dtype) for _ in range(max(1, len(matrices) // 2))]

    def timed(what, kernel, setting, tokens, call, moved=read) -> None:
        """`call(matrix, x, out)` over all the matrices."""
        if report.late(2):
            report.fact(cut_short=True)
            return
        x = torch.randn(tokens, columns, device=device).to(dtype)
        out = torch.empty(tokens, rows, dtype=dtype, device=device)
        row = {"what": what, "kernel": kernel, "setting": setting, "tokens": tokens}
        try:
            time = measure([lambda m=m: call(m, x, out) for m in matrices], device)
            row |= {"µs": time, "GB/s": moved / time / 1e3, "of copy": moved / time * 1e6 / bandwidth}
        # A setting that does not compile or fit is a result too.
        except Exception as failure:
            row["setting"] += f" ({type(failure).__name__}: {str(failure)[:80]})"
        report.add(**row)

    x = torch.randn(1, columns, device=device).to(dtype)
    time = measure([lambda w=w: F.linear(x, w) for w in weights], device)
    moved = 2 * rows * columns
    row = {"what": "baseline", "kernel": "cuBLAS 16-bit", "setting": "", "tokens": 1}
    report.add(**row, **{"µs": time, "GB/s": moved / time / 1e3, "of copy": moved / time * 1e6 / bandwidth})
    del weights
    if device != "cpu" and not torch.version.hip:
        cuda_sweeps(timed, rows, columns, block, dtype, device, read)
    triton_sweeps(timed, block)


def cuda_sweeps(timed, rows, columns, block, dtype, device, read) -> None:
    dense = torch.empty(rows, columns, dtype=dtype, device=device)
    products = {"cuda_simt": cuda_simt.linear}
    if capability(0) >= cuda_mma.CAPABILITY:
        products["cuda_mma"] = cuda_mma.linear
    for name, options in lookups().items():
        for kernel, product in products.items():
            timed(
                "look-up",
                kernel,
                name,
                1,
                lambda m, x, out, p=product, o=options: p(x, *m, block, None, out, **o),
            )
        timed(
            "look-up",
            "cuda_decode",
            name,
            1,
            lambda m, x, out, o=options: cuda_decode.decode(*m, block, None, 0, dense, **o),
            moved=read + 2 * rows * columns,
        )
    for depth in (1, 2, 4, 8):
        timed(
            "settings",
            "cuda_decode",
            f"depth {depth}",
            1,
            lambda m, x, out, d=depth: cuda_decode.decode(*m, block, None, 0, dense, depth=d),
            moved=read + 2 * rows * columns,
        )


def triton_sweeps(timed, block) -> None:
    if not have_triton():
        return
    from octavo.ops.gpu.kernels.triton_gemm import gemm
    from octavo.ops.gpu.kernels.triton_gemv import gemv

    for how in ("load", "gather", "segments"):
        way = {"gather": how == "gather", "segments": how == "segments"}
        for block_n, block_k, warps in ((4, 512, 4), (8, 512, 4), (16, 256, 4), (8, 1024, 8)):
            timed(
                "settings",
                "triton_gemv",
                f"{how}, tile {block_n}x{block_k}, {warps} warps",
                1,
                lambda m, x, out, y=way, n=block_n, k=block_k, w=warps: gemv(
                    x, *m, block, None, out, **y, block_n=n, block_k=k, num_warps=w
                ),
            )
        for tile in (
            (16, 64, 128, 4, 3),
            (32, 64, 128, 4, 3),
            (64, 64, 64, 4, 3),
            (64, 64, 128, 4, 3),
            (128, 128, 64, 8, 3),
            (128, 64, 64, 4, 3),
        ):
            timed(
                "settings",
                "triton_gemm",
                f"{how}, tile {'x'.join(map(str, tile[:3]))}, {tile[3]} warps",
                min(tile[0], 128),
                lambda m, x, out, y=way, t=tile: gemm(x, *m, block, None, out, **y, tile=t),
            )
