"""A year of nights in a bucket (half of one with HanoiCycle), and any moment of it again: days
missed, nights that failed, New Year, archives that somebody deleted, the rotation of both cycles.
What comes back is compared with a plain copy kept of each night, or the refusal is right; every
evening its standing is what the nights imply.
"""

import os
import random
import shutil
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import bad_compressor, inventory

import s3napback
from s3napback import Moment

# HanoiCycle with Discs 6 goes round every 32 nights: four times before New Year, once after it.
FIRST = {"SimpleCycle": datetime(2027, 3, 1, 3, 0), "HanoiCycle": datetime(2027, 8, 24, 3, 0)}
NIGHTS = {"SimpleCycle": 365, "HanoiCycle": 170}
MOMENTS = 50  # for each cycle

CYCLES = {
    "SimpleCycle": "Frequency 1\nDiffs 4\nFulls 5",
    "HanoiCycle": "CycleType HanoiCycle\nDiscs 6",
}


def change(tree: Path, chance: random.Random, day: int) -> None:
    files = [path for path in tree.rglob("*") if path.is_file()]
    for path in chance.sample(files, min(2, len(files))):
        path.unlink()
    for n in range(3):
        path = tree / f"d{chance.randrange(3)}" / f"{day}-{n}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(chance.randbytes(chance.randrange(200)))
    if day % 11 == 5:
        shutil.rmtree(tree / "d0", ignore_errors=True)


@pytest.mark.slow
@pytest.mark.parametrize("cycle", CYCLES)
def test_any_moment_of_a_year(
    cycle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(s3napback, "read_logconfig", lambda: s3napback.LogConfig("", ""))
    chance, first, count = random.Random(cycle), FIRST[cycle], NIGHTS[cycle]
    tree = tmp_path / "tree"
    for name in ("diffs", "buckets", "tree"):
        (tmp_path / name).mkdir()
    conf = tmp_path / "c"
    text = (
        f"DiffDir {tmp_path}/diffs\nS3Endpoint file://{tmp_path}/buckets\nBucket b\n"
        f"ChunkSize 700\n<Cycle c>\n{CYCLES[cycle]}\nDirectory {tree}\n</Cycle>\n"
    )
    conf.write_text(text)
    store = s3napback.open_store("b", s3napback.Access(f"file://{tmp_path}/buckets"), lambda: 0.0)
    losses, lost = random.Random(f"{cycle}, losses"), False
    (job,) = s3napback.jobs_of(s3napback.read_config(str(conf)))
    watched = s3napback.Recovery(
        store, 4, None, {}, (), "", None, (), jobs=[job])
    there: dict[str, s3napback.CatalogEntry] = {}
    told: Counter[str] = Counter()
    nights: dict[datetime, dict[str, Any]] = {}
    for day in range(count):
        change(tree, chance, day)
        night = first + timedelta(days=day)
        fate = chance.random()
        conf.write_text(text)
        if fate > 0.95:  # the compressor dies in the middle
            bad = bad_compressor(tmp_path, "head -c 900; exit 1")
            conf.write_text(f"{text}Compressor {bad}\n")
            assert s3napback.main(["-c", str(conf)], now=night) == 1
        elif fate >= 0.05:  # else the machine was off
            assert s3napback.main(["-c", str(conf)], now=night) in ((0, 3) if lost else (0,))
            nights[night], lost = inventory(tree, links=False, unit=0), False
            slot = s3napback.slot_and_mode(job.cycle, Moment.of(night).day, False)
            name = s3napback.archive_name("Directory", str(tree), *slot)
            (there[name],) = s3napback.catalogue(store, f"{name}:")
        if losses.random() < 0.04:
            name = losses.choice(sorted(there))
            store.delete([item.key for item in there.pop(name).archive.chunks])
            lost = True
        evening = Moment.of(night + timedelta(hours=16))
        ((_, standing),) = s3napback.standings(watched, evening, 12 * 3600, 1e9)
        assert standing.verdict == implied([*there.values()], night), day
        told[standing.verdict] += 1
    assert told["ok"] > 0.8 * count and told["late"] > 0.05 * count
    assert told["broken"] or cycle == "HanoiCycle"
    conf.write_text(text)
    found = list(s3napback.catalogue(store))
    held = {datetime.fromtimestamp(one.made): one for one in found}
    assert all(not one.fault for one in found)
    assert set(held) <= set(nights)
    equal = refused = 0
    for n in range(MOMENTS):
        at = first + timedelta(minutes=chance.randrange(count * 1440))
        place = tmp_path / f"back{n}"
        status = s3napback.main(
            ["restore", "-c", str(conf), str(tree), "--at", f"{at:%Y-%m-%d %H:%M:%S}", "--to",
             str(place)], now=first + timedelta(days=count),
        )
        before = [night for night in held if night <= at]
        if status == 0:
            newest = max(before)
            assert inventory(place / str(tree)[1:], links=False, unit=0) == nights[newest]
            equal += 1
            shutil.rmtree(place)
        else:
            # Right only if nothing so old is held, or what the newest continues is gone.
            assert not before or not is_whole(found, held[max(before)])
            refused += 1
    assert equal + refused == MOMENTS
    assert equal >= 5
    for night in sorted(held):
        if not is_whole(found, held[night]):
            continue
        place = tmp_path / "again"
        assert s3napback.main(
            ["restore", "-c", str(conf), str(tree), "--at", f"{night:%Y-%m-%d %H:%M:%S}", "--to",
             str(place)], now=first,
        ) == 0
        assert inventory(place / str(tree)[1:], links=False, unit=0) == nights[night]
        shutil.rmtree(place)
    check_searches(tmp_path, tree, found, nights, held, chance)
    left = sorted(name.rpartition(".")[2] for name in os.listdir(tmp_path / "diffs"))
    assert set(left) == {"chain", "diff", "files"}


def check_searches(
    folder: Path, tree: Path, found: list[s3napback.CatalogEntry],
    nights: dict[datetime, dict[str, Any]], held: dict[datetime, s3napback.CatalogEntry],
    chance: random.Random,
) -> None:
    """`list --files`, `find` and `diff` say what the plain copies do, with the index and without,
    for 100 moments and names of each cycle."""
    whole = {night: one for night, one in sorted(held.items()) if is_whole(found, one)}
    moments = chance.choices([*whole], k=100)
    names = chance.sample(sorted({path for night in whole for path in nights[night]} - {"."}), 100)
    for diff_dir in (f"{folder}/diffs/", ""):
        recovery = s3napback.Recovery(
            s3napback.open_store("b", s3napback.Access(f"file://{folder}/buckets"), lambda: 0.0),
            2, None, dict(os.environ), ("gpg",), "", None, (), diff_dir=diff_dir,
            place=s3napback.bucket_place(f"file://{folder}/buckets", "b"),
        )
        if diff_dir:
            assert all(s3napback.index_of(recovery, one) for one in found)
        lists = {}
        for night in set(moments):
            chain = s3napback.choose_chain(found, night.timestamp() + 1)
            lists[night] = {
                os.path.relpath(f"/{path}", tree): one
                for path, one in s3napback.files_of(recovery, chain).items()
            }
            assert {path: (oct(0o100000 * (one.mode[0] == "-") + 0o40000 * one.is_folder
                               + mode_bits(one.mode)), one.size)
                    for path, one in lists[night].items()} == {
                path: (kept[0], len(kept[-1]) if isinstance(kept[-1], bytes) else 0)
                for path, kept in nights[night].items()
            }
        for one, other in zip(moments[::2], moments[1::2], strict=True):
            there = [set(nights[night]) for night in (one, other)]
            said = s3napback.differences(lists[one], lists[other])
            gone = {path for path, what, _ in said if what in ("gone", "renamed")}
            new = {target if what == "renamed" else path
                   for path, what, target in said if what in ("new", "renamed")}
            assert (gone, new) == (there[0] - there[1], there[1] - there[0])
            assert not any(what == "changed" for _, what, _ in said)  # no file is written again
        history = s3napback.History(found)
        patterns = [f"{tree}/{name}" for name in names]
        versions, unread = s3napback.find_versions(recovery, history, patterns)
        assert len(unread) == history.intact.count(False)
        seen = {(one.path, at) for one in versions for at in one.moments}
        assert seen == {(f"{tree}/{name}"[1:], int(night.timestamp()))
                        for night in whole for name in names if name in nights[night]}


def mode_bits(mode: str) -> int:
    return sum(1 << 8 - n for n, letter in enumerate(mode[1:]) if letter != "-")


def implied(found: list[s3napback.CatalogEntry], night: datetime) -> str:
    """What the evening after a night should say of what is in the bucket."""
    newest = max(found, key=lambda one: one.made)
    if not is_whole(found, newest):
        return "broken"
    return "ok" if newest.made >= night.timestamp() else "late"


def is_whole(found: list[s3napback.CatalogEntry], wanted: s3napback.CatalogEntry) -> bool:
    """Whether all that an archive continues is held: by the states alone, going back."""
    while wanted.mode == "DIFF" and wanted.before != "-":
        earlier = [one for one in found if one.after == wanted.before and one.made < wanted.made]
        if not earlier:
            return False
        wanted = max(earlier, key=lambda one: one.made)
    return True
