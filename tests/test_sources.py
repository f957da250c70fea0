"""Sources: whatever its name and whatever reads it, what is backed up comes back."""

import gzip
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import ESC, NIGHT, Capture, Site, files, require_tool

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
    done = subprocess.run([sys.executable, s3napback.__file__, "-c", str(site.conf)],
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
