"""Sources: whatever its name and whatever reads it, what is backed up comes back."""

import gzip
import os
import random
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    ESC,
    NIGHT,
    START,
    Capture,
    Site,
    differences,
    fake_tool,
    files,
    require_tool,
    tmpfs,
)

import s3napback

# ---- directories ----


def test_awkward_names_are_stored_and_excludes_are_not(site: Site) -> None:
    awkward = site.folder / "a b; $(touch x) 'q' \"d\" *"
    awkward.mkdir()
    for name in ("keep", "drop.o", "*.o"):
        (awkward / name).write_text("x")
    quoted = str(awkward).replace('"', '\\"')
    site.jobs = f'<Directory "{quoted}">\nExclude *.o\n</Directory>'
    assert site.run() == 0
    ((name, _),) = site.archives().items()
    assert name.startswith(f"{awkward}-")
    assert [f.rpartition("/")[2] for f in files(site.content(name))] == ["", "keep"]


def test_wildcards_and_home_as_the_shell_had_them(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(site.folder))
    (site.data / "sub1").mkdir()
    (site.data / "sub2").mkdir()
    site.jobs = "<Directory ~/data/sub*>\nExclude ~/data/sub2/x\n</Directory>"
    (site.data / "sub2" / "x").write_text("")
    assert site.run() == 0
    ((name, _),) = site.archives().items()
    assert name.startswith("~/data/sub*-")
    assert [f.rpartition("data/")[2] for f in files(site.content(name))] == ["sub1/", "sub2/"]


def test_names_that_are_not_utf8_come_back(site: Site) -> None:
    raw = os.fsencode(str(site.folder)) + b"/J\xfcrgen"
    os.mkdir(raw)
    site.jobs = ""
    with open(site.write(), "ab") as conf:
        conf.write(b"Directory " + raw + b"\n")
    # In a process of its own: the tests' reports cannot hold such names.
    done = subprocess.run([sys.executable, START, "-c", str(site.conf)],
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"Directory " + raw + b" -> " in done.stderr or b"J\\udcfcrgen" in done.stderr
    ((name, _),) = site.archives().items()
    assert "/J\\xfcrgen-" in name


NAMES = {
    "newline": "a\nb", "quotes": "it's \"q\"", "command": "$(touch pwned);`touch pwned`",
    "dash": "-rf", "semicolon": "; touch pwned #", "stars": "*?[a]{b}", "space": " a  b ",
    "not UTF-8": os.fsdecode(b"caf\xe9"), "backslash": "a\\nb", "percent": "%s%n%d",
    "escape": ESC,
}


@pytest.mark.parametrize("gpg", [False, True])
def test_files_of_any_name_come_back(site: Site, gpg_home: Any, gpg: bool) -> None:
    os.environ["GNUPGHOME"] = str(gpg_home.home)
    try:
        if gpg:
            site.settings["GpgRecipient"] = gpg_home.recipient
        for name in NAMES.values():
            (site.data / name).mkdir()
            (site.data / name / name).write_text(name, errors="surrogateescape")
        deep = site.data
        for _ in range(5):
            deep = deep / ("long" * 50)
        deep.mkdir(parents=True)
        (deep / "file").write_text("deep")
        assert site.run() == 0
        words = ["restore", "-c", str(site.write()), str(site.data), "--to", str(site.folder / "b")]
        assert s3napback.main(words) == 0
    finally:
        del os.environ["GNUPGHOME"]
    done = subprocess.run(
        [require_tool("diff"), "-r", site.data, f"{site.folder}/b{site.data}"], capture_output=True
    )
    assert done.returncode == 0, done.stdout
    assert not list(site.folder.rglob("pwned"))


# The others cannot stand in a config, or are in test_backup.py.
@pytest.mark.parametrize("name", ["command", "dash", "semicolon", "stars", "space", "backslash",
                                  "percent"])
def test_directories_of_any_name_come_back(
    site: Site, name: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(site.folder)
    place = site.data / NAMES[name]
    place.mkdir()
    (place / "file").write_text("here")
    site.jobs = ""
    quote = "'" if '"' in str(place) else '"'
    line = f"Directory {quote}{place}{quote}\n"
    site.conf.write_bytes(site.write().read_bytes() + os.fsencode(line))
    assert s3napback.main(["-t", "-c", str(site.conf)], now=NIGHT) == 0
    # What -t shows can be pasted into a shell, and does what is meant, no more.
    shown = capsys.readouterr().err
    (line,) = [line.partition("INFO ")[2] for line in shown.splitlines() if "/bin/tar " in line
               or "INFO tar " in line]
    safe = line.partition(" | ")[0] + " | tar -tz > listed"
    subprocess.run(["sh", "-c", safe], cwd=site.folder, capture_output=True)
    assert not list(site.folder.rglob("pwned"))
    for path in site.diff_files():
        path.unlink()
    assert s3napback.main(["-c", str(site.conf)], now=NIGHT) == 0, capsys.readouterr().err
    ((stored, archive),) = site.archives().items()
    assert archive.complete
    target = site.folder / "back"
    assert s3napback.main(
        ["restore", *site.bucket, "--to", str(target),
         stored]
    ) == 0
    assert (Path(str(target) + str(place)) / "file").read_text() == "here"
    assert not list(site.folder.rglob("pwned"))


# ---- what is left out ----

CACHE = "Signature: 8a477f597d28d172789f06886806bc55\n"  # bford.info/cachedir
NIGHTS = [datetime(2026, 11, day, 3, 0) for day in (19, 20, 21, 22)]  # a FULL and three DIFFs


def fill(folder: Path) -> Path:
    """A folder with a file, and one in a folder in it."""
    (folder / "sub").mkdir(parents=True)
    (folder / "file").write_text(folder.name)
    (folder / "sub" / "deep").write_text(folder.name)
    return folder


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_tag_leaves_out_what_is_beside_it_for_as_long_as_it_is_there(site: Site) -> None:
    cache, private, fake = (fill(site.data / name) for name in ("cache", "private", "fake"))
    (fake / "CACHEDIR.TAG").write_text("Signature: of something else")
    site.jobs = (f"<Directory {site.data}>\nExcludeCaches On\nExcludeIfPresent .no-a .no-b\n"
                 "ExcludeIfPresent .no-c\n</Directory>")
    everything = names_in(site.data)
    assert site.run(now=NIGHTS[0]) == 0
    # Both were stored before they had a tag: what came, changed and went meanwhile is nobody's.
    for folder, tag in ((cache, "CACHEDIR.TAG"), (private, ".no-c")):
        (folder / tag).write_text(CACHE)
        (folder / "file").write_text("changed")
        (folder / "sub" / "deep").unlink()
    assert site.run(now=NIGHTS[1]) == 0
    tagged = {name for name in everything if not name.startswith(("cache/", "private/"))}
    tagged |= {"cache/CACHEDIR.TAG", "private/.no-c"}
    # Without their tags they are stored, though none of their files is new.
    (cache / "CACHEDIR.TAG").unlink()
    (private / ".no-c").unlink()
    assert site.run(now=NIGHTS[2]) == 0
    assert sorted(name[-4:] for name in site.archives()) == ["DIFF", "DIFF", "FULL"]
    assert names_in(site.restored(after=NIGHTS[0])) == everything
    assert names_in(site.restored(after=NIGHTS[1])) == tagged
    assert names_in(site.restored(after=NIGHTS[2])) == names_in(site.data)
    assert differences(site.data, site.restored()) == ""


def test_the_folder_of_a_cache_comes_back_with_its_tag(site: Site) -> None:
    cache = fill(site.data / "cache")
    cache.chmod(0o2750)
    (cache / "CACHEDIR.TAG").write_text(CACHE)
    site.jobs = f"<Directory {site.data}>\nExcludeCaches yes\n</Directory>"
    assert site.run() == 0
    back = site.restored() / "cache"
    assert names_in(back) == {"CACHEDIR.TAG"} and back.stat().st_mode & 0o7777 == 0o2750


@pytest.mark.parametrize(
    "tag", [".no", pytest.param("CACHEDIR.TAG", marks=pytest.mark.slow)]
)
def test_a_tag_in_the_directory_itself_is_told(site: Site, tag: str, capsys: Capture) -> None:
    site.jobs = f"<Directory {site.data}>\nExcludeCaches On\nExcludeIfPresent .no\n</Directory>"
    assert site.run() == 0
    (site.data / tag).write_text(CACHE)
    told = f"nothing of {site.data} is stored but {tag}, by which all else is left out"
    assert s3napback.main(["check", "-c", str(site.conf)], now=NIGHT) == 3
    assert f"warning  Directory {site.data}: {told}" in capsys.readouterr().out
    assert site.run(now=NIGHT + timedelta(days=1)) == 3
    assert told in capsys.readouterr().err
    assert names_in(site.restored()) == {tag}


def test_what_is_no_tag_to_tar_is_not_told(site: Site, tmp_path: Path) -> None:
    (site.data / "CACHEDIR.TAG").write_text("Signature: of something else")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".no").touch()
    (tmp_path / "link").symlink_to("cache")
    job = s3napback.Job("Directory", "/a", "conf:1", False, s3napback.CycleSpec(),
                        exclude_caches=True, exclude_tags=(".no",), one_file_system=True)
    assert not list(s3napback.tags_among([str(site.data), str(tmp_path / "link")], job))
    site.jobs = f"<Directory {site.data}>\nExcludeCaches On\n</Directory>"
    assert site.run() == 0
    assert differences(site.data, site.restored()) == ""


def test_a_directory_is_stored_where_no_mount_is_known_that_it_is_on(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a chroot, whose own folder is no mount point (proc(5), mountinfo)."""
    monkeypatch.setattr(s3napback, "mounts", lambda: [s3napback.Mount("0:1", "/proc", "proc")])
    site.jobs = f"<Directory {site.data}>\nOneFileSystem On\n</Directory>"
    assert site.run() == 0
    assert differences(site.data, site.restored()) == ""


@pytest.mark.slow
def test_one_file_system_is_not_left(site: Site, capsys: Capture) -> None:
    moved = fill(site.data / "moved")
    site.jobs = f"<Cycle c>\nOneFileSystem On\nDirectory {site.data}\n</Cycle>"
    assert site.run(now=NIGHTS[0]) == 0
    with tmpfs(moved, "size=1m"):
        fill(moved / "new")
        assert site.run(now=NIGHTS[1]) == 0
        back = site.restored(after=NIGHTS[1])
        assert names_in(back) == {"file", "moved"}
        capsys.readouterr()
        assert s3napback.main(["check", "-c", str(site.conf)], now=NIGHTS[1]) == 0
        assert f"by OneFileSystem what is in {moved} is left out" in capsys.readouterr().out
    assert site.run(now=NIGHTS[2]) == 0  # no warning: what was mounted there was never stored
    assert differences(site.data, site.restored()) == ""
    site.jobs = site.jobs.replace("On", "Off")
    with tmpfs(moved, "size=1m"):
        fill(moved / "new")
        assert site.run(now=NIGHTS[3]) == 0
        assert differences(site.data, site.restored()) == ""


def test_what_is_left_out_is_no_loss_and_no_warning(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (fill(site.data / "cache") / "CACHEDIR.TAG").write_text(CACHE)
    moved = fill(site.data / "moved")
    site.jobs = f"<Directory {site.data}>\nExcludeCaches On\nOneFileSystem On\n</Directory>"
    fake_tool(site, monkeypatch, "tar", '"$REAL" "$@"; echo "tar: file changed" >&2; exit 1')
    with tmpfs(moved, "size=1m"):
        assert site.run() == 3
    told = [line for line in capsys.readouterr().err.splitlines() if " WARN " in line]
    assert len(told) == 2 and told[0].endswith("tar: file changed"), told


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_any_nights_of_tags_come_back_as_they_were(site: Site, seed: int) -> None:
    """Folders that move, files that come and go, tags that come and go: each night comes back."""
    chance = random.Random(seed)
    tags, folders = ["CACHEDIR.TAG", ".no"], [f"{a}{b}" for a in "ab" for b in ("", "/c", "/c/d")]
    rules = site.folder / "rules"
    rules.write_text("*.o\n")
    site.jobs = (f"<Directory {site.data}>\nDiffs 5\nFulls 9\nExcludeCaches On\n"
                 f"ExcludeIfPresent .no\nExcludeFrom {rules}\n</Directory>")
    wanted: dict[datetime, dict[str, str]] = {}
    for day in range(10):
        for _ in range(6):
            place = site.data / chance.choice(folders)
            place.mkdir(parents=True, exist_ok=True)
            file = place / chance.choice([*tags, *tags, "x", "y", "z.o"])
            if chance.random() < 0.4:
                file.unlink(missing_ok=True)
            elif chance.random() < 0.1:
                place.rename(site.data / f"moved-{day}-{chance.random()}")
            else:
                file.write_text(CACHE if file.name in tags else str(chance.random()))
        if chance.random() < 0.2:
            rules.write_text(chance.choice(["*.o\n", "", "y\n"]))
        night = NIGHTS[0] + timedelta(days=day)
        assert site.run(now=night) == 0
        patterns = rules.read_text().split()
        # Of two tags, tar keeps the one that it is told last.
        tag_of = {folder: next((folder / tag for tag in reversed(tags) if (folder / tag).exists()),
                               None) for folder in [site.data, *site.data.rglob("*")]}
        wanted[night] = {
            str(path.relative_to(site.data)): path.read_text() if path.is_file() else ""
            for path in site.data.rglob("*") if not any(map(path.match, patterns))
            and all(tag_of.get(above) in (None, path) for above in path.parents)
        }
    for night, expected in wanted.items():
        back = site.restored(after=night)
        found = {str(path.relative_to(back)): path.read_text() if path.is_file() else ""
                 for path in back.rglob("*")}
        assert found == expected, night


def test_a_job_s_own_mount_point_is_not_left_out(site: Site) -> None:
    with tmpfs(site.data, "size=1m"):
        (site.data / "file").write_text("on it")
        site.jobs = f"<Directory {site.data}>\nOneFileSystem On\n</Directory>"
        assert site.run() == 0
        assert differences(site.data, site.restored()) == ""


def test_exclude_from_is_read_as_tar_reads_it(site: Site, capsys: Capture) -> None:
    rules = site.folder / "the rules"
    for name in ("a.o", "b.log", "# c", "keep"):
        (site.data / name).write_text(name)
    rules.write_bytes(b"*.o\r\n\n   \n*.log  \n# c\nsub/")
    (site.folder / "more").write_text("/nothing")
    site.jobs = (f"<Directory {site.data}>\nExclude *.tmp\nExcludeFrom \"{rules}\""
                 f" {site.folder}/more\n</Directory>")
    assert site.run("-t", now=NIGHTS[0]) == 0
    words = f"--exclude '*.tmp' '--exclude-from={rules}' --exclude-from={site.folder}/more -g"
    assert words in capsys.readouterr().err
    assert site.run(now=NIGHTS[0]) == 0
    assert names_in(site.restored()) == {"file", "keep"}
    assert s3napback.main(["check", "-c", str(site.conf)], now=NIGHTS[0]) == 3
    assert "ExcludeFrom: sub/ excludes nothing: write sub" in capsys.readouterr().out
    # The order counts for nothing; what is let in again has to be stored, old as it is.
    rules.write_bytes(b"*.log\n# c\n*.o\nsub/\n")
    assert site.run(now=NIGHTS[1]) == 0
    assert "everything is stored" not in capsys.readouterr().err
    rules.write_bytes(b"*.log\n")
    assert site.run(now=NIGHTS[2]) == 0
    assert "its Excludes are not those of the last backup" in capsys.readouterr().err
    assert names_in(site.restored()) == {"file", "keep", "a.o", "# c"}


@pytest.mark.slow
def test_what_is_left_out_no_more_is_in_the_next_archive(site: Site, capsys: Capture) -> None:
    for name, tag in (("cache", "CACHEDIR.TAG"), ("private", ".no")):
        (fill(site.data / name) / tag).write_text(CACHE)
    options = ["ExcludeCaches On", "ExcludeIfPresent .no"]
    for night in NIGHTS[:3]:
        lines = "\n".join(options)
        site.jobs = f"<Directory {site.data}>\n{lines}\n</Directory>"
        assert site.run(now=night) == 0
        told = "its Excludes are not those of the last backup" in capsys.readouterr().err
        assert told == (night != NIGHTS[0])
        options = options[1:]
    assert differences(site.data, site.restored()) == ""


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("ExcludeCaches perhaps", "ExcludeCaches perhaps is not yes or no"),
        ("OneFileSystem 2", "OneFileSystem 2 is not yes or no"),
        ("ExcludeIfPresent a/b", "ExcludeIfPresent a/b is not the name of a file"),
        ("ExcludeIfPresent ok ..", "ExcludeIfPresent .. is not the name of a file"),
        ('ExcludeIfPresent ""', "ExcludeIfPresent  is not the name of a file"),
        ("ExcludeFrom rules", "ExcludeFrom rules is not a whole path"),
        ("ExcludeFrom /absent/rules", "cannot read ExcludeFrom /absent/rules: No such file"),
        ("ExcludeFrom /", "cannot read ExcludeFrom /: Is a directory"),
    ],
)
def test_a_wrong_word_for_what_is_left_out_stores_nothing(
    site: Site, line: str, said: str, capsys: Capture
) -> None:
    site.jobs = f"Directory {site.data}\n<Cycle c>\n{line}\nDirectory {site.data}\n</Cycle>"
    assert site.run() == 2
    assert f"{site.conf}:9: {said}" in capsys.readouterr().err
    assert not site.archives()


# ---- databases and repositories ----


def test_dumps_of_mysql_and_postgresql_hold_their_rows(
    site: Site, mariadb: Any, postgres: Any, monkeypatch: pytest.MonkeyPatch
) -> None:

    mariadb.run("CREATE OR REPLACE DATABASE shop; CREATE TABLE shop.t (n INT);"
                "INSERT INTO shop.t VALUES (42);")
    postgres.run("postgres", "DROP DATABASE IF EXISTS crm")
    postgres.run("postgres", "CREATE DATABASE crm")
    postgres.run("crm", "CREATE TABLE t (n int); INSERT INTO t VALUES (43)")
    monkeypatch.setenv("PGHOST", str(postgres.socket_dir))
    monkeypatch.setenv("PGUSER", postgres.user)
    site.jobs = (
        f"<MySQL {mariadb.socket}:shop>\nMySQLOptions --single-transaction --skip-comments\n"
        f"</MySQL>\n<MySQL {mariadb.socket}:all>\nUseTempFile yes\n</MySQL>\n"
        f"PostgreSQL {postgres.user}@crm all"
    )
    assert site.run() == 0
    found = site.archives()
    sock = str(mariadb.socket)
    assert set(found) == {
        f"MySQL/{sock}/shop-2", f"MySQL/{sock}/--all-databases-2", "PostgreSQL/crm-2",
        "PostgreSQL/-2",
    }
    for name in found:
        sql = gzip.decompress(site.content(name)).decode(errors="replace")
        assert ("43" if name.startswith("P") else "(42)") in sql
    assert "Dump completed" not in gzip.decompress(site.content(f"MySQL/{sock}/shop-2")).decode()


def test_a_repository_is_dumped_whole_then_by_what_is_new(
    site: Site, svn_repo_factory: Any
) -> None:
    repo = svn_repo_factory(site.folder / "repo", 3)
    site.jobs = f"Subversion {repo}"
    assert site.run() == 0
    svn_repo_factory(repo, 2)
    assert site.run(now=NIGHT + timedelta(days=1)) == 0
    assert site.run(now=NIGHT + timedelta(days=2)) == 0  # nothing new
    states = {a.metadata["state"] for a in site.archives().values()}
    assert states == {"0:3", "4:5"}
    assert sorted(name[-4:] for name in site.archives()) == ["DIFF", "FULL"]
    assert (site.folder / "diffs").joinpath(
        s3napback.diff_file_name(str(repo))
    ).read_text() == "5\n"


def test_each_repository_of_a_subversion_dir_is_a_job(
    site: Site, svn_repo_factory: Any, capsys: Capture
) -> None:
    root = site.folder / "svnroot"
    root.mkdir()
    svn_repo_factory(root / "good", 1)
    broken = svn_repo_factory(root / "broken", 2)
    (root / "not-a-repository").mkdir()
    (broken / "db" / "revs" / "0" / "1").write_bytes(b"garbage")
    site.jobs = f"<SubversionDir {root}>\n</SubversionDir>"
    assert site.run() == 1
    assert [name.rpartition("/")[2] for name in site.archives()] == ["good-18-FULL"]
    said = capsys.readouterr().err
    assert f"the repository {root}/broken does not verify" in said
    assert "not-a-repository" not in said
    site.jobs = f"<SubversionDir {root}/absent>\n</SubversionDir>"
    assert site.run() == 1
    assert f"Cannot open directory: {root}/absent" in capsys.readouterr().err


# ---- what is done to a source ----


@pytest.mark.parametrize("compressor", ["gzip", "pigz", '"zstd -3"', "cat", ""])
def test_each_compressor_gives_what_its_decoder_reads(site: Site, compressor: str) -> None:
    if compressor:
        require_tool(compressor.strip('"').split()[0])
    site.settings["Compressor"] = compressor
    assert site.run() == 0
    ((name, _),) = site.archives().items()
    content = site.content(name)
    if compressor == "cat":
        assert content[257:262] == b"ustar"
    else:
        assert content.startswith(b"\x28\xb5\x2f\xfd" if "zstd" in compressor else b"\x1f\x8b")


@pytest.mark.parametrize("temp", [False, True])
@pytest.mark.parametrize("where", ["folder", "S3"])
def test_what_is_encrypted_comes_back_with_and_without_a_temp_file(
    site: Site, gpg_home: Any, monkeypatch: pytest.MonkeyPatch, temp: bool, where: str,
    request: pytest.FixtureRequest,
) -> None:
    if where == "S3":
        request.getfixturevalue("s3_site")
    monkeypatch.setenv("GNUPGHOME", str(gpg_home.home))
    (site.data / "big").write_bytes(os.urandom(5000))
    site.settings["GpgRecipient"] = gpg_home.recipient
    site.jobs = f"<Directory {site.data}>\nUseTempFile {int(temp)}\n</Directory>"
    assert site.run() == 0
    ((name, archive),) = site.archives().items()
    assert len(archive.chunks) > 5
    plain = subprocess.run(
        ["gpg", "--batch", "-q", "-d"], input=site.content(name), capture_output=True, check=True
    ).stdout
    assert len(files(plain)) == 3
    assert not list((site.folder / "temp").iterdir())


def test_what_gpg_conf_says_of_text_spoils_no_archive(
    site: Site, gpg_home: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GNUPGHOME", str(gpg_home.home))
    options = gpg_home.home / "gpg.conf"
    (site.data / "file").write_bytes(b"one \r\ntwo\n" * 100)
    site.settings.update(GpgRecipient=gpg_home.recipient, Compressor="cat")
    options.write_text("textmode\n")
    try:
        assert site.run() == 0
    finally:
        options.unlink()
    assert not differences(site.data, site.restored())


def test_options_of_tar_in_the_environment_are_not_used(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("TAR_OPTIONS", "-z --exclude=two --strip-components=1")
    (site.data / "two").write_text("two")
    assert site.run() == 0
    assert "WARN TAR_OPTIONS is not used" in capsys.readouterr().err
    assert not differences(site.data, site.restored())
