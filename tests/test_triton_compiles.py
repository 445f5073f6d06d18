"""Every Triton kernel compiles for real GPUs, ahead of time, on a machine without one."""

import os
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter is on, which replaces the compiler", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from octavo.ops.gpu.kernels import triton_decode as decode
from octavo.ops.gpu.kernels import triton_encode as encode
from octavo.ops.gpu.kernels import triton_gemm as gemm
from octavo.ops.gpu.kernels import triton_gemv as gemv

POINTERS = {
    "x_ptr": "*{x}",
    "out_ptr": "*{x}",
    "bias_ptr": "*{x}",
    "weight_ptr": "*{x}",
    "qdata_ptr": "*u8",
    "absmax_ptr": "*fp16",
    "ids_ptr": "*i64",
    "code_ptr": "*fp32",
    "boundaries_ptr": "*fp32",
    "partial_ptr": "*fp32",
    "largest_ptr": "*fp32",
    "median_ptr": "*fp32",
    "bad_ptr": "*i32",
    "counts_ptr": "*i64",
}
FLOATS = ("half_bins", "unit", "cap")


def compiled(kernel, capability, constants, x="fp16", **options):
    """Machine code and the rest for one kernel, its pointers and row length being multiples of 16."""
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = POINTERS.get(name, "fp32" if name in FLOATS else "i32").format(x=x)
        if name in POINTERS or name in ("columns", "split_columns"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def multiply_constants(tile, segments=False):
    block_m, block_n, block_k, _, _ = tile
    return {
        "BLOCK_SIZE": 64,
        "HAS_BIAS": True,
        "GATHER": True,
        "SEGMENTS": segments,
        "EVEN": True,
        "SPLIT_K": 1,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
    }


BLOCKS = {"SIZE": 64, "PADDED": 64, "BLOCKS": 16}


def decoding(segments, gather):
    """The small kernels that decode weights; the gemv's table is gathered or not, the decoder's always is."""
    kind = {"BLOCK_SIZE": 64, "SEGMENTS": segments}
    return [
        SimpleNamespace(
            kernel=gemv.gemv_kernel,
            constants={
                **kind,
                "HAS_BIAS": True,
                "GATHER": gather,
                "EVEN": True,
                "BLOCK_N": 8,
                "BLOCK_K": 512,
            },
        ),
        SimpleNamespace(
            kernel=decode.decode_kernel,
            constants={**kind, "HAS_IDS": True, "GATHER": True, "BLOCK_K": 1024},
        ),
    ]


SMALL = [
    *decoding(segments=False, gather=False),
    *decoding(segments=True, gather=True),
    SimpleNamespace(
        kernel=gemm.add_partial_kernel, constants={"HAS_BIAS": True, "SPLIT_K": 4, "BLOCK": 1024}
    ),
    SimpleNamespace(kernel=encode.scales_kernel, constants={**BLOCKS, "HALF": True}),
    SimpleNamespace(kernel=encode.quantize_kernel, constants=BLOCKS),
    SimpleNamespace(kernel=encode.histogram_kernel, constants={**BLOCKS, "COPIES": 32}),
]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [75, 80, 90])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.kernel.__name__)
def test_kernel(case, capability):
    assert compiled(case.kernel, capability, case.constants).asm["cubin"]


@pytest.mark.slow
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("tokens", list(gemm.TILES))
@pytest.mark.parametrize("capability", [80, 90])
def test_gemm_uses_tensor_cores(tokens, capability, segments):
    tile = gemm.tile_for(tokens)
    result = compiled(
        gemm.gemm_kernel,
        capability,
        multiply_constants(tile, segments),
        x="bf16",
        num_warps=tile[3],
        num_stages=tile[4],
    )
    assert "mma" in result.asm["ptx"]
    # What a block may have on every GPU since compute capability 8.0, 99 KB on the smallest.
    assert result.metadata.shared <= 99 * 1024


@pytest.mark.slow
def test_quantizing_fuses_nothing_and_divides_exactly():
    for kernel, constants in (
        (encode.quantize_kernel, BLOCKS),
        (encode.histogram_kernel, {**BLOCKS, "COPIES": 32}),
    ):
        ptx = compiled(kernel, 90, constants, x="fp32", enable_fp_fusion=False).asm["ptx"]
        assert "div.rn.f32" in ptx
        assert "fma.rn.f32" not in ptx and "div.full.f32" not in ptx
        # Small numbers are not flushed to zero where that could matter (floor's argument is at least 0.5).
        assert not any(f"{operation}.ftz" in ptx for operation in ("mul", "add", "sub", "div.rn"))
