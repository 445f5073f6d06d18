"""Compiles CUDA source at run time and launches it: NVRTC and the CUDA driver, called through ctypes.

PyTorch's CUDA wheels bring NVRTC along, so no compiler and no header is needed. Launches go onto PyTorch's
current stream, which is what makes them part of a CUDA graph that is being captured.

Example:
    >>> from octavo.ops.gpu import nvrtc  # doctest: +SKIP
    >>> kernel = nvrtc.load(source, "linear_simt", ("-DX_TYPE=1", ...), device=0)  # doctest: +SKIP
    >>> kernel.launch(132, 256, x, qdata, absmax, code, None, out, 1, 4096, 4096, 6, 64)  # doctest: +SKIP
"""

import ctypes
import functools
import glob
import os
import struct
import sys
from collections.abc import Callable
from typing import Any

import torch

INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class CompilationFailed(RuntimeError):
    """NVRTC or the driver is missing, or refused the source; the message says which, and the log."""


@functools.cache
def _nvrtc(major: str | None = None) -> ctypes.CDLL:
    """NVRTC of a major version of CUDA, PyTorch's by default: the one PyTorch has loaded or brought along, else the CUDA
    toolkit's."""
    major = major or (torch.version.cuda or "13").split(".")[0]
    names = []
    for folder in sys.path:
        names += sorted(glob.glob(os.path.join(folder, "nvidia", "*", "lib", f"libnvrtc.so.{major}*")))
    names.append(f"libnvrtc.so.{major}")
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home:
            names.append(os.path.join(home, "lib64", f"libnvrtc.so.{major}"))
    if sys.platform == "win32":
        names = [f"nvrtc64_{major}0_0.dll"]
    for name in names:
        try:
            # NVRTC opens its second library by name only, which the loader finds if it is loaded already.
            for builtins in glob.glob(os.path.join(os.path.dirname(name), f"libnvrtc-builtins.so.{major}*")):
                ctypes.CDLL(builtins, ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CompilationFailed(f"NVRTC not found; looked for {', '.join(names)}")


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as missing:
        raise CompilationFailed(f"the CUDA driver's library was not found: {missing}") from missing
    pointer, unsigned = ctypes.c_void_p, ctypes.c_uint
    driver.cuLaunchKernel.argtypes = [pointer, *[unsigned] * 7, pointer, pointer, pointer]
    return driver


class _Packed(ctypes.Structure):
    """cuLaunchKernel's `extra`: the arguments in one buffer, and how many bytes they are."""

    _fields_ = (
        ("buffer_follows", ctypes.c_void_p),
        ("buffer", ctypes.c_char_p),
        ("size_follows", ctypes.c_void_p),
        ("size", ctypes.c_void_p),
        ("end", ctypes.c_void_p),
    )


@functools.cache
def _layout(types: tuple[type, ...]) -> tuple[Callable[..., bytes], ctypes.c_size_t, int]:
    """How arguments of these types are packed as C would; their size, and its address."""
    layout = struct.Struct("".join("i" if kind is int else "P" for kind in types))
    size = ctypes.c_size_t(layout.size)
    return layout.pack, size, ctypes.addressof(size)


def raw_stream(device: int) -> int:
    """PyTorch's current stream of a device, as CUDA's handle."""
    return torch.cuda.current_stream(device).cuda_stream


def current_device() -> int:
    """The index of this thread's current CUDA device."""
    return torch.cuda.current_device()


# torch.cuda's own functions build objects, which costs more than the launch; Triton and inductor use these two as well.
_torch: Any = torch._C
raw_stream = getattr(_torch, "_cuda_getCurrentRawStream", raw_stream)
current_device = getattr(_torch, "_cuda_getDevice", current_device)


def _check(result: int, what: str) -> None:
    if result != 0:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(result, ctypes.byref(text))
        reason = text.value.decode() if text.value else "unknown error"
        raise CompilationFailed(f"{what} failed with CUDA error {result}: {reason}")


def version(toolkit: str | None = None) -> str:
    """Version of NVRTC, "12.9"."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc(toolkit).nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def architectures(toolkit: str | None = None) -> list[int]:
    """What NVRTC compiles for, as major * 10 + minor."""
    count = ctypes.c_int()
    _nvrtc(toolkit).nvrtcGetNumSupportedArchs(ctypes.byref(count))
    found = (ctypes.c_int * count.value)()
    _nvrtc(toolkit).nvrtcGetSupportedArchs(found)
    return list(found)


@functools.cache
def compile_source(
    source: str, architecture: int | str, defines: tuple[str, ...], toolkit: str | None = None
) -> bytes:
    """Machine code of a CUDA source for one architecture.

    Args:
        source: CUDA C++ without includes.
        architecture: compute capability as major * 10 + minor, 90 for an H100; "90a" with what only that one has.
        defines: options such as "-DX_TYPE=1".
        toolkit: major version of CUDA whose NVRTC compiles, "12"; by default PyTorch's.

    Raises:
        CompilationFailed: with NVRTC's log.
    """
    nvrtc = _nvrtc(toolkit)
    program = ctypes.c_void_p()
    result = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), b"octavo_kernels.cu", 0, None, None
    )
    if result != 0:
        raise CompilationFailed(f"NVRTC could not take the source: error {result}")
    try:
        options = [f"--gpu-architecture=sm_{architecture}", "--std=c++17", *defines]
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        result = nvrtc.nvrtcCompileProgram(program, len(options), array)
        if result != 0:
            size = ctypes.c_size_t()
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(max(size.value, 1))
            nvrtc.nvrtcGetProgramLog(program, log)
            raise CompilationFailed(
                f"NVRTC refused {' '.join(options)} (error {result}):\n{log.value.decode()}"
            )
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, code)
        return code.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


class Compiled:
    """One compiled kernel, loaded on one device.

    Args:
        binary: machine code from `compile_source`.
        name: the kernel's name in the source (declared extern "C").
        device: index of the CUDA device.
        shared: bytes of dynamic shared memory per block.
    """

    def __init__(self, binary: bytes, name: str, device: int, shared: int = 0):
        self.name = name
        self.device = device
        self.shared = shared
        driver = _driver()
        with torch.cuda.device(device):
            # Makes PyTorch's context the current one of this thread: modules belong to a context.
            torch.cuda.current_stream().synchronize()
            self._context = ctypes.c_void_p()
            _check(driver.cuCtxGetCurrent(ctypes.byref(self._context)), "asking for the context")
            self._module = ctypes.c_void_p()
            self._binary = binary
            _check(driver.cuModuleLoadData(ctypes.byref(self._module), binary), f"loading {name}")
            self._function = ctypes.c_void_p()
            _check(
                driver.cuModuleGetFunction(ctypes.byref(self._function), self._module, name.encode()),
                f"finding {name}",
            )
            if shared:
                _check(
                    driver.cuFuncSetAttribute(self._function, MAX_DYNAMIC_SHARED, ctypes.c_int(shared)),
                    f"{shared} bytes of shared memory for {name}",
                )
            blocks = ctypes.c_int()
            _check(
                driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(
                    ctypes.byref(blocks), self._function, 256, ctypes.c_size_t(shared)
                ),
                f"occupancy of {name}",
            )
        #: Blocks of 256 threads that fit a multiprocessor at once.
        self.resident_blocks = max(1, blocks.value)

    def launch(self, grid: int, threads: int, *arguments) -> None:
        """Queue the kernel on the current stream of its device.

        Args:
            grid: number of blocks.
            threads: threads per block.
            arguments: tensors (passed as pointers), None (a null pointer) and ints (passed as C ints), in the
                kernel's order.
        """
        values = [a if type(a) is int else 0 if a is None else a.data_ptr() for a in arguments]
        pack, _, size = _layout(tuple(map(type, arguments)))
        packed = _Packed(1, pack(*values), 2, size, None)
        if current_device() != self.device:
            with torch.cuda.device(self.device):
                self._queue(grid, threads, packed)
        else:
            self._queue(grid, threads, packed)

    def bind(self, grid: int, threads: int, pointers: int, integers: tuple[int, ...]) -> Callable[..., None]:
        """The launch for fixed sizes: a function of `pointers` addresses, which the fixed integers follow.

        The kernel's device must be the current one when it is called.
        """
        pack, _, size = _layout((torch.Tensor,) * pointers + (int,) * len(integers))
        launch, function, device = _driver().cuLaunchKernel, self._function, self.device
        shared = self.shared

        def run(*addresses: int) -> None:
            packed = _Packed(1, pack(*addresses, *integers), 2, size, None)
            extra = ctypes.byref(packed)
            if launch(function, grid, 1, 1, threads, 1, 1, shared, raw_stream(device), None, extra):
                # Which failure it is, and whether it can be helped, is found out there.
                self._queue(grid, threads, packed)

        return run

    def _queue(self, grid: int, threads: int, packed: _Packed) -> None:
        stream, extra = raw_stream(self.device), ctypes.byref(packed)
        launch = _driver().cuLaunchKernel
        result = launch(self._function, grid, 1, 1, threads, 1, 1, self.shared, stream, None, extra)
        if result == INVALID_CONTEXT:
            # A thread of autograd's, in which nothing of CUDA has run yet.
            _check(_driver().cuCtxSetCurrent(self._context), f"preparing a thread for {self.name}")
            result = launch(self._function, grid, 1, 1, threads, 1, 1, self.shared, stream, None, extra)
        if result != 0:
            _check(result, f"launching {self.name}")


def load(
    source: str, name: str, defines: tuple[str, ...], device: int, *, specific: bool = False, shared: int = 0
) -> Compiled:
    """Compile a kernel for a device and load it there.

    Args:
        specific: for this architecture alone, with all its instructions.
        shared: bytes of dynamic shared memory per block.
    """
    major, minor = torch.cuda.get_device_capability(device)
    architecture = f"{major}{minor}{'a' if specific else ''}"
    return Compiled(compile_source(source, architecture, defines), name, device, shared)
