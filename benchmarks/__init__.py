"""Measurements that `octavo bench` is too small for; one module or package a question.

`OCTAVO_CPU_ISA=avx2` (or avx512) holds Octavo's kernels to an older processor's instructions. PyTorch, MKL and oneDNN are held
to the same ones, or the comparison would be with a processor that nobody has. They read that when they are loaded, so it is set
here.
"""

import os

_HELD = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
}

for _name, _value in _HELD.get(os.environ.get("OCTAVO_CPU_ISA", ""), {}).items():
    os.environ.setdefault(_name, _value)
