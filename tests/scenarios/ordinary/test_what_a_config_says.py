"""What a config says and a run would pass over without a word."""

import pytest
from conftest import NIGHT, Capture, Site

import s3napback


def check(site: Site) -> int:
    return s3napback.main(["check", "-c", str(site.write())], now=NIGHT)


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("Bucket other", "Bucket has one value, and the first counts, bkt: other is not used"),
        ("ChunkSize 2000", "ChunkSize has one value, and the first counts, 1000: 2000 is"),
        ("SafeReplace on off", "SafeReplace has one value, and the first counts, 1: 0 is not used"),
        ("Prefix my machine", "Prefix has one value, and the first counts, my: machine is not used;"
                              " a value with blanks stands in quotes"),
        ("Parallel 2 # at once", "first counts, 2: # is not used; a comment has a line of its own"),
        ("Compressor gzip\nCompressor xz", "Compressor has one value, and the first counts, gzip"),
        ("Frequency 1\nFrequency 2", "Frequency has one value, and the first counts, 1: 2 is not"),
        ("<Cycle a>\nFrequency 400\nDiffs 6\nDiffs 3\nMySQL x\n</Cycle>",
         "Diffs has one value, and the first counts, 6: 3"),
        ("<MySQL x>\nFrequency 400\nUseTempFile no\nUseTempFile yes\n</MySQL>",
         "UseTempFile has one value, and the first counts, 0: 1 is not used"),
        ("<MySQL x>\nFrequency 400\nUseTempFile maybe\n</MySQL>",
         "UseTempFile maybe is read as no"),
        ("Exclude", "Exclude without a value is read as 1"),
        ("Exclude no", "Exclude no is read as 0"),
        ("<Cycle a>\nFulls 30\n<MySQL x>\nFrequency 400\n</MySQL>\n</Cycle>",
         "Fulls is not used: there is no job line beside it, and a block has its own"),
        ("<MySQL x>\nFrequency 400\nExclude y\n</MySQL>",
         "Exclude is not used: <mysql> is no Directory"),
        ("Prefix off", "Prefix off is read as 0"),
        ("Exclude /x/./y", "Exclude /x/./y excludes nothing; write /x/y"),
        ("Exclude //x/y", "Exclude //x/y excludes nothing; write /x/y"),
        ("<Cycle a>\nGpgRecipient me\n</Cycle>", "GpgRecipient inside <cycle> is ignored"),
        ("<Cycle a>\nStorageClass GLACIER\n</Cycle>", "StorageClass inside <cycle> is ignored"),
    ],
)
def test_a_value_that_is_not_used_is_a_warning(
    site: Site, lines: str, told: str, capsys: Capture
) -> None:
    site.jobs += f"\n{lines}"
    assert site.run() in (0, 3)
    (line,) = [t for t in capsys.readouterr().err.splitlines() if told in t]
    assert " WARN " in line and "my.conf:" in line
    assert len(site.archives()) == 1
    assert check(site) in (1, 3)
    assert told in capsys.readouterr().out


def test_words_of_a_compressor_and_lists_are_no_repetition(site: Site, capsys: Capture) -> None:
    site.jobs += "\nCompressor gzip -1\nExclude a b\nExclude c\n"
    assert site.run() == 0
    assert " WARN " not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("<Cycle w>\nCycleType WeeklyCycle\nDirectory {other}\n</Cycle>",
         'Directory {other} is never backed up: its CycleType "WeeklyCycle" is unknown; use'
         " SimpleCycle or HanoiCycle"),
        ("<Directory {other}>\nCycleType hanoicycle\n</Directory>", 'CycleType "hanoicycle" is'),
        ("<Cycle a>\n<Cycle b>\nDirectory {other}\n</Cycle>\n</Cycle>",
         "Cycle b inside <cycle> is never backed up"),
        ("<Directory {data}/x>\nDirectory {other}\nFrequency 400\n</Directory>",
         "Directory {other} inside <directory> is never backed up"),
        ("<Cycle a>\n<MySQL m>\nFrequency 400\nDirectory {other}\n</MySQL>\n</Cycle>",
         "Directory {other} inside <mysql> is never backed up"),
        ("<Directory {data}/x {other}>\nFrequency 400\n</Directory>",
         "Directory {other} is never backed up: a block has one name"),
        ("<Weekly a>\nMySQL shop\n</Weekly>", "MySQL shop inside <weekly> is never backed up"),
        ("<Directory {other}>\nFrequency 1000\nPhase 500\n</Directory>",
         "by its Frequency and Phase no day of the year is its day"),
    ],
)
def test_what_is_never_backed_up_is_told(
    site: Site, lines: str, told: str, capsys: Capture
) -> None:
    other = site.folder / "other"
    other.mkdir()
    places = {"other": other, "data": site.data}
    site.jobs += "\n" + lines.format(**places)
    assert site.run() == 3
    (line,) = [t for t in capsys.readouterr().err.splitlines() if told.format(**places) in t]
    assert " WARN " in line and "my.conf:" in line
    assert list(site.archives())  # all the rest is stored
    assert check(site) == 1
    out = capsys.readouterr().out
    assert [t for t in out.splitlines() if told.format(**places) in t and t.startswith("error")]


def test_a_config_without_a_job_is_told(site: Site, capsys: Capture) -> None:
    site.jobs = ""
    assert site.run() == 3
    assert "nothing is backed up: the config names nothing" in capsys.readouterr().err
    assert check(site) == 1
