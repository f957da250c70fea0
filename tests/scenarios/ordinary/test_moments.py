"""Which state of a source is restored: marks before dates, and moments as people type them."""

import json
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import Site

import s3napback
from s3napback import Failure, Found, History

NIGHT = datetime(2026, 11, 22, 3)  # a DIFF is due from now on, till the 28th


def one(n: int, made: float, state: str = "", fault: str = "", kind: str = "Directory") -> Found:
    """The archive of slot n; a FULL where the state says that it continues nothing."""
    before, _, after = state.partition(":")
    mode = "FULL" if before in ("-", "0") else "DIFF"
    return Found(f"/d-{n}-{mode}", kind, "/d", n, mode, made, 1, 1, fault, before, after,
                 "ok" if state else "")


def chains(found: list[Found]) -> dict[int, list[int]]:
    """moment → slots of its chain, for each moment that can be restored."""
    return {at: [link.slot for link in s3napback.choose_chain(found, at).links]
            for at in s3napback.restorable_moments(found)}


DAY = 86400
START = 1_790_000_000


@pytest.mark.parametrize("dates", [
    [0, 1, 2, 3], [0, 1, -20000, 3], [0, 9999, 2, 3], [9999, 1, 2, 3], [3, 2, 1, 0],
    [0, 1, -20000, -19999], [0, 0, 0, 0], [0, 1, 0.995, 2],
])
def test_marked_archives_are_chained_by_what_they_continue_whatever_their_dates(
    dates: list[float],
) -> None:
    states = ["-:a", "a:b", "b:c", "c:d"]
    found = [one(n, START + day * DAY, state)
             for n, (day, state) in enumerate(zip(dates, states, strict=True))]
    for shuffled in (found, found[::-1], found[2:] + found[:2]):
        got = chains(shuffled)
        assert list(got.values()) == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
        assert len(got) == 4  # each has a moment of its own
        newest = s3napback.choose_chain(shuffled, float("inf")).links
        assert [link.slot for link in newest] == [0, 1, 2, 3]


def test_a_date_that_is_right_is_the_moment_and_one_that_is_wrong_comes_a_second_after() -> None:
    found = [one(0, START, "-:a"), one(1, 5 * DAY, "a:b"), one(2, START + 2 * DAY, "b:c"),
             one(3, START + 9000 * DAY, "c:d"), one(4, START + 4 * DAY, "d:e")]
    assert History(found).moments == [
        START, START + 1, START + 2 * DAY, START + 2 * DAY + 1, START + 4 * DAY
    ]
    # The date by which a wrong clock marked it names the archive, too.
    assert s3napback.choose_chain(found, 5 * DAY).links[-1].slot == 1


def test_a_torn_newest_archive_is_not_passed_over_because_of_its_date() -> None:
    found = [one(0, START, "-:a"), one(1, START + DAY, "a:b"),
             one(2, 5 * DAY, "b:c", "chunk 1 is missing")]
    with pytest.raises(Failure, match="/d-2-DIFF cannot be used: chunk 1 is missing"):
        s3napback.choose_chain(found, float("inf"))
    found.append(one(3, START + 3 * DAY, "c:d"))
    with pytest.raises(Failure, match=r"/d-3-DIFF continues .* not whole: /d-2-DIFF: chunk 1"):
        s3napback.choose_chain(found, float("inf"))


def test_states_in_a_circle_and_states_that_many_share_end_and_are_decided_once() -> None:
    circle = [one(1, START, "b:a"), one(2, START + 1, "a:b"), one(3, START + 2, "c:c")]
    assert s3napback.restorable_moments(circle) == []
    with pytest.raises(Failure, match="no longer there"):
        s3napback.choose_chain(circle, float("inf"))
    full = one(0, START - 5, "-:a")
    assert list(chains([full, *circle]).values()) == [[0], [0, 2], [0, 2, 1]]
    forced = [one(0, START, "-:a"), one(7, START + 50, "-:a"), one(1, START + 10, "a:b"),
              one(8, START + 60, "a:b"), one(2, START + 70, "b:c")]
    for found in (forced, forced[::-1]):
        assert chains(found) == {
            START: [0], START + 10: [0, 1], START + 50: [7], START + 60: [7, 8],
            START + 70: [7, 8, 2],
        }
    same = [one(n, START, "a:b") for n in range(1, 5000)] + [one(9999, START, "b:b")]
    assert len(s3napback.restorable_moments([full, *same])) == 1 + len(same)


def test_a_thousand_archives_in_one_chain_are_looked_at_in_one_pass() -> None:
    found = [one(n, START + n * DAY, f"{n or '-'}:{n + 1}") for n in range(1000)]
    unmarked = [one(n, START + n * DAY) for n in range(1, 1000)]
    begun = time.process_time()
    assert len(s3napback.restorable_moments(found[::-1])) == 1000
    assert s3napback.restorable_moments(unmarked) == []
    assert len(s3napback.choose_chain(found, float("inf")).links) == 1000
    assert time.process_time() - begun < 2


def nights(site: Site, clocks: list[datetime]) -> list[str]:
    """A night for each clock; the file's content in each."""
    for n, now in enumerate(clocks):
        (site.data / "file").write_text(f"night {n}")
        # The diff files' dates are the clock's as well.
        assert site.run("-f", now=now) in (0, 3)
    return [f"night {n}" for n in range(len(clocks))]


def listed(site: Site) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, s3napback.__file__, "list", "--json", "-c", str(site.conf)],
        capture_output=True, check=True,
    )
    (source,) = json.loads(done.stdout)["sources"]
    return dict(source)


@pytest.mark.parametrize("wrong", [
    datetime(1970, 1, 3), datetime(2031, 1, 4), NIGHT + timedelta(hours=44, minutes=56),
])
def test_every_night_comes_back_although_the_clock_was_wrong_in_one(
    site: Site, wrong: datetime, tmp_path: Path
) -> None:
    # The second night begins three minutes after midnight, by a clock that is ahead.
    clocks = [NIGHT, NIGHT + timedelta(hours=45, minutes=3), wrong, NIGHT + timedelta(days=3)]
    contents = nights(site, clocks)
    moments = listed(site)["restorable"]
    assert len(moments) == len(contents)
    words = ["restore", "-c", str(site.conf), str(site.data)]
    for n, (at, content) in enumerate(zip(moments, contents, strict=True)):
        assert s3napback.main([*words, "--at", at, "--to", f"{tmp_path}/{n}"]) == 0
        assert Path(f"{tmp_path}/{n}{site.data}/file").read_text() == content
    assert s3napback.main([*words, "--to", f"{tmp_path}/last"]) == 0
    assert Path(f"{tmp_path}/last{site.data}/file").read_text() == contents[-1]
