"""The documentation builds as a site, strictly: a link to nothing, in a page or in a docstring, is an error."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra 'docs'"),
]


def test_the_site_builds_and_the_reference_holds_the_public_names():
    import octavo

    result = subprocess.run([sys.executable, "scripts/site.py"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    listed = (ROOT / "build" / "site" / "api" / "index.html").read_text()
    assert all(f"octavo.{name}<" in listed for name in octavo._HOMES)
    # Examples are shown as code, with what they give.
    assert "&gt;&gt;&gt; " in (ROOT / "build" / "site" / "api" / "codebook" / "index.html").read_text()


def test_a_broken_link_is_an_error(tmp_path):
    pages = tmp_path / "pages"
    pages.mkdir()
    (pages / "index.md").write_text("[nowhere](missing.md)\n")
    config = tmp_path / "mkdocs.yml"
    settings = (ROOT / "mkdocs.yml").read_text().split("plugins:")[0]
    config.write_text(settings.replace("build/site-pages", "pages").replace("build/site", "site"))
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--config-file", config], capture_output=True, text=True
    )
    assert result.returncode != 0 and "missing.md" in result.stderr
