"""Which versions are installed: for what the oldest that are allowed (`make test-oldest`) cannot do."""

from importlib.metadata import version

import pytest
from packaging.version import Version


def needs(package: str, least: str, why: str) -> pytest.MarkDecorator:
    """Skip a test where an older version is installed, saying what that lacks."""
    older = Version(version(package)) < Version(least)
    return pytest.mark.skipif(older, reason=f"{package} before {least}: {why}")
