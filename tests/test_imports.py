"""The house's plan: imports go from what is built later to what it is built on, never back, and never in a circle.

Imports inside functions count, and those for the type checker too. `octavo/__init__.py` and `__main__.py`, the doors, are left
out: the first imports nothing until it is asked.
"""

import ast
from pathlib import Path

import octavo

ROOT = Path(octavo.__file__).parent
# From the foundation up; what stands on one line does not import one another.
ORDER = [
    ["config", "json_files", "text_files", "wording"],
    ["hub_datasets"],
    ["ops"],
    ["codebook"],
    ["quantizer"],
    ["tensor"],
    ["model"],
    ["checkpoint"],
    ["integrations"],
    ["quantization"],
    ["loading"],
    ["compat", "demo"],
    ["calibration", "evaluation", "export"],
    ["training"],
    ["generation", "merging", "planning"],
    ["serving"],
    ["bench"],
    ["cli"],
]
RANKS = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
# (from, to) → why it cannot be otherwise now.
EXCEPTIONS: dict[tuple[str, str], str] = {}


def modules() -> dict[str, Path]:
    """Module, by its name below `octavo` → file."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name and name != "__main__":
            found[name] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of ours that a module imports, wherever in it."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names if alias.name.startswith("octavo.")]
            found |= {target.removeprefix("octavo.") for target in targets}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
                base = base + (node.module.split(".") if node.module else [])
            elif node.module and node.module.split(".")[0] == "octavo":
                base = node.module.split(".")[1:]
            else:
                continue
            for alias in node.names:
                whole = ".".join([*base, alias.name])
                if not base and alias.name in octavo._HOMES:
                    whole = octavo._HOMES[alias.name]
                found.add(whole if whole in known else ".".join(base))
    return (found & known.keys()) - {name}


def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(name, path, known) for name, path in known.items()}


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Sets of modules that import one another."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            new = edges[waiting.pop()] - seen
            seen |= new
            waiting.extend(new)
        return seen

    after = {name: reached(name) for name in edges}
    found = {
        tuple(sorted({name, *(o for o in after[name] if name in after[o])}))
        for name in edges
        if name in after[name]
    }
    return sorted(map(list, found))


def test_every_room_has_its_place():
    assert {name.split(".")[0] for name in modules()} == RANKS.keys()


def test_imports_go_down():
    up = {
        (name, target)
        for name, targets in graph().items()
        for target in targets
        if name.split(".")[0] != target.split(".")[0]
        and RANKS[name.split(".")[0]] <= RANKS[target.split(".")[0]]
    }
    assert up == EXCEPTIONS.keys()


def test_there_are_no_circles():
    assert circles(graph()) == []


def test_the_tests_see_arrows_and_circles(tmp_path):
    path = tmp_path / "run.py"
    path.write_text(
        "from . import text\nfrom ..config import OctavoConfig\nimport octavo.ops\n\n"
        "def f():\n    from .. import load, codebook\n    from octavo.cli.demo import demo\n"
    )
    known = modules()
    assert imports("calibration.run", path, known) == {
        "calibration.text",
        "config",
        "ops",
        "loading",
        "codebook",
        "cli.demo",
    }
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d", "a"}}) == [["b", "c"], ["d"]]
