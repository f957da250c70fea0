"""Failures that need some staging: each ends in a sentence, none in a traceback."""

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import NIGHT, Site, fake_tool

import s3napback
from s3napback import Access, ArchiveRef, Failure, Moment, Sidecar, Stage, State

Capture = pytest.CaptureFixture[str]


def key() -> Access:
    return Access("http://127.0.0.1:1", "us-east-1", "key", "secret")


@pytest.mark.parametrize(
    ("library", "use"),
    [
        ("apacheconfig", lambda site: s3napback.read_config(str(site.write()))),
        ("gnupg", lambda site: s3napback._public_keys("x", None, os.environ)),
        ("boto3", lambda site: s3napback.S3Store("bkt", key()).exists()),
        ("botocore", lambda site: s3napback.S3Store("bkt", key()).exists()),
        ("dateutil", lambda site: s3napback.parse_when("2026-11-20", Moment.of(NIGHT))),
    ],
)
def test_a_library_that_is_missing(
    site: Site, library: str, use: Callable[[Site], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n == library or n.startswith(f"{library}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(Failure, match=f"the Python library {library}.* is missing") as failure:
        use(site)
    assert "pip install -r" in failure.value.hint


def test_a_server_that_speaks_no_tls(s3_server: Any) -> None:
    endpoint = s3_server.endpoint.replace("http:", "https:")
    store = s3napback.S3Store("bkt", Access(endpoint, "us-east-1", "key", "secret"))
    with pytest.raises(Failure, match="SSL") as failure:
        store.exists()
    assert not isinstance(failure.value, s3napback.TransientFailure)


def test_a_bucket_of_no_possible_name() -> None:
    with pytest.raises(Failure, match="Invalid bucket name"):
        s3napback.S3Store("no bucket!", key()).exists()


def test_dates_of_another_kind(s3_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert s3napback._skew_text("yesterday") == ""
    store = s3napback.S3Store("bkt", Access(s3_server.endpoint, None, "key", "secret"))
    monkeypatch.setattr(
        store._client, "list_objects_v2", lambda **_: {"ResponseMetadata": {"HTTPHeaders": {}}}
    )
    assert store.skew() is None


# ---- DiffDir ----


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State(f"{tmp_path}/", Moment.of(NIGHT))


def test_a_diff_file_that_is_none(state: State, tmp_path: Path) -> None:
    path = Path(state.diff_file("/repo"))
    path.write_text("many")
    with pytest.raises(Failure, match="cannot read the revision") as failure:
        state.reached("Subversion", "/repo")
    assert failure.value.hint == "delete the file for a full backup"
    path.unlink()
    path.mkdir()
    with pytest.raises(Failure, match="cannot read the diff file"):
        state.reached("Directory", "/repo")


def test_notes_that_cannot_be_kept(state: State, tmp_path: Path) -> None:
    notes = Sidecar("x", "bkt", (ArchiveRef("a", "y"),))
    state.keep_chain("/repo", notes)
    (path,) = tmp_path.glob(".s3napback-*.chain")
    path.unlink()
    path.mkdir()
    with pytest.raises(Failure, match="write in DiffDir"):
        state.keep_chain("/repo", notes)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".draft")]
    assert state.chain("/repo") == ()


def test_a_diff_dir_that_went_away(tmp_path: Path) -> None:
    state = State(f"{tmp_path}/away/", Moment.of(NIGHT))
    for attempt in (state.lock(), state.draft("/x", fresh=True)):
        with pytest.raises(Failure, match="DiffDir"), attempt:
            pass
    with pytest.raises(Failure, match="cannot write in DiffDir") as failure:
        state.prepare()
    assert failure.value.status == 2


def test_a_directory_in_the_place_of_a_diff_file(site: Site, capsys: Capture) -> None:
    path = Path(State(site.settings["DiffDir"] + "/", Moment.of(NIGHT)).diff_file(str(site.data)))
    path.mkdir()
    os.utime(path, (1e9, 1e9))
    assert site.run() == 1
    assert "Is a directory" in capsys.readouterr().err


def test_a_snapshot_of_another_program(site: Site) -> None:
    assert site.run(now=NIGHT - timedelta(days=1)) == 0
    (path,) = site.diff_files()
    content = b"GNU tar-1.34-2\n" + b"x\0" * 12
    path.write_bytes(content)
    s3napback.Draft(str(path), "", Moment.of(NIGHT)).keep_in_place()
    assert path.read_bytes() == b""  # nothing of it is believed
    path.write_bytes(content)
    # No archive ends there, so all is stored anew.
    assert site.run() == 3


# ---- folders, files, tools ----


def test_a_temp_dir_that_cannot_be_written(site: Site, capsys: Capture) -> None:
    site.settings["TempDir"] = "/proc"
    site.jobs = f"<Directory {site.data}>\nUseTempFile 1\n</Directory>"
    assert site.run() == 1
    assert "cannot write in TempDir" in capsys.readouterr().err
    assert s3napback.main(["check", "-c", str(site.write())]) == 1
    assert "cannot write in /proc" in capsys.readouterr().out


def test_data_that_cannot_be_read() -> None:
    with pytest.raises(Failure, match="read the data to be stored"), open("/proc/self/mem", "rb",
                                                                          buffering=0) as file:
        s3napback.FileStream(file).readinto(memoryview(bytearray(10)))


def test_tools_that_a_restore_needs(tmp_path: Path) -> None:
    bare = {"PATH": str(tmp_path)}
    with pytest.raises(Failure, match="no-such is not on PATH"):
        list(s3napback.run_filter(Stage(("no-such",)), [b"x"], bare))
    before = os.environ["PATH"]
    os.environ["PATH"] = str(tmp_path)
    try:
        with pytest.raises(Failure, match="tar is not on PATH"):
            s3napback.run_tar(iter([b"x"]), str(tmp_path), bare)
    finally:
        os.environ["PATH"] = before


def test_a_tar_that_ends_early(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tool(site, monkeypatch, "tar", "echo 'tar: no' >&2; exit 2")
    with pytest.raises(Failure, match="tar ended with status 2: tar: no"):
        s3napback.run_tar(iter([bytes(1 << 20)] * 20), str(site.folder), dict(os.environ))


def test_places_where_nothing_can_be_restored_to(site: Site, capsys: Capture) -> None:
    assert site.run() == 0
    words = ["restore", "-c", str(site.write()), str(site.data), "--to"]
    assert s3napback.main([*words, "/proc/new"]) == 1
    assert "cannot make the folder" in capsys.readouterr().err
    store = site.store()
    store.put("MySQL/shop-0:0000000000000", b"dump", {})
    words[3] = "MySQL/shop"
    assert s3napback.main([*words, "/nowhere/dump"]) == 1
    assert "cannot write the dump" in capsys.readouterr().err


def test_a_bucket_that_cannot_be_asked_about_fulls(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is not known is not told."""
    site.jobs = f"<Directory {site.data}>\nFulls 2\nDiffs 0\n</Directory>"
    (site.data / "big").write_bytes(os.urandom(5000))
    assert site.run() == 0
    real = s3napback.FolderStore.list_page

    def list_page(self: Any, prefix: str, after: str = "") -> Any:
        if prefix.endswith("-"):
            raise Failure("not now")
        return real(self, prefix, after)

    monkeypatch.setattr(s3napback.FolderStore, "list_page", list_page)
    assert site.run("-f") == 0
    assert "last complete full backup" not in caplog.text


def test_numbers_that_make_no_rotation_are_told_by_check(site: Site, capsys: Capture) -> None:
    site.jobs = f"<Directory {site.data}>\nFulls 1e308\nDiffs 1e308\n</Directory>"
    assert s3napback.main(["check", "-c", str(site.write())]) == 1
    assert "make" in capsys.readouterr().out


def test_a_database_without_its_tool(
    site: Site, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(site.folder))
    site.jobs = "MySQL shop"
    assert s3napback.main(["check", "-c", str(site.write())]) == 1
    said = capsys.readouterr().out
    assert "error    MySQL shop: mysqldump is not on PATH" in said


def test_a_log_config_that_is_a_folder_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3napback, "__file__", str(tmp_path / "s3napback.py"))
    assert not s3napback.read_logconfig().problems
    (tmp_path / "s3napback.logconfig").mkdir()
    assert "logging to the screen only" in s3napback.read_logconfig().problems[0]


# ---- ends from outside ----


def test_a_command_that_is_ended(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def command(*_: Any) -> int:
        raise s3napback.Interrupted(15)

    monkeypatch.setitem(s3napback.COMMANDS, "list", command)
    assert s3napback.main(["list"]) == 143
    assert "ended by SIGTERM" in capsys.readouterr().err


def test_an_output_that_is_closed(site: Site) -> None:
    for n in range(60):
        (site.folder / f"d{n}").mkdir()
    site.jobs = "\n".join(f"Directory {site.folder}/d{n}" for n in range(60))
    assert site.run() == 0
    words = [sys.executable, s3napback.__file__, "list", "-c", str(site.write())]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait() == 1
    assert b"Traceback" not in said


def test_the_demo(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert s3napback.main(["demo"]) == 0
    assert "A throwaway folder" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
