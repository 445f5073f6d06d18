"""The campaign of power failures (tests/campaigns/powerloss.py): its model of a disk loses what a disk may lose, and no more.

Each list is what a program might do; what is left of it in each way is said by hand."""

import random
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the campaign runs on Linux")

ROOT = Path("/r")
WRITE = [("C", "/r/a.partial", "", 0, b""), ("W", "/r/a.partial", "", 0, b"whole")]
SYNC = [("S", "/r/a.partial", "", 0, b"")]
RENAME = [("R", "/r/a.partial", "/r/a", 0, b"")]
SYNC_NAMES = [("S", "/r", "", 0, b"")]


def left(records, way, seed=0):
    from .campaigns.powerloss import replayed

    return replayed(records, ROOT).after(way, random.Random(seed))


def test_what_is_not_synced_is_lost_in_each_way():
    done = [*WRITE, *RENAME]
    assert left(done, "lost") == {}
    assert left(done, "names") == {"a": b""}
    assert left(done, "zeros") == {"a": bytes(5)}


def test_bytes_that_are_synced_before_the_name_are_whole_under_it():
    done = [*WRITE, *SYNC, *RENAME]
    assert left(done, "lost") == {}
    for way in ("names", "zeros"):
        assert left(done, way) == {"a": b"whole"}
    for seed in range(20):
        assert left(done, "some", seed) in ({}, {"a.partial": b"whole"}, {"a": b"whole"})


def test_a_name_is_there_once_its_folder_is_synced():
    done = [*WRITE, *SYNC, *RENAME, *SYNC_NAMES]
    for way in ("lost", "names", "zeros", "some"):
        assert left(done, way) == {"a": b"whole"}


def test_syncing_a_name_does_not_sync_the_bytes():
    assert left([*WRITE, *RENAME, *SYNC_NAMES], "lost") == {"a": b""}


def test_an_old_file_is_there_until_the_new_ones_name_is():
    old = [("C", "/r/a", "", 0, b""), ("W", "/r/a", "", 0, b"old"), ("S", "/r/a", "", 0, b""), *SYNC_NAMES]
    assert left([*old, *WRITE, *SYNC, *RENAME], "lost") == {"a": b"old"}
    assert left([*old, ("T", "/r/a", "", 0, b""), ("W", "/r/a", "", 0, b"n")], "lost") == {"a": b"old"}
    # What is written in place is torn.
    some = {
        left([*old, ("T", "/r/a", "", 0, b""), ("W", "/r/a", "", 0, b"new")], "some", s)["a"]
        for s in range(40)
    }
    assert {b"old", b""} < some and some <= {b"old", b"", b"n", b"ne", b"new"}


def test_a_file_in_a_folder_whose_name_is_lost_is_lost():
    done = [
        ("M", "/r/f", "", 0, b""),
        ("C", "/r/f/a", "", 0, b""),
        ("S", "/r/f/a", "", 0, b""),
        ("S", "/r/f", "", 0, b""),
    ]
    assert left(done, "lost") == {}
    assert left([*done, *SYNC_NAMES], "lost") == {"f": None, "f/a": b""}


def test_a_removal_that_is_not_synced_may_not_have_happened():
    done = [*WRITE, *SYNC, *SYNC_NAMES, ("U", "/r/a.partial", "", 0, b"")]
    assert left(done, "lost") == {"a.partial": b"whole"}
    assert left([*done, *SYNC_NAMES], "lost") == {}
