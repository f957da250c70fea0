"""Section 14, Hooks: commands of the config that run before, after, and where something failed."""

import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from conftest import NIGHT, START, Capture, Site, fake_tool, leave_out, require_tool, run
from hypothesis import given, settings
from hypothesis import strategies as st

import s3napback


class Diary:
    """A file to which hooks write what they were told."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def entry(self, text: str = "$S3NAPBACK_STATUS") -> str:
        """A command that writes an entry."""
        return f'echo "{text}" >> {self.path}'

    @property
    def entries(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.exists() else []


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Has caplog hear our log, which hands nothing on to the root logger."""
    logger, handler = logging.getLogger("Backup"), caplog.handler
    if is_new := handler not in logger.handlers:
        logger.addHandler(handler)
    yield
    if is_new:
        logger.removeHandler(handler)


@pytest.fixture
def diary(tmp_path: Path) -> Diary:
    return Diary(tmp_path / "diary")


def block(site: Site, *lines: str, name: Path | str = "") -> str:
    return "\n".join([f"<Directory {name or site.data}>", *lines, "</Directory>"])


ALL = {"RunBefore": "before", "RunAfter": "after", "OnFailure": "failure"}


def all_hooks(diary: Diary, who: str = "") -> list[str]:
    return [f"{name} {diary.entry(f'{who}{word} $S3NAPBACK_STATUS'.strip())}"
            for name, word in ALL.items()]


# ---- order ----


def test_hooks_of_the_run_enclose_those_of_each_job(site: Site, diary: Diary) -> None:
    (site.folder / "more").mkdir()
    site.jobs = "\n".join([
        *all_hooks(diary, "run "), block(site, *all_hooks(diary, "one ")),
        block(site, *all_hooks(diary, "two "), name=site.folder / "more"),
    ])
    assert site.run() == 0
    assert diary.entries == [
        "run before ", "one before ", "one after ok", "two before ", "two after ok", "run after ok",
    ]


def test_on_failure_comes_after_run_after_and_only_then(site: Site, diary: Diary) -> None:
    site.jobs = "\n".join([
        *all_hooks(diary, "run "), block(site, *all_hooks(diary, "one "), name="/nonexistent"),
        block(site, *all_hooks(diary, "two ")),
    ])
    assert site.run() == 1
    assert diary.entries == [
        "run before ", "one before ", "one after failed", "one failure failed",
        "two before ", "two after ok", "run after failed", "run failure failed",
    ]


def test_several_lines_of_a_directive_run_in_order(site: Site, diary: Diary) -> None:
    lines = [f"{name} {diary.entry(f'{name} {n}')}" for n in (1, 2) for name in ALL]
    site.jobs = block(site, *lines)
    assert site.run() == 0
    assert diary.entries == ["RunBefore 1", "RunBefore 2", "RunAfter 1", "RunAfter 2"]


def test_a_cycle_gives_its_hooks_to_each_of_its_lines_and_not_to_its_blocks(
    site: Site, diary: Diary, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("b", "c"):
        (site.folder / name).mkdir()
    site.jobs = "\n".join([
        "<Cycle nightly>", f"Directory {site.data} {site.folder}/b",
        *all_hooks(diary, "$S3NAPBACK_NAME "), block(site, name=site.folder / "c"), "</Cycle>",
    ])
    assert site.run() == 0
    assert diary.entries == [
        f"{site.folder}/{name} {text}" for name in ("data", "b") for text in ("before ", "after ok")
    ]
    site.jobs = "\n".join(["<Cycle nightly>", "RunAfter x", block(site), "</Cycle>"])
    assert site.run("-t") == 0
    assert "RunAfter is not used: there is no job line beside it" in caplog.text


def test_hooks_of_the_main_level_run_once_whatever_the_jobs(
    site: Site, diary: Diary, caplog: pytest.LogCaptureFixture
) -> None:
    site.jobs = "\n".join([*all_hooks(diary), f"Directory {site.data}", block(
        site, name=site.folder / "temp")])
    assert site.run() == 0
    assert diary.entries == ["before ", "after ok"]
    assert "is not used" not in caplog.text
    site.jobs = "\n".join([*all_hooks(diary), block(site)])
    assert site.run() == 0
    assert "is not used" not in caplog.text


def test_a_wildcard_is_one_job_and_is_expanded_once_run_before_has_run(
    site: Site, diary: Diary
) -> None:
    homes = site.folder / "homes"
    make = f"RunBefore mkdir -p {homes}/u1 {homes}/u2 && touch {homes}/u1/x {homes}/u2/y"
    site.jobs = block(site, make, f"RunAfter {diary.entry()}", f"RunAfter rm -r {homes}",
                      name=f"{homes}/*")
    assert site.run() == 0
    assert diary.entries == ["ok"]
    assert not homes.exists()
    back = site.restored(name=f"{homes}/*").parent
    assert {one.name for one in back.rglob("[xy]")} == {"x", "y"}


def test_a_repository_may_be_there_only_once_run_before_has_run(
    site: Site, diary: Diary, svn_repo_factory: Callable[[Path, int], Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    real, there = svn_repo_factory(site.folder / "real", 2), site.folder / "there"
    site.jobs = "\n".join([
        f"<Subversion {there}>", f"RunBefore ln -s {real} {there}",
        f"RunAfter rm {there}; {diary.entry('$S3NAPBACK_ARCHIVE $S3NAPBACK_STATUS')}",
        f"OnFailure {diary.entry()}", "</Subversion>",
    ])
    assert site.run() == 0
    [archive] = site.archives()
    assert site.run() == 0  # done today: that can be seen only by looking at it
    assert diary.entries == [f"{archive} ok", f"{there}-18-DIFF skipped"]
    svn_repo_factory(real, 1)
    assert site.run(now=NIGHT + timedelta(days=1)) == 0
    assert site.archives().keys() - {archive} == {f"{there}-19-DIFF"}
    assert not there.is_symlink()
    assert "ERROR" not in {record.levelname for record in caplog.records}


@pytest.mark.slow
def test_a_folder_of_repositories_has_its_hooks_once(
    site: Site, diary: Diary, svn_repo_factory: Callable[[Path, int], Path]
) -> None:
    (site.folder / "real").mkdir()
    for name in ("r1", "r2"):
        svn_repo_factory(site.folder / "real" / name, 1)
    there = site.folder / "there"
    site.jobs = "\n".join([
        f"<SubversionDir {there}>", f"RunBefore ln -s {site.folder}/real {there}",
        f"RunAfter {diary.entry('$S3NAPBACK_KIND $S3NAPBACK_NAME')}", f"RunAfter rm {there}",
        f"RunAfter {diary.entry('$S3NAPBACK_ARCHIVE')}", "</SubversionDir>",
    ])
    assert site.run() == 0
    assert diary.entries == [f"SubversionDir {there}", *sorted(site.archives())]
    assert len(site.archives()) == 2


def test_a_repository_that_run_before_does_not_bring_fails_its_job_alone(
    site: Site, diary: Diary
) -> None:
    site.jobs = "\n".join([
        "<Subversion /nonexistent>", *all_hooks(diary), "</Subversion>", f"Directory {site.data}",
    ])
    assert site.run() == 1
    assert diary.entries == ["before ", "after failed", "failure failed"]
    assert len(site.archives()) == 1


@pytest.mark.slow
@pytest.mark.root
def test_a_snapshot_of_btrfs_is_read_and_taken_away(site: Site) -> None:
    disk, top = site.folder / "disk", site.folder / "top"
    top.mkdir()
    with disk.open("wb") as file:
        file.truncate(200_000_000)
    run([require_tool("mkfs.btrfs"), "-q", str(disk)])
    try:
        run(["mount", "-o", "loop", str(disk), str(top)])
    except AssertionError:
        leave_out("no btrfs can be mounted here")
    try:
        run(["btrfs", "subvolume", "create", f"{top}/srv"])
        (top / "srv" / "large").write_bytes(os.urandom(50_000))
        # While it is read, the file system changes; the snapshot does not.
        site.jobs = block(
            site, f"RunBefore btrfs subvolume snapshot -r {top}/srv {top}/snap",
            f"RunBefore echo later > {top}/srv/small",
            f"RunAfter btrfs subvolume delete {top}/snap", name=top / "snap",
        )
        assert site.run() == 0
        assert site.run(now=NIGHT + timedelta(days=1)) == 0
        assert not (top / "snap").exists()
        assert sorted(one.size > 50_000 for one in site.archives().values()) == [False, True]
        back = [site.restored(name=top / "snap", after=NIGHT + timedelta(days=day))
                for day in (0, 1)]
        assert [sorted(os.listdir(one)) for one in back] == [["large"], ["large", "small"]]
    finally:
        run(["umount", str(top)])


# ---- only around real work ----


def test_a_job_that_is_done_today_or_not_due_has_no_hooks(site: Site, diary: Diary) -> None:
    site.jobs = block(site, *all_hooks(diary))
    assert site.run() == 0
    assert site.run() == 0
    assert diary.entries == ["before ", "after ok"]
    assert site.run("-f") == 0
    assert len(diary.entries) == 4
    diary.path.unlink()
    site.jobs = block(site, "Frequency 366", "Phase 200", *all_hooks(diary))
    assert site.run() == 0
    assert not diary.entries


def test_a_run_with_nothing_to_do_has_its_own_hooks(site: Site, diary: Diary) -> None:
    site.jobs = "\n".join([*all_hooks(diary), f"Directory {site.data}"])
    assert (site.run(), site.run()) == (0, 0)
    assert diary.entries == ["before ", "after ok", "before ", "after skipped"]


def test_a_job_that_cannot_even_be_planned_tells_on_failure_alone(
    site: Site, diary: Diary
) -> None:
    site.jobs = "\n".join([
        block(site), block(site, *all_hooks(diary)),  # two jobs for one archive
    ])
    assert site.run() == 1
    assert diary.entries == ["failure failed"]


def test_test_mode_shows_the_hooks_and_runs_none(
    site: Site, diary: Diary, caplog: pytest.LogCaptureFixture
) -> None:
    site.jobs = "\n".join([*all_hooks(diary, "run "), block(site, *all_hooks(diary, "job "))])
    caplog.set_level("INFO")
    assert site.run("-t") == 0
    assert not diary.entries
    shown = [text for text in caplog.messages if text.startswith(tuple(ALL))]
    assert [text.split(" >>")[0].replace(" $S3NAPBACK_STATUS", "") for text in shown] == [
        'RunBefore: echo "run before"', 'RunBefore: echo "job before"',
        'RunAfter: echo "job after"', 'OnFailure: echo "job failure"',
        'RunAfter: echo "run after"', 'OnFailure: echo "run failure"',
    ]


# ---- RunBefore that fails, or says: not now ----


def test_a_job_whose_run_before_fails_is_not_read(
    site: Site, diary: Diary, caplog: pytest.LogCaptureFixture
) -> None:
    more = site.folder / "more"
    more.mkdir()
    site.jobs = "\n".join([block(
        site, "RunBefore printf 'no\\n\\t such\\nvolume\\n' >&2; exit 5",
        f"RunBefore {diary.entry('second')}",
        *all_hooks(diary)[1:], f"OnFailure {diary.entry('$S3NAPBACK_ERROR')}",
    ), block(site, name=more)])
    assert site.run() == 1
    assert diary.entries == ["after failed", "failure failed",
                             f"Directory {site.data}: {site.conf}:8: RunBefore ended with status 5:"
                             " no such volume"]
    assert list(site.archives()) == [name for name in site.archives() if f"{more}-" in name]
    assert f"{site.conf}:8: RunBefore ended with status 5: no such volume" in caplog.text


def test_a_job_whose_run_before_ends_with_75_is_skipped_without_failure(
    site: Site, diary: Diary, caplog: pytest.LogCaptureFixture
) -> None:
    site.settings["MetricsFile"] = f"{site.folder}/metrics.prom"
    site.jobs = "\n".join([
        f"RunAfter {diary.entry('$S3NAPBACK_STATUS $S3NAPBACK_ERROR')}",
        block(site, "RunBefore exit 75", *all_hooks(diary)[1:],
              f"RunAfter {diary.entry('$S3NAPBACK_ERROR')}")])
    caplog.set_level("INFO")
    assert site.run() == 0
    why = f"Directory {site.data}: {site.conf}:10: RunBefore ended with status 75"
    assert diary.entries == ["after skipped", why, f"skipped {why}"]
    assert "job_last_success_timestamp_seconds{" not in (site.folder / "metrics.prom").read_text()
    assert not site.archives()
    assert f"Skipping {why}" in caplog.text
    assert "0 stored, 1 skipped, 0 failed" in caplog.text


def test_a_run_whose_run_before_fails_does_nothing(site: Site, diary: Diary) -> None:
    site.jobs = "\n".join(["RunBefore exit 1", *all_hooks(diary)[1:],
                           block(site, *all_hooks(diary, "job "))])
    before = site.state()
    assert site.run() == 1
    assert diary.entries == ["after failed", "failure failed"]
    assert {name for name in site.state() if ".lock" not in name} == set(before)


def test_a_run_whose_run_before_ends_with_75_is_skipped_with_status_0(
    site: Site, diary: Diary, caplog: pytest.LogCaptureFixture
) -> None:
    site.jobs = "\n".join(["RunBefore exit 75", *all_hooks(diary)[1:], f"Directory {site.data}"])
    caplog.set_level("INFO")
    assert site.run() == 0
    assert diary.entries == ["after skipped"]
    assert not site.archives()
    assert f"Skipping {site.conf}: {site.conf}:7: RunBefore ended with status 75" in caplog.text


# ---- RunAfter and OnFailure that fail ----


@pytest.mark.parametrize("level", ["run", "job"])
def test_a_run_after_that_fails_is_a_warning_and_keeps_no_other_back(
    site: Site, diary: Diary, level: str, caplog: pytest.LogCaptureFixture
) -> None:
    lines = ["RunAfter exit 3", f"RunAfter {diary.entry()}"]
    job = f"Directory {site.data}"
    site.jobs = "\n".join([*lines, job]) if level == "run" else block(site, *lines)
    assert site.run() == 3
    assert diary.entries == ["ok"]
    assert len(site.archives()) == 1
    assert re.search(r"my.conf:\d+: RunAfter ended with status 3", caplog.text)


def test_an_on_failure_that_fails_changes_nothing(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.jobs = block(site, "OnFailure exit 3", name="/nonexistent")
    assert site.run() == 1
    assert "OnFailure ended with status 3" in caplog.text


# ---- runs that fail as a whole ----


@pytest.mark.parametrize(
    ("change", "told"),
    [({"Bucket": "a/b"}, "is not a bucket's name"), ({"HookTimeout": "never"}, "HookTimeout never"),
     ({"DiffDir": "/nonexistent"}, "DiffDir does not exist")],
)
def test_on_failure_tells_of_a_bad_config_that_can_be_parsed(
    site: Site, diary: Diary, change: dict[str, str], told: str
) -> None:
    site.settings |= change
    text = "$S3NAPBACK_CONFIG $S3NAPBACK_STATUS $S3NAPBACK_ERROR"
    site.jobs = "\n".join(["RunBefore exit 9", "RunAfter exit 9",
                           f"OnFailure {diary.entry(text)}", f"Directory {site.data}"])
    assert site.run() == 2
    assert len(diary.entries) == 1
    assert diary.entries[0].startswith(f"{site.conf} failed {site.conf}:")
    assert told in diary.entries[0]


def test_a_run_that_is_locked_out_runs_on_failure_alone(site: Site, diary: Diary) -> None:
    site.jobs = "\n".join([*all_hooks(diary), f"Directory {site.data}"])
    diffs = s3napback.DiffDir(f"{site.folder}/diffs/", s3napback.Moment.of(NIGHT))
    with diffs.lock():
        assert site.run() == 75
    assert diary.entries == ["failure failed"]


def test_a_fault_of_the_program_is_told_too(
    site: Site, diary: Diary, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*_: object) -> None:
        raise ZeroDivisionError("bug")

    monkeypatch.setattr(s3napback, "run_jobs", bug)
    site.jobs = "\n".join([*all_hooks(diary), f"Directory {site.data}"])
    with pytest.raises(ZeroDivisionError):
        site.run()
    s3napback.close_log()
    assert diary.entries == ["before ", "after failed", "failure failed"]


# ---- what they are told, and tell ----

NAMES = ("CONFIG", "KIND", "NAME", "ARCHIVE", "STATUS", "ERROR", "BYTES", "SECONDS")


def facts(diary: Diary) -> str:
    """A command that writes what it is told, a line for each."""
    words = " ".join(f'"$S3NAPBACK_{name}"' for name in NAMES)
    return f"printf '<%s>\\n' {words} >> {diary.path}"


def test_a_job_is_told_by_environment(site: Site, diary: Diary) -> None:
    site.jobs = block(site, f"RunBefore {facts(diary)}", f"RunAfter {facts(diary)}")
    assert site.run() == 0
    archive, found = next(iter(site.archives().items()))
    head = [str(site.conf), "Directory", str(site.data), archive]
    assert diary.entries[:8] == [f"<{text}>" for text in (*head, "", "", "", "")]
    assert diary.entries[8:15] == [f"<{text}>" for text in (*head, "ok", "", found.size)]
    assert re.fullmatch(r"<[0-9]>", diary.entries[15])


def test_a_run_is_told_by_environment(site: Site, diary: Diary) -> None:
    site.jobs = "\n".join([f"RunBefore {facts(diary)}", f"RunAfter {facts(diary)}",
                           f"Directory {site.data}", "Directory /nonexistent"])
    assert site.run() == 1
    size = sum(one.size for one in site.archives().values())
    assert diary.entries[:8] == [f"<{site.conf}>", *["<>"] * 7]
    conf, kind, name, archive, status, error, stored, seconds = diary.entries[8:]
    assert (conf, kind, name, archive) == (f"<{site.conf}>", "<>", "<>", "<>")
    assert (status, stored) == ("<failed>", f"<{size}>")
    assert error.startswith("<Directory /nonexistent: directory /nonexistent does not exist")
    assert re.fullmatch(r"<[0-9]>", seconds)


@pytest.mark.slow
def test_awkward_names_reach_a_hook_as_they_are_and_errors_are_one_line(
    site: Site, diary: Diary
) -> None:
    name = os.fsdecode(os.fsencode(site.folder) + b"/\x1b[31m $(id) `id` ' \xff")
    site.jobs = block(site, f"RunAfter {facts(diary)}", name=f'"{name}"')
    lines = [f"{key} {value}" for key, value in site.settings.items()]
    site.conf.write_bytes(os.fsencode("\n".join([*lines, site.jobs, ""])))
    call = [sys.executable, START, "-c", str(site.conf)]
    assert subprocess.run(call, capture_output=True, check=False).returncode == 1
    told = diary.path.read_bytes().split(b"\n")
    assert told[2] == b"<" + os.fsencode(name) + b">"
    assert told[4:6] == [b"<failed>", b"<Directory " + s3napback.printable(name, "").encode()
                         + b": directory " + s3napback.printable(name, "").encode()
                         + b" does not exist (mount it, or take it out of the config)>"]
    assert b"\x1b" not in told[3] + told[5]


def test_an_error_is_as_long_as_an_environment_can_hold(site: Site, diary: Diary) -> None:
    names = "\n".join(f"Directory /nonexistent/{n:04}/{'x' * 200}" for n in range(30))
    site.jobs = f"OnFailure {diary.entry('${#S3NAPBACK_ERROR}')}\n{names}"
    assert site.run() == 1
    assert diary.entries == ["4000"]


def test_a_hook_gets_the_environment_of_the_tools_and_no_secret_of_aws(
    site: Site, diary: Diary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "swordfish")
    monkeypatch.setenv("MY_TOPIC", "alerts")
    site.jobs = block(site, f"RunAfter {diary.entry('$MY_TOPIC ${AWS_SECRET_ACCESS_KEY-none}')}")
    assert site.run() == 0
    assert diary.entries == ["alerts none"]


def test_what_a_hook_prints_goes_to_the_log_of_its_job(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.jobs = "\n".join([
        "RunAfter echo all done",
        block(site, "RunBefore printf 'one\\ntwo\\377\\n'; echo careful >&2"),
    ])
    caplog.set_level("INFO")
    assert site.run() == 0
    records = [(r.name, r.levelname, r.getMessage()) for r in caplog.records]
    job = "Backup.S3napback.Directory"
    at = records.index((job, "INFO", "one"))
    assert records[at : at + 3] == [
        (job, "INFO", "one"), (job, "INFO", "two\\xff"), (job, "WARNING", "careful")]
    assert ("Backup.S3napback", "INFO", "all done") in records


def test_of_a_hook_that_prints_without_end_the_last_is_logged(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    long = "seq -f %0400.0f 1000; head -c 100000 /dev/zero | tr '\\0' x >&2"
    site.jobs = block(site, f"RunBefore {long}")
    caplog.set_level("INFO")
    assert site.run() == 0
    lines = [text for text in caplog.messages if re.fullmatch(r"[0-9]+", text)]
    assert lines[-1].lstrip("0") == "1000"
    assert 65_000 < sum(map(len, lines)) < 65_537
    assert max(map(len, caplog.messages)) == 65_536


def test_of_a_hook_that_prints_short_lines_the_last_are_logged(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.jobs = block(site, "RunBefore seq 5000; seq 7000 9000 >&2")
    caplog.set_level("INFO")
    assert site.run() == 0
    numbers = [int(text) for text in caplog.messages if text.isdigit()]
    assert numbers == [*range(4001, 5001), *range(8001, 9001)]


def test_a_hook_is_not_kept_waiting_by_what_it_prints(site: Site) -> None:
    long = "head -c 30000000 /dev/zero | tr '\\0' x"
    site.jobs = f"HookTimeout 5s\n{block(site, f'RunBefore {long}')}"
    assert site.run() == 0


def test_a_hook_reads_nothing_and_has_no_terminal(site: Site, diary: Diary) -> None:
    site.jobs = block(site, f"RunBefore cat; (: < /dev/tty) 2>/dev/null || {diary.entry('none')}")
    assert site.run() == 0
    assert diary.entries == ["none"]


def test_commands_with_passwords_are_logged_by_debug_alone(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.jobs = block(site, "RunBefore : --password swordfish")
    caplog.set_level("INFO")
    assert site.run() == 0
    assert f"RunBefore of {site.conf}:8" in caplog.messages
    assert "swordfish" not in caplog.text
    caplog.set_level("DEBUG")
    assert site.run("-f", "-d") == 0
    assert ": --password swordfish" in caplog.messages


# ---- commands as they are written ----


@pytest.mark.parametrize(
    ("written", "printed"),
    [
        ("printf %s it\\'s", "it's"),
        ("printf %s 'a  b' \"c d\"", "a  bc d"),
        ("printf %s \"$HOME\" | sed 's/.*/home/'", "home"),
        ("printf '%s\\n' a b | tr '\\n' -", "a-b-"),
        ("printf %s 10% 5\\%", "10%5%"),
        ("printf %s a # a comment", "a"),
        ("printf %s '#1' a#b", "#1a#b"),
        ("printf %s \"$(echo x)\" `echo y`", "xy"),
        ("A=\"1 2\"; printf %s \"$A\"", "1 2"),
        ("printf %s yes no on off true false", "yesnoonofftruefalse"),
        ("[ -d / ] && printf %s ok", "ok"),
        ("printf %s <<x {}>&2 2>&1", ""),
        # In quotes as a whole, which are the config's.
        ('"printf %s a; printf b"', "ab"),
        ("'printf %s \"a  b\"'", "a  b"),
        ('"printf %s \\"a  b\\""', "a  b"),
        ("'\"/bin/echo\" -n a'", "a"),
        # Not as a whole.
        ('"/bin/echo" -n "a b"', "a b"),
        ("printf %s 'é 日'", "é 日"),
    ],
)
def test_a_command_arrives_at_the_shell_as_it_is_written(
    written: str, printed: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.conf"
    path.write_text(f"<Directory /a>\n  RunBefore   {written}  \n</Directory>\n")
    hooks = s3napback.jobs_of(s3napback.read_config(str(path)))[0].hooks
    [(name, line)] = hooks
    assert name == "RunBefore"
    done = subprocess.run(["/bin/sh", "-c", line.text], capture_output=True, text=True)
    assert (done.stdout, name) == (printed, "RunBefore")


COMMANDS = st.text(st.characters(exclude_characters="\0\n\r\\\"'#", exclude_categories=["Cs"]))


@settings(max_examples=10)
@given(st.lists(COMMANDS.map(lambda text: f"x{text.rstrip(s3napback._BLANKS)}"), max_size=50))
def test_any_command_is_kept(commands: list[str]) -> None:
    with tempfile.NamedTemporaryFile("w", newline="", suffix=".conf") as file:
        file.write("".join(f"OnFailure {command}\n" for command in commands))
        file.flush()
        config = s3napback.read_config(file.name)
    assert [line.text for _, line in s3napback.hooks_of(config)] == commands


def test_a_backslash_at_the_end_joins_the_next_line(site: Site, diary: Diary) -> None:
    site.jobs = block(site, "RunBefore echo a \\", f"   b >> {diary.path}")
    assert site.run() == 0
    assert diary.entries == ["a b"]


# ---- bad input ----


@pytest.mark.parametrize("line", ["RunBefore", "RunAfter \"\"", "OnFailure '  '", "RunAfter # x"])
def test_a_hook_without_a_command_is_told_before_anything_runs(
    site: Site, diary: Diary, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    site.jobs = "\n".join([*all_hooks(diary), block(site, line)])
    assert site.run() == 2
    name = line.split()[0]
    assert f"Error in config file {site.conf}, line 11: {name} has no command" in caplog.text
    assert not diary.entries


@pytest.mark.parametrize("value", ["0s", "90", '""'])
def test_a_bad_hook_timeout_is_told_before_anything_runs(
    site: Site, diary: Diary, value: str, caplog: pytest.LogCaptureFixture
) -> None:
    site.settings["HookTimeout"] = value
    site.jobs = f"RunBefore {diary.entry()}\nDirectory {site.data}"
    assert site.run() == 2
    assert re.search(rf"{site.conf}:7: HookTimeout .*is not a duration such as 90s", caplog.text)
    assert not diary.entries


# ---- check ----


def findings(site: Site, capsys: Capture) -> tuple[int, dict[str, list[tuple[str, str]]]]:
    """(exit status, hook or job → (level, text) of each) of `check`."""
    capsys.readouterr()
    status = s3napback.main(["check", "--json", "-c", str(site.write())], now=NIGHT)
    found: dict[str, list[tuple[str, str]]] = {}
    for one in json.loads(capsys.readouterr().out):
        found.setdefault(one["subject"], []).append((one["level"], one["text"]))
    return status, found


def test_check_lists_the_hooks_and_runs_none(site: Site, diary: Diary, capsys: Capture) -> None:
    site.jobs = "\n".join([f"RunBefore {diary.entry()}", f"OnFailure {diary.entry()}",
                           block(site, f"RunAfter FOO='a b' {diary.entry()}")])
    status, found = findings(site, capsys)
    assert status == 0
    assert found["RunBefore"] == found["OnFailure"] == [("ok", diary.entry())]
    assert found["RunAfter"] == [("ok", f"FOO='a b' {diary.entry()}")]
    assert not diary.entries


def test_check_finds_hooks_that_cannot_run(site: Site, capsys: Capture) -> None:
    commands = {
        "no-such-program -x": "no-such-program is not on PATH",
        "A=1 B='x y' no-such-program": "no-such-program is not on PATH",
        "/nonexistent/program && true": "/nonexistent/program is not on PATH",
        "'/non existent/program' x": "/non existent/program is not on PATH",
        'echo "a': "Unterminated quoted string",
        "if true; then": "end of file unexpected",
    }
    site.jobs = block(site, *(f"OnFailure {command}" for command in commands))
    status, found = findings(site, capsys)
    assert status == 1
    for line, (told, (level, text)) in enumerate(
        zip(commands.values(), found["OnFailure"], strict=True), 8
    ):
        assert level == "error"
        assert text.startswith(f"{site.conf}:{line}: ")
        assert told in text


def test_check_does_not_complain_of_what_it_cannot_judge(site: Site, capsys: Capture) -> None:
    commands = [
        "cd /; true", "if true; then true; fi", "$HOME/bin/x", "~/bin/x", "(no-such)", "`no-such`",
        "! no-such", "A=1", "[ -e /x ] || exit 75", "{ no-such; }", "true # it's a comment",
        "exit 75", "/bin/true", "<&- cat",
    ]
    site.jobs = block(site, *(f"OnFailure {command}" for command in commands))
    status, found = findings(site, capsys)
    assert (status, found["OnFailure"]) == (0, [("ok", command) for command in commands])


@pytest.mark.parametrize("level", ["run", "job"])
def test_check_takes_a_directory_that_run_before_brings_for_no_fault(
    site: Site, capsys: Capture, level: str
) -> None:
    line = "RunBefore mkdir /nonexistent"
    site.jobs = block(site, line, name="/nonexistent")
    if level == "run":
        site.jobs = f"{line}\n{block(site, name='/nonexistent')}"
    status, found = findings(site, capsys)
    text = "before RunBefore has run: directory /nonexistent does not exist"
    assert (status, found["Directory /nonexistent"]) == (0, [("ok", text)])


# ---- hooks that hang ----


@pytest.mark.slow
def test_a_hook_that_hangs_is_ended_with_all_its_processes(
    site: Site, diary: Diary, caplog: pytest.LogCaptureFixture
) -> None:
    site.settings["HookTimeout"] = "1s"
    pid = site.folder / "pid"
    # A grandchild that does not end by SIGTERM, and holds the output.
    deaf = f"(trap '' TERM; echo waiting; echo started > {pid}; while :; do sleep 0.1; done)"
    site.jobs = block(site, f"RunBefore sh -c {shlex.quote(deaf)} & wait", *all_hooks(diary)[1:])
    caplog.set_level("INFO")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3napback, "_END_SECONDS", 0.3)
        assert site.run() == 1
    assert pid.exists()
    told = r"RunBefore did not end within 1\.\d s \(HookTimeout gives it more time\)"
    assert re.search(told, caplog.text)
    assert "waiting" in caplog.messages
    assert diary.entries == ["after failed", "failure failed"]
    left = subprocess.run(["pgrep", "-f", str(pid)], capture_output=True, text=True).stdout
    assert not left


def test_a_process_in_the_background_neither_holds_us_up_nor_is_ended(
    site: Site, diary: Diary
) -> None:
    site.jobs = block(site, "RunBefore sleep 60 & echo $! > pid", f"RunAfter {diary.entry()}")
    site.jobs = site.jobs.replace("> pid", f"> {site.folder}/pid")
    started = time.monotonic()
    assert site.run() == 0
    pid = int((site.folder / "pid").read_text())
    os.kill(pid, signal.SIGTERM)  # raises where it is gone
    assert time.monotonic() - started < 20
    assert diary.entries == ["ok"]


def test_a_command_that_is_killed_says_by_which_signal(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.jobs = block(site, "RunBefore kill -9 $$")
    assert site.run() == 1
    assert "RunBefore was ended by SIGKILL" in caplog.text


def test_no_shell_is_one_failure(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(argv: object, **_: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    site.jobs = block(site, "RunBefore true")
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", refuse)
        assert site.run() == 1
    assert "cannot start sh: Resource temporarily unavailable" in caplog.text


# ---- signals ----


@pytest.mark.slow
def test_a_signal_ends_run_before_and_run_after_still_runs(
    site: Site, diary: Diary, caplog: pytest.LogCaptureFixture
) -> None:
    error = diary.entry("$S3NAPBACK_ERROR")
    site.jobs = "\n".join([
        *all_hooks(diary, "run "),
        block(site, "RunBefore echo mounted; kill -TERM $PPID; sleep 60 & wait",
              *all_hooks(diary, "job ")[1:], f"OnFailure {error}"),
        block(site, *all_hooks(diary, "two "), name=site.folder / "temp"),
    ])
    caplog.set_level("INFO")
    started = time.monotonic()
    assert site.run() == 143
    assert time.monotonic() - started < 20
    assert diary.entries == ["run before ", "job after failed", "job failure failed",
                             "ended by SIGTERM", "run after failed", "run failure failed"]
    assert "mounted" in caplog.messages
    assert caplog.messages[-1] == "Ended by SIGTERM"
    assert not site.archives()


def test_a_signal_in_the_middle_of_a_job_runs_each_hook_once(
    site: Site, diary: Diary, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.jobs = "\n".join([*all_hooks(diary, "run "), block(site, *all_hooks(diary, "job "))])
    fake_tool(site, monkeypatch, "tar", "kill -INT $PPID; exec sleep 60")
    assert site.run() == 130
    assert diary.entries == ["run before ", "job before ", "job after failed",
                             "job failure failed", "run after failed", "run failure failed"]


def test_a_signal_while_run_after_tidies_lets_it_end(site: Site, diary: Diary) -> None:
    site.jobs = "\n".join([*all_hooks(diary, "run ")[1:], block(
        site, f"RunAfter kill -TERM $PPID; sleep 0.3; {diary.entry('unmounted')}",
        f"RunAfter {diary.entry('removed')}",
    )])
    assert site.run() == 143
    assert diary.entries == ["unmounted", "removed", "run after failed", "run failure failed"]
    assert len(site.archives()) == 1


@pytest.mark.slow
def test_after_a_signal_a_hook_has_little_time(
    site: Site, diary: Diary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3napback, "LAST_SECONDS", 0.2)
    site.jobs = "\n".join([
        "RunAfter sleep 60", f"RunAfter {diary.entry('second')}",
        block(site, "RunAfter kill -TERM $PPID; sleep 60", f"OnFailure {diary.entry()}"),
    ])
    started = time.monotonic()
    assert site.run() == 143
    assert time.monotonic() - started < 20
    assert diary.entries == ["second"]


@pytest.mark.slow
def test_a_hook_after_a_signal_can_be_ended_by_one(site: Site, diary: Diary) -> None:
    ignored = "grep SigIgn /proc/self/status"
    site.jobs = block(site, f"RunBefore {ignored} >> {diary.path}; kill -TERM $PPID; sleep 60",
                      f"RunAfter {ignored} >> {diary.path}")
    assert site.run() == 143
    before, after = diary.entries
    assert int(after.split()[1], 16) & (1 << signal.SIGTERM - 1) == 0
    assert before == after
