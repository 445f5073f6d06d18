"""Each campaign (tests/campaigns), a small part of it; docs/RELIABILITY.md has the whole ones."""

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_hostile_files():
    from .campaigns.hostile import campaign

    table, faults = campaign(25, seed=1_000_000)
    assert not faults
    assert all(sum(verdicts.values()) == 25 for verdicts in table.values())


def test_silently_wrong():
    from .campaigns.differential import campaign

    table, faults = campaign(12, seed=1_000_000)
    assert not faults
    assert sum(table.values()) == 12


@pytest.mark.parametrize("what", ["kill", "full"])
def test_interrupted(what):
    import os

    from .campaigns.interrupted import campaign

    if what == "full" and os.geteuid():
        pytest.skip("needs root for a small file system")
    table, faults = campaign(what, 2, seed=1_000_000)
    assert not faults
    assert set(table.values()) == {2}
