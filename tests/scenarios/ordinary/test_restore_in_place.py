"""A restore into a folder that is in use: what is mounted there, what others own, what is left."""

import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import NIGHT, Site, leave_out, require_tool, run_as_nobody, tmpfs

import s3napback


@pytest.mark.parametrize("how", ["not backed up", "a file in the backup", "bind"])
def test_what_is_mounted_in_a_folder_that_goes_is_not_deleted(
    site: Site, how: str, capsys: Any
) -> None:
    (site.data / "keep").write_text("stored")
    if how == "a file in the backup":
        (site.data / "other").write_text("stored")
    assert site.run() == 0
    place = site.folder / "place"
    mounted = Path(f"{place}{site.data}") / "other" / "deep" / "disk"
    mounted.mkdir(parents=True)
    source = site.folder / "source"
    source.mkdir()
    with tmpfs(source if how == "bind" else mounted, "size=1m"):
        try:
            if how == "bind":
                subprocess.run(["mount", "--bind", site.folder / "diffs", mounted], check=True)
                (mounted / "precious").write_text("mine")
            else:
                (mounted / "precious").write_text("mine")
            assert site.restore(place, "--overwrite") == 3
            said = capsys.readouterr().err
            assert "data/other is left as it is: another file system" in said
            assert (mounted / "precious").read_text() == "mine"
        finally:
            if how == "bind":
                subprocess.run(["umount", mounted], check=True)


def test_what_a_killed_restore_left_goes_with_the_next(site: Site) -> None:
    inner = site.data / "inner"
    inner.mkdir()
    (inner / "file").write_text("stored")
    assert site.run() == 0
    place = site.folder / "place"
    assert site.restore(place, "--overwrite") == 0
    there = Path(f"{place}{inner}")
    (there / ".s3napback-restore-0123").mkdir()
    (there / ".s3napback-restore-4567").write_text("copy")
    (place / ".s3napback-restore-89ab").mkdir()
    assert site.restore(place, "--overwrite", str(inner / "file")) == 0
    assert site.restore(place, "--overwrite") == 0
    assert not list(place.rglob(".s3napback*"))


def test_an_ordinary_user_restores_into_a_folder_of_another(nobodys: Site) -> None:
    site = nobodys
    """The file takes its place; to set the folder's mode and times is not the user's right."""
    assert run_as_nobody(site).returncode == 0
    place = site.folder / "place"
    there = Path(f"{place}{site.data}")
    there.mkdir(parents=True)
    for path in (there, *there.parents):
        if path.is_relative_to(place):
            path.chmod(0o777)
    os.chmod(there, 0o777)
    done = run_as_nobody(site, "restore", str(site.data), "--overwrite", "--to", str(place))
    assert (there / "file").read_text() == "one"
    assert done.returncode == 3, done.stderr
    assert f"{there} could not be brought back whole: Operation not permitted" in done.stderr


def test_the_script_goes_on_past_what_tar_cannot_do(site: Site, capfdbinary: Any) -> None:
    if os.geteuid():
        leave_out("owners need root")
    os.chown(site.data / "file", 1234, 1235)
    os.mknod(site.data / "null", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    assert site.run() == 0
    (site.data / "later").write_text("later")
    assert site.run("-f", now=NIGHT.replace(day=22)) == 0
    capfdbinary.readouterr()
    assert s3napback.main(["restore-script", "-c", str(site.write()), str(site.data)]) == 0
    script = site.folder / "restore.sh"
    script.write_bytes(capfdbinary.readouterr().out)
    lesser = [require_tool("setpriv"), "--bounding-set=-chown,-mknod", "--inh-caps=-chown,-mknod"]
    done = subprocess.run([*lesser, "sh", script, site.folder / "back"], capture_output=True)
    found = sorted(p.name for p in Path(f"{site.folder}/back{site.data}").iterdir())
    assert found == ["file", "later"], done.stderr
    assert done.returncode == 3


def test_a_file_that_is_mounted_stays_and_the_rest_comes_back(site: Site, capsys: Any) -> None:
    """A container's /etc/hosts."""
    (site.data / "other").write_text("stored")
    assert site.run() == 0
    place = site.folder / "place"
    there = Path(f"{place}{site.data}")
    there.mkdir(parents=True)
    for name in ("file", "other", "more"):
        (there / name).write_text("mine")
    mount = ["mount", "--bind", str(site.conf), str(there / "file")]
    if subprocess.run(mount, capture_output=True).returncode:
        leave_out("mounting needs root")
    try:
        assert site.restore(place, "--overwrite") == 3
        assert f"{there}/file is left as it is" in capsys.readouterr().err
        assert (there / "file").read_bytes() == site.conf.read_bytes()
    finally:
        subprocess.run(["umount", there / "file"], check=True)
    assert sorted(os.listdir(there)) == ["file", "other"]
    assert (there / "other").read_text() == "stored"


def test_the_bucket_and_the_diffdir_in_a_source_outlive_its_restore(
    site: Site, capsys: Any
) -> None:
    """No archive holds them, and what is in no archive is taken away."""
    backup = site.data / "backup"
    for name in ("diffs", "buckets"):
        (backup / name).mkdir(parents=True)
    site.settings["DiffDir"] = f"{backup}/diffs"
    site.settings["S3Endpoint"] = f"file://{backup}/buckets"
    assert site.run() == 0
    before = sorted(backup.rglob("*"))
    (site.data / "file").write_text("mine")
    (site.data / "more").write_text("mine")
    assert site.restore(Path("/"), "--overwrite") == 3
    assert sorted(backup.rglob("*")) == before
    assert sorted(os.listdir(site.data)) == ["backup", "file"]
    assert (site.data / "file").read_text() == "one"
    assert f"{backup}/buckets/bkt is left as it is" in capsys.readouterr().err


def test_folders_get_their_times_back(site: Site) -> None:
    """Also those out of which something is taken, and those above and below it."""
    inner = site.data / "inner"
    (inner / "deep").mkdir(parents=True)
    (inner / "deep" / "file").write_text("stored")
    folders = [inner / "deep", inner, site.data]
    for folder in folders:
        os.utime(folder, (1e9, 1e9))
    assert site.run() == 0
    (inner / "deep" / "file").write_text("mine")
    (inner / "more").write_text("mine")
    (site.data / "file").unlink()
    assert site.restore("/", "--overwrite") == 0
    assert [folder.stat().st_mtime for folder in folders] == [1e9] * 3
    assert sorted(os.listdir(inner)) == ["deep"]


@pytest.mark.parametrize("mode", [0o500, 0o000, 0o300])
def test_an_ordinary_user_gets_locked_folders_back_as_they_were(nobodys: Site, mode: int) -> None:
    """What may not be written is moved out of and into, what may not be read is looked into."""
    site = nobodys
    (site.data / "locked" / "in").mkdir(parents=True)
    (site.data / "locked" / "in" / "file").write_text("one")
    (site.data / "locked" / "gone").write_text("one")
    for night in (21, 22):
        os.chmod(site.data / "locked" / "in", mode)
        os.chmod(site.data / "locked", mode)
        assert site.run("-f", now=NIGHT.replace(day=night)) == 0  # root may read it
        if night == 21:
            (site.data / "locked" / "gone").unlink()
    subprocess.run(["chown", "-R", "65534:65534", site.folder], check=True)
    place = site.folder / "place"
    back = Path(f"{place}{site.data}") / "locked"
    for words in ([], ["--overwrite"]):
        if words:
            os.chmod(back, 0o700)
            (back / "more").write_text("mine")
            os.chmod(back, mode)
            os.chown(back / "more", 65534, 65534)
        done = run_as_nobody(site, "restore", str(site.data), "--to", str(place), *words)
        assert done.returncode == 0, done.stderr
        assert [stat.S_IMODE(path.stat().st_mode) for path in (back, back / "in")] == [mode] * 2
        assert os.listdir(back) == ["in"]
        assert (back / "in" / "file").read_text() == "one"


def test_a_folder_that_a_user_may_not_search_is_told_with_the_reason(nobodys: Site) -> None:
    site = nobodys
    (site.data / "in" / "deep").mkdir(parents=True)
    (site.data / "in" / "deep" / "file").write_text("one")
    subprocess.run(["chown", "-R", "65534:65534", site.data], check=True)
    assert run_as_nobody(site).returncode == 0
    place = site.folder / "place"
    locked = Path(f"{place}{site.data}") / "in"
    (locked / "deep").mkdir(parents=True)
    subprocess.run(["chown", "-R", "65534:65534", place], check=True)
    os.chown(locked, 0, 0)
    os.chmod(locked, 0o744)
    done = run_as_nobody(site, "restore", str(site.data), "--overwrite", "--to", str(place))
    assert done.returncode == 3, done.stderr
    assert f"{locked}/deep could not be brought back whole: Permission denied" in done.stderr


def test_what_programs_change_meanwhile_ends_no_restore(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """What is to go may be gone by then; what else is not as it was listed is told."""
    for name in ("a", "z"):
        (site.data / name).mkdir()
        (site.data / name / "file").write_text("stored")
    assert site.run() == 0
    place = site.folder / "place"
    assert site.restore(place) == 0
    there = Path(f"{place}{site.data}")
    (there / "temp").write_text("a program's")
    (there / "file").write_text("mine")
    listed = s3napback.entries_of

    def and_changed(folder: int) -> dict[str, bool]:
        found = listed(folder)
        if os.readlink(f"/proc/self/fd/{folder}") == str(there):
            (there / "temp").unlink()
            (there / "z").rename(there / "y")
        return found

    monkeypatch.setattr(s3napback, "entries_of", and_changed)
    capsys.readouterr()
    assert site.restore(place, "--overwrite") == 3
    said, _ = capsys.readouterr().err.splitlines()
    assert said.endswith(f"{there}/z could not be brought back whole: No such file or directory")
    monkeypatch.undo()
    assert (there / "file").read_text() == "one"
    assert site.restore(place, "--overwrite") == 0
    assert sorted(os.listdir(there)) == ["a", "file", "z"]


def test_a_file_system_without_acls_is_told_for_what_has_some(site: Site, capsys: Any) -> None:
    """tar tells it of every file."""
    (site.data / "shared").write_text("stored")
    place = site.folder / "place"
    place.mkdir()
    with tmpfs(place, "size=1m", "ramfs"):
        for night, words in ((21, []), (22, [require_tool("setfacl"), "-m", "u:nobody:r"])):
            if words:
                subprocess.run([*words, site.data / "shared"], check=True)
            assert site.run("-f", now=NIGHT.replace(day=night)) == 0
            capsys.readouterr()
            assert site.restore(place / str(night)) == (3 if words else 0)
            *said, _ = capsys.readouterr().err.splitlines()
            assert ["data/shared" in line for line in said] == [True for _ in words[:1]]
