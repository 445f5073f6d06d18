"""The documentation as a site in build/site: the pages of the repository, and a reference made from the docstrings.

    python scripts/site.py            build it; a broken link is an error
    python scripts/site.py serve      show it on http://127.0.0.1:8000 while it is written

Pages keep their place in the repository, so that a link holds there and on the site alike.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import octavo

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "build" / "site-pages"
PARTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "docs", "csrc/README.md", "examples")


def gather() -> None:
    """Copy what the site shows to build/site-pages."""
    shutil.rmtree(PAGES, ignore_errors=True)
    for part in PARTS:
        source, target = ROOT / part, PAGES / part
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)


def rooms() -> list[str]:
    """The rooms with a page, in the order of mkdocs.yml."""
    return re.findall(r"api/(\w+)\.md", (ROOT / "mkdocs.yml").read_text().replace("api/index.md", ""))


def reference() -> None:
    """A list of the public names, and a page for each room."""
    folder = PAGES / "api"
    folder.mkdir()
    lines = ["# Reference", "", "What `import octavo` gives:", ""]
    for name in sorted(octavo._HOMES):
        thing = getattr(octavo, name)
        summary = (thing.__doc__ or "").partition("\n\n")[0]
        lines.append(f"- [`octavo.{name}`][{thing.__module__}.{name}]: {' '.join(summary.split())}")
    (folder / "index.md").write_text("\n".join(lines) + "\n")
    for room in rooms():
        (folder / f"{room}.md").write_text(f"::: octavo.{room}\n")


def main() -> int:
    gather()
    reference()
    command = "serve" if sys.argv[1:] == ["serve"] else "build"
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", command, "--strict", "--config-file", ROOT / "mkdocs.yml"],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        stderr=None if command == "serve" else subprocess.PIPE,
        text=True,
    )
    if result.returncode:
        print(result.stderr, file=sys.stderr)
        return result.returncode
    missing = sorted(
        page.relative_to(PAGES)
        for page in PAGES.rglob("*.md")
        if page.stem not in ("README", "index") and not (site_page(page)).exists()
    )
    assert not missing, missing
    print(f"{ROOT / 'build' / 'site' / 'index.html'}: {count_documented()} documented names")
    return 0


def site_page(page: Path) -> Path:
    return ROOT / "build" / "site" / page.relative_to(PAGES).with_suffix("") / "index.html"


def count_documented() -> int:
    """Names with an entry in the reference."""
    pages = (ROOT / "build" / "site" / "api").rglob("index.html")
    return sum(len(set(re.findall(r'id="(octavo\.[\w.]+)"', page.read_text()))) for page in pages)


if __name__ == "__main__":
    sys.exit(main())
