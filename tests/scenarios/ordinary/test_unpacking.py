"""What a restore brings back of a directory or a repository, and what it says of the rest."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from conftest import NIGHT, START, Site, differences, fake_tool, leave_out, require_tool, tmpfs

import s3napback


def script_of(site: Site, name: str, capfdbinary: Any) -> Path:
    """The restore script of a name."""
    capfdbinary.readouterr()
    assert s3napback.main(["restore-script", "-c", str(site.write()), name]) == 0
    script = site.folder / "restore.sh"
    script.write_bytes(capfdbinary.readouterr().out)
    return script


@pytest.mark.parametrize("by", ["restore", "restore-script"])
def test_capabilities_and_other_attributes_come_back(site: Site, by: str, capfdbinary: Any) -> None:
    if os.geteuid():
        leave_out("capabilities need root")
    setcap, setfattr = require_tool("setcap"), require_tool("setfattr")
    tool = site.data / "tool"
    tool.write_bytes(b"x")
    subprocess.run([setcap, "cap_net_raw+ep", tool], check=True)
    subprocess.run([setfattr, "-n", "trusted.note", "-v", "x", site.data], check=True)
    assert site.run() == 0
    place = site.folder / "back"
    if by == "restore":
        assert site.restore(place) == 0
    else:
        script = script_of(site, str(site.data), capfdbinary)
        subprocess.run(["sh", script, place], check=True)
    for path, name in ((tool, "security.capability"), (site.data, "trusted.note")):
        assert os.getxattr(f"{place}{path}", name) == os.getxattr(path, name)


@pytest.mark.parametrize("by", ["restore", "restore-script"])
def test_a_log_message_with_a_carriage_return_is_loaded(
    site: Site, by: str, capfdbinary: Any, svn_repo_factory: Any
) -> None:
    repo = svn_repo_factory(site.folder / "repo", 1)
    revision = repo / "db" / "revprops" / "0" / "1"
    revision.chmod(0o644)
    message = revision.read_bytes().replace(b"V 8\ncommit 1", b"V 8\nco\rmit 1")
    assert b"\r" in message
    revision.write_bytes(message)
    site.jobs = f"Subversion {repo}"
    assert site.run() == 0
    place = site.folder / "again"
    if by == "restore":
        assert site.restore(place, name=repo) == 0
    else:
        script = script_of(site, str(repo), capfdbinary)
        subprocess.run(["sh", script, place], check=True)
    log = subprocess.run(["svnlook", "log", place, "-r", "1"], capture_output=True, check=True)
    assert log.stdout.startswith(b"co")


@pytest.mark.parametrize(("tool", "does"), [
    ("tar", "exit 64  # as of one that is not GNU tar"),
    ("cat", 'kill -TERM $PPID; exec "$REAL" "$@"'), ("tar", "kill -INT $PPID; exit 2"),
])
def test_a_script_that_is_ended_says_so_and_leaves_nothing_decrypted(
    site: Site, tool: str, does: str, monkeypatch: pytest.MonkeyPatch, capfdbinary: Any
) -> None:
    assert site.run() == 0
    script = script_of(site, str(site.data), capfdbinary)
    fake_tool(site, monkeypatch, tool, does)
    monkeypatch.setenv("TMPDIR", str(site.folder / "temp"))
    done = subprocess.run(["sh", script, site.folder / "back"], capture_output=True)
    assert done.returncode == 1, done.stderr
    assert not os.listdir(site.folder / "temp")


def run_as(words: list[str], *given: str, env: dict[str, str] | None = None) -> Any:
    """The program as another user, or in another environment."""
    return subprocess.run(
        [*words, sys.executable, START, *given], capture_output=True, cwd="/",
        env={**os.environ, **(env or {})}, stdin=subprocess.DEVNULL,
    )


def three_nights(site: Site, *changes: Any) -> None:
    """A backup, and one more after each change."""
    for night, change in enumerate([lambda: None, *changes]):
        change()
        assert site.run("-f", now=NIGHT.replace(day=21 + night)) == 0


# ---- a part of an archive is restored by what is needed of it ----


@pytest.mark.slow
@pytest.mark.parametrize("wanted", ["a/one", "a", "b/link"])
def test_what_follows_the_wanted_paths_in_an_archive_is_not_read(
    site: Site, wanted: str, capsys: Any
) -> None:
    """The dumpdirs at an archive's start tell what is to come, so the end of it may be damaged:
    what lies further away than pipes and chunks that are fetched ahead."""
    for folder in ("a/inner", "b", "z"):
        (site.data / folder).mkdir(parents=True)
    for name in ("a/one", "a/inner/two"):
        (site.data / name).write_text(name)
    os.link(site.data / "a" / "one", site.data / "b" / "link")
    (site.data / "z" / "big").write_bytes(os.urandom(10_000_000))
    site.settings["ChunkSize"] = "100000"
    three_nights(site, lambda: (site.data / "z" / "big").write_bytes(os.urandom(10_000_000)))
    for night in ("16", "17"):
        last = max((site.folder / "buckets" / "bkt").glob(f"*-{night}-DIFF*"))
        info = last.stat()
        last.write_bytes(b"x" * info.st_size)
        os.utime(last, ns=(info.st_atime_ns, info.st_mtime_ns))
    place = site.restored(f"{site.data}/{wanted}")
    subprocess.run(["diff", "-r", site.data / wanted, place / wanted], check=True)
    assert site.restore(site.folder / "all") == 1
    assert "is damaged" in capsys.readouterr().err


def test_a_file_of_the_newest_archive_needs_none_before(site: Site) -> None:
    for name in ("changed", "gone", "kept"):
        (site.data / name).write_text(name)

    def change() -> None:
        (site.data / "changed").write_text("again")
        (site.data / "gone").unlink()

    three_nights(site, lambda: None, change)
    first = min((site.folder / "buckets" / "bkt").glob("*-16-*"))
    info = first.stat()
    first.write_bytes(b"x" * info.st_size)
    os.utime(first, ns=(info.st_atime_ns, info.st_mtime_ns))
    place = site.restored(f"{site.data}/changed")
    assert (place / "changed").read_text() == "again"
    assert site.restore(site.folder / "gone", f"{site.data}/gone") == 1
    assert site.restore(site.folder / "kept", f"{site.data}/kept") == 1
    assert not [path for path in (site.folder / "kept").rglob("*") if path.is_file()]


# ---- what is gone stays gone ----


def test_what_was_below_a_file_of_today_does_not_come_back(site: Site, capsys: Any) -> None:
    (site.data / "a").mkdir()
    (site.data / "a" / "b").write_text("old")

    def change() -> None:
        shutil.rmtree(site.data / "a")
        (site.data / "a").write_text("a file now")

    three_nights(site, change, lambda: None)
    (site.data / "z").mkdir()
    for wanted in ("a/b", "a/b z"):
        words = [f"{site.data}/{name}" for name in wanted.split()]
        assert site.restore(site.folder / wanted.replace("/", "-"), *words) == 1
        assert "a/b" in capsys.readouterr().err
        assert not list((site.folder / wanted.replace("/", "-")).rglob("b"))


def test_a_path_below_what_could_not_be_read_is_as_the_whole_has_it(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid():
        leave_out("to make tar an ordinary user needs root")
    for name in ("a", "b"):
        (site.data / name).mkdir()
        (site.data / name / "file").write_text("old")
    assert site.run("-f", now=NIGHT.replace(day=21)) == 0
    for name, mode in (("a", 0), ("b", 0o600)):
        shutil.rmtree(site.data / name)
        (site.data / name).write_text("a file now")
        (site.data / name).chmod(mode)
    rights = "-dac_override,-dac_read_search"
    fake_tool(site, monkeypatch, "tar", f'exec setpriv --bounding-set={rights} "$REAL" "$@"')
    assert site.run("-f", now=NIGHT.replace(day=22)) == 3
    place = site.restored()
    assert (place / "a" / "file").read_text() == "old"
    assert (place / "b").read_text() == "a file now"
    assert (site.restored(f"{site.data}/a/file") / "a" / "file").read_text() == "old"
    assert site.restore(site.folder / "none", f"{site.data}/b/file") == 1


@pytest.mark.parametrize("wanted", ["whole", "path"])
def test_a_home_that_was_deleted_does_not_come_back(site: Site, wanted: str, capsys: Any) -> None:
    homes = site.folder / "home"
    for name in ("anna", "bert", "cleo"):
        (homes / name / "docs").mkdir(parents=True)
        (homes / name / "docs" / "file").write_text(name)
    site.jobs = f"Directory {homes}/*"
    three_nights(site, lambda: shutil.rmtree(homes / "bert"), lambda: None)
    place = site.folder / "back"
    words = [f"{homes}/bert"] if wanted == "path" else []
    status = site.restore(place, *words, name=f"{homes}/*")
    if wanted == "path":
        assert status == 1
        assert "not in the backup as of 2026-11-23 03:00:00" in capsys.readouterr().err
        assert not [path for path in place.rglob("*") if path.is_file()]
    else:
        assert status == 0
        assert sorted(os.listdir(f"{place}{homes}")) == ["anna", "cleo"]
        assert (Path(f"{place}{homes}") / "cleo" / "docs" / "file").read_text() == "cleo"
    assert site.restore(site.folder / "then", "--at", "2026-11-21", name=f"{homes}/*") == 0
    assert (Path(f"{site.folder}/then{homes}") / "bert" / "docs" / "file").exists()


def test_of_what_is_given_to_tar_no_more_no_empty_folder_is_left(site: Site, capsys: Any) -> None:
    homes = site.folder / "home"
    for name in ("anna/a", "anna/b", "bert/a"):
        (homes / name).mkdir(parents=True)
    site.jobs = f"Directory {homes}/*/*"
    for number, gone in enumerate((None, homes / "anna/b", homes / "bert/a")):
        if gone:
            gone.rmdir()
        assert site.run("-f", now=NIGHT.replace(day=21 + number)) == 0
    back = site.restored(name=f"{homes}/*/*").parents[1]
    assert [str(path.relative_to(back)) for path in back.rglob("*")] == ["anna", "anna/a"]
    assert site.restore(site.folder / "part", f"{homes}/bert", name=f"{homes}/*/*") == 1
    assert "not in the backup" in capsys.readouterr().err


def test_files_given_by_name_are_kept_while_they_do_not_change(site: Site) -> None:
    for name in ("kept", "changed"):
        (site.data / name).write_text("one")
    site.jobs = f"Directory {site.data}/*"
    three_nights(site, lambda: (site.data / "changed").write_text("two"), lambda: None)
    place = site.folder / "back"
    assert site.restore(place, name=f"{site.data}/*") == 0
    found = {path.name: path.read_text() for path in Path(f"{place}{site.data}").iterdir()}
    assert found == {"file": "one", "kept": "one", "changed": "two"}


def test_a_file_given_by_name_that_was_deleted_does_not_come_back(site: Site) -> None:
    for name in ("kept", "gone"):
        (site.data / name).write_text("one")
    (site.data / "folder").mkdir()
    site.jobs = f"Directory {site.data}/*"
    three_nights(site, (site.data / "gone").unlink, lambda: None)
    for words in ([], [str(site.data)]):
        place = site.folder / f"back{len(words)}"
        assert site.restore(place, *words, name=f"{site.data}/*") == 0
        assert sorted(os.listdir(f"{place}{site.data}")) == ["file", "folder", "kept"]


def test_a_folder_given_by_name_that_could_not_be_read_is_kept(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("open", "shut"):
        (site.data / name).mkdir()
        (site.data / name / "file").write_text(name)
    site.jobs = f"Directory {site.data}/*"
    assert site.run("-f", now=NIGHT.replace(day=21)) == 0
    # Root may read everything: here tar is not told of one folder, as of one that it cannot open.
    fake_tool(site, monkeypatch, "tar", f'args=(); for a; do [ "$a" = {site.data}/shut ] ||'
              ' args+=("$a"); done; exec "$REAL" "${args[@]}"')
    assert site.run("-f", now=NIGHT.replace(day=22)) == 0
    for words in ([], [f"{site.data}/shut/file"], [f"{site.data}/shut"]):
        place = site.folder / f"back{words[0].count('/') if words else ''}"
        assert site.restore(place, *words, name=f"{site.data}/*") == 0
        assert (Path(f"{place}{site.data}") / "shut" / "file").read_text() == "shut"


# ---- directories that were renamed, as the Perl script stored them ----


def current_is_a_release(data: Path) -> None:
    (data / "current").unlink()
    (data / "release").rename(data / "current")


def a_file_is_a_folder(data: Path) -> None:
    (data / "x").unlink()
    (data / "d").rename(data / "x")


def one_out_of_another(data: Path) -> None:
    (data / "v1").rename(data / "old")
    (data / "old" / "data").rename(data / "data")


def two_change_their_names(data: Path) -> None:
    (data / "d").rename(data / "t")
    (data / "v1").rename(data / "d")
    (data / "t").rename(data / "v1")


@pytest.mark.slow
@pytest.mark.parametrize("change", [current_is_a_release, a_file_is_a_folder, one_out_of_another,
                                    two_change_their_names])
def test_renames_of_the_perl_script_come_back(site: Site, change: Any) -> None:
    """tar stores these and cannot do them on the way back; a later DIFF is there, too."""
    for name in ("release", "d", "v1/data"):
        (site.data / name).mkdir(parents=True)
        (site.data / name / "file").write_text(name)
    (site.data / "current").symlink_to("release")
    (site.data / "x").write_text("x")
    store = site.store()
    store.create()
    nights = [lambda data: None, change, lambda data: (data / "later").write_text("later")]
    if change is two_change_their_names:
        nights.pop()  # tar forgets that it has stored such a pair, and stores it again
    for night, of_night in enumerate(nights):
        of_night(site.data)
        archive = subprocess.run(
            ["tar", "-f", "-", "-g", site.folder / "snapshot", "-C", "/", "-czp", site.data],
            capture_output=True, check=True,
        )
        mode = "DIFF" if night else "FULL"
        store.put(f"{site.data}-{night}-{mode}:{0:020d}", archive.stdout, {})
        (file,) = (site.folder / "buckets" / "bkt").glob(f"*-{night}-{mode}*")
        os.utime(file, (1e9 + night * 86400, 1e9 + night * 86400))
    whole = site.folder / "whole"
    assert site.restore(whole) == 0
    assert not differences(site.data, f"{whole}{site.data}")
    for number, path in enumerate(site.data.iterdir()):
        part = site.folder / f"part{number}"
        assert site.restore(part, str(path)) == 0
        assert not differences(path, f"{part}{path}")
        assert os.listdir(f"{part}{site.data}") == [path.name]


def test_a_path_in_one_directory_is_told_of_a_rename_out_of_another(site: Site) -> None:
    """The first directory that is given to tar says where a folder of it has gone."""
    for name in ("a/moved", "b"):
        (site.data / name).mkdir(parents=True)
    (site.data / "a" / "moved" / "file").write_text("one")
    store = site.store()
    store.create()
    for night in range(2):
        if night:
            (site.data / "a" / "moved").rename(site.data / "b" / "moved")
        archive = subprocess.run(
            ["tar", "-f", "-", "-g", site.folder / "snapshot", "-C", "/", "-czp",
             site.data / "a", site.data / "b"], capture_output=True, check=True,
        )
        mode = "DIFF" if night else "FULL"
        store.put(f"{site.data}/*-{night}-{mode}:{0:020d}", archive.stdout, {})
        (file,) = (site.folder / "buckets" / "bkt").glob(f"*-{night}-{mode}*")
        os.utime(file, (1e9 + night * 86400, 1e9 + night * 86400))
    for number, path in enumerate(("b", "b/moved", "b/moved/file")):
        place = site.folder / f"back{number}"
        assert site.restore(place, f"{site.data}/{path}", name=f"{site.data}/*") == 0
        assert (Path(f"{place}{site.data}") / "b" / "moved" / "file").read_text() == "one"


# ---- names ----


@pytest.mark.slow
@pytest.mark.parametrize("locale", [None, "C", "C.UTF-8"])
def test_paths_of_any_letters_in_any_locale(site: Site, locale: str | None) -> None:
    """And `etc` is not missing because `etc2` is, nor found because `etc2` is there."""
    for name in ("grün", "etc2", "new\nline", "back\\slash", "[a]", "-x"):
        (site.data / name).mkdir()
        (site.data / name / "файл").write_text(name)
    three_nights(site, lambda: (site.data / "grün" / "neu").write_text("neu"))
    env = {name: "" for name in ("LANG", "LC_CTYPE", "LANGUAGE")} | {"LC_ALL": locale or ""}
    words = ["restore", "-c", str(site.write()), str(site.data), "--to"]
    paths = [f"{site.data}/{name}" for name in (
        "grün", "etc2/файл", "new\nline", "back\\slash", "[a]/", "-x")]
    done = run_as([], *words, f"{site.folder}/back", *paths, env=env)
    assert done.returncode == 0, done.stderr
    for path in paths:
        there = Path(f"{site.folder}/back{path}")
        inner = [there] if there.is_file() else sorted(there.iterdir())
        assert [p.name for p in inner] == (["neu", "файл"] if "grün" in path else ["файл"])
    done = run_as([], *words, f"{site.folder}/no", f"{site.data}/etc", f"{site.data}/etc2", env=env)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith(f"{site.data}/etc".lstrip("/").encode())
    assert (Path(f"{site.folder}/no{site.data}") / "etc2" / "файл").exists()


def test_a_hard_link_whose_other_name_lies_outside_of_the_path(site: Site) -> None:
    (site.data / "a").mkdir()
    (site.data / "b").mkdir()
    (site.data / "a" / "first").write_text("content")
    os.link(site.data / "a" / "first", site.data / "b" / "second")
    three_nights(site, lambda: (site.data / "b" / "more").write_text("more"))
    place = site.folder / "back"
    assert site.restore(place, f"{site.data}/b") == 0
    assert (Path(f"{place}{site.data}") / "b" / "second").read_text() == "content"
    assert os.listdir(f"{place}{site.data}") == ["b"]


# ---- what cannot be done where it runs ----


def test_owners_and_devices_that_cannot_be_made_are_listed(site: Site) -> None:
    """As root of a container, without the right to either."""
    if os.geteuid():
        leave_out("owners need root")
    os.chown(site.data / "file", 1234, 1235)
    os.mknod(site.data / "null", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    three_nights(site, lambda: (site.data / "later").write_text("later"),
                 lambda: (site.data / "file").write_text("two"))
    lesser = [require_tool("setpriv"), "--bounding-set=-chown,-mknod", "--inh-caps=-chown,-mknod"]
    done = run_as(lesser, "restore", "-c", str(site.write()), str(site.data), "--to",
                  f"{site.folder}/back")
    assert done.returncode == 3, done.stderr
    said = done.stderr.decode()
    assert "data/null: Cannot mknod: Operation not permitted" in said
    assert "data/file: Cannot change ownership to uid 1234, gid 1235" in said
    found = {p.name: p.read_text() for p in Path(f"{site.folder}/back{site.data}").iterdir()}
    assert found == {"file": "two", "later": "later"}


@pytest.mark.slow
def test_an_ordinary_user_restores_folders_that_are_locked(site: Site) -> None:
    if os.geteuid():
        leave_out("another user needs root")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        home = Site(Path(folder))
        (home.data / "locked" / "in").mkdir(parents=True)
        (home.data / "locked" / "in" / "file").write_text("one")
        (home.data / "locked" / "gone").write_text("one")
        subprocess.run(["chown", "-R", "65534:65534", folder], check=True)
        user = [require_tool("setpriv"), "--reuid=65534", "--regid=65534", "--clear-groups"]
        conf = str(home.write())
        os.chmod(home.data / "locked", 0o500)
        assert run_as(user, "-c", conf).returncode == 0
        (home.data / "locked" / "gone").unlink()
        os.chmod(home.data / "locked" / "in", 0o500)
        assert run_as(user, "-f", "-c", conf).returncode == 0
        for words in ([], [f"{home.data}/locked/in/file"]):
            place = f"{folder}/back{len(words)}"
            done = run_as(user, "restore", "-c", conf, str(home.data), "--to", place, *words)
            assert done.returncode == 0, done.stderr
            back = Path(f"{place}{home.data}")
            assert (back / "locked" / "in" / "file").read_text() == "one"
            assert not (back / "locked" / "gone").exists()
            assert not [name for name in os.listdir(place) if name.startswith(".s3napback")]
        assert stat.S_IMODE((Path(f"{folder}/back0{home.data}") / "locked").stat().st_mode) == 0o500
        one, none = f"{home.data}/locked", f"{home.data}/locked/none"
        done = run_as(user, "restore", "-c", conf, str(home.data), "--to", f"{folder}/b", one, none)
        assert done.returncode == 1, done.stderr
        assert stat.S_IMODE(Path(f"{folder}/b{one}").stat().st_mode) == 0o500


def test_a_full_disk_is_a_failure_all_the_same(site: Site, capsys: Any) -> None:
    (site.data / "big").write_bytes(os.urandom(3_000_000))
    site.settings["ChunkSize"] = "1000000"
    assert site.run() == 0
    (site.folder / "small").mkdir()
    with tmpfs(site.folder / "small", "size=2m") as small:
        assert site.restore(small / "back") == 1
        assert "free some room there" in capsys.readouterr().err


# ---- over what is there ----

KILLED = """
import os, signal, sys
import s3napback
left = int(sys.argv[1])
def counted(real):
    def act(*args, **named):
        global left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **named)
    return act
os.rename = counted(os.rename)
s3napback.exchange_entries = counted(s3napback.exchange_entries)
sys.exit(s3napback.main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_what_was_there_is_the_old_or_the_new_at_any_moment(site: Site) -> None:
    """SIGKILL before each step; links of the folder's own, files for folders and back."""
    for name in ("changed", "same", "to folder", "to link"):
        (site.data / name).write_text("backup")
    (site.data / "to file").mkdir()
    (site.data / "link").symlink_to("/from/backup")
    three_nights(site, lambda: (site.data / "changed").write_text("backup again"))
    wanted = entries(site.data)

    def before(place: Path) -> dict[str, str]:
        folder = Path(f"{place}{site.data}")
        (folder / "to folder" / "in").mkdir(parents=True)
        (folder / "to file").write_text("mine")
        (folder / "changed").write_text("mine")
        (folder / "more").write_text("mine")
        (folder / "link").symlink_to("/mine")
        (folder / "to link").symlink_to("/mine/too")
        return entries(folder)

    for step in range(1, 40):
        place = site.folder / f"over{step}"
        old = before(place)
        words = ["restore", "-c", str(site.write()), str(site.data), "--overwrite", "--to",
                 str(place)]
        done = subprocess.run([sys.executable, "-c", KILLED, str(step), *words],
                              env={**os.environ, "PYTHONPATH": os.path.dirname(s3napback.__file__)})
        found = entries(Path(f"{place}{site.data}"))
        for name in {*old, *wanted, *found}:
            assert found.get(name) in (old.get(name), wanted.get(name)), (step, name)
        if done.returncode == 0:
            break
        assert done.returncode == -9
    assert found == wanted
    assert 5 < step < 39
    # The next one clears up what the killed one left.
    assert s3napback.main([*words[:-1], str(site.folder / f"over{step - 1}")]) == 0
    assert not [p for p in (site.folder / f"over{step - 1}").rglob(".s3napback*")]


def entries(folder: Path) -> dict[str, str]:
    return {
        path.name: os.readlink(path) if path.is_symlink()
        else path.read_text() if path.is_file() else f"folder of {sorted(os.listdir(path))}"
        for path in folder.iterdir() if not path.name.startswith(".s3napback")
    }


def test_a_restore_that_fails_leaves_a_folder_as_it_was(site: Site) -> None:
    three_nights(site, lambda: (site.data / "file").write_text("two"))
    last = next((site.folder / "buckets" / "bkt").glob("*-17-DIFF*"))
    last.write_bytes(last.read_bytes()[:-20])
    place = site.folder / "there"
    place.mkdir()
    (place / "mine").write_text("mine")
    assert site.restore(place, "--overwrite", "--force-partial") != 3
    assert (place / "mine").read_text() == "mine"
    assert not [name for name in os.listdir(place) if name.startswith(".s3napback")]


def test_a_part_of_a_mounted_file_system_is_restored_into_it(site: Site) -> None:
    inner = site.data / "inner"
    inner.mkdir()
    (inner / "file").write_text("stored")
    assert site.run() == 0
    place = site.folder / "place"
    mounted = Path(f"{place}{inner}")
    mounted.mkdir(parents=True)
    with tmpfs(mounted, "size=1m"):
        (mounted / "file").write_text("mine")
        (mounted / "more").write_text("mine")
        assert site.restore(place, "--overwrite") == 0
        assert entries(mounted) == {"file": "stored"}
