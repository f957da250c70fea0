"""DiffDir: what a DIFF continues, and whose file that is."""

import dataclasses
import io
import os
import re
import shutil
import subprocess
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import NIGHT, Capture, Site, fake_tool, files, newest, nights, tmpfs
from hypothesis import given
from hypothesis import strategies as st

import s3napback
from s3napback import ArchiveRef, DiffDir, Failure, Moment, Sidecar

# ---- a DIFF continues what is whole ----


def test_a_diff_continues_what_is_whole(site: Site, capsys: Capture) -> None:
    night = nights(site, 3)
    assert site.run(now=night) == 0
    assert not newest(site).metadata["state"].startswith("-:")
    assert "everything is stored" not in capsys.readouterr().err


@pytest.mark.parametrize("lost", ["first", "middle", "last", "all", "chunk", "replaced"])
def test_a_diff_whose_chain_is_torn_is_self_contained(
    site: Site, lost: str, capsys: Capture
) -> None:
    (site.data / "big").write_bytes(os.urandom(3000))  # the first archive has some chunks
    night = nights(site, 3)
    store = site.store()
    by_date = sorted(site.archives().values(), key=lambda archive: archive.modified)
    gone = {"first": by_date[:1], "middle": by_date[1:2], "last": by_date[2:], "all": by_date}
    for archive in gone.get(lost, ()):
        store.delete([item.key for item in archive.chunks])
    if lost == "chunk":
        store.delete([by_date[0].chunks[1].key])
    if lost == "replaced":  # another machine wrote there
        key = by_date[1].chunks[0].key
        root = s3napback.folder_root(site.settings["S3Endpoint"])
        s3napback.FolderStore(str(root), "bkt", lambda: 1e9).put(key, b"other", {})  # long ago
    assert site.run(now=night) == 3
    said = capsys.readouterr().err
    assert "is not whole in the bucket; everything is stored in it" in said
    archive = newest(site)
    assert archive.metadata["state"].startswith("-:")
    names = files(site.content(archive.name))
    assert {"file", "night0", "night1", "night2"} <= {os.path.basename(name) for name in names}
    # From here on there is a chain again.
    assert site.run(now=night + timedelta(days=1)) == 0
    assert (site.restored() / "file").read_text() == "one"


@pytest.mark.parametrize("notes", ["none", "cut", "damaged", "empty"])
def test_a_diff_file_without_notes_is_not_continued(
    site: Site, notes: str, capsys: Capture
) -> None:
    """It is the Perl script's, as far as anyone can tell."""
    night = nights(site, 3)
    (path,) = (site.folder / "diffs").glob(".s3napback-*.chain")
    if notes == "none":
        path.unlink()
    else:
        text = path.read_text()
        path.write_text({
            "cut": text[: len(text) // 2], "damaged": re.sub('"boot": .*', '"boot": [1]}]}', text),
            "empty": "{}",
        }[notes])
    assert site.run(now=night) == 0
    assert "the diff file is the Perl script's: everything is stored in it, once" in (
        capsys.readouterr().err
    )
    assert newest(site).metadata["state"].startswith("-:")
    assert site.run(now=night + timedelta(days=1)) == 0
    assert not newest(site).metadata["state"].startswith("-:")


def test_a_diff_file_that_another_wrote_since_is_not_continued(site: Site, capsys: Capture) -> None:
    """The Perl script, for one night more."""
    night = nights(site, 3)
    (diff_file,) = site.diff_files()
    (site.data / "lost").write_text("in no archive")
    subprocess.run(["tar", "-g", diff_file, "-cf", "/dev/null", site.data], capture_output=True)
    assert site.run(now=night) == 3
    assert "not the one that the last backup left" in capsys.readouterr().err
    assert any(name.endswith("/lost") for name in files(site.content(newest(site).name)))


def test_a_run_that_ends_between_the_notes_and_the_diff_file(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The notes tell of both."""
    night = nights(site, 3)

    def ended(*_: Any) -> None:
        raise s3napback.Interrupted(15)

    with monkeypatch.context() as patch:
        patch.setattr(s3napback.Draft, "commit", ended)
        assert site.run(now=night) == 143
    of_the_ended = newest(site)
    assert site.run(now=night) == 0  # done today
    assert site.run(now=night + timedelta(days=1)) == 0
    before = of_the_ended.metadata["state"].partition(":")[0]
    assert newest(site).metadata["state"].partition(":")[0] == before != "-"


def test_a_diff_in_the_place_of_its_predecessor_holds_everything(site: Site) -> None:
    night = nights(site, 2) - timedelta(days=1)
    before = newest(site).name
    assert site.run("-f", now=night + timedelta(hours=1)) == 0
    archive = newest(site)
    assert archive.name == before
    assert archive.metadata["state"].startswith("-:")


def test_a_forced_run_that_ends_before_its_state_is_kept(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new archive may have the very bytes of the one that DiffDir still tells of."""
    site.settings["Compressor"] = '"gzip -n"'  # without the time of day
    # Read once, a file and a folder keep their access times, which tar stores as well.
    subprocess.run(["tar", "-cf", "-", site.data], capture_output=True)
    assert site.run(now=NIGHT) == 0
    night = NIGHT + timedelta(days=1)
    ((name, _),) = site.archives().items()
    before = site.content(name)

    def ended(*_: Any) -> None:
        raise s3napback.Interrupted(15)

    with monkeypatch.context() as patch:
        patch.setattr(s3napback.DiffDir, "commit", ended)
        assert site.run("-f", now=night - timedelta(hours=23)) == 143
    assert site.content(name) == before
    assert site.run(now=night) == 3  # what DiffDir tells of is gone, so all is stored
    assert (site.restored() / "file").read_text() == "one"


def test_a_snapshot_that_is_cut_short_is_not_kept(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    fake_tool(
        site, monkeypatch, "tar",
        '"$REAL" "$@"; for word; do case "$word" in */.s3napback-*) '
        'echo "tar: $word: Cannot write: No space left on device" >&2;; esac; done; exit 2',
    )
    assert site.run() == 1
    assert "(make room in DiffDir)" in capsys.readouterr().err
    assert not site.archives()
    assert not site.diff_files()


def test_a_snapshot_that_a_full_disk_cut_short_is_not_kept_whatever_diffdir_is_called(
    site: Site, capsys: Capture
) -> None:
    """tar writes `\\:` for a colon in the name of what it cannot write."""
    for n in range(2000):
        (site.data / f"{'long' * 10}{n}").touch()
    folder = site.folder / "a:b \\c"
    folder.mkdir()
    site.settings["DiffDir"] = f'"{folder}"'
    with tmpfs(folder, "size=64k"):
        assert site.run() == 1
        assert "(make room in DiffDir)" in capsys.readouterr().err
        assert not [*folder.glob("*.diff")]
    assert not site.archives()


@pytest.mark.parametrize("how", ["onto a deleted one", "swapped", "in a row"])
def test_directories_that_took_anothers_name_come_back(site: Site, how: str) -> None:
    for name in ("a", "b", "c"):
        (site.data / name / "sub").mkdir(parents=True)
        (site.data / name / "sub" / name).write_text(name)
    assert site.run() == 0
    a, b, c = (site.data / name for name in ("a", "b", "c"))
    if how == "onto a deleted one":
        shutil.rmtree(a)
        b.rename(a)
    else:
        a.rename(site.data / "x")
        b.rename(a)
        if how == "in a row":
            c.rename(b)
        else:
            (site.data / "x").rename(b)
    assert site.run(now=NIGHT + timedelta(days=1)) == 0
    back = site.folder / "back"
    back.mkdir()
    for archive in sorted(site.archives().values(), key=lambda x: x.modified):
        done = subprocess.run(
            ["tar", "xz", "--listed-incremental=/dev/null", "-C", str(back)],
            input=site.content(archive.name), capture_output=True,
        )
        assert done.returncode == 0, done.stderr
    assert subprocess.run(["diff", "-r", str(site.data), f"{back}{site.data}"]).returncode == 0


# ---- the files ----


@pytest.fixture
def state(tmp_path: Path) -> DiffDir:
    return DiffDir(f"{tmp_path}/", Moment.of(NIGHT))


def test_a_diff_file_that_cannot_be_read_is_told(state: DiffDir, tmp_path: Path) -> None:
    path = Path(state.diff_file("/repo"))
    path.write_text("many")
    with pytest.raises(Failure, match="cannot read the revision") as failure:
        state.position("Subversion", "/repo")
    assert failure.value.hint == "delete the file for a full backup"
    path.unlink()
    path.mkdir()
    with pytest.raises(Failure, match="cannot read the diff file"):
        state.position("Directory", "/repo")


@pytest.mark.parametrize("kind", ["Directory", "Subversion"])
def test_without_a_diff_file_there_is_nothing_to_continue(state: DiffDir, kind: str) -> None:
    """Whoever deletes it gets a full backup."""
    state.commit("/repo", Sidecar("x", "bkt", (ArchiveRef("a", "y"),)))
    assert state.position(kind, "/repo") == ""


def test_notes_that_cannot_be_kept(state: DiffDir, tmp_path: Path) -> None:
    notes = Sidecar("x", "bkt", (ArchiveRef("a", "y"),))
    state.commit("/repo", notes)
    (path,) = tmp_path.glob(".s3napback-*.chain")
    path.unlink()
    path.mkdir()
    with pytest.raises(Failure, match="write in DiffDir"):
        state.commit("/repo", notes)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".draft")]
    assert state.sidecars("/repo") == ()


def test_a_diff_dir_that_went_away_is_a_sentence(tmp_path: Path) -> None:
    state = DiffDir(f"{tmp_path}/away/", Moment.of(NIGHT))
    for attempt in (state.lock(), state.draft("/x", empty=True)):
        with pytest.raises(Failure, match="DiffDir"), attempt:
            pass
    with pytest.raises(Failure, match="cannot write in DiffDir") as failure:
        state.clear()
    assert failure.value.status == 2


def test_a_directory_in_the_place_of_a_diff_file(site: Site, capsys: Capture) -> None:
    path = Path(DiffDir(site.settings["DiffDir"] + "/", Moment.of(NIGHT)).diff_file(str(site.data)))
    path.mkdir()
    os.utime(path, (1e9, 1e9))
    assert site.run() == 1
    assert "Is a directory" in capsys.readouterr().err


def test_a_snapshot_of_another_program_is_not_continued(site: Site) -> None:
    assert site.run(now=NIGHT - timedelta(days=1)) == 0
    (path,) = site.diff_files()
    content = b"GNU tar-1.34-2\n" + b"x\0" * 12
    path.write_bytes(content)
    s3napback.Draft(str(path), "", Moment.of(NIGHT), s3napback.IndexDraft("")).prepare()
    assert path.read_bytes() == b""  # nothing of it is believed
    path.write_bytes(content)
    # No archive ends there, so all is stored anew.
    assert site.run() == 3


@given(st.binary(max_size=300))
def test_no_snapshot_file_breaks_the_reader(content: bytes) -> None:
    for text in (content, b"GNU tar-1.34-2\n" + content, b"GNU tar-1.34-2\n1\0002\0" + content):
        try:
            snapshot = s3napback.Snapshot.read(io.BytesIO(text))
            folders = list(snapshot.folders)
        except ValueError:
            continue
        written = io.BytesIO()
        dataclasses.replace(snapshot, folders=folders).write(written)
        again = s3napback.Snapshot.read(io.BytesIO(written.getvalue()))
        assert list(again.folders) == folders
        assert dataclasses.replace(again, folders=snapshot.folders) == snapshot


def test_a_snapshot_that_ends_within_a_record_is_none() -> None:
    whole = b"GNU tar-1.34-2\n1\0002\0" + b"0\0001\0002\0003\0004\0./a\0Yb\0\0\0"
    assert [one.name for one in s3napback.Snapshot.read(io.BytesIO(whole)).folders] == [b"./a"]
    for end in range(20, len(whole)):
        with pytest.raises(ValueError, match=r"cut short|unpack|2"):
            list(s3napback.Snapshot.read(io.BytesIO(whole[:end])).folders)


# ---- the folder ----


def test_a_name_too_long_for_a_diff_file_fails_alone(site: Site, capsys: Capture) -> None:
    deep = site.folder / ("d" * 120) / ("e" * 120)
    deep.mkdir(parents=True)
    site.jobs = f"Directory {deep} {site.data}"
    assert site.run() == 1
    assert "cannot use the diff file: " in capsys.readouterr().err
    assert [name.rpartition("/")[2].split("-")[0] for name in site.archives()] == ["data"]


def test_a_folder_that_cannot_be_locked_is_no_end(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    assert site.run() == 0
    assert "cannot lock DiffDir" in capsys.readouterr().err


def test_a_read_only_diff_dir_is_a_failure_before_anything_is_stored(
    site: Site, capsys: Capture
) -> None:
    with tmpfs(site.folder / "diffs", "ro") as diffs:
        assert site.run() == 2
    assert f"cannot write in DiffDir {diffs}/: Read-only file system" in capsys.readouterr().err
    assert not site.archives()


def test_a_second_run_on_a_diff_dir_is_refused(site: Site, capsys: Capture) -> None:
    with s3napback.DiffDir(f"{site.folder}/diffs/", s3napback.Moment(0)).lock():
        assert site.run() == 75
        assert site.run("-t") == 0  # looks, and waits for no one
    assert f"another run is at work in DiffDir {site.folder}/diffs/" in capsys.readouterr().err
    assert not site.archives()
    assert site.run() == 0


def test_what_a_killed_run_left_in_diff_dir_is_cleared(site: Site) -> None:
    left = site.folder / "diffs" / f"{s3napback._DRAFT_START}xyz{s3napback._DRAFT_END}"
    left.write_text("half")
    assert site.run() == 0
    assert not left.exists()
