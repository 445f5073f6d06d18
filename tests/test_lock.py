"""requirements/lock.txt: what `make install` takes has hashes, agrees with constraints.txt, and is all that pyproject.toml asks
for."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
packaging = pytest.importorskip("packaging.requirements")

# Each Python on each system: (python_version, sys_platform).
PLACES = [(f"3.{minor}", system) for minor in (10, 11, 12, 13) for system in ("linux", "darwin", "win32")]


def requirements(path: Path) -> list:
    """(requirement, its hashes) of each line, continued lines joined."""
    text = re.sub(r"\\\n", " ", path.read_text(encoding="utf-8"))
    found = []
    for line in text.splitlines():
        line = line.partition("#")[0].strip()
        if line:
            found.append(
                (
                    packaging.Requirement(line.partition("--hash")[0].strip()),
                    re.findall(r"--hash=(\S+)", line),
                )
            )
    return found


LOCKED = requirements(ROOT / "requirements" / "lock.txt")


def holding(place: tuple[str, str]) -> dict[str, str]:
    """Name → version of what is installed there."""
    python, system = place
    where = {
        **{"python_version": python, "python_full_version": f"{python}.9", "sys_platform": system},
        **{"os_name": "nt" if system == "win32" else "posix", "implementation_name": "cpython"},
        **{"platform_python_implementation": "CPython", "platform_machine": "x86_64"},
    }
    found: dict[str, str] = {}
    for requirement, _ in LOCKED:
        if requirement.marker is None or requirement.marker.evaluate(where):
            assert requirement.name not in found, (requirement.name, place)
            found[requirement.name] = str(requirement.specifier).removeprefix("==")
    return found


def test_every_package_has_one_version_and_hashes():
    assert len(LOCKED) > 100
    for requirement, hashes in LOCKED:
        assert re.fullmatch(r"==[^=,]+", str(requirement.specifier)), requirement
        assert requirement.url is None
        assert hashes and all(re.fullmatch("sha256:[0-9a-f]{64}", each) for each in hashes), requirement


def test_it_names_no_index():
    text = (ROOT / "requirements" / "lock.txt").read_text(encoding="utf-8")
    assert not re.search(r"://|--(extra-)?index|--find-links|^-", text, re.MULTILINE)


@pytest.mark.parametrize("place", PLACES, ids="-".join)
def test_it_holds_all_that_is_asked_for(place):
    """Directly, by pyproject.toml, its extras and constraints.txt; torch is taken besides."""
    if sys.version_info < (3, 11):
        pytest.skip("reads pyproject.toml with tomllib")
    import tomllib

    found = holding(place)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    where = {"python_version": place[0], "sys_platform": place[1]}
    for text in (*project["dependencies"], *extras["train"], *extras["dev"]):
        asked = packaging.Requirement(text)
        if asked.name == "torch" or (asked.marker and not asked.marker.evaluate(where)):
            continue
        assert found[asked.name] in asked.specifier, (asked, place)
    for constraint, _ in requirements(ROOT / "constraints.txt"):
        if constraint.name in found and (not constraint.marker or constraint.marker.evaluate(where)):
            assert found[constraint.name] in constraint.specifier, (constraint, place)


def test_what_only_gpus_need_is_left_out():
    names = {requirement.name for requirement, _ in LOCKED}
    assert not [name for name in names if name == "torch" or name.startswith(("nvidia", "cuda"))]
    assert "triton" in names
