"""Which state of a source is restored: marks before dates, and moments as people type them."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from conftest import Site, entry, program

import s3napback
from s3napback import CatalogEntry, Failure, History

NIGHT = datetime(2026, 11, 22, 3)  # a DIFF is due from now on, till the 28th


def one(
    n: int, made: float, state: str = "", fault: str = "", kind: str = "Directory"
) -> CatalogEntry:
    """The archive of slot n; a FULL where the state says that it continues nothing."""
    before = state.partition(":")[0]
    mode = "FULL" if before in ("-", "0") else "DIFF"
    marks = {"status": "ok"} if state else {}
    return entry("/d", n, mode, made, state, kind=kind, fault=fault, **marks)


def chains(found: list[CatalogEntry]) -> dict[int, list[int]]:
    """moment → slots of its chain, for each moment that can be restored."""
    return {at: [link.slot for link in s3napback.choose_chain(found, at).archives]
            for at in s3napback.History(found).restorable()}


DAY = 86400
START = 1_790_000_000


@pytest.mark.parametrize("dates", [
    [0, 1, 2, 3], [0, 1, -20000, 3], [0, 9999, 2, 3], [9999, 1, 2, 3], [3, 2, 1, 0],
    [0, 1, -20000, -19999], [0, 0, 0, 0], [0, 1, 0.995, 2],
])
def test_marked_archives_are_chained_by_what_they_continue_whatever_their_dates(
    dates: list[float]
) -> None:
    states = ["-:a", "a:b", "b:c", "c:d"]
    found = [one(n, START + day * DAY, state)
             for n, (day, state) in enumerate(zip(dates, states, strict=True))]
    for shuffled in (found, found[::-1], found[2:] + found[:2]):
        got = chains(shuffled)
        assert list(got.values()) == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
        assert len(got) == 4  # each has a moment of its own
        newest = s3napback.choose_chain(shuffled, float("inf")).archives
        assert [link.slot for link in newest] == [0, 1, 2, 3]


def test_a_date_that_is_right_is_the_moment_and_one_that_is_wrong_comes_a_second_after() -> None:
    found = [one(0, START, "-:a"), one(1, 5 * DAY, "a:b"), one(2, START + 2 * DAY, "b:c"),
             one(3, START + 9000 * DAY, "c:d"), one(4, START + 4 * DAY, "d:e")]
    assert History(found).moments == [
        START, START + 1, START + 2 * DAY, START + 2 * DAY + 1, START + 4 * DAY
    ]
    # The date by which a wrong clock marked it names the archive, too.
    assert s3napback.choose_chain(found, 5 * DAY).archives[-1].slot == 1


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
    assert s3napback.History(circle).restorable() == []
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
    assert len(s3napback.History([full, *same]).restorable()) == 1 + len(same)


def test_a_thousand_archives_in_one_chain_are_looked_at_in_one_pass() -> None:
    found = [one(n, START + n * DAY, f"{n or '-'}:{n + 1}") for n in range(1000)]
    unmarked = [one(n, START + n * DAY) for n in range(1, 1000)]
    begun = time.process_time()
    assert len(s3napback.History(found[::-1]).restorable()) == 1000
    assert s3napback.History(unmarked).restorable() == []
    assert len(s3napback.choose_chain(found, float("inf")).archives) == 1000
    assert time.process_time() - begun < 2


def nights(site: Site, clocks: list[datetime]) -> list[str]:
    """A night for each clock; the file's content in each."""
    for n, now in enumerate(clocks):
        (site.data / "file").write_text(f"night {n}")
        # The diff files' dates are the clock's as well.
        assert site.run("-f", now=now) in (0, 3)
    return [f"night {n}" for n in range(len(clocks))]


def listed(site: Site) -> dict[str, Any]:
    done = program("list", "--json", "-c", str(site.conf))
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


# ---- moments as people type them ----

BERLIN = ["Europe/Berlin", "CET-1CEST,M3.5.0,M10.5.0/3"]


@pytest.fixture(params=BERLIN)
def berlin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield request.param
    monkeypatch.undo()
    time.tzset()


WINTER, SUMMER = datetime(2026, 11, 26, 12), datetime(2027, 4, 1, 12)


@pytest.mark.parametrize(("now", "text", "utc"), [
    (WINTER, "2026-07-21 02:30", "2026-07-21T00:30:59"),
    (WINTER, "2026-07-21 02:30:00", "2026-07-21T00:30:00"),
    (WINTER, "2026-07-21", "2026-07-21T21:59:59"),
    (WINTER, "2026-01-21", "2026-01-21T22:59:59"),
    (WINTER, "2026-07-21 02:30 +0200", "2026-07-21T00:30:59"),
    (WINTER, "2026-07-21 02:30:00 +0100", "2026-07-21T01:30:00"),
    (WINTER, "2026-07-21 02:30 CEST", "2026-07-21T00:30:59"),
    (WINTER, "2026-07-21T02:30:00Z", "2026-07-21T02:30:00"),
    (SUMMER, "2027-01-21 02:30:00", "2027-01-21T01:30:00"),
    # The hour that the clock showed twice, and the one that it left out.
    (WINTER, "2026-10-25 02:30:00", "2026-10-25T01:30:00"),
    (WINTER, "2026-10-25 02:30:00 +0200", "2026-10-25T00:30:00"),
    (WINTER, "2026-10-25 01:59:59", "2026-10-24T23:59:59"),
    (WINTER, "2026-10-25 03:00:00", "2026-10-25T02:00:00"),
    (SUMMER, "2027-03-28 01:59:59", "2027-03-28T00:59:59"),
    (SUMMER, "2027-03-28 02:30:00", "2027-03-28T00:30:00"),
    (SUMMER, "2027-03-28 03:00:00", "2027-03-28T01:00:00"),
    # Days have 23 hours, or 25.
    (datetime(2026, 10, 26, 0, 30), "yesterday", "2026-10-25T22:59:59"),
    (datetime(2026, 10, 25, 23, 30), "yesterday", "2026-10-24T21:59:59"),
    (datetime(2027, 3, 29, 0, 30), "yesterday", "2027-03-28T21:59:59"),
    (datetime(2026, 10, 26, 3), "3 days ago", "2026-10-23T01:00:00"),
    (datetime(2027, 3, 29, 3), "1 week ago", "2027-03-22T02:00:00"),
    (datetime(2026, 10, 25, 4), "3 hours ago", "2026-10-25T00:00:00"),
])
def test_a_moment_is_read_on_the_clock_of_its_own_time(
    berlin: str, now: datetime, text: str, utc: str
) -> None:
    zones = [None] if berlin.startswith("CET") else [None, ZoneInfo(berlin)]
    for zone in zones:
        at = s3napback.parse_when(text, s3napback.Moment.of(now.replace(tzinfo=zone)))
        assert datetime.fromtimestamp(int(at), timezone.utc).isoformat()[:19] == utc
        # What is shown is read back as the same second.
        shown = f"{s3napback.Moment.of(now.replace(tzinfo=zone)).local(int(at)):%F %T %z}"
        assert s3napback.parse_when(shown, s3napback.Moment.of(now)) == int(at)


def test_far_away_moments_are_refused() -> None:
    for text in ("999999 weeks ago", "0001-01-01", "9999-12-31"):
        try:
            assert isinstance(s3napback.parse_when(text, s3napback.Moment.of(NIGHT)), float)
        except Failure as failure:
            assert failure.status == 2


def test_in_winter_a_summer_night_is_restored_by_its_own_time_and_hints_show_it(
    site: Site, tmp_path: Path
) -> None:
    zone = ZoneInfo("Europe/Berlin")
    for hour, minute in ((2, 0), (3, 0)):
        (site.data / "file").write_text(f"at {hour}")
        (site.data / "big").write_bytes(os.urandom(3000))
        now = datetime(2026, 7, 20 + (hour == 3), hour, minute, tzinfo=zone)
        assert site.run("-f", now=now) == 0
    words = "restore", "-c", str(site.conf), str(site.data), "--to"
    env = {"TZ": "Europe/Berlin"}
    done = program(*words, f"{tmp_path}/a", "--at", "2026-07-21 02:30", env=env)
    assert b"as of 2026-07-20 02:00:00 +0200 is in" in done.stderr
    assert Path(f"{tmp_path}/a{site.data}/file").read_text() == "at 2"
    last = max(site.archives().values(), key=lambda archive: archive.made)
    site.store().delete([last.chunks[0].key])
    done = program(*words, f"{tmp_path}/b", env=env)
    assert (done.returncode, b"2026-07-20 02:00:00 +0200" in done.stderr) == (1, True), done.stderr


def test_a_moment_that_list_prints_restores_what_it_names_to_the_fraction_of_a_second(
    tmp_path: Path
) -> None:
    """The Perl script's archives have the date of their last chunk, which folders keep to ns."""
    store = s3napback.open_store("b", s3napback.Access(f"file://{tmp_path}"), lambda: 1.7e9)
    store.create()
    for n in range(3):
        store.put(f"MySQL/shop-{n}:{0:020d}", f"night {n}".encode(), {})
        at = 1_700_000_000 + n * 86400 + 0.75
        os.utime(tmp_path / "b" / f"MySQL%2Fshop-{n}%3A{0:020d}", (at, at))
    shutil.rmtree(tmp_path / "b" / ".meta")  # what is noted there stands before a date
    place = ["-b", "b", "--endpoint", f"file://{tmp_path}"]
    for zone in ("UTC", "Asia/Kathmandu"):
        run = partial(program, env={"TZ": zone})
        line = run("list", *place).stdout.decode().splitlines()[-1]
        moments = line.removeprefix("  can be restored as of: ").split(", ")
        assert len(moments) == 3
        for n, moment in enumerate(moments):
            done = run("restore", *place, "MySQL/shop", "--at", moment, "--stdout")
            assert done.stdout == f"night {n}".encode(), done.stderr


# ---- what marks and dates do not tell ----


def unmarked_copy(site: Site, folder: Path) -> list[str]:
    """The bucket as a tool copies it that keeps neither metadata nor dates."""
    target = folder / "copies" / "bkt"
    target.mkdir(parents=True)
    for path in sorted((site.folder / "buckets" / "bkt").iterdir()):
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    return ["-b", "bkt", "--endpoint", f"file://{folder}/copies"]


def test_a_copy_without_marks_and_dates_says_what_is_not_known(
    site: Site, tmp_path: Path, capsys: Any
) -> None:
    full = NIGHT - timedelta(days=1)
    nights(site, [full, full + timedelta(days=1), full + timedelta(days=28)])
    place = unmarked_copy(site, tmp_path)
    capsys.readouterr()
    s3napback.main(["list", *place])
    assert "in doubt: " in capsys.readouterr().out
    s3napback.main(["list", "--json", *place])
    assert "which state is the newest" in json.loads(capsys.readouterr().out)["sources"][0][
        "doubts"][0]
    s3napback.main(["restore", *place, str(site.data), "--to", f"{tmp_path}/to"])
    assert "in doubt: " in capsys.readouterr().err
    s3napback.main(["verify", *place])
    assert "in doubt: " in capsys.readouterr().err
    s3napback.main(["restore-script", *place, str(site.data)])
    assert "in doubt: " in capsys.readouterr().err
    # The bucket itself leaves no doubt.
    assert s3napback.main(["list", "-c", str(site.conf)]) == 0
    assert "in doubt" not in capsys.readouterr().out


def test_an_archive_that_lost_its_marks_is_never_silently_older_or_newer() -> None:
    found = [one(0, START, "-:a"), one(1, START + DAY, "a:b"), one(2, START + 2 * DAY, "b:c")]
    lost = one(1, START + 90 * DAY)  # a copy's date
    local = s3napback.Moment(0)
    assert s3napback.date_doubts(found, local) == []
    torn = one(3, START + 3 * DAY, fault="its last chunk is not there")
    assert s3napback.date_doubts([*found, torn], local) == []
    (doubt,) = s3napback.date_doubts([found[0], lost, found[2]], local)
    assert doubt.startswith("/d-1-DIFF has no marks, but a later date than /d-0-FULL")
    # In a chain a gap is never bridged by an archive of a later date.
    with pytest.raises(Failure, match="/d-2-DIFF continues an archive that is no longer there"):
        s3napback.choose_chain([found[0], lost, found[2]], START + 3 * DAY)


@pytest.mark.parametrize(("made", "said"), [
    (5 * DAY, "may be newer"), (START - 365 * DAY, "may be newer"),
    (START + 366 * DAY, "may be older"),
])
def test_a_dump_of_a_wrong_clock_is_doubted(made: int, said: str) -> None:
    found = [one(n, at, "-:") for n, at in enumerate((START, START + DAY, made))]
    (doubt,) = s3napback.date_doubts(found, s3napback.Moment(0))
    assert doubt.startswith("/d-2-FULL is dated ")
    assert said in doubt


def test_the_perl_scripts_archives_before_ours_leave_no_doubt() -> None:
    found = [one(n, START + n * DAY) for n in range(5)]
    for later in (5, 900):  # its uploads ended in 2025, maybe long before we came
        ours = [one(5, START + later * DAY, "-:a"), one(6, START + (later + 1) * DAY, "a:b")]
        assert s3napback.date_doubts(found + ours, s3napback.Moment(0)) == []
