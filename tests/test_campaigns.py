"""Each campaign (tests/campaigns), a small part of it; docs/RELIABILITY.md has the whole ones."""

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_hostile_files():
    from .campaigns.hostile import campaign

    table, faults = campaign(25, seed=1_000_000)
    assert not faults
    assert all(sum(verdicts.values()) == 25 for verdicts in table.values())
