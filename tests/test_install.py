"""Installing: a wheel, built from the source distribution, in an environment that does not know this checkout.

With a compiler the wheel brings native kernels; without one it is built all the same, and says so. What Octavo depends on is
linked into the clean environment from the one that runs the tests, so that nothing is downloaded and pip still checks every
requirement.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from octavo import demo
from octavo.ops import cpu

REPOSITORY = Path(__file__).parents[1]
# What must not come from the environment that runs the tests: Octavo itself, in any form.
NOT_LINKED = ("octavo", "_editable", "__editable__", "__pycache__")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(os.name == "nt", reason="links into a clean environment by symbolic links"),
]


def run(*command, **environment) -> subprocess.CompletedProcess:
    """A command that must succeed, outside the repository and without what the caller's environment says of Python."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OCTAVO"))}
    done = subprocess.run(
        list(map(str, command)),
        cwd=environment.pop("cwd", "/"),
        env={**kept, "COLUMNS": "120", "NO_COLOR": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The source distribution."""
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, REPOSITORY)
    return next(out.glob("octavo-*.tar.gz"))


def build_wheel(source: Path, out: Path, **environment) -> Path:
    run(
        *(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", out, source),
        **environment,
    )
    return next(out.glob("octavo-*.whl"))


def install(wheel: Path | None, folder: Path) -> Path:
    """A new environment with the wheel in it, or with all but Octavo. Returns the folder of its commands."""
    # Without pip: the linked one installs, and no old setuptools comes along.
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    linked = folder / "linked"
    linked.mkdir()
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(place).iterdir():
            if not entry.name.startswith(NOT_LINKED) and entry.suffix != ".pth":
                (linked / entry.name).symlink_to(entry)
    commands = folder / "bin"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run(commands / "python", "-c", where).stdout.strip())
    (packages / "linked.pth").write_text(f"{linked}\n")
    if wheel is None:
        return commands
    run(commands / "python", "-m", "pip", "install", "--no-index", wheel)
    assert (commands / "octavo").exists()
    return commands


@pytest.fixture(scope="module")
def native(source, tmp_path_factory) -> Path:
    """Commands of an environment with a wheel that was built with a compiler."""
    if not (shutil.which(os.environ.get("CXX", "c++")) and cpu.native.library):
        pytest.skip("no C++ compiler, or it cannot build the native kernels here")
    out = tmp_path_factory.mktemp("native")
    return install(build_wheel(source, out), out / "environment")


@pytest.fixture(scope="module")
def plain(source, tmp_path_factory) -> Path:
    """Commands of an environment with a wheel that was built where there is no compiler."""
    out = tmp_path_factory.mktemp("plain")
    wheel = build_wheel(source, out, CC="/bin/false", CXX="/bin/false")
    assert not any("_native" in name for name in zipfile.ZipFile(wheel).namelist())
    return install(wheel, out / "environment")


def active_kernels(commands: Path, **environment) -> str:
    return json.loads(run(commands / "octavo", "doctor", "--json", **environment).stdout)["Kernels"]["CPU"]


def shipped_model(commands: Path) -> str:
    """The folder of the model in the installed package, which lies in the clean environment."""
    folder = run(commands / "python", "-c", "from octavo import demo; print(demo.MODEL)").stdout.strip()
    assert Path(folder).is_relative_to(commands.parent)
    return folder


def generate(commands: Path) -> str:
    return run(
        *(commands / "octavo", "generate", shipped_model(commands), demo.PROMPT),
        *("--max-new-tokens", 8, "--greedy"),
    ).stdout.strip()


def test_a_wheel_brings_native_kernels_and_the_model(native):
    kernels = active_kernels(native)
    assert kernels.split(":")[0] == cpu.native.library.supported()[0]
    assert len(generate(native).split()) > 1


@pytest.mark.parametrize("isa", ["none", *cpu.status()["supported"]])
def test_doctor_names_the_kernels_that_were_asked_for(native, isa):
    expected = "reference" if isa == "none" else isa
    assert active_kernels(native, OCTAVO_CPU_ISA=isa) == f"{expected}: OCTAVO_CPU_ISA={isa}"


def test_bench_of_an_installed_octavo(native):
    found = json.loads(run(native / "octavo", "bench", "--quick", "--kernels-only", "--json").stdout)
    assert 0 < found["kernels"][0]["share"]["median"] < 2


def test_the_first_cell_of_a_notebook_installs_it(source, tmp_path):
    """As pasted into Colab or Kaggle, with an uploaded file in its one variable: `%pip` puts it into the kernel's environment."""
    pytest.importorskip("IPython")
    notebook = json.loads((REPOSITORY / "examples" / "1_generate.ipynb").read_text())
    cell = "".join(next(cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code"))
    wheel = build_wheel(source, tmp_path, CC="/bin/false", CXX="/bin/false")
    commands = install(None, tmp_path / "environment")
    pasted = cell.replace('OCTAVO = ""', f'OCTAVO = "{wheel}"')
    assert pasted != cell
    for text, expected in ((cell, "put its address into OCTAVO above"), (pasted, "GPT-J")):
        script = tmp_path / "cell.ipy"
        script.write_text(f"{text}\nfrom octavo import demo\nprint(demo.__doc__, 'GPT-J', demo.MODEL)\n")
        done = subprocess.run(
            [commands / "python", "-m", "IPython", "--colors=NoColor", script],
            capture_output=True,
            text=True,
            cwd="/",
            env={**os.environ, "PIP_NO_INDEX": "1"},
        )
        assert expected in done.stdout + done.stderr, done.stdout + done.stderr
    assert str(tmp_path / "environment") in done.stdout


def test_without_a_compiler_it_installs_works_and_says_so(plain):
    kernels = active_kernels(plain)
    assert kernels.startswith("reference: the native kernels were not built")
    assert len(generate(plain).split()) > 1
