"""Section 14 against the recordings: whole runs in test mode, as the original logged them."""

import hashlib
import json
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from conftest import GOLDEN, START, Capture, fetched

import s3napback

RUNS = json.loads((GOLDEN / "runs.json").read_text())

# Where the port differs on purpose, and why. README.md, "Differences from the original", has the
# same list for users; `test_every_difference_is_in_the_readme` holds them together.
DIFFERENCES = {
    "readme-like, New Year's Day": "two jobs for one archive: an error for the second",
    "postgresql: all, one, as a user": "two jobs for one archive: an error for the second",
    "a name twice": "each job line and each block is a job of its own",
    "blocks inside a cycle": "each job line and each block is a job of its own",
    "top-level directives share the top level's timing": "a line and a block side by side work",
    "a named config in /etc": "a NAME that is found nowhere is an error",
    "-c and a named config": "each config file has its own encryption",
    "no S3Keyfile": "S3Keyfile may be left out",
    "frequency zero": "the config is checked before anything is done; the exit status is 2",
    "temp file wanted, no TempDir": "the config is checked before anything is done",
    "recipient is not in the keyring": "the exit status is 2",
    "no DiffDir": "the exit status is 2",
    "no Bucket": "the exit status is 2",
    "no ChunkSize": "the exit status is 2",
    "an unknown option": "the exit status is 2",
    "an unknown cycle type": "a warning, and status 3",
    "the diff file was touched today": "only an archive in the bucket makes a day done",
    "the diff file was touched on this day of last year": "only an archive in the bucket makes a"
    " day done",
    "svn, a diff": "a diff file without notes of ours is never continued",
    "svn, nothing new": "a diff file without notes of ours is never continued",
    "svn, done today": "only an archive in the bucket makes a day done",
}
EQUAL = [run["name"] for run in RUNS if run["name"] not in DIFFERENCES]

Line = tuple[str, str, str]


class Stage:
    """A recorded run set up anew: its config, its clock, its state; and what the port logs."""

    def __init__(self, run: dict[str, Any], folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.run, self.folder, self.patch = run, folder, patch
        self.lines: list[Line] = []
        for name in ("diffs", "temp", "scratch", "buckets", "etc"):
            (folder / name).mkdir()
        self.places = {
            "{D}": f"{folder}/diffs", "{T}": f"{folder}/temp", "{W}": f"{folder}/scratch",
        }
        self.moment = datetime.fromisoformat(run["now"]).replace(tzinfo=ZoneInfo(run["tz"]))
        patch.setattr(s3napback, "CONFIG_DIR", f"{folder}/etc")
        for path, text in run.get("more_confs", {}).items():
            (folder / "etc" / Path(path).name).write_text(self.conf(text))
        (folder / "conf").write_text(self.conf(run["conf"]))
        for name, (stamp, text) in run.get("diff_files", {}).items():
            file = folder / "diffs" / name.replace("_svn_p", f"{folder}/scratch_svn_p").replace(
                "/", "_"
            )
            file.write_text(text)
            at = datetime.fromisoformat(stamp).replace(tzinfo=self.moment.tzinfo).timestamp()
            os.utime(file, (at, at))
        for line in run.get("listing", ()):
            self.store_object(line)

    def conf(self, text: str) -> str:
        """A config of the recording for this folder. The recorded /svn/p was made up; here it is
        a real repository, so it needs a place."""
        text = text.replace("Subversion /svn/p", "Subversion {W}/svn/p")
        text = text.replace("/etc/backup.gpg", "{W}/backup.gpg")
        for name, place in self.places.items():
            text = text.replace(name, place)
        return text + f"\nS3Endpoint file://{self.folder}/buckets\n"

    def store_object(self, line: str) -> None:
        match = re.fullmatch(r"(\S+ \S+) - ([^:]+):(.*) - .*", line)
        assert match
        bucket = self.folder / "buckets" / match[2]
        bucket.mkdir(exist_ok=True)
        at = datetime.fromisoformat(match[1]).replace(tzinfo=self.moment.tzinfo)
        store = s3napback.open_store(
            match[2], s3napback.Access(f"file://{self.folder}/buckets"), at.timestamp
        )
        store.put(f"{match[3]}:{0:020d}", b"x" * 153_380, {})

    def play(self) -> int:
        words = [
            str(self.folder / "conf") if word == "CONF" else
            word.replace("CONF", str(self.folder / "conf"))
            for word in self.run.get("args", ["-t", "-c", "CONF"])
        ]
        return s3napback.main(words, now=self.moment)

    def normal(self, text: str) -> str:
        """A recorded message in this folder, and without what no one compares: the command that
        sends, and how blanks and quotes are put."""
        text = text.replace("Subversion /svn/p", "Subversion {W}/svn/p").replace(
            " /svn/p", " {W}/svn/p"
        ).replace(":/svn/p", ":{W}/svn/p").replace("=> /svn/p", "=> {W}/svn/p")
        text = text.replace("/etc/backup.gpg", "{W}/backup.gpg")
        if text.startswith("/svn/p"):
            text = "{W}" + text
        for name, place in self.places.items():
            text = text.replace(name, place)
        return text


SENDS = re.compile(r"(java -jar \S+js3tream\.jar|\S*s3napback\.py js3tream)( \S+)*")


def normal(text: str) -> str:
    """A command as its words, the program that talks to S3 left to its last word."""
    def last_word(match: re.Match[str]) -> str:
        return "JS3TREAM " + match[0].split("-b ")[-1].replace("'", "")

    if not re.search(r"js3tream|^(tar|mysqldump|pg_dump|pg_dumpall|svnadmin|rm) ", text):
        return text
    return " ".join(shlex.split(SENDS.sub(last_word, text), posix=True))


@pytest.fixture
def stage(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpg_home: Any,
    svn_repo_factory: Callable[[Path, int], Path],
    repository: Path,
) -> Iterator[Stage]:
    run = next(run for run in RUNS if run["name"] == request.param)
    stage = Stage(run, tmp_path, monkeypatch)
    monkeypatch.setenv("GNUPGHOME", str(gpg_home.home))
    (tmp_path / "scratch" / "backup.gpg").write_bytes(b"")
    if "{W}/svn/myproject" in run["conf"] or "/svn/p" in run["conf"]:
        (tmp_path / "scratch" / "svn").mkdir()
        name = "p" if "/svn/p" in run["conf"] else "myproject"
        (tmp_path / "scratch" / "svn" / name).symlink_to(repository)

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            level = {"WARNING": "WARN", "CRITICAL": "FATAL"}.get(record.levelname, record.levelname)
            stage.lines.append((record.name, level, record.getMessage()))

    monkeypatch.setattr(s3napback, "open_log", lambda *_, **__: [])
    monkeypatch.setattr(s3napback, "close_log", lambda: None)
    recorder = Recorder()
    s3napback.log.addHandler(recorder)
    s3napback.log.setLevel(logging.INFO)
    yield stage
    s3napback.log.removeHandler(recorder)


@pytest.fixture(scope="session")
def repository(
    tmp_path_factory: pytest.TempPathFactory, svn_repo_factory: Callable[[Path, int], Path]
) -> Path:
    return svn_repo_factory(tmp_path_factory.mktemp("svn") / "p", 42)


def compared(lines: list[Line]) -> list[Line]:
    return [
        (category, level, normal(message))
        for category, level, message in lines
        if not message.startswith("Finished: ")
    ]


def expected(stage: Stage) -> list[Line]:
    return [
        (category, level, normal(stage.normal(message)))
        for category, level, message in stage.run["perl"]["log"]
    ]


def tree(folder: Path) -> dict[str, tuple[float, str]]:
    return {
        str(path.relative_to(folder)): (
            path.lstat().st_mtime, hashlib.md5(path.read_bytes()).hexdigest()
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("stage", EQUAL, indirect=True)
def test_a_run_in_test_mode_says_what_the_original_said(stage: Stage, capsys: Capture) -> None:
    before = tree(stage.folder)
    status = stage.play()
    recorded = stage.run["perl"]
    fatal = [line for line in recorded["stderr"] if line != "1"]
    if recorded["exit"] and fatal:
        assert fatal[0] in stage.lines[-1][2]
        assert stage.lines[-1][1] == "FATAL"
        stage.lines.pop()
    if recorded["log"] and recorded["log"][0][0] != "stdout":
        lines = [line for line in expected(stage) if line[0] != "stdout"]
        assert compared(stage.lines) == lines or "-h" in stage.run.get("args", ())
    assert status == recorded["exit"]
    assert tree(stage.folder) == before  # test mode changes nothing at all


def test_every_recorded_run_is_looked_at() -> None:
    assert len(RUNS) == 49
    assert set(DIFFERENCES) < {run["name"] for run in RUNS}


def messages(stage: Stage, level: str) -> list[str]:
    return [message for _, its_level, message in stage.lines if its_level == level]


@pytest.mark.parametrize(
    ("stage", "archive"),
    [
        ("postgresql: all, one, as a user", "PostgreSQL/shop-4"),
        ("readme-like, New Year's Day", "/svn/myproject-0-FULL"),
    ],
    indirect=["stage"],
)
def test_the_second_of_two_jobs_for_one_archive_is_an_error(stage: Stage, archive: str) -> None:
    assert stage.play() == 1
    (error,) = messages(stage, "ERROR")
    assert f"{archive} failed: " in error
    assert "writes to the same archive" in error
    # All the rest is as recorded: the second job says the same as far as it gets.
    ours = compared(stage.lines)
    at = next(n for n, line in enumerate(ours) if line[1] == "ERROR")
    assert ours[:at] == expected(stage)[:at]
    assert ours[at + 1 :] == expected(stage)[at + 2 :]


@pytest.mark.parametrize("stage", ["a name twice"], indirect=True)
def test_each_line_of_a_name_is_a_job_of_its_own(stage: Stage) -> None:
    stage.play()
    names = [m for m in messages(stage, "INFO") if m.startswith("Directory /a -> ")]
    # The blocks in file order, each with its own Diffs, then the line with the main level's.
    assert [name.rpartition(":")[2] for name in names] == ["/a-6-FULL", "/a-6-DIFF", "/a-18-DIFF"]
    assert messages(stage, "WARN")


@pytest.mark.parametrize("stage", ["blocks inside a cycle"], indirect=True)
def test_each_block_inside_a_cycle_is_a_job_of_its_own(stage: Stage) -> None:
    assert stage.play() == 0
    found = [m.rpartition(":")[2] for m in messages(stage, "INFO") if " -> dev." in m]
    assert found == ["/a-2-FULL", "/b-11-DIFF", "MySQL/m-2"]


@pytest.mark.parametrize(
    "stage", ["top-level directives share the top level's timing"], indirect=True
)
def test_lines_and_blocks_work_side_by_side(stage: Stage) -> None:
    assert stage.play() == 0
    found = [m.rpartition(":")[2] for m in messages(stage, "INFO") if " -> dev." in m]
    assert found == ["/etc-2-FULL", "/var-2-FULL", "/srv-2-FULL", "MySQL/one-2", "PostgreSQL/two-2"]


@pytest.mark.parametrize("stage", ["an unknown cycle type"], indirect=True)
def test_an_unknown_cycle_type_is_told(stage: Stage) -> None:
    assert stage.play() == 3
    told = [line for line in stage.lines if 'its CycleType "WeeklyCycle" is unknown' in line[2]]
    assert [line[1] for line in told] == ["WARN"]
    stage.lines.remove(told[0])
    assert compared(stage.lines) == expected(stage)


@pytest.mark.parametrize("stage", ["a named config in /etc"], indirect=True)
def test_a_name_that_is_found_nowhere_is_an_error(stage: Stage) -> None:
    assert stage.play() == 2
    (error,) = messages(stage, "FATAL")
    assert "no config for missing" in error
    assert not [m for m in messages(stage, "INFO") if " -> " in m]
    stage.run["args"].remove("missing")
    stage.lines.clear()
    assert stage.play() == 0
    # The second config has no GpgRecipient; in the recording it inherits the first one's.
    encrypt = "gpg --batch -r backup@example.com -e | "
    wanted = [
        (category, level, text.replace(encrypt, "") if "_beta.diff" in text else text)
        for category, level, text in expected(stage)
    ]
    assert compared(stage.lines) == wanted


@pytest.mark.parametrize("stage", ["-c and a named config"], indirect=True)
def test_the_second_config_is_not_encrypted_as_the_first(stage: Stage) -> None:
    assert stage.play() == 0
    first, second = (m for m in messages(stage, "INFO") if m.startswith("tar "))
    assert "gpg --batch -r backup@example.com -e" in first
    assert "gpg" not in second


@pytest.mark.parametrize("stage", ["no S3Keyfile"], indirect=True)
def test_s3keyfile_may_be_left_out(stage: Stage) -> None:
    assert stage.play() == 0
    assert any(" -> b:/a-18-DIFF" in m for m in messages(stage, "INFO"))


@pytest.mark.parametrize(
    "stage",
    [
        "frequency zero", "temp file wanted, no TempDir", "recipient is not in the keyring",
        "no DiffDir", "no Bucket", "no ChunkSize",
    ],
    indirect=True,
)
def test_a_fatal_message_comes_with_status_2(stage: Stage) -> None:
    assert stage.play() == 2
    wanted = stage.run["perl"]["stderr"][0].partition(" in pub ")[0]
    assert wanted in messages(stage, "FATAL")[-1]
    assert not [m for m in messages(stage, "INFO") if "Finished" in m]


def keep_notes(stage: Stage) -> None:
    """Makes the recorded diff file the port's: its archive is in the bucket, of the night that the
    diff file is of."""
    ((file, (stamp, text)),) = stage.run["diff_files"].items()
    kind, name = ("Subversion", f"{stage.folder}/scratch/svn/p") if "svn" in file else (
        "Directory", "/etc"
    )
    at = datetime.fromisoformat(stamp).replace(tzinfo=stage.moment.tzinfo)
    bucket = re.search(r"^Bucket (\S+)", stage.run["conf"], re.M)[1]  # type: ignore[index]
    endpoint = f"file://{stage.folder}/buckets"
    store = s3napback.open_store(bucket, s3napback.Access(endpoint), at.timestamp)
    if not store.exists():
        store.create()
    marks = {"archive": "x", "chunks": "1", "bytes": "1", "day": at.date().isoformat(),
             "made": s3napback.Moment.of(at).utc_text(), "kind": kind}
    store.put(f"{name}-9-FULL:{0:013d}", b"x", {s3napback.META + k: v for k, v in marks.items()})
    state = s3napback.DiffDir(f"{stage.folder}/diffs/", s3napback.Moment.of(at))
    reached = text.strip() if kind == "Subversion" else hashlib.sha256(text.encode()).hexdigest()
    place = s3napback.bucket_place(endpoint, bucket)
    link = s3napback.ArchiveRef(f"{name}-9-FULL", "x")
    identity = (
        s3napback.revision_identity(name, int(reached), dict(os.environ))
        if kind == "Subversion" else ""
    )
    state.commit(name, s3napback.Sidecar(reached, place, (link,), identity=identity))


OF_OURS = ["the diff file was touched today", "svn, a diff", "svn, nothing new", "svn, done today"]


@pytest.mark.parametrize("stage", OF_OURS, indirect=True)
def test_with_a_diff_file_of_ours_the_run_is_as_recorded(stage: Stage) -> None:
    keep_notes(stage)
    assert stage.play() == 0
    done = [line for line in compared(stage.lines) if re.search("-9-FULL$", line[2])]
    assert [line for line in compared(stage.lines) if line not in done] == expected(stage)


@pytest.mark.parametrize("stage", ["the diff file was touched today", "svn, done today",
                                   "the diff file was touched on this day of last year"],
                         indirect=True)
def test_the_date_of_a_diff_file_makes_no_day_done(stage: Stage) -> None:
    if "last year" in stage.run["name"]:
        keep_notes(stage)
    assert stage.play() == 0
    assert not [m for m in messages(stage, "WARN") if m.startswith("Skipping")]
    assert [m for m in messages(stage, "INFO") if " -> " in m]


@pytest.mark.parametrize("stage", ["svn, a diff", "svn, nothing new"], indirect=True)
def test_a_revision_file_of_the_perl_script_is_not_continued(stage: Stage) -> None:
    assert stage.play() == 0
    (shown,) = [m for m in messages(stage, "INFO") if m.startswith("svnadmin dump")]
    assert "-r0:42 " in shown
    assert "/svn/p-6-FULL" in shown


@pytest.mark.parametrize("stage", ["an unknown option"], indirect=True)
def test_an_unknown_option_is_refused(stage: Stage, capsys: Capture) -> None:
    assert stage.play() == 2
    said = capsys.readouterr().err
    assert "Unknown option: x" in said
    assert "usage: s3napback.py" in said


def test_every_difference_is_in_the_readme() -> None:
    readme = (Path(s3napback.__file__).parent / "README.md").read_text()
    _, _, section = readme.partition("## Differences from the original")
    for reason in set(DIFFERENCES.values()):
        assert reason in section, reason


def test_the_shown_commands_can_be_pasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """What -t shows, run by a shell, makes the archive that the run would have made."""
    import subprocess

    data = tmp_path / "it's a dir; $(x)"
    data.mkdir()
    (data / "f").write_text("hello")
    for name in ("diffs", "buckets"):
        (tmp_path / name).mkdir()
    (tmp_path / "conf").write_text(
        f"DiffDir {tmp_path}/diffs\nS3Endpoint file://{tmp_path}/buckets\nBucket b\n"
        f'ChunkSize 1000\n<Directory "{data}">\n</Directory>\n'
    )
    shown = subprocess.run(
        [sys.executable, START, "-t", "-c", str(tmp_path / "conf")],
        capture_output=True, text=True, check=True,
    )
    lines = [
        line.partition(" INFO ")[2] for line in (shown.stdout + shown.stderr).splitlines()
        if "js3tream" in line and " INFO " in line
    ]
    assert len(lines) == 2
    python = f"{sys.executable} "
    script = "\n".join(
        line.replace(f"{s3napback._program()} js3tream", f"{python}{s3napback._program()} js3tream")
        for line in lines
    )
    done = subprocess.run(["bash", "-e", "-o", "pipefail", "-c", script], capture_output=True)
    assert done.returncode == 0, done.stderr
    store = s3napback.open_store("b", s3napback.Access(f"file://{tmp_path}/buckets"), time.time)
    (item,) = store.iter_objects()
    tar = subprocess.run(["tar", "tz"], input=fetched(store, item.key)[0], capture_output=True)
    assert tar.stdout.decode().splitlines()[-1].endswith("it's a dir; $(x)/f")
