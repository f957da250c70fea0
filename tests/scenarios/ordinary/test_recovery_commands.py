"""list, restore, restore-script and verify: their options, and names that mean nothing or more."""

import json
import os
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import START, Site, program, require_tool

import s3napback

NIGHT = datetime(2026, 11, 22, 3)


def call(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    done = program(*words, env={"TZ": "UTC", **env})
    said = done.stdout.decode(), done.stderr.decode()
    return subprocess.CompletedProcess(words, done.returncode, *said)


@pytest.fixture
def place(site: Site) -> list[str]:
    """Where the archives of one night are."""
    assert site.run("-f", now=NIGHT) == 0
    return site.bucket


@pytest.mark.parametrize("command", ["list", "restore", "restore-script", "verify", "check"])
def test_each_command_has_a_help_of_its_own(command: str) -> None:
    done = call(command, "-h")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: s3napback.py {command} ")
    assert ("--deep" in done.stdout) == (command == "verify")
    assert ("--at" in done.stdout) == (command in ("list", "restore", "restore-script"))


@pytest.mark.parametrize(("words", "said"), [
    (["list", "--deep"], "option --deep not recognized"),
    (["list", "--at", "rubbish"], "need --files"),
    (["list", "--to=x"], "option --to not recognized"),
    (["verify", "--json"], "option --json not recognized"),
    (["check", "--deep"], "option --deep not recognized"),
    (["check", "--jsno"], "option --jsno not recognized; did you mean --json?"),
    (["restore", "/d", "--overwirte"], "did you mean --overwrite?"),
    (["verify", "--overwrite"], "option --overwrite not recognized"),
    (["restore", "/d", "--to", "x", "--sample", "5%"], "option --sample not recognized"),
    (["restore-script", "/d", "--stdout"], "option --stdout not recognized"),
    (["list", "/a", "/b"], "need --files"),
    (["verify", "/a", "/b"], "one NAME at a time, not /b"),
    (["restore-script", "/a", "/b"], "one NAME at a time, not /b"),
    (["restore", "--to", "x"], "no NAME given"),
    (["restore-script"], "no NAME given"),
    (["restore", "/d", "--at"], "argument --at: expected one argument"),
    (["list", "-c", "x", "-b", "y"], "-b cannot be given with -c"),
    (["list", "-c", "x", "--endpoint", "y"], "--endpoint cannot be given with -c"),
    (["restore", "/d", "--to", "x", "--stdout"], "give one of --to PLACE and --stdout"),
])
def test_what_a_command_does_not_know_is_refused(
    words: list[str], said: str, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert s3napback.main(words) == 2
    assert said in capsys.readouterr().err


def test_options_may_stand_anywhere_and_a_name_may_begin_with_a_dash(
    site: Site, place: list[str], tmp_path: Path
) -> None:
    done = call("restore", str(site.data), "--to", f"{tmp_path}/a", *place, f"{site.data}/file")
    assert done.returncode == 0, done.stderr
    done = call("restore", *place, "--", "-odd")
    assert "give one of --to" in done.stderr
    assert "there is no backup of -odd" in call("list", *place, "--", "-odd").stderr


@pytest.mark.parametrize(("name", "said"), [
    ("lst", "did you mean the command list?"), ("restroe", "did you mean the command restore?"),
    ("Verify", "did you mean the command verify?"), ("zzz", "give the path of a config file"),
])
def test_a_mistyped_command_is_no_config_and_gets_its_right_name(
    name: str, said: str, capsys: Any
) -> None:
    assert s3napback.main([name]) == 2
    text = capsys.readouterr()
    assert f"no config for {name}" in text.out + text.err
    assert said in text.out + text.err


def test_a_command_behind_an_option_is_told_where_it_belongs(site: Site, capsys: Any) -> None:
    assert s3napback.main(["-c", str(site.write()), "list"]) == 2
    text = capsys.readouterr()
    assert "list is a command if it is the first word" in text.out + text.err


def test_nothing_to_verify_is_no_success(site: Site, place: list[str]) -> None:
    done = call("verify", "/typo", *place)
    assert (done.returncode, done.stdout) == (1, "")
    assert "there is no backup of /typo in bkt" in done.stderr
    (site.folder / "buckets" / "empty").mkdir()
    empty = ["-b", "empty", *place[2:]]
    done = call("verify", *empty)
    assert (done.returncode, "there are no archives in empty" in done.stderr) == (1, True)
    done = call("list", *empty)
    assert (done.returncode, "there are no archives in empty" in done.stderr) == (0, True)
    assert json.loads(call("list", "--json", *empty).stdout)["sources"] == []


@pytest.mark.parametrize("words", [
    ["list"], ["list", "--json"], ["verify"], ["verify", "/d"], ["restore-script", "/d"],
    ["restore", "/d", "--to", "/nowhere"],
])
def test_a_bucket_that_is_not_there_is_named(
    words: list[str], site: Site, s3_server: Any, tmp_path: Path
) -> None:
    key = str(s3_server.write_keyfile(tmp_path / "k"))
    for place in (["--endpoint", site.settings["S3Endpoint"]],
                  ["--endpoint", s3_server.endpoint, "-K", key]):
        done = call(*words, "-b", "absent", *place)
        assert (done.returncode, done.stdout) == (1, ""), words
        assert "absent" in done.stderr and "does not exist" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_new_machine_needs_no_diffdir_to_restore(site: Site, place: list[str]) -> None:
    shutil.rmtree(site.folder / "diffs")
    shutil.rmtree(site.folder / "temp")
    for words in (["list"], ["verify"], ["restore", str(site.data), "--to", f"{site.folder}/a"]):
        done = call(*words, "-c", str(site.conf))
        assert done.returncode == 0, done.stderr
    assert not (site.folder / "diffs").exists()
    assert site.run(now=NIGHT) == 2  # a backup does


def test_what_js3tream_stored_under_another_name_is_listed_verified_and_given_back(
    site: Site, place: list[str], tmp_path: Path
) -> None:
    data = os.urandom(3500)
    sent = subprocess.run(
        [sys.executable, START, "js3tream", "-i", "-z", "1000",
         "-b", "bkt:my/own stuff", *place[2:]], input=data, capture_output=True,
    )
    assert sent.returncode == 0, sent.stderr
    for number in range(2):  # as the Java program wrote it
        site.store().put(f"old:{number:020d}", b"y" * (1000 - number), {})
    site.store().put("report:2024", b"of no backup", {})
    text = call("list", *place).stdout
    assert "js3tream my/own stuff\n" in text
    assert "js3tream old\n" in text
    assert "report" not in text
    done = call("verify", *place)
    assert (done.returncode, "3 archives checked, 0 faults" in done.stderr) == (0, True)
    shown = program("restore", "my/own stuff", "--stdout", *place)
    assert (shown.returncode, shown.stdout) == (0, data), shown.stderr
    done = call("restore", "my/own stuff", "--to", f"{tmp_path}/out", *place)
    assert (done.returncode, Path(f"{tmp_path}/out").read_bytes()) == (0, data)
    script = call("restore-script", "my/own stuff", *place).stdout
    subprocess.run(["sh", "-s", f"{tmp_path}/out2"], input=script, text=True, check=True)
    assert Path(f"{tmp_path}/out2").read_bytes() == data
    keys = [i.key for i in site.store().iter_objects() if i.key.startswith("my/")]
    site.store().delete([keys[1]])
    done = call("verify", "--deep", *place)
    assert (done.returncode, "my/own stuff: chunk 1 is missing" in done.stdout) == (1, True)


def test_a_slash_at_an_end_makes_no_other_name(
    site: Site, place: list[str], tmp_path: Path
) -> None:
    bare = str(site.data)
    for stored, typed in ((bare, f"{bare}/"), (f"{bare}/", bare), (bare, bare[1:])):
        shutil.rmtree(site.folder / "buckets" / "bkt", ignore_errors=True)
        shutil.rmtree(site.folder / "diffs")
        (site.folder / "diffs").mkdir()
        shutil.rmtree(tmp_path / "to", ignore_errors=True)
        site.jobs = f"Directory {stored}"
        assert site.run("-f", now=NIGHT) == 0
        for words in (["list"], ["verify"], ["restore", "--to", f"{tmp_path}/to"]):
            done = call(words[0], typed, *words[1:], *place)
            assert done.returncode == 0, done.stderr


def test_a_name_means_the_same_to_each_command(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was typed comes before what differs by a slash; one archive is a NAME, too."""
    monkeypatch.setenv("HOME", "/")
    bare = str(site.data)[1:]
    site.jobs = f"Directory /{bare}\nDirectory {bare}"
    for night in (21, 22):
        assert site.run("-f", now=NIGHT.replace(day=night)) == 0
    for name in (bare, f"/{bare}"):
        text = call("list", name, *site.bucket).stdout
        assert text.startswith(f"Directory {name}\n") and text.count("Directory ") == 1
        done = call("verify", name, *site.bucket)
        assert (done.returncode, "2 archives checked" in done.stderr) == (0, True)
        done = call("restore", name, "--to", f"{tmp_path}/{len(name)}", *site.bucket)
        assert done.returncode == 0, done.stderr
        newest, older = sorted(one for one in site.archives() if one.startswith(f"{name}-"))[::-1]
        for archive in (newest, older):
            text = call("list", archive, *site.bucket).stdout
            assert f"  {archive}  " in text and "stale" not in text
            assert (older in text) == (archive == older)
            (shown,) = json.loads(call("list", "--json", archive, *site.bucket).stdout)["sources"]
            assert [one["archive"] for one in shown["archives"]] == [archive]
            assert len(shown["restorable"]) == 1
            assert "1 archives checked" in call("verify", archive, *site.bucket).stderr
    for command in ("list", "verify", "restore-script"):
        assert "there is no backup of" in call(command, f"{bare}-9-DIFF", *site.bucket).stderr


def test_a_database_of_a_directorys_name_does_not_make_it_a_dump(site: Site) -> None:
    site.settings["Prefix"] = "web1"
    site.jobs = "MySQL shop"
    store = site.store()
    store.create()
    store.put(f"web1/shop-0-FULL:{0:020d}", b"x", {})
    assert call("list", "-c", str(site.write())).stdout.startswith(
        "Directory or Subversion /shop (Prefix web1)")


def test_a_repository_and_a_dump_are_found_with_a_slash_too(
    site: Site, place: list[str], svn_repo_factory: Any, tmp_path: Path
) -> None:
    repo = svn_repo_factory(tmp_path / "repo", 2)
    site.jobs = f"Subversion {repo}/"
    assert site.run("-f", now=NIGHT) == 0
    site.store().put(f"MySQL/shop-0:{0:013d}", b"SELECT 1;", {})
    for name in (str(repo), f"{repo}/", "MySQL/shop", "MySQL/shop/", "/MySQL/shop"):
        done = call("restore", name, "--stdout", *place)
        assert done.returncode == 0, (name, done.stderr)


def perl_archives(store: s3napback.Store, folder: Path, nights: int, excluded: str = "") -> None:
    """DIFFs as the Perl script made them, of a job that began in the middle of a round."""
    data = folder / "perl"
    data.mkdir()
    (data / "kept").write_text("kept")
    (data / "skip.bak").write_text("not wanted")
    for n in range(nights):
        (data / f"night{n}").write_text(f"{n}")
        made = subprocess.run(
            [require_tool("tar"), "-f", "-", "-g", str(folder / "snapshot"),
             *([f"--exclude={excluded}"] if excluded else []), "-C", "/", "-czp", str(data)],
            capture_output=True, check=True,
        )
        key = f"{data}-{n + 3}-DIFF:{0:020d}"
        store.put(key, made.stdout, {})
        at = NIGHT.timestamp() + n * 86400
        path = s3napback.FolderStore(str(folder / "buckets"), "bkt", lambda: 0.0).path_of(key)
        os.utime(path, (at, at))


def test_a_perl_job_that_began_with_a_diff_comes_back_by_its_name(
    site: Site, place: list[str], tmp_path: Path
) -> None:
    perl_archives(site.store(), tmp_path, 3)
    data = tmp_path / "perl"
    text = call("list", str(data), *place).stdout
    assert f"no FULL is before {data}-3-DIFF; it holds everything if the job began with it" in text
    done = call("verify", str(data), *place)
    assert f"{data}-3-DIFF: no FULL is before it" in done.stdout
    assert call("verify", f"{data}-4-DIFF", *place).returncode == 0  # it alone was asked for
    done = call("restore", str(data), "--to", f"{tmp_path}/to", *place)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in Path(f"{tmp_path}/to{data}").iterdir()) == [
        "kept", "night0", "night1", "night2", "skip.bak"
    ]
    done = call("restore", f"{data}-3-DIFF", "--to", f"{tmp_path}/one", *place)
    assert done.returncode == 0
    # Without the first night, the second does not hold what it began with, and that is told.
    first = s3napback.archive_objects(site.store(), f"{data}-3-DIFF")
    site.store().delete([item.key for item in first])
    done = call("restore", str(data), "--to", f"{tmp_path}/less", *place)
    assert done.returncode == 1
    assert f"{data}-4-DIFF does not hold kept" in done.stderr
    done = call("restore", str(data), "--to", f"{tmp_path}/less", "--force-partial", *place)
    assert f"partial: {data}-4-DIFF does not hold kept" in done.stderr
    assert done.returncode == 3
    done = call("restore", str(data), "--to", f"{tmp_path}/none", "--force-partial", *place,
                f"{data}/kept")
    assert f"partial: {data}-4-DIFF does not hold kept" in done.stderr  # although the PATH is not
    assert (done.returncode, "not in the backup as of" in done.stderr) == (1, True)
    assert (Path(f"{tmp_path}/less{data}") / "night2").exists()


def test_a_perl_diff_that_cannot_be_read_is_said_to_hold_maybe_everything(
    site: Site, place: list[str], tmp_path: Path
) -> None:
    perl_archives(site.store(), tmp_path, 1)
    site.store().put(f"{tmp_path}/perl-3-DIFF:{0:020d}", b"\x85\x01encrypted", {})
    done = call("restore", f"{tmp_path}/perl", "--to", f"{tmp_path}/to", *place)
    assert done.returncode == 1
    assert "/perl-3-DIFF may hold everything, but cannot be read: gpg ended" in done.stderr


def test_what_was_excluded_then_is_named_where_a_perl_job_began_with_a_diff(
    site: Site, place: list[str], tmp_path: Path
) -> None:
    perl_archives(site.store(), tmp_path, 2, "*.bak")
    done = call("restore", f"{tmp_path}/perl", "--to", f"{tmp_path}/to", *place)
    assert done.returncode == 1
    assert "does not hold skip.bak, which was excluded then, or is in an archive" in done.stderr
