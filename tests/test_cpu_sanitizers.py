"""The native kernels under AddressSanitizer and UBSan, and for ARM under an emulator; sources in tests/native."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NATIVE = ROOT / "tests" / "native"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def tool(name: str) -> str:
    """A program on the path or beside this Python (the packages cmake and ninja bring theirs)."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def build_and_check(folder: Path, *options: str, runner: tuple[str, ...] = ()) -> str:
    cmake = tool("cmake")
    subprocess.run([cmake, "-S", str(NATIVE), "-B", str(folder), *options], check=True, capture_output=True)
    subprocess.run([cmake, "--build", str(folder), "-j", "2"], check=True, capture_output=True)
    done = subprocess.run([*runner, str(folder / "check")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_address_and_undefined_behaviour(tmp_path):
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    out = build_and_check(tmp_path, "-DSANITIZE=address,undefined")
    assert out.rstrip().endswith(" passed, 0 failed")


def test_arm_under_an_emulator(tmp_path):
    emulator = tool("qemu-aarch64")
    tool("aarch64-linux-gnu-g++")
    toolchain = NATIVE / "aarch64.cmake"
    out = build_and_check(tmp_path, "-DSANITIZE=", f"-DCMAKE_TOOLCHAIN_FILE={toolchain}", runner=(emulator,))
    assert out.rstrip().endswith(" passed, 0 failed")
