"""`make test-oldest` tests what pyproject.toml says is enough."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_oldest_versions_are_those_that_are_allowed():
    allowed = dict(re.findall(r'"([a-z-]+)>=([\d.]+)', (ROOT / "pyproject.toml").read_text()))
    tested = dict(
        re.findall(r"^([a-z-]+)==([\d.]+)", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE)
    )
    for name in tested:
        assert [int(n) for n in tested[name].split(".") if int(n)] == [
            int(n) for n in allowed[name].split(".") if int(n)
        ], name
    # Of what is needed to build or to test, and of extras for other tools, the newest will do.
    others = {"scikit-build-core", "nanobind", "lm-eval", "mkdocs-material"}
    assert tested.keys() == allowed.keys() - others
