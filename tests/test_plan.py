"""The plan: which archive on which day, what can be restored then, and how much that is."""

from __future__ import annotations

import json
import os
from datetime import date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from conftest import NIGHT, Capture, Site, program

import s3napback

SIMPLE = "Diffs 3\nFulls 2"


def block(kind: str, name: object, timing: str) -> str:
    return f"<{kind} {name}>\n{timing}\n</{kind}>"


def plan(site: Site, capsys: Capture, *words: str, now: datetime = NIGHT) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert site.run("plan", "--json", *words, now=now) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["format"] == 1
    sources: list[dict[str, Any]] = shown["sources"]
    return sources


def text(site: Site, capsys: Capture, *words: str, now: datetime = NIGHT) -> str:
    capsys.readouterr()
    assert site.run("plan", *words, now=now) == 0
    return capsys.readouterr().out


# ---- what is due ----


def test_each_day_has_its_slot_and_mode(site: Site, capsys: Capture) -> None:
    site.jobs = "\n".join((
        block("Directory", "/srv/a", SIMPLE), block("MySQL", "shop", SIMPLE),
        block("Directory", "/srv/c", "Frequency 3\nDiffs 1\nFulls 2"),
    ))
    simple, every_third, dump = plan(site, capsys, "--days", "4")  # days 326 to 329 of the year
    assert simple["due"] == {
        "2026-11-23": "6-DIFF", "2026-11-24": "7-DIFF", "2026-11-25": "0-FULL",
        "2026-11-26": "1-DIFF",
    }
    assert list(dump["due"].values()) == ["0-FULL", "1-FULL", "0-FULL", "1-FULL"]
    assert every_third["due"] == {"2026-11-24": "1-DIFF"}


@pytest.mark.parametrize(("day", "timing"), [
    (25, "Frequency 5\nPhase 2\nDiffs 3\nFulls 1"),
    pytest.param(19, SIMPLE, marks=pytest.mark.slow),
    pytest.param(20, "CycleType HanoiCycle\nDiscs 3", marks=pytest.mark.slow),
])
def test_the_plan_of_a_turn_of_the_year_is_what_the_runs_leave(
    site: Site, capsys: Capture, day: int, timing: str
) -> None:
    """The plan before the first night, and `list` after the last one."""
    site.jobs = block("Directory", site.data, timing)
    first = datetime(2026, 12, day, 3)
    (source,) = plan(site, capsys, "--days", "18", now=first)
    for n in range(18):
        if "Frequency" in timing and n % 5 > 1:
            continue
        (site.data / f"night{n}").write_text(f"{n}")
        assert site.run(now=first + timedelta(days=n)) == 0
        made = {name.removeprefix(f"{site.data}-") for name, archive in site.archives().items()
                if archive.metadata["day"] == f"{(first + timedelta(days=n)).date()}"}
        expected = source["due"].get(f"{(first + timedelta(days=n)).date()}")
        assert made == ({expected} if expected else set())
    capsys.readouterr()
    assert site.run("list", "--json") == 0
    (listed,) = json.loads(capsys.readouterr().out)["sources"]
    began = f"{first.date()}"
    assert [at[:10] for at in listed["restorable"]] == [
        day for day in source["restorable"] if day >= began
    ]
    there = {one["archive"].removeprefix(f"{site.data}-") for one in listed["archives"]}
    assert there == {end for day, end in source["kept"].items() if day >= began}


def test_a_hanoi_cycle_reaches_back_ever_more_seldom(site: Site, capsys: Capture) -> None:
    site.jobs = block("Directory", "/srv/a", "CycleType HanoiCycle\nDiscs 5")
    (source,) = plan(site, capsys, "--on", "2026-12-31")
    ages = [(date(2026, 12, 31) - date.fromisoformat(day)).days for day in source["restorable"]]
    assert len(ages) == 5
    assert ages[-1] == 0
    assert 8 <= ages[0] <= 16


def test_an_oldest_disc_that_is_archived_stays(site: Site, capsys: Capture) -> None:
    timing = "CycleType HanoiCycle\nDiscs 3\nArchiveOldestDisc Yes"
    site.jobs = block("Directory", "/srv/a", timing)
    (source,) = plan(site, capsys, "--on", "2026-12-31")
    assert len(source["restorable"]) > 360  # one for each four of the days that are followed
    assert " and before\n" in text(site, capsys, "--days", "1")


@pytest.mark.parametrize(("year", "slots"), [(2027, 365), (2028, 366)])
def test_the_last_day_of_a_leap_year_has_a_slot_of_its_own(
    site: Site, capsys: Capture, year: int, slots: int
) -> None:
    site.jobs = block("Directory", "/srv/a", "Diffs 0\nFulls 366")
    (source,) = plan(site, capsys, "--on", f"{year}-12-31")
    days = source["restorable"]
    assert len(days) == 366  # in 2027 that of 2024-12-31 is still there
    assert days[0] == {365: "2024-12-31", 366: "2028-01-01"}[slots]
    assert list(source["kept"].values())[-1] == f"{slots - 1}-FULL"


def test_on_the_days_that_the_clock_is_changed_nothing_is_left_out(
    site: Site, capsys: Capture
) -> None:
    """In Berlin 02:30 is not there on March 28th of 2027, and twice on October 31st."""
    site.jobs = block("Directory", "/srv/a", SIMPLE)
    for first in (datetime(2027, 3, 26, 12), datetime(2027, 10, 29, 12)):
        now = first.replace(tzinfo=ZoneInfo("Europe/Berlin"))
        (source,) = plan(site, capsys, "--days", "5", "--time", "02:30", now=now)
        slot = (now.timetuple().tm_yday - 1) % 8
        slots = [int(end.partition("-")[0]) for end in source["due"].values()]
        assert slots == [(slot + n) % 8 for n in range(5)]
        assert list(source["due"]) == [f"{(now + timedelta(days=n)).date()}" for n in range(5)]


def test_a_hanoi_cycle_counts_days_of_utc(site: Site, capsys: Capture) -> None:
    """At 03:00 in Sydney it is still the day before in London."""
    site.jobs = block("Directory", "/srv/a", "CycleType HanoiCycle\nDiscs 8")
    now = datetime(2026, 11, 23, 15, tzinfo=ZoneInfo("Australia/Sydney"))
    (night,) = plan(site, capsys, "--days", "3", now=now)
    (noon,) = plan(site, capsys, "--days", "3", "--time", "12:00", now=now)
    assert list(night["due"].values())[1:] == list(noon["due"].values())[:2]


# ---- what is shown ----


def test_the_text_has_a_column_for_each_rotation_and_a_picture_of_each_source(
    site: Site, capsys: Capture
) -> None:
    site.jobs = "\n".join((
        f"<Cycle nightly>\n{SIMPLE}\nDirectory /srv/a /srv/b\n</Cycle>",
        block("Directory", "/srv/c", "Frequency 7\nDiffs 3\nFulls 2"),
    ))
    lines = text(site, capsys, "--days", "2", "--on", "2026-11-30").splitlines()
    assert lines[0].split() == ["#1", "#2"]
    assert lines[1].split() == ["2026-11-23", "Mon", "-", "6-DIFF"]
    shown = {name: lines[lines.index(f"{head}  Directory {name}") + 1].split("  ")
             for head, name in (("#2", "/srv/a"), ("#2", "/srv/b"), ("#1", "/srv/c"))}
    assert shown["/srv/a"] == shown["/srv/b"]
    _, _, picture, reach = shown["/srv/a"]
    assert picture == f"{'FdddFd':.>50}"
    assert reach == "6, from 2026-11-25"


@pytest.mark.parametrize("columns", [1, 14])
def test_no_line_of_the_calendar_is_wider_than_a_terminal(
    site: Site, capsys: Capture, columns: int
) -> None:
    site.jobs = "\n".join(
        block("MySQL", f"shop{n}", f"Phase {n}\nFulls 9999") for n in range(columns)
    )
    site.store().create()
    shown = text(site, capsys, "--days", "3")
    assert max(map(len, shown.splitlines())) <= 80
    calendar = shown.partition("What can")[0]
    assert calendar.count("2026-11-23") == {1: 1, 14: 3}[columns]
    assert calendar.split().count(f"{326 + columns - 1}-FULL") == min(columns, 3)
    assert f"#{columns}" in calendar.split()


def test_names_with_escape_sequences_move_no_cursor(site: Site, capsys: Capture) -> None:
    site.jobs = block("Directory", '"/srv/\x1b]0;owned\x07"', SIMPLE)
    assert "\x1b" not in text(site, capsys)


def test_what_is_never_due_is_shown_so(site: Site, capsys: Capture) -> None:
    site.jobs = block("Directory", "/srv/a", "CycleType WeeklyCycle")
    assert " -\n" in (shown := text(site, capsys)) and shown.endswith("  0\n")
    site.jobs = ""
    assert "What can be restored" in text(site, capsys)


# ---- sizes ----


def test_the_size_is_that_of_the_last_archives(site: Site, capsys: Capture) -> None:
    site.settings["Prefix"] = "web1"
    site.jobs = block("Directory", site.data, SIMPLE)
    start = datetime(2026, 11, 25, 3)  # slot 0
    (site.data / "large").write_bytes(os.urandom(50_000))
    for n in range(3):
        (site.data / "small").write_bytes(os.urandom(3000))
        assert site.run(now=start + timedelta(days=n)) == 0
    sizes = {name.rpartition("data-")[2]: archive.size
             for name, archive in site.archives().items()}
    now = start + timedelta(days=3)

    def then(*words: str) -> object:
        (source,) = plan(site, capsys, *words, now=now)
        return source["bytes"]

    assert then("--on", "2026-11-27") == sum(sizes.values())
    assert then("--on", "2026-11-28") == sum(sizes.values()) + sizes["2-DIFF"]
    all_slots = 2 * sizes["0-FULL"] + sizes["1-DIFF"] + 5 * sizes["2-DIFF"]  # of each its newest
    assert then("--on", "2027-06-01") == all_slots
    assert f"{all_slots / 1000:.1f} kB" in text(site, capsys, "--on", "2027-06-01", now=now)


def test_it_asks_once_for_each_source(s3_site: Site, s3_server: Any, capsys: Capture) -> None:
    s3_site.jobs = f"Directory {s3_site.data} /srv/b\nMySQL shop"
    s3_server.client().create_bucket(Bucket="bkt")
    s3_server.requests.clear()
    sources = plan(s3_site, capsys)
    assert s3_server.requests == [("GET", "/bkt")] * 3
    assert [source["bytes"] for source in sources] == [None, None, None]
    assert "3 sources not known" in text(s3_site, capsys)


@pytest.mark.parametrize(
    ("settings", "why"),
    [({"S3Endpoint": "http://127.0.0.1:1"}, "no answer from http://127.0.0.1:1"),
     ({"S3Endpoint": "http://127.0.0.1:1", "S3Keyfile": "/no/such/file"}, "cannot read S3Keyfile"),
     ({}, "bucket bkt does not exist")],
)
def test_without_a_bucket_the_calendar_is_shown_all_the_same(
    site: Site, capsys: Capture, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], why: str
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    site.settings.update(settings)
    assert site.run("plan") == 0
    said = capsys.readouterr()
    assert "2026-12-06 Sun" in said.out and "Size then" not in said.out
    assert said.err.startswith("s3napback: the size then is not known: ") and why in said.err
    assert [source["bytes"] for source in plan(site, capsys)] == [None]


# ---- calls ----


@pytest.mark.parametrize(
    "words",
    [("--on", "tomorrow"), ("--on", "2026-02-30"), ("--on", "0001-01-01"), ("--on", "9999-12-31"),
     ("--on", ""), ("--time", "25:00"), ("--time", "noon"), ("--time", "03:00+99:00"),
     ("--days", "0"), ("--days", "many")],
)
def test_what_is_no_day_is_a_wrong_call(site: Site, capsys: Capture, words: tuple[str]) -> None:
    status = site.run("plan", *words)
    message = capsys.readouterr().err
    assert (status, "Traceback" in message) == (2, False)
    assert message.startswith("s3napback: ")


def test_a_config_without_a_rotation_is_told_with_its_line(site: Site, capsys: Capture) -> None:
    site.jobs = block("Directory", "/srv/a", "Frequency 0")
    assert site.run("plan") == 2
    assert f"{site.conf}:7: Illegal modulus zero" in capsys.readouterr().err


def test_a_config_that_cannot_be_read_keeps_no_calendar_before_it_back(
    site: Site, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3napback, "CONFIG_DIR", str(site.folder))
    (site.folder / "bad.conf").write_text("Bucket b\nTypo x\n")
    assert s3napback.main(["plan", "-c", str(site.write()), "bad"], now=NIGHT) == 2
    assert "2026-12-06 Sun" in capsys.readouterr().out


def test_it_runs_where_nothing_of_the_machine_is_there(site: Site) -> None:
    """No DiffDir, no HOME, in another zone, as a program that reads a pipe sees it."""
    site.settings.update(DiffDir="/no/such/folder", S3Endpoint="file:///no/such/folder")
    site.jobs = block("SubversionDir", "/no/such/folder", SIMPLE)
    done = program("plan", "-c", str(site.write()), env={"TZ": "Asia/Tokyo", "HOME": ""})
    assert (done.returncode, done.stderr.count(b"\n")) == (0, 1)
    assert b"SubversionDir /no/such/folder" in done.stdout
