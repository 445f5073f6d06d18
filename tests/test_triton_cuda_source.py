"""The CUDA source, on the CPU: its kernels run thread by thread under tests/gpu/cuda_on_host.h, and it
compiles for GPUs.

What a GPU alone can show (speed, races inside a warp) is left to tests/gpu.
"""

import ctypes
import mmap
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from octavo import codebook
from octavo.ops import reference
from octavo.ops.gpu import cuda_launch
from octavo.ops.gpu.kernels import cuda_decode, cuda_mma, cuda_simt, cuda_wgmma

HERE = Path(__file__).parent
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

PRODUCT = "((const scalar*)p[0], (const u8*)p[1], (const scale_type*)p[2], (const float*)p[3],"
PRODUCT += " (const scalar*)p[4], (scalar*)p[5], n[0], n[1], n[2], n[3], n[4])"
DECODE = "((const u8*)p[0], (const scale_type*)p[1], (const float*)p[2], p[3], (scalar*)p[4],"
DECODE += " n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7])"
CALLS = {"linear_simt": PRODUCT, "linear_mma": PRODUCT, "decode_rows": DECODE}
CALLS["permute_x"] = "((const scalar*)p[0], (scalar*)p[1], n[0], n[1], n[2], n[3])"
CALLS["add_parts"] = "((const float*)p[0], (const scalar*)p[1], (scalar*)p[2], n[0], n[1], n[2])"


def source(kernel: str) -> str:
    wgmma = kernel in ("permute_x", "add_parts", "linear_wgmma")
    return cuda_launch.source(*(cuda_wgmma.SOURCE if wgmma else (*cuda_launch.COMMON, kernel)))


needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Compile one variant of a kernel for the CPU and return its launcher: run(grid, tensors, integers)."""
    folder = tmp_path_factory.mktemp("cuda_on_host")

    def make(kernel, **parameters):
        name = "_".join([kernel, *(f"{k}{v}" for k, v in parameters.items())])
        library = folder / f"{name}.so"
        if not library.exists():
            main = folder / f"{name}.cpp"
            main.write_text(
                f'#include "{HERE}/gpu/cuda_on_host.h"\n{source(kernel)}\n'
                'extern "C" void run(int grid, void** p, int* n) {\n'
                f"    launch(grid, [&] {{ {kernel}{CALLS[kernel]}; }});\n}}\n"
            )
            flags = [f"-D{k}={v}" for k, v in parameters.items()]
            subprocess.run(
                ["g++", "-std=c++17", "-O1", "-w", "-ffp-contract=off", "-shared", "-fPIC", *flags]
                + [str(main), "-o", str(library)],
                check=True,
            )
        function = ctypes.CDLL(str(library)).run

        def run(grid, tensors, integers):
            pointers = (ctypes.c_void_p * len(tensors))(*(0 if t is None else t.data_ptr() for t in tensors))
            function(grid, pointers, (ctypes.c_int * len(integers))(*integers))

        return run

    return make


def segments(seed=0):
    """Sixteen lines of random slopes within [-1, 1], on the finest grid; neighbours may be far apart."""
    generator = torch.Generator().manual_seed(seed)
    slopes = torch.randint(0, 100, (16, 1), generator=generator)
    gaps = torch.randint(0, 30, (16, 1), generator=generator)
    starts = (15 * slopes + gaps).cumsum(0) - 15 * slopes - 12000
    return ((starts + slopes * torch.arange(16)).reshape(256) / 16384).float()


def steep():
    """Lines as long as a codebook's whole range: -1 to 1 in fifteen steps, all else flat."""
    code = torch.full((16, 16), -1.0)
    code[7] = torch.arange(16) * (2184 / 16384) - 1
    code[8:] = code[7, 15]
    return code.reshape(256)


def packed(rows, columns, block, scales, code=None):
    code = codebook.dynamic() if code is None else code
    return reference.quantize(torch.randn(rows, columns), code, block, scales)


def aligned(tensor):
    """A copy as near before a page that nobody may touch as 16-byte alignment allows: reading beyond it is fatal."""
    size = tensor.numel() * tensor.element_size()
    page = mmap.PAGESIZE
    whole = mmap.mmap(-1, -(-size // page) * page + page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(whole))
    libc = ctypes.CDLL(None, use_errno=True)
    guard = ctypes.c_void_p(base + len(whole) - page)
    assert libc.mprotect(guard, ctypes.c_size_t(page), ctypes.c_int(0)) == 0
    start = (len(whole) - page - size) // 16 * 16
    flat = torch.frombuffer(whole, dtype=torch.uint8, offset=start, count=max(size, 1))
    # The protection goes when the tensor does, and the memory with it.
    return flat[:size].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def check_linear(run, grid, dtype, tokens, rows, columns, block, scales, bias, code=None):
    code = codebook.dynamic() if code is None else code
    qdata, absmax = packed(rows, columns, block, scales, code)
    x = torch.randn(tokens, columns).to(dtype)
    bias = torch.randn(rows).to(dtype) if bias else None
    out = torch.full((tokens, rows), float("nan"), dtype=dtype)
    x, qdata, absmax, out = aligned(x), aligned(qdata), aligned(absmax), aligned(out)
    bias = None if bias is None else aligned(bias)
    run(
        grid,
        [x, qdata, absmax, code, bias, out],
        [tokens, rows, columns, block.bit_length() - 1, absmax.shape[1]],
    )
    weight = reference.dequantize(qdata, absmax, code, block, torch.float32).double()
    exact = torch.nn.functional.linear(x.double(), weight, None if bias is None else bias.double())
    naive = torch.nn.functional.linear(x, weight.to(dtype), bias)
    limit = 1e-5 if dtype == torch.float32 else 1.05 * error(naive, exact) + 1e-6
    assert error(out, exact) <= limit
    return x, qdata, absmax, bias, out


def error(found, exact):
    assert torch.isfinite(found).all()
    return ((found.double() - exact).norm() / exact.norm()).item()


@needs_gxx
@pytest.mark.parametrize(
    "dtype, scales, tokens, rows, columns, block, grid, bias",
    [
        # A partial tile, a partial step, several tiles per warp.
        (torch.float32, torch.float32, 1, 45, 1040, 64, 1, True),
        (torch.float16, torch.float16, 1, 37, 512, 32, 3, False),
        (torch.bfloat16, torch.float16, 1, 64, 2064, 4096, 2, True),  # one block a row, longer than the row
    ],
)
def test_simt_one_token(build, dtype, scales, tokens, rows, columns, block, grid, bias):
    run = build(
        "linear_simt", X_TYPE=TYPES[dtype], SCALE=int(scales == torch.float16), TOKENS=1, ROWS=4, DEPTH=2
    )
    check_linear(run, grid, dtype, tokens, rows, columns, block, scales, bias)


@needs_gxx
def test_simt_several_tokens(build):
    run = build("linear_simt", X_TYPE=1, SCALE=1, TOKENS=4, ROWS=2, DEPTH=1)
    for tokens in (3, 4):
        check_linear(run, 2, torch.float16, tokens, 35, 528, 64, torch.float16, True)


@needs_gxx
@pytest.mark.parametrize(
    "dtype, scales, tokens, rows, columns, block, tiles, groups, grid, bias",
    [
        (torch.bfloat16, torch.float16, 1, 50, 1040, 64, (1, 1), 1, 2, True),  # 16 columns in the last step
        (torch.bfloat16, torch.float16, 7, 16, 256, 32, (1, 1), 1, 1, False),  # fewer columns than a step
        (torch.float16, torch.float32, 8, 90, 2560, 128, (2, 1), 1, 2, True),
        (torch.float16, torch.float16, 13, 40, 1024, 64, (1, 2), 2, 1, False),
        (torch.bfloat16, torch.float32, 32, 70, 1536, 4096, (1, 4), 4, 5, True),  # more blocks than tiles
        (torch.float16, torch.float16, 61, 150, 528, 64, (2, 8), 4, 2, True),  # sums exchanged in four turns
    ],
)
def test_mma(build, dtype, scales, tokens, rows, columns, block, tiles, groups, grid, bias):
    half = int(scales == torch.float16)
    sizes = {"M_TILES": tiles[0], "N_TILES": tiles[1], "WARPS_M": groups, "DEPTH": 2}
    run = build("linear_mma", X_TYPE=TYPES[dtype], SCALE=half, **sizes)
    check_linear(run, grid, dtype, tokens, rows, columns, block, scales, bias)


@needs_gxx
@pytest.mark.parametrize("computed", [False, True])
def test_mma_in_half_steps(build, computed):
    """Two instructions of eight columns for one of sixteen, as GPUs before 8.0 have them."""
    sizes = {"X_TYPE": 1, "SCALE": 1, "M_TILES": 2, "N_TILES": 2, "WARPS_M": 2, "DEPTH": 1}
    run = build("linear_mma", **sizes, SEGMENTS=int(computed), HALF_STEPS=1)
    code = segments() if computed else None
    check_linear(run, 2, torch.float16, 13, 90, 1040, 64, torch.float16, True, code)


@needs_gxx
@pytest.mark.parametrize("copies", [1, 8, 32])
def test_mma_is_the_same_with_any_number_of_copies_and_blocks(build, copies):
    """The layout of the table and the size of the launch change no bit of the result."""
    torch.manual_seed(5)
    qdata, absmax = packed(48, 512, 64, torch.float16)
    x, qdata, code = aligned(torch.randn(2, 512).to(torch.bfloat16)), aligned(qdata), codebook.dynamic()
    results = []
    for c, grid in ((32, 1), (copies, 2)):
        out = torch.empty(2, 48, dtype=torch.bfloat16)
        run = build("linear_mma", X_TYPE=2, SCALE=1, M_TILES=1, N_TILES=1, DEPTH=2, COPIES=c)
        run(grid, [x, qdata, absmax, code, None, out], [2, 48, 512, 6, 8])
        results.append(out)
    assert torch.equal(*results)


@needs_gxx
@pytest.mark.parametrize("dtype", list(TYPES))
def test_decode_is_the_reference_bit_for_bit(build, dtype):
    run = build("decode_rows", X_TYPE=TYPES[dtype], SCALE=1, DEPTH=2)
    rows, columns, block, code = 19, 1040, 64, codebook.dynamic()
    qdata, absmax = packed(rows, columns, block, torch.float16)
    qdata = aligned(qdata)
    expected = reference.dequantize(qdata, absmax, code, block, dtype)

    def decode(ids, first_column, width):
        count = rows if ids is None else len(ids)
        out = aligned(torch.full((count, width), float("nan"), dtype=dtype))
        wide = int(ids is not None and ids.dtype == torch.int64)
        integers = [wide, count, rows, columns, first_column, width, block.bit_length() - 1, absmax.shape[1]]
        run(2, [qdata, absmax, code, ids, out], integers)
        return out

    assert torch.equal(decode(None, 0, columns), expected)
    assert torch.equal(decode(None, 192, 512), expected[:, 192:704])
    for kind in (torch.int32, torch.int64):
        ids = torch.tensor([3, 18, 0, 3], dtype=kind)
        assert torch.equal(decode(ids, 0, columns), expected[ids.long()])
    assert torch.isnan(decode(torch.tensor([rows, -1]), 0, columns)).all()


@needs_gxx
@pytest.mark.parametrize("scales", [torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", list(TYPES))
def test_decoding_segments_is_the_reference_bit_for_bit(build, dtype, scales):
    """Every index, computed from lines: on the finest grid, on one that fits bytes, as steep as can be; scales of every size."""
    half = int(scales == torch.float16)
    run = build("decode_rows", X_TYPE=TYPES[dtype], SCALE=half, DEPTH=2, SEGMENTS=1)
    fitted = codebook.fit(torch.randn(64, 512), 64)
    for code in (segments(), steep(), fitted, torch.linspace(-128, 127, 256) / 128):
        assert codebook.segments(code) is not None
        qdata = torch.stack([torch.randperm(256) for _ in range(19 * 4)]).view(19, 1024).to(torch.uint8)
        absmax = torch.exp2(torch.empty(19, 16).uniform_(-24, 15)).to(scales)
        absmax[3, 2] = 0.0
        expected = reference.dequantize(qdata, absmax, code, 64, dtype)
        out = aligned(torch.full((19, 1024), float("nan"), dtype=dtype))
        run(2, [aligned(qdata), absmax, code, None, out], [0, 19, 19, 1024, 0, 1024, 6, 16])
        assert torch.equal(out, expected)
        ids = torch.tensor([3, 18, -1, 0])
        rows = aligned(torch.empty(4, 1024, dtype=dtype))
        run(1, [aligned(qdata), absmax, code, ids, rows], [1, 4, 19, 1024, 0, 1024, 6, 16])
        assert torch.equal(rows[[0, 1, 3]], expected[[3, 18, 0]]) and torch.isnan(rows[2]).all()


@needs_gxx
@pytest.mark.parametrize(
    "kernel, dtype, scales, tokens, rows, columns, block, grid, bias, sizes",
    [
        ("linear_simt", 0, torch.float32, 1, 45, 1040, 64, 1, True, {"TOKENS": 1, "ROWS": 4, "DEPTH": 2}),
        ("linear_simt", 1, torch.float16, 1, 37, 512, 32, 3, False, {"TOKENS": 1, "ROWS": 2, "DEPTH": 4}),
        ("linear_simt", 2, torch.float16, 3, 64, 2064, 4096, 2, True, {"TOKENS": 4, "ROWS": 2, "DEPTH": 1}),
        ("linear_mma", 2, torch.float16, 1, 50, 1040, 64, 2, True, {"M_TILES": 1, "N_TILES": 1}),
        ("linear_mma", 1, torch.float32, 8, 90, 2560, 128, 2, False, {"M_TILES": 2, "N_TILES": 1}),
        (
            "linear_mma",
            1,
            torch.float16,
            29,
            70,
            528,
            16,
            2,
            True,
            {"M_TILES": 1, "N_TILES": 4, "WARPS_M": 4},
        ),
    ],
)
def test_products_with_segments(
    build, kernel, dtype, scales, tokens, rows, columns, block, grid, bias, sizes
):
    """Right, and bit for bit what the kernel for tables gives: a weight is the same number either way."""
    sizes = {"X_TYPE": dtype, "SCALE": int(scales == torch.float16), "DEPTH": 2, **sizes}
    for code in (segments(7), codebook.fit(torch.randn(64, 512), 64)):
        x, qdata, absmax, bias_, out = check_linear(
            build(kernel, **sizes, SEGMENTS=1), grid, list(TYPES)[dtype], tokens, rows, columns, block, scales,
            bias, code,
        )  # fmt: skip
        table = torch.full_like(out, float("nan"))
        integers = [tokens, rows, columns, block.bit_length() - 1, absmax.shape[1]]
        build(kernel, **sizes)(grid, [x, qdata, absmax, code, bias_, table], integers)
        assert torch.equal(out, table)


WGMMA = {"X_TYPE": 2, "SCALE": 1, "TOKENS": 64, "DEPTH": 2, "STAGES": 4, "GROUPS": 1}


@needs_gxx
def test_the_input_is_put_into_the_order_of_the_decoded_columns(build):
    tokens, columns, padded, steps = 5, 208, 64, 4
    x = aligned(torch.randn(tokens, columns).to(torch.bfloat16))
    out = aligned(torch.full((padded, steps * 64), float("nan"), dtype=torch.bfloat16))
    build("permute_x", **WGMMA)(padded * steps // 8, [x, out], [tokens, columns, padded, steps])
    # Lane t of a quad holds columns 16 t ... of 64, word j of its four feeds instruction j, whose operand has in lane t the
    # columns 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 (PTX, wgmma with its first operand in registers).
    order = [0] * 64
    for j in range(4):
        for t in range(4):
            for byte, k in enumerate((2 * t, 2 * t + 1, 2 * t + 8, 2 * t + 9)):
                order[16 * j + k] = 16 * t + 4 * j + byte
    assert sorted(order) == list(range(64))
    wanted = torch.zeros(padded, steps, 64, dtype=torch.bfloat16)
    wanted.view(padded, -1)[:tokens, :columns] = x
    assert torch.equal(out, wanted[:, :, order].reshape(padded, -1))


@needs_gxx
@pytest.mark.parametrize("with_bias", [False, True])
def test_parts_are_added_in_order_and_rounded_once(build, with_bias):
    splits, tokens, rows = 3, 7, 130
    parts = torch.randn(splits, tokens, rows)
    bias = torch.randn(rows).to(torch.bfloat16) if with_bias else None
    out = aligned(torch.full((tokens, rows), float("nan"), dtype=torch.bfloat16))
    build("add_parts", **WGMMA)(2, [aligned(parts), bias, out], [splits, tokens, rows])
    total = (parts[0] + parts[1]) + parts[2]
    assert torch.equal(out, (total if bias is None else total + bias.float()).to(torch.bfloat16))


class OnHost:
    """Stands for a kernel on a GPU: takes a launch's arguments and runs the same source on the CPU."""

    resident_blocks = 1

    def __init__(self, run):
        self.run = run

    def launch(self, grid, threads, *arguments):
        assert threads == 256
        count = next(i for i, value in enumerate(arguments) if isinstance(value, int))
        assert all(isinstance(value, int) for value in arguments[count:])
        self.run(grid, arguments[:count], arguments[count:])


@pytest.fixture
def launchers(build, monkeypatch):
    """The CUDA kernels by name, running on the CPU, for a GPU of two multiprocessors."""
    made = {}

    def instance(name, device, parameters):
        if (name, parameters) not in made:
            made[name, parameters] = OnHost(build(name, **dict(parameters)))
        return made[name, parameters]

    monkeypatch.setattr(cuda_launch, "instance", instance)
    for module in (cuda_launch, cuda_mma, cuda_simt):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 2)
    forget()
    yield {"linear_simt": cuda_simt.linear, "linear_mma": cuda_mma.linear, "decode_rows": cuda_decode.decode}
    forget()


def forget() -> None:
    """What the launchers remember of kernels."""
    for remembering in (cuda_simt.compiled, cuda_mma.compiled, cuda_decode.compiled, cuda_launch.prepared):
        remembering.cache_clear()


@needs_gxx
@pytest.mark.parametrize("computed", [False, True])
@pytest.mark.parametrize(
    "name, dtype, tokens",
    [
        ("linear_simt", torch.float32, 3),
        ("linear_mma", torch.float16, 12),
        ("linear_mma", torch.bfloat16, 40),
        ("linear_mma", torch.float16, 70),
    ],
)
def test_launch_of_a_product(launchers, name, dtype, tokens, computed):
    code, rows, columns = segments() if computed else codebook.dynamic(), 130, 528
    qdata, absmax = packed(rows, columns, 64, torch.float16, code)
    qdata, bias = aligned(qdata), torch.randn(rows).to(dtype)
    # Not aligned: the launcher has to copy it.
    x = aligned(torch.zeros(tokens * columns + 1)).to(dtype)[1:].normal_().view(tokens, columns)
    out = torch.full((tokens, rows), float("nan"), dtype=dtype)
    launchers[name](x, qdata, absmax, code, 64, bias, out, segments=computed)
    exact = torch.nn.functional.linear(
        x.double(), reference.dequantize(qdata, absmax, code, 64, torch.float32).double(), bias.double()
    )
    assert error(out, exact) <= {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]


@needs_gxx
@pytest.mark.parametrize("computed", [False, True])
def test_launch_of_decoding(launchers, computed):
    code = segments() if computed else codebook.dynamic()
    qdata, absmax = packed(20, 528, 64, torch.float32, code)
    qdata = aligned(qdata)
    expected = reference.dequantize(qdata, absmax, code, 64, torch.float16)
    for ids in (None, torch.tensor([4, 19, 4]), torch.tensor([0, 7], dtype=torch.int32)):
        wanted = expected if ids is None else expected[ids.long()]
        for first, width in ((0, 528), (256, 272)):
            out = aligned(torch.full((len(wanted), width), float("nan"), dtype=torch.float16))
            launchers["decode_rows"](qdata, absmax, code, 64, ids, first, out, segments=computed)
            assert torch.equal(out, wanted[:, first : first + width])


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize(
    "architecture",
    ["sm_90", pytest.param("sm_80", marks=pytest.mark.slow), pytest.param("sm_75", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(
    "kernel, flags",
    [
        ("linear_simt", "-DX_TYPE=1 -DSCALE=1 -DTOKENS=1 -DROWS=4 -DDEPTH=2"),
        ("linear_simt", "-DX_TYPE=0 -DSCALE=0 -DTOKENS=8 -DROWS=2 -DDEPTH=2"),
        ("linear_mma", "-DX_TYPE=2 -DSCALE=1 -DM_TILES=1 -DN_TILES=1 -DDEPTH=2"),
        ("linear_mma", "-DX_TYPE=1 -DSCALE=0 -DM_TILES=1 -DN_TILES=4 -DWARPS_M=4 -DDEPTH=2"),
        ("linear_mma", "-DX_TYPE=2 -DSCALE=1 -DM_TILES=2 -DN_TILES=8 -DWARPS_M=4 -DDEPTH=2"),
        ("decode_rows", "-DX_TYPE=2 -DSCALE=1 -DDEPTH=4"),
        ("linear_simt", "-DX_TYPE=1 -DSCALE=1 -DTOKENS=1 -DROWS=4 -DDEPTH=2 -DSEGMENTS=1"),
        ("linear_mma", "-DX_TYPE=1 -DSCALE=1 -DM_TILES=1 -DN_TILES=1 -DDEPTH=2 -DSEGMENTS=1"),
        ("decode_rows", "-DX_TYPE=1 -DSCALE=0 -DDEPTH=4 -DSEGMENTS=1"),
        ("linear_wgmma", "-DX_TYPE=2 -DSCALE=1 -DTOKENS=64 -DDEPTH=1 -DSTAGES=4 -DGROUPS=2 -DWARPS=16"),
        ("linear_wgmma", "-DX_TYPE=1 -DSCALE=0 -DTOKENS=128 -DDEPTH=1 -DSTAGES=4 -DGROUPS=2 -DWARPS=16"),
        ("linear_wgmma", "-DX_TYPE=2 -DSCALE=1 -DTOKENS=256 -DDEPTH=2 -DSTAGES=3 -DGROUPS=1 -DWARPS=8"),
    ],
)
def test_source_compiles_for_gpus(architecture, kernel, flags, tmp_path):
    """Every kernel compiles without warnings and without spilling registers to memory."""
    if kernel == "linear_mma" and architecture == "sm_75" and "-DX_TYPE=1" not in flags:
        pytest.skip("bfloat16 on tensor cores is for sm_80 and later")
    if kernel == "linear_wgmma":
        if architecture != "sm_90":
            pytest.skip("linear_wgmma is for Hopper")
        architecture = "sm_90a"
    file = tmp_path / "kernel.cu"
    file.write_text(source(kernel))
    command = f"nvcc -std=c++17 -cubin -arch={architecture} -Xptxas -v {flags}"
    result = subprocess.run(
        [*command.split(), "-o", str(tmp_path / "x.cubin"), str(file)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in result.stderr, result.stderr
