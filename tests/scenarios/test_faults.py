"""A short selection of the fault harness; the long run is soak.py.

S3NAPBACK_SEED chooses other faults than those of every day.
"""

import os
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from conftest import require_tool, tmpfs
from harness import BUCKET, SETTINGS, Fault, FaultyS3, Setting, Shelf, World, live_a_month

import s3napback

START = datetime(2026, 12, 29, 3, 0, tzinfo=timezone.utc)
SEED = os.environ.get("S3NAPBACK_SEED", "tests")

Make = Callable[[Setting], World]


@pytest.fixture
def make_world(
    short_folder: Callable[[str], Path], gpg_home: Any, tmp_path: Path
) -> Iterator[Make]:
    for tool in ("pigz", "gpg", "svnadmin", "svnmucc", "mount"):
        require_tool(tool)
    with tmpfs(tmp_path, "size=64k"):
        pass  # `World` mounts some
    server = FaultyS3()
    server.reset()
    worlds: list[World] = []

    def make(setting: Setting) -> World:
        worlds.append(World(short_folder(""), server, gpg_home, setting, SEED))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()
    server.stop()


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 7, 10, 13])  # of any two, but gpg and temp, all four ways
def test_nights_with_faults_lose_nothing(number: int, make_world: Make) -> None:
    """Two nights at New Year, each with kills and faults at random, and all moments restored."""
    world = make_world(SETTINGS[number])
    assert live_a_month(world, nights=2, kills=2, faults=2, start=START) >= 3
    assert world.count["indexed"]  # what they tell was compared


@pytest.mark.slow
@pytest.mark.parametrize("safe", [False, True])
def test_a_kill_at_any_step_loses_nothing(safe: bool, make_world: Make) -> None:
    """SIGKILL before and after every request of a run that replaces archives: `World` checks that
    what was complete still is, with SafeReplace even in the slot that is being rewritten."""
    world = make_world(Setting("HanoiCycle", gpg=False, safe=safe, temp=False))
    world.live(START)
    world.undisturbed()
    killed = number = late = 0
    while True:
        number += 1
        world.disturbed(Fault("kill", "SIGKILL before", number), "-f")
        if world.count["without effect"] > late:  # it made fewer requests
            break
        world.disturbed(Fault("kill", "SIGKILL after", number), "-f")
        late = world.count["without effect"]  # it may have ended before the signal came
        killed += 2
    assert killed > (40 if safe else 20)
    world.undisturbed()
    assert world.proved_again() >= 3


@pytest.mark.slow
def test_the_harness_sees_what_is_lost(make_world: Make) -> None:
    """It would be worth nothing if it could not fail."""
    world = make_world(Setting("SimpleCycle", gpg=False, safe=False, temp=False))
    for day in range(2):
        world.live(START + timedelta(days=day))
        world.undisturbed()
    seen = world.seen()
    store: Any = Shelf(world.server)
    lost = min(seen, key=lambda name: seen[name][3])
    for item in s3napback.archive_objects(store, lost):
        world.server._backend.delete_object(BUCKET, item.key)
    with pytest.raises(AssertionError, match="was touched"):
        world._check(Fault("none"), seen, 0)
