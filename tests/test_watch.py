"""Section 18: what those who watch the backups are told."""

import json
import os
import re
import shutil
import subprocess
import time
from dataclasses import replace
from datetime import date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from conftest import ESC, NIGHT, Capture, Site, cycle_of, entry, require_tool, send, stage_only
from conftest import stage as stage

import s3napback
from s3napback import CycleSpec, Moment, Standing

BERLIN = ZoneInfo("Europe/Berlin")
HOURS = 3600.0
SOURCE = Standing("Directory", "/d", "c:1", 0)
DUMP = Standing("MySQL", "shop", "c:1", 0)
REPOSITORY = Standing("Subversion", "/r", "c:1", 0)


def at(text: str, zone: ZoneInfo = BERLIN) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=zone)


def backup(
    text: str, *, slot: int = 0, mode: str = "FULL", state: str = "", day: str = "",
    zone: ZoneInfo = BERLIN, **marks: str,
) -> s3napback.CatalogEntry:
    """An archive that began at a moment of the local clock, in the run of that day, or another."""
    began = at(text, zone)
    if marks.get("fault") is None:
        marks.setdefault("status", "ok")
        marks["day"] = day or f"{began:%Y-%m-%d}"
    return entry("/d", slot, mode, began.timestamp(), state, **marks)


def verdict(
    found: list[s3napback.CatalogEntry], now: str, timing: str = "", *, zone: ZoneInfo = BERLIN,
    source: Standing = SOURCE, **terms: Any,
) -> str:
    cycle = cycle_of(dict(line.split() for line in timing.split(", ") if line))
    terms = {"grace": 12 * HOURS, **terms}
    return s3napback.judge(source, cycle, found, Moment.of(at(now, zone)), **terms).verdict


# ---- late ----


@pytest.mark.parametrize(
    ("began", "now", "expected"),
    [
        ("2026-11-23 03:00", "2026-11-23 03:01", "ok"),
        ("2026-11-23 03:00", "2026-11-24 02:59", "ok"),  # tonight's has not begun
        ("2026-11-23 03:00", "2026-11-24 14:59", "ok"),  # it takes its hours
        ("2026-11-23 03:00", "2026-11-24 15:01", "late"),  # and did not come
        ("2026-11-20 03:00", "2026-11-23 03:00", "late"),
        ("2026-11-23 23:30", "2026-11-24 23:00", "ok"),
        ("2026-11-23 23:30", "2026-11-25 11:29", "ok"),
        ("2026-11-23 23:30", "2026-11-25 11:31", "late"),
    ],
)
def test_a_daily_job_is_late_when_the_hour_of_the_last_run_has_passed_by_the_grace(
    began: str, now: str, expected: str
) -> None:
    assert verdict([backup(began)], now) == expected


@pytest.mark.parametrize(
    ("grace", "now", "expected"),
    [
        (0, "2026-11-24 03:00", "ok"), (0, "2026-11-24 03:01", "late"),
        (30 * HOURS, "2026-11-25 08:59", "ok"), (30 * HOURS, "2026-11-25 09:01", "late"),
        (1e25, "2046-11-25 09:01", "ok"),
    ],
)
def test_the_grace_is_given(grace: float, now: str, expected: str) -> None:
    assert verdict([backup("2026-11-23 03:00")], now, grace=grace) == expected


@pytest.mark.parametrize(
    ("now", "timing", "expected"),
    [
        ("2026-11-25 00:59", "", "ok"),  # of the 24th, whose run comes to it after midnight again
        ("2026-11-25 12:59", "", "ok"),
        ("2026-11-25 13:01", "", "late"),
        # Of days 0, 7 … of the year November 23rd, a Monday, is day 326, and the 26th is one.
        ("2026-11-27 12:59", "Frequency 7, Phase 3", "ok"),
        ("2026-12-01 12:59", "Frequency 7, Phase 3", "ok"),
        ("2026-12-01 13:01", "Frequency 7, Phase 3", "late"),
    ],
)
def test_a_run_that_came_to_it_after_midnight_is_of_the_day_on_which_it_began(
    now: str, timing: str, expected: str
) -> None:
    assert verdict([backup("2026-11-24 01:00", day="2026-11-23")], now, timing) == expected


@pytest.mark.parametrize(
    ("began", "timing", "on_time", "too_late"),
    [
        # yday 326 is no day of 7s: 322 (the 19th) is, and 329 (the 26th).
        ("2026-11-19 03:00", "Frequency 7", "2026-11-26 14:00", "2026-11-26 16:00"),
        # SimpleCycle counts the days of the year: 364 is the last one, and New Year the next.
        ("2026-12-31 03:00", "Frequency 7", "2027-01-01 14:00", "2027-01-01 16:00"),
        ("2026-11-23 03:00", "Frequency 7, Phase 3", "2026-11-30 14:00", "2026-11-30 16:00"),
        ("2024-12-31 03:00", "Frequency 1000, Phase -365", "2028-12-31 14:00",
         "2028-12-31 16:00"),
        # 20780 days since 1970 is November 23rd: Hanoi's days go on over New Year.
        ("2026-12-27 03:00", "CycleType HanoiCycle, Frequency 2", "2026-12-29 14:00",
         "2026-12-29 16:00"),
        ("2026-12-31 03:00", "CycleType HanoiCycle, Frequency 3", "2027-01-02 14:00",
         "2027-01-02 16:00"),
    ],
)
def test_the_day_that_is_due_next_is_the_cycles(
    began: str, timing: str, on_time: str, too_late: str
) -> None:
    assert verdict([backup(began)], on_time, timing) == "ok"
    assert verdict([backup(began)], too_late, timing) == "late"


@pytest.mark.parametrize("began", ["2026-03-28 02:30", "2026-10-24 02:30"])  # two nights' changes
def test_a_changed_clock_makes_nothing_late(began: str) -> None:
    next_night = at(began) + timedelta(days=1, hours=11)  # of the local clock
    found = [backup(began)]
    assert verdict(found, next_night.isoformat()[:16]) == "ok"
    assert verdict(found, (next_night + timedelta(hours=3)).isoformat()[:16]) == "late"


def test_the_days_of_a_cycle_keep_the_hour_of_the_process_zone(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Europe/Berlin")
        time.tzset()
        days = s3napback.backup_days(CycleSpec(), Moment.of(datetime(2026, 10, 24, 3)), 1)
        shown = [str(next(days).local()) for _ in range(2)]
    time.tzset()
    assert shown == ["2026-10-24 03:00:00+02:00", "2026-10-25 03:00:00+01:00"]


def test_days_are_those_of_the_local_clock() -> None:
    # In New York it is still the 19th, a day of the cycle, where UTC has the 20th, which is none.
    zone = ZoneInfo("America/New_York")
    found = [backup("2026-11-19 22:00", zone=zone)]
    assert verdict(found, "2026-11-27 09:00", "Frequency 7", zone=zone) == "ok"
    assert verdict(found, "2026-11-27 11:00", "Frequency 7", zone=zone) == "late"


def test_what_another_time_zone_stored_is_not_late_before_its_time() -> None:
    tokyo = ZoneInfo("Asia/Tokyo")
    found = [backup("2026-11-23 03:00", zone=tokyo)]  # 2026-11-22 19:00 in Berlin
    assert verdict(found, "2026-11-24 06:00") == "ok"
    assert verdict(found, "2026-11-26 08:00") == "late"


def test_a_day_that_a_mark_makes_up_is_no_traceback() -> None:
    for day in ("2026-99-99", "soon", "\x1b"):
        assert verdict([backup("2026-11-23 03:00", day=day)], "2026-11-23 04:00") == "ok"


def test_a_manual_run_between_two_days_of_the_cycle_counts() -> None:
    found = [backup("2026-11-22 15:00")]
    assert verdict(found, "2026-11-25 20:00", "Frequency 7") == "ok"
    assert verdict(found, "2026-11-27 04:00", "Frequency 7") == "late"  # the 26th was due


def test_what_is_too_old_is_late_whatever_its_cycle() -> None:
    found = [backup("2026-11-19 03:00")]
    for days, expected in ((4, "late"), (5, "ok")):
        assert verdict(found, "2026-11-23 04:00", "Frequency 7",
                       max_age=days * 86400) == expected


@pytest.mark.parametrize(
    "timing", ["CycleType WeeklyCycle", "Frequency 400", "Frequency 400, Phase 1"]
)
def test_what_its_cycle_never_asks_for_is_said(timing: str) -> None:
    standing = s3napback.judge(
        SOURCE, cycle_of(dict(line.split() for line in timing.split(", "))),
        [backup("2026-11-23 03:00")], Moment.of(at("2026-11-23 04:00")), 0.0)
    if timing == "Frequency 400":  # day 0 of the year, at least
        assert (standing.verdict, standing.due_next) == ("ok", date(2027, 1, 1))
        return
    assert (standing.verdict, standing.due_last, standing.due_next) == ("late", None, None)
    assert standing.why == "no day is its cycle's"
    assert verdict([], "2026-11-23 04:00", timing) == "never"


def test_the_days_before_and_after_now_are_told() -> None:
    standing = s3napback.judge(SOURCE, cycle_of({"Frequency": "7"}), [],
                               Moment.of(at("2026-12-30 04:00")), 0.0)
    assert (standing.due_last, standing.due_next) == (date(2026, 12, 24), date(2026, 12, 31))


def dump(slot: int, made: str, stored: str) -> s3napback.CatalogEntry:
    """A dump, when it was made by the clock of its machine, and stored by that of the bucket."""
    one = entry("MySQL/shop", slot, "FULL", at(stored).timestamp(), status="ok", day=made[:10])
    marks = {**one.archive.metadata, "made": f"{made}T02:00:00Z"}
    return replace(one, archive=replace(one.archive, metadata=marks))


@pytest.mark.parametrize("slots", [(0, 1), (1, 0)])
def test_a_clock_that_was_ahead_hides_no_missed_night(slots: tuple[int, int]) -> None:
    ahead = dump(slots[0], "2028-01-01", "2026-11-22 03:00")
    after = dump(slots[1], "2026-11-23", "2026-11-23 03:00")
    assert verdict([ahead], "2026-11-22 16:00", source=DUMP) == "ok"
    assert verdict([ahead], "2026-11-23 16:00", source=DUMP) == "late"
    assert verdict([ahead, after], "2026-11-23 16:00", source=DUMP) == "ok"
    assert verdict([ahead, after], "2026-11-24 16:00", source=DUMP) == "late"


# ---- never, broken, warnings ----

CHAIN = [
    backup("2026-11-20 03:00", state="-:a"),
    backup("2026-11-21 03:00", slot=1, mode="DIFF", state="a:b"),
    backup("2026-11-22 03:00", slot=2, mode="DIFF", state="b:c"),
    backup("2026-11-23 03:00", slot=3, mode="DIFF", state="c:d"),
]


def test_a_chain_that_is_whole_is_well() -> None:
    assert verdict(CHAIN, "2026-11-23 04:00") == "ok"


def test_without_any_archive_there_was_never_one() -> None:
    assert verdict([], "2026-11-23 04:00") == "never"


@pytest.mark.parametrize("lost", range(3))
def test_what_continues_something_that_is_gone_is_broken(lost: int) -> None:
    standing = s3napback.judge(SOURCE, CycleSpec(), CHAIN[:lost] + CHAIN[lost + 1 :],
                               Moment.of(at("2026-11-23 04:00")), 0.0)
    assert standing.verdict == "broken"
    assert standing.why == (f"/d-{lost + 1}-DIFF continues an archive that is no longer there")
    assert standing.archive == ("" if lost == 0 else str(CHAIN[lost - 1]))


def test_the_next_self_contained_archive_mends_it() -> None:
    mended = backup("2026-11-24 03:00", slot=4, mode="DIFF", state="-:e")
    assert verdict([*CHAIN[2:], mended], "2026-11-24 04:00") == "ok"


def test_an_archive_without_end_is_no_backup_and_breaks_none() -> None:
    cut = backup("2026-11-24 03:00", slot=4, mode="DIFF", fault="it was cut off")
    assert verdict([*CHAIN, cut], "2026-11-24 04:00") == "ok"  # it may be on its way
    assert verdict([*CHAIN, cut], "2026-11-24 16:00") == "late"
    assert verdict([cut], "2026-11-24 16:00") == "broken"


def test_what_was_stored_with_warnings_says_so_if_it_is_not_late() -> None:
    found = [backup("2026-11-23 03:00", status="warnings")]
    assert verdict(found, "2026-11-23 04:00") == "warnings"
    assert verdict(found, "2026-11-25 04:00") == "late"


def test_archives_of_the_perl_script_count_by_when_they_were_stored() -> None:
    full = entry("/d", 0, "FULL", at("2026-11-22 04:00").timestamp())
    diff = entry("/d", 1, "DIFF", at("2026-11-23 03:10").timestamp())
    assert verdict([full, diff], "2026-11-24 15:00") == "ok"
    assert verdict([full, diff], "2026-11-24 15:11") == "late"
    assert verdict([diff], "2026-11-23 15:11") == "broken"


# ---- repositories ----


@pytest.mark.parametrize(
    ("unstored", "now", "expected"),
    [
        (float("inf"), "2026-11-27 16:00", "ok"),  # nothing new since
        (None, "2026-11-27 16:00", "ok"),  # nobody knows: only a FULL must come
        ("2026-11-24 02:00", "2026-11-24 14:59", "ok"),
        ("2026-11-24 02:00", "2026-11-24 15:01", "late"),
        ("2026-11-24 09:00", "2026-11-24 16:00", "ok"),  # the next run will see it
        ("2026-11-24 09:00", "2026-11-25 14:59", "ok"),
        ("2026-11-24 09:00", "2026-11-25 15:01", "late"),
        (float("inf"), "2026-11-28 16:00", "late"),
        (None, "2026-11-28 16:00", "late"),
    ],
)
def test_a_repository_is_late_by_its_revisions_and_its_fulls(
    unstored: float | str | None, now: str, expected: str
) -> None:
    timing = "Phase 5"  # November 28th is day 331 of the year, and 336 is 7 times 48: a FULL's
    moment = at(unstored).timestamp() if isinstance(unstored, str) else unstored
    assert verdict([backup("2026-11-23 03:00", state="0:5", kind="Subversion")], now, timing,
                   source=REPOSITORY, unstored=moment) == expected


def test_a_new_repository_is_waited_for() -> None:
    created = at("2026-11-23 09:00").timestamp()
    for now, expected in (("2026-11-23 10:00", "ok"), ("2026-11-25 22:00", "never")):
        assert verdict([], now, source=REPOSITORY, unstored=created) == expected


# ---- the command ----


def tell(
    site: Site, capsys: Capture, now: datetime, *words: str
) -> tuple[int, list[dict[str, Any]]]:
    """(exit status, the sources) that `status --json` tells of the site."""
    capsys.readouterr()
    status = s3napback.main(["status", "--json", "-c", str(site.write()), *words], now=now)
    shown = json.loads(capsys.readouterr().out)
    assert (shown["format"], shown["problems"]) == (1, [])
    return status, shown["sources"]


def verdicts(site: Site, capsys: Capture, now: datetime = NIGHT, *words: str) -> dict[str, str]:
    """Name → verdict; "" → the exit status."""
    status, sources = tell(site, capsys, now, *words)
    return {"": str(status), **{one["name"].rpartition("/")[2]: one["verdict"] for one in sources}}


def hours(count: float) -> datetime:
    return NIGHT + timedelta(hours=count)


def test_the_status_is_that_of_the_worst_source(site: Site, capsys: Capture) -> None:
    assert site.run() == 0
    assert verdicts(site, capsys) == {"": "0", "data": "ok"}
    assert verdicts(site, capsys, hours(37)) == {"": "3", "data": "late"}
    (site.folder / "more").mkdir()
    (site.folder / "more" / "file").write_text("x")
    site.jobs += f"\nDirectory {site.folder}/more"
    assert verdicts(site, capsys, hours(37)) == {"": "1", "data": "late", "more": "never"}
    assert site.run(now=hours(24)) == 0
    assert verdicts(site, capsys, hours(25)) == {"": "0", "data": "ok", "more": "ok"}


def test_a_bucket_that_lost_a_link_is_broken_until_the_next_night(
    site: Site, capsys: Capture
) -> None:
    for day in range(3):
        (site.data / f"night{day}").write_text("x")
        assert site.run(now=hours(24 * day)) == 0
    store = site.store()
    names = sorted(site.archives(), key=lambda name: site.archives()[name].made)
    store.delete([item.key for item in s3napback.archive_objects(store, names[1])])
    status, (one,) = tell(site, capsys, hours(49))
    assert (status, one["verdict"], one["archive"]) == (1, "broken", names[0])
    assert one["why"] == f"{names[2]} continues an archive that is no longer there"
    (site.data / "more").write_text("x")
    assert site.run(now=hours(72)) == 0  # a FULL
    assert verdicts(site, capsys, hours(73)) == {"": "0", "data": "ok"}


def test_it_changes_nothing_and_needs_no_diff_dir(site: Site, capsys: Capture) -> None:
    assert site.run() == 0
    before = site.state()
    site.settings["DiffDir"] = "/nowhere/at/all"
    assert verdicts(site, capsys) == {"": "0", "data": "ok"}
    assert site.state() == before


def test_it_works_while_a_backup_runs(site: Site, capsys: Capture) -> None:
    assert site.run() == 0
    with s3napback.DiffDir(f"{site.folder}/diffs/", Moment.of(NIGHT)).lock():
        assert verdicts(site, capsys) == {"": "0", "data": "ok"}


def test_an_archive_of_the_future_tells_of_a_wrong_clock(site: Site, capsys: Capture) -> None:
    assert site.run() == 0
    for back, expected in ((timedelta(minutes=30), "ok"), (timedelta(days=20), "late")):
        wanted = 3 if expected == "late" else 0
        assert s3napback.main(["status", "-c", str(site.conf)], now=NIGHT - back) == wanted
        row = capsys.readouterr().out.splitlines()[-1]
        assert row.split()[:2] == [expected, "-"]
        assert ("a machine's clock is wrong" in row) == (expected == "late")


def test_ages_of_months_are_told_in_days(site: Site, capsys: Capture) -> None:
    assert site.run() == 0
    capsys.readouterr()
    assert s3napback.main(["status", "-c", str(site.conf)], now=hours(24 * 124 + 13)) == 3
    title, row = capsys.readouterr().out.splitlines()
    assert row[:21] == "late       124 d 13 h"
    assert row.index("Directory") == title.index("WHAT")


def test_a_table_has_the_worst_last(site: Site, capsys: Capture) -> None:
    assert site.run() == 0
    site.jobs = f"Directory {site.folder}/temp\n{site.jobs}"
    capsys.readouterr()
    assert s3napback.main(["status", "-c", str(site.write())], now=hours(1)) == 1
    title, first, last = capsys.readouterr().out.splitlines()
    assert title.split() == ["VERDICT", "AGE", "DUE", "LAST", "DUE", "NEXT", "SIZE", "WHAT"]
    assert re.fullmatch(
        rf"ok +1 h 00 min  2026-11-23  2026-11-24  +\d+ bytes  Directory {site.data}", first)
    assert re.fullmatch(
        rf"never +-  2026-11-23  2026-11-24  +0 bytes  Directory {site.folder}/temp", last)


def nagios(capsys: Capture, *words: str, now: datetime = NIGHT) -> tuple[int, str, dict[str, str]]:
    """(plugin's status, what it says, label → value)"""
    capsys.readouterr()
    status = s3napback.main(["status", "--nagios", *words], now=now)
    (line,) = capsys.readouterr().out.splitlines()
    said, _, data = line.partition(" | ")
    pairs = re.findall("'([^'=|]+)'=(\\S+)", data)
    assert " ".join(f"'{label}'={value}" for label, value in pairs) == data
    return status, said, dict(pairs)


def test_a_plugin_of_nagios_says_one_line_with_its_data(site: Site, capsys: Capture) -> None:
    conf = ["-c", str(site.write())]
    assert site.run() == 0
    size = sum(one.size for one in site.archives().values())
    data = {f"Directory {site.data} age": "3600s", f"Directory {site.data} size": f"{size}B"}
    assert nagios(capsys, *conf, now=hours(1)) == (0, "S3NAPBACK OK: 1 ok", data)
    assert s3napback.main(["status", "--nag", *conf], now=hours(1)) == 0  # as argparse has it
    assert capsys.readouterr().out.startswith("S3NAPBACK OK")
    status, said, data = nagios(capsys, *conf, now=hours(37))
    assert (status, said) == (1, f"S3NAPBACK WARNING: 1 late, Directory {site.data} late")
    assert data[f"Directory {site.data} age"] == f"{37 * 3600}s"
    odd = site.folder / "it's a=b|c"
    odd.mkdir()
    site.jobs = f'Directory "{odd}"\n{site.jobs}'
    site.write()
    status, said, data = nagios(capsys, *conf, now=hours(37))
    assert (status, said.partition(":")[0]) == (2, "S3NAPBACK CRITICAL")
    assert said.endswith(f"1 never, 1 late, Directory {site.folder}/it_s a_b_c never,"
                         f" Directory {site.data} late")
    assert data[f"Directory {site.folder}/it_s a_b_c size"] == "0B"


@pytest.mark.parametrize(
    ("directive", "value"),
    [pytest.param("S3Endpoint", "http://127.0.0.1:1", marks=pytest.mark.slow),
     ("ChunkSize", "many")],
)
def test_a_plugin_that_cannot_know_says_unknown(
    site: Site, capsys: Capture, directive: str, value: str
) -> None:
    site.settings[directive] = value
    if directive == "S3Endpoint":
        (site.folder / "key").write_text("key=k\nsecret=s\n")
        site.settings["S3Keyfile"] = f"{site.folder}/key"
    site.write()
    status, said, data = nagios(capsys, "-c", str(site.conf))
    assert (status, data) == (3, {})
    assert re.match(r"S3NAPBACK UNKNOWN: \S", said)
    if directive != "S3Endpoint":
        assert s3napback.main(["status", "-c", str(site.conf)]) == (
            2 if directive == "ChunkSize" else 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-b", "bkt", "-K", "key"], "a bucket alone does not say what is due"),
        (["--grace", "soon"], "--grace soon is not a duration"),
        (["--max-age", "12"], "--max-age 12 is not a duration"),
        (["--maximum"], "option --maximum not recognized"),
        ([], "give a config with -c FILE, or a NAME"),
        (["no-such-config"], "no config for no-such-config"),
        (["-c", "one.conf", "-c", "two.conf"], "option -c is given twice"),
        (["--grace", "1d", "--grace=2d"], "option --grace is given twice"),
    ],
)
def test_a_wrong_call_is_one_sentence(words: list[str], message: str, capsys: Capture) -> None:
    assert s3napback.main(["status", *words]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and len(shown.err.splitlines()) == 1 and not shown.out
    assert nagios(capsys, *words)[0] == 3


def test_several_configs_are_told_at_once_and_one_keeps_no_other_back(
    site: Site, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3napback, "CONFIG_DIR", str(site.folder))
    (site.folder / "other").mkdir()
    (site.folder / "other" / "file").write_text("x")
    site.write().rename(site.folder / "one.conf")
    site.jobs = f"Directory {site.folder}/other"
    site.write().rename(site.folder / "two.conf")
    (site.folder / "bad.conf").write_text("Bucket b\n")
    assert s3napback.main(["one", "two"], now=NIGHT) == 0
    capsys.readouterr()
    # Alone, what the other config stores is nobody's; beside it, it is its own.
    assert s3napback.main(["status", "one"], now=NIGHT) == 0
    assert f"  {site.folder}/other: 1 archive(s)\n" in capsys.readouterr().out
    for names in (["one", "two"], ["two", "one"]):
        assert s3napback.main(["status", *names], now=NIGHT) == 0
        assert "unnamed" not in capsys.readouterr().out
    assert s3napback.main(["status", "bad", "one"], now=NIGHT) == 2
    shown = capsys.readouterr()
    assert "DiffDir must be defined" in shown.err
    assert f"Directory {site.data}" in shown.out
    status, said, _ = nagios(capsys, "bad", "one")
    assert (status, said.endswith("1 unnamed, 1 ok") or said.endswith("1 ok, 1 unnamed")) == (
        3, True)
    site.jobs = f"Directory {site.folder}/temp"  # of which there is none
    site.write()
    status, said, _ = nagios(capsys, "bad", "my")
    assert status == 2
    assert re.match(r"S3NAPBACK CRITICAL: .*DiffDir must be defined.* 1 never", said)


def test_what_no_job_names_is_told_with_what_it_costs(site: Site, capsys: Capture) -> None:
    assert site.run() == 0
    store = site.store()
    send(store, bytes(2500), "MySQL/old-0")
    send(store, bytes(10), "a stream")
    store.put("notes.txt", b"no archive", {})
    status, sources = tell(site, capsys, NIGHT)
    assert status == 0
    assert [(one["verdict"], one["kind"], one["name"], one["bytes"]) for one in sources[:2]] == [
        ("unnamed", "", "MySQL/old", 2500), ("unnamed", "", "a stream", 10)]
    assert len(sources) == 3


def test_a_bucket_that_is_gone_has_none_of_the_jobs_backups(site: Site, capsys: Capture) -> None:
    assert s3napback.main(["status", "-c", str(site.write())], now=NIGHT) == 1
    shown = capsys.readouterr()
    assert "does not exist" in shown.err
    assert re.search(rf"^never .* Directory {site.data}$", shown.out, re.MULTILINE)
    status, said, _ = nagios(capsys, "-c", str(site.conf))
    assert status == 2
    assert re.match("S3NAPBACK CRITICAL: bucket .* does not exist .*, 1 never", said)


def test_archives_without_end_are_told(site: Site, capsys: Capture) -> None:
    for day in range(2):
        (site.data / f"night{day}").write_bytes(os.urandom(2500))
        assert site.run(now=hours(24 * day)) == 0
    store = site.store()
    full = max(site.archives().values(), key=lambda one: one.made)
    store.delete([full.chunks[-1].key])
    send(store, bytes(3000), "MySQL/old-0")
    store.delete(["MySQL/old-0:0000000000001"])
    _, sources = tell(site, capsys, hours(25))
    cut = {one["name"].rpartition("/")[2]: one["unfinished"] for one in sources}
    assert cut == {"old": ["MySQL/old-0: chunk 1 is missing"],
                   "data": [f"{full.name}: its last chunk is not there"]}
    s3napback.main(["status", "-c", str(site.conf)], now=hours(25))
    shown = capsys.readouterr().out
    assert f"         not whole: {full.name}: its last chunk is not there" in shown


def test_what_waits_to_take_its_place_counts(site: Site, capsys: Capture) -> None:
    assert site.run() == 0
    stage_only(site)
    assert verdicts(site, capsys) == {"": "0", "data": "ok"}
    assert site.run(now=hours(24)) == 0
    stage(site, max(site.archives().values(), key=lambda one: one.made).name)
    assert verdicts(site, capsys, hours(25)) == {"": "0", "data": "ok"}


def test_what_began_to_take_its_place_hides_nothing(site: Site, capsys: Capture) -> None:
    (site.data / "more").write_bytes(os.urandom(2500))
    assert site.run() == 0
    (name,) = site.archives()
    stage(site, name)
    waiting = [item.key for item in s3napback.archive_objects(site.store(), name)
               if s3napback.is_staged(item.key)]
    site.store().delete(waiting[1:])
    status, (one,) = tell(site, capsys, NIGHT)
    assert (status, one["verdict"], one["archive"], one["unfinished"]) == (0, "ok", name, [])


def test_a_prefix_is_a_part_of_the_bucket(site: Site, capsys: Capture) -> None:
    site.settings["Prefix"] = "web1"
    assert site.run() == 0
    send(site.store(), b"x", "MySQL/others-0")
    assert verdicts(site, capsys) == {"": "0", "data": "ok"}
    site.settings["Prefix"] = "web2"
    assert verdicts(site, capsys) == {"": "1", "data": "never"}
    site.settings["Prefix"] = ""
    assert verdicts(site, capsys) == {"": "1", "data": "never", "others": "unnamed"}


def test_an_archive_of_another_host_says_whose_it_is(
    site: Site, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3napback, "host_name", lambda: "web2")
    assert site.run() == 0
    monkeypatch.setattr(s3napback, "host_name", lambda: "web1")
    capsys.readouterr()
    assert s3napback.main(["status", "-c", str(site.conf)], now=NIGHT) == 0
    assert f"Directory {site.data} (by web2)\n" in capsys.readouterr().out


def test_names_from_a_bucket_move_no_cursor(site: Site, capsys: Capture) -> None:
    assert site.run() == 0
    send(site.store(), b"x", f"MySQL/{ESC}-0")
    for words in ([], ["--nagios"]):
        capsys.readouterr()
        s3napback.main(["status", "-c", str(site.conf), *words], now=NIGHT)
        assert ESC not in capsys.readouterr().out


# ---- repositories on this disk ----


@pytest.fixture
def repositories(site: Site, svn_repo_factory: Any) -> Site:
    require_tool("svnadmin")
    (site.folder / "svn").mkdir()
    svn_repo_factory(site.folder / "svn" / "a", 1)
    svn_repo_factory(site.folder / "svn" / "b", 1)
    site.jobs = f"SubversionDir {site.folder}/svn"
    assert site.run() == 0
    return site


def test_repositories_without_a_revision_are_not_late(
    repositories: Site, svn_repo_factory: Any, capsys: Capture
) -> None:
    site = repositories
    svn_repo_factory(site.folder / "svn" / "b", 1)
    dated = ["svnadmin", "setrevprop", f"{site.folder}/svn/b", "-r", "2", "svn:date", "/dev/stdin"]
    subprocess.run(dated, input=b"2026-11-23T12:00:00.000000Z", check=True)
    assert verdicts(site, capsys, hours(24 + 13)) == {"": "3", "a": "ok", "b": "late"}
    assert site.run(now=hours(24 + 14)) == 0
    assert verdicts(site, capsys, hours(24 + 15)) == {"": "0", "a": "ok", "b": "ok"}
    # On the 26th a FULL was due.
    assert verdicts(site, capsys, hours(6 * 24)) == {"": "3", "a": "late", "b": "late"}


def test_a_repository_that_is_gone_is_still_told(repositories: Site, capsys: Capture) -> None:
    site = repositories
    shutil.rmtree(site.folder / "svn" / "a")
    assert verdicts(site, capsys, hours(24)) == {"": "0", "a": "ok", "b": "ok"}
    assert verdicts(site, capsys, hours(6 * 24)) == {"": "3", "a": "late", "b": "late"}
    shutil.rmtree(site.folder / "svn")  # as on a machine that only watches
    assert verdicts(site, capsys, hours(24)) == {"": "0", "a": "ok", "b": "ok"}


def test_a_repository_that_no_run_has_met_is_told(
    repositories: Site, svn_repo_factory: Any, capsys: Capture
) -> None:
    svn_repo_factory(repositories.folder / "svn" / "new", 0)
    found = verdicts(repositories, capsys, datetime.now() + timedelta(hours=1))
    assert found["new"] == "ok"  # it is waited for
    found = verdicts(repositories, capsys, datetime.now() + timedelta(days=3))
    assert found["new"] == "never"


def test_a_folder_without_repositories_was_never_backed_up(site: Site, capsys: Capture) -> None:
    assert site.run() == 0
    site.jobs = f"SubversionDir {site.folder}/temp"
    assert verdicts(site, capsys) == {"": "1", "temp": "never", "data": "unnamed"}


# ---- requests ----


def test_a_look_takes_a_listing_and_what_the_newest_archives_say(
    s3_site: Site, s3_server: Any, capsys: Capture
) -> None:
    first = datetime(2026, 11, 19, 3)  # a FULL
    for day in range(-1, 2):
        (s3_site.data / f"night{day}").write_text("x")
        assert s3_site.run(now=first + timedelta(days=day)) == 0
        s3_server.backdate("bkt", timedelta(days=1))
    s3_server.requests.clear()
    assert verdicts(s3_site, capsys, first + timedelta(days=1)) == {"": "0", "data": "ok"}
    methods = [method for method, _ in s3_server.requests]
    assert methods == ["GET", "HEAD", "HEAD"]  # of the FULL, and of the DIFF that continues it
    s3_server.requests.clear()
    assert verdicts(s3_site, capsys, first + timedelta(days=3))["data"] == "late"
    methods = [method for method, _ in s3_server.requests]
    assert methods == ["GET", "HEAD", "HEAD", "HEAD"]  # is there anything younger?
