"""What the source must not contain: pickles that are trusted, shells, evaluated text; and a wheel's library that is hardened."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [
    path
    for folder in ("src", "benchmarks", "scripts", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def calls(path: Path):
    """(name as written, call) of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def true_option(call: ast.Call, name: str) -> bool:
    return any(option.arg == name and ast.unparse(option.value) == "True" for option in call.keywords)


def faults_of(path: Path) -> list[str]:
    found = []
    for name, call in calls(path):
        if name in (
            "eval",
            "exec",
            "os.system",
            "os.popen",
            "pickle.load",
            "pickle.loads",
            "pickle.Unpickler",
        ):
            found.append(f"{name} in line {call.lineno}")
        if name.startswith("subprocess.") and true_option(call, "shell"):
            found.append(f"a shell in line {call.lineno}")
        if name == "torch.load" and not true_option(call, "weights_only"):
            found.append(f"torch.load without weights_only=True in line {call.lineno}")
        if true_option(call, "trust_remote_code"):
            found.append(f"trust_remote_code=True in line {call.lineno}")
    return found


def test_nothing_of_the_kind_is_in_the_source():
    assert len(FILES) > 100
    assert {str(path.relative_to(ROOT)): found for path in FILES if (found := faults_of(path))} == {}


def test_the_search_finds_what_it_looks_for(tmp_path):
    file = tmp_path / "x.py"
    lines = ["eval(a)", "torch.load(f)", "torch.load(f, weights_only=True)", "subprocess.run(c, shell=True)"]
    file.write_text("\n".join([*lines, "f(trust_remote_code=True)"]))
    assert len(faults_of(file)) == 4


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("readelf") is None, reason="needs readelf")
def test_the_native_library_is_hardened():
    """No executable stack, relocations read-only once they are done, and no symbols but Python's entry."""
    native = pytest.importorskip("octavo._native")
    read = ["readelf", "--wide"]
    segments = subprocess.run(
        [*read, "--segments", native.__file__], capture_output=True, text=True, check=True
    ).stdout
    stack = next(line for line in segments.splitlines() if "GNU_STACK" in line)
    assert " RWE " not in stack and "GNU_RELRO" in segments
    symbols = subprocess.run(
        [*read, "--dyn-syms", native.__file__], capture_output=True, text=True, check=True
    ).stdout
    ours = [line.split()[-1] for line in symbols.splitlines() if " UND " not in line and "octavo" in line]
    assert ours == []
