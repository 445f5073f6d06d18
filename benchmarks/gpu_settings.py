"""Part "settings": the tilings of the CUDA kernels and the size of panels, on three shapes. The constants of `cuda_mma.py`,
`cuda_simt.py` and `panels.py` come from these tables.

Every CUDA instance is compiled beforehand, on all cores. A row is a setting, a column a shape: microseconds a call in 16 bits,
on matrices that together do not fit the cache.
"""

import functools
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F

from octavo.ops.gpu.device import capability
from octavo.ops.gpu.kernels import cuda_mma, cuda_simt, panels

from .gpu_common import Report, copies_for, matrix, measure

BLOCK = 64
PRODUCTS = {"linear_simt": cuda_simt, "linear_mma": cuda_mma}
SHAPES = [(4096, 4096), (16384, 4096), (4096, 16384)]
# 16-row tiles a warp, groups of warps, depth.
FEW = [(1, 1, 1), (1, 1, 2), (1, 2, 1), (2, 1, 1), (2, 1, 2), (2, 2, 1), (4, 1, 1)]
MORE = [(1, 2, 1), (2, 1, 1), (2, 2, 1), (2, 2, 2), (2, 4, 1), (2, 4, 2), (4, 1, 1), (4, 2, 1)]
TILINGS = {1: FEW, 8: FEW, 16: MORE, 32: MORE, 64: MORE}
RESIDENT = {1: (None, 4, 5), 8: (None, 4, 5), 16: (None, 3), 32: (None, 2), 64: (None, 2)}
SIMT = [(rows, depth) for rows in (1, 2, 4, 8) for depth in (1, 2, 4)]
PANEL_MEGABYTES = (8, 16, 32, 64, 128, 256)
PANEL_TOKENS = (128, 512, 2048)


def run(report: Report, device: str, tiny: bool) -> None:
    shapes = [(64, 128)] if tiny else SHAPES
    dtype = torch.bfloat16 if device == "cpu" or capability(0) >= (8, 0) else torch.float16
    report.fact(block=BLOCK, type=str(dtype))
    cuda = device != "cpu" and not torch.version.hip
    settings = list(fused(device)) if cuda else []
    if cuda:
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda setting: compiled(setting, dtype), settings))
    data = {}
    for rows, columns in shapes:
        copies = copies_for(rows * columns, device)
        data[rows, columns] = (
            [matrix(rows, columns, BLOCK, device) for _ in range(copies)],
            [
                torch.randn(rows, columns, device=device).to(dtype)
                for _ in range(1 if tiny else max(2, copies // 2))
            ],
        )
    for tokens in (1, 2, 8, 16, 32, 64, *PANEL_TOKENS) if not tiny else (1,):
        row: dict[str, object] = {"kernel": "cuBLAS 16-bit", "setting": "", "tokens": tokens}
        for shape, (_, dense) in data.items():
            x = torch.randn(tokens, shape[1], device=device).to(dtype)
            row[name_of(shape)] = measure([lambda w=w, x=x: F.linear(x, w) for w in dense], device)
        report.add(**row)
    for kernel, tokens, options in settings:
        if report.late(2):
            report.fact(cut_short=True)
            return
        row = {"kernel": kernel, "setting": described(options), "tokens": tokens}
        for shape, (packed, _) in data.items():
            x = torch.randn(tokens, shape[1], device=device).to(dtype)
            out = torch.empty(tokens, shape[0], dtype=dtype, device=device)
            product = functools.partial(PRODUCTS[kernel].linear, **options)
            try:
                row[name_of(shape)] = measure(
                    [lambda m=m, x=x, o=out, p=product: p(x, *m, BLOCK, None, o) for m in packed],
                    device,
                    milliseconds=6,
                )
            # A setting that does not compile or fit is a result too.
            except Exception as failure:
                row[name_of(shape)] = f"{type(failure).__name__}: {str(failure)[:60]}"
        report.add(**row)
    panel_sizes(report, data, dtype, device, tiny)


def fused(device: str):
    """(kernel, tokens, options) to try."""
    for tokens in (1, 2):
        for rows, depth in SIMT:
            yield "linear_simt", tokens, {"tiling": (rows, depth), "extra": ()}
    if capability(0) < cuda_mma.CAPABILITY:
        return
    for tokens, tilings in TILINGS.items():
        for tiling in tilings:
            for resident in RESIDENT[tokens]:
                extra = () if resident is None else (("RESIDENT", resident),)
                yield "linear_mma", tokens, {"tiling": tiling, "extra": extra}


def described(options: dict) -> str:
    if len(options["tiling"]) == 2:
        return "{} rows a warp, depth {}".format(*options["tiling"])
    tiles, groups, depth = options["tiling"]
    resident = "".join(f", {value} resident" for _, value in options["extra"])
    return f"{16 * tiles} rows a warp, {groups} groups, depth {depth}{resident}"


def compiled(setting, dtype) -> None:
    """Compile a setting, if it compiles."""
    kernel, tokens, options = setting
    try:
        PRODUCTS[kernel].compiled(tokens, 4096, 0, dtype, torch.float16, options["tiling"], options["extra"])
    # It is tried, and reported, again.
    except Exception as failure:
        print(f"{setting}: {failure}")


def name_of(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def panel_sizes(report: Report, data, dtype, device: str, tiny: bool) -> None:
    """Products through panels of each size, forwards and backwards."""
    for tokens in (32,) if tiny else PANEL_TOKENS:
        for size in PANEL_MEGABYTES[: 1 if tiny else None]:
            for product in (panels.linear, panels.linear_transposed):
                if report.late(2):
                    report.fact(cut_short=True)
                    return
                row: dict[str, object] = {"kernel": f"panels.{product.__name__}"}
                row |= {"setting": f"{size} MiB", "tokens": tokens}
                for shape, (packed, _) in data.items():
                    forward = product is panels.linear
                    wide, narrow = (shape[1], shape[0]) if forward else shape
                    x = torch.randn(tokens, wide, device=device).to(dtype)
                    out = torch.empty(tokens, narrow, dtype=dtype, device=device)
                    bias = (None,) if forward else ()
                    call = functools.partial(product, x)
                    some = packed[: max(2, 2048 // tokens)]
                    row[name_of(shape)] = measure(
                        [
                            lambda m=m, c=call, b=bias, o=out, s=size: c(*m, BLOCK, *b, o, s << 20)
                            for m in some
                        ],
                        device,
                        milliseconds=6,
                    )
                report.add(**row)
