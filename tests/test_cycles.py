"""Section 5: which day, which slot, FULL or DIFF."""

import doctest
import gzip
import json
from datetime import datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from conftest import Capture, Site, cycle_of
from hypothesis import given
from hypothesis import strategies as st

import s3napback
from s3napback import CycleSpec, Day, Failure, Moment

# What the config reader makes of words that Perl's reader takes for booleans.
BOOLEANS = {"yes": "1", "on": "1", "true": "1", "no": "0", "off": "0", "false": "0"}


def decision(cycle: CycleSpec, day: Day) -> list[str] | None:
    """In the form of the recording: the ends of a Directory's and of a MySQL archive's name."""
    if not s3napback.is_backup_day(cycle, day):
        return None
    slot, mode = s3napback.slot_and_mode(cycle, day, dumps=False)
    of_dumps, always = s3napback.slot_and_mode(cycle, day, dumps=True)
    assert always == "FULL"
    return [f"{slot}-{mode}", f"{of_dumps}"]


def test_every_recorded_decision_is_made_again(golden: Path) -> None:
    recorded = json.loads(gzip.decompress((golden / "slots.json.gz").read_bytes()))
    days = [
        Moment.of(datetime.fromisoformat(local).replace(tzinfo=ZoneInfo(zone))).day
        for local, zone in recorded["instants"]
    ]
    compared = 0
    for spec, expected in zip(recorded["specs"], recorded["decisions"], strict=True):
        timing = {
            name: BOOLEANS.get(str(value).lower(), str(value))
            for name, value in spec.items()
            if value is not None
        }
        cycle = cycle_of(timing)
        assert [decision(cycle, day) for day in days] == expected, spec
        compared += len(days)
    assert compared == 213_120


def test_the_examples_in_docstrings_are_true() -> None:
    failed, tried = doctest.testmod(s3napback)
    assert tried > 5
    assert not failed


@pytest.mark.parametrize(
    ("text", "number"),
    [("7", 7), ("07", 7), (" 3 ", 3), ("-1", -1), ("+2", 2), ("1.5", 1.5), (".5", 0.5), ("2.", 2),
     ("1e1", 10), ("3 weeks", 3), ("weekly", 0), ("", 0), ("0x10", 0), ("1e999", 0)],
)
def test_a_text_is_the_number_that_perl_takes_it_for(text: str, number: float) -> None:
    assert s3napback.perl_number(text) == number


@pytest.mark.parametrize(
    "timing",
    [
        {"Frequency": "0"},
        {"Frequency": "0.5"},
        {"Fulls": "0"},
        {"Diffs": "-1"},
        {"CycleType": "HanoiCycle", "Frequency": "0"},
        {"CycleType": "HanoiCycle", "Discs": "0"},
    ],
)
def test_a_cycle_without_a_rotation_is_a_failure(timing: dict[str, str]) -> None:
    cycle = cycle_of(timing)
    with pytest.raises(Failure, match="Illegal modulus zero"):
        decision(cycle, Day(0, 0))


@pytest.mark.parametrize(
    "timing",
    [
        {"CycleType": "HanoiCycle", "Discs": "2000"},
        {"CycleType": "HanoiCycle", "Discs": "-2000"},
        {"Fulls": "1e300", "Diffs": "1e300"},
    ],
)
def test_numbers_beyond_all_bounds_are_a_failure(timing: dict[str, str]) -> None:
    with pytest.raises(Failure) as caught:
        decision(cycle_of(timing), Day(0, 0))
    assert caught.value.status == 2


def test_an_unknown_cycle_type_is_never_due_and_has_no_slot() -> None:
    cycle = cycle_of({"CycleType": "WeeklyCycle"})
    assert not s3napback.is_backup_day(cycle, Day(0, 0))
    with pytest.raises(Failure, match='CycleType "WeeklyCycle" is unknown'):
        s3napback.slot_and_mode(cycle, Day(0, 0), dumps=False)


numbers = st.one_of(st.integers(-20, 400).map(str), st.floats(-9, 99).map(str), st.text(max_size=5))


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "CycleType": st.sampled_from(["SimpleCycle", "HanoiCycle"]),
            "Frequency": numbers,
            "Phase": numbers,
            "Diffs": numbers,
            "Fulls": numbers,
            "Discs": numbers,
            "ArchiveOldestDisc": st.sampled_from(["0", "1"]),
        },
    ),
    st.integers(0, 365),
    st.integers(0, 40_000),
)
def test_odd_directives_give_a_slot_or_a_failure(
    timing: dict[str, str], yday: int, epoch_days: int
) -> None:
    try:
        decision(cycle_of(timing), Day(yday, epoch_days))
    except Failure as failure:
        assert failure.status == 2


def test_a_moment_knows_its_local_day() -> None:
    moment = Moment.of(datetime(2026, 12, 31, 23, 30, tzinfo=ZoneInfo("America/New_York")))
    assert moment.day == Day(364, 20819)  # already 2027-01-01 in UTC
    assert moment.utc_text() == "2027-01-01T04:30:00Z"
    assert Moment.of(moment.epoch).epoch == moment.epoch


def test_the_full_before_is_of_yesterday_where_the_clock_went_on_an_hour() -> None:
    berlin = ZoneInfo("Europe/Berlin")
    for day in range(27, 32):  # the 29th has 23 hours
        now = Moment.of(datetime(2026, 3, day, 0, 30, tzinfo=berlin))
        before = Moment.of(datetime(2026, 3, day - 1, 0, 30, tzinfo=berlin))
        cycle = cycle_of({"Fulls": "4", "Diffs": "0"})
        slot, _ = s3napback.slot_and_mode(cycle, before.day, dumps=False)
        assert s3napback.slot_of_full_before(cycle, now, dumps=False) == slot


@pytest.mark.parametrize("line", ["CycleType HanoiCycle\nDiscs 1500", "Frequency 1e-310"])
def test_numbers_that_make_no_rotation_fail_the_job(site: Site, capsys: Capture, line: str) -> None:
    site.jobs = f"<Directory {site.data}>\n{line}\n</Directory>"
    assert site.run("-f") == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not site.archives()


# ---- what `check` says of a cycle ----


def days(first: datetime, count: int) -> list[Day]:
    return [Moment.of(first + timedelta(days=n)).day for n in range(count)]


def restore_points(cycle: CycleSpec, week: list[Day], dumps: bool) -> list[int]:
    return [len(s3napback.restorable_nights(held))
            for held in s3napback.rotation(cycle, week, dumps)]


def test_restore_points_are_the_archives_that_a_chain_reaches() -> None:
    week = days(datetime(2026, 1, 1, 3), 9)
    cycle = CycleSpec(fulls=2, diffs=2)  # FULL DIFF DIFF FULL DIFF DIFF, over and over
    # The seventh night's FULL takes the first one's place, whose two DIFFs are worth nothing then.
    assert restore_points(cycle, week, False) == [1, 2, 3, 4, 5, 6, 4, 5, 6]
    assert restore_points(cycle, week, True) == [1, 2, 2, 2, 2, 2, 2, 2, 2]


def test_a_diff_that_replaces_what_it_would_continue_holds_everything() -> None:
    """At New Year, where the year does not begin with the night of a FULL."""
    turn = days(datetime(2026, 12, 25, 3), 11)
    *_, held = s3napback.rotation(CycleSpec(frequency=5, phase=2, fulls=1, diffs=3), turn, False)
    full, diff = s3napback.restorable_nights(held)
    assert (full.number, full.slot, full.mode) == (0, 0, "FULL")
    assert (diff.number, diff.slot, diff.mode) == (10, 1, "DIFF")  # the one of day 5 is gone
    assert diff.needs == {10}


@pytest.mark.parametrize(
    ("cycle", "loses"),
    [
        (CycleSpec(), False),  # the defaults: 28 slots
        (CycleSpec(fulls=2, diffs=20), True),  # 42 slots
        (CycleSpec(fulls=1, diffs=29), False),  # every FULL takes all with it, at any time
        (CycleSpec("HanoiCycle"), False),
    ],
)
def test_new_year_loses_what_the_rotation_replaces(cycle: CycleSpec, loses: bool) -> None:
    assert bool(s3napback.new_year_loss(cycle, 2026, False)) == loses
