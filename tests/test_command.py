"""Commands: what any command writes is backed up as a dump is, and only if it ended well."""

import contextlib
import gzip
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import NIGHT, START, Capture, Redis, Site, program, require_tool, wait_until

import s3napback


def command(run: str, *lines: str, name: str = "x") -> str:
    """A block with that Run, quoted as README says."""
    escaped = run.replace('"', '\\"')
    return "\n".join([f"<Command {name}>", f'Run "{escaped}"', *lines, "</Command>"])


def restored(site: Site, name: str = "x") -> bytes:
    """What a restore of the site's command writes to a file."""
    place = site.folder / "restored"
    assert site.restore(place, "--overwrite", name=f"Command/{name}") == 0
    return place.read_bytes()


# ---- round trips ----


def test_a_database_of_sqlite_comes_back(site: Site) -> None:
    """As README shows it: nothing is stored of one that is locked, damaged or not there."""
    sqlite, readme = require_tool("sqlite3"), Path(s3napback.__file__).with_name("README.md")
    shown = re.search('`(Run "sqlite3 .*")`', readme.read_text())
    assert shown
    run = shown[1].replace("/root", str(site.folder)).replace("/srv", str(site.data))
    site.jobs = f"<Command x>\n{run}\n</Command>"
    place, rows = site.data / "x.db", "CREATE TABLE t (n, s); INSERT INTO t VALUES (42, x'00ff');"
    assert site.run(now=NIGHT) == 1 and not place.exists()
    place.write_text("no database" * 1000)
    assert site.run(now=NIGHT) == 1
    place.unlink()
    subprocess.run([sqlite, place, rows], check=True)
    with contextlib.closing(sqlite3.connect(place, isolation_level=None)) as locked:
        locked.execute("BEGIN EXCLUSIVE")
        assert site.run(now=NIGHT) == 1
    assert not site.archives()
    assert site.run(now=NIGHT) == 0
    (site.folder / "again.db").write_bytes(restored(site))
    told = [subprocess.run([sqlite, one, ".dump"], capture_output=True, check=True).stdout
            for one in (place, site.folder / "again.db")]
    assert told[0] == told[1] and b"42" in told[0]


def test_a_redis_comes_back(site: Site, redis: Redis, tmp_path: Path) -> None:
    redis.run("SET", "name", "caf\u00e9")
    redis.run("RPUSH", "list", *map(str, range(500)))
    site.jobs = command(f"redis-cli -s {redis.socket} --rdb -")
    assert site.run() == 0
    place = tmp_path / "again"
    place.mkdir()
    (place / "dump.rdb").write_bytes(restored(site))
    with redis.started(place) as again:
        for words in (["GET", "name"], ["LRANGE", "list", "0", "-1"], ["DBSIZE"]):
            assert again.run(*words) == redis.run(*words) != ""


def test_an_openldap_comes_back(site: Site) -> None:
    slapadd, slapcat = require_tool("slapadd"), require_tool("slapcat")
    ldif = ("dn: dc=example,dc=com\nobjectClass: dcObject\nobjectClass: organization\n"
            "dc: example\no:: Q2Fmw6k=\n\n"
            "dn: cn=Jo,dc=example,dc=com\nobjectClass: organizationalRole\ncn: Jo\n")

    def database(name: str) -> str:
        (site.folder / name).mkdir()
        conf = site.folder / f"{name}.conf"
        conf.write_text("include /etc/ldap/schema/core.schema\nmodulepath /usr/lib/ldap\n"
                        "moduleload back_mdb\ndatabase mdb\nmaxsize 10485760\n"
                        f"suffix dc=example,dc=com\ndirectory {site.folder / name}\n")
        return str(conf)

    one, other = database("one"), database("other")
    subprocess.run([slapadd, "-q", "-f", one], input=ldif, text=True, check=True)
    site.jobs = command(f"{slapcat} -f '{one}'")
    assert site.run() == 0
    subprocess.run([slapadd, "-q", "-f", other], input=restored(site), check=True)
    dumps = [subprocess.run([slapcat, "-f", conf], capture_output=True, check=True).stdout
             for conf in (one, other)]
    assert dumps[0] == dumps[1] and b"cn=Jo,dc=example,dc=com" in dumps[0]


CODED = {"gzip": gzip.compress(os.urandom(3000)), "OpenPGP": b"\x85\x01\x0c\x03no such key",
         "zeros": bytes(5000)}


@pytest.mark.parametrize(
    ("compressor", "encrypted"),
    [("cat", True), pytest.param("cat", False, marks=pytest.mark.slow),
     pytest.param('"zstd -3"', False, marks=pytest.mark.slow)],
)
def test_what_is_compressed_or_encrypted_already_comes_back_as_it_was(
    site: Site, gpg_home: Any, monkeypatch: pytest.MonkeyPatch, compressor: str, encrypted: bool
) -> None:
    monkeypatch.setenv("GNUPGHOME", str(gpg_home.home))
    site.settings["Compressor"] = compressor
    site.settings["GpgRecipient"] = gpg_home.recipient if encrypted else ""
    site.jobs = ""
    for name, data in CODED.items():
        (site.data / name).write_bytes(data)
        site.jobs += command(f"cat '{site.data}/{name}'", name=name) + "\n"
    assert site.run() == 0
    for name, data in CODED.items():
        assert restored(site, name) == data


# ---- as a dump ----


def test_archives_rotate_as_those_of_dumps_do(site: Site, capsys: Capture) -> None:
    site.jobs = command("date", "Fulls 2", "Diffs 6", name="host-2.ldap") + (
        "\n<Cycle c>\nFrequency 50\n" + command("date", name="y") + "\n</Cycle>"
    )
    for day in range(3):
        assert site.run(now=NIGHT + timedelta(days=day)) == 0
    said = capsys.readouterr().err
    assert "Backup.S3napback.Command INFO Command y -> bkt:Command/y-2\n" in said
    assert set(site.archives()) == {"Command/host-2.ldap-0", "Command/host-2.ldap-1",
                                    "Command/y-0", "Command/y-2", "Command/y-3"}
    assert {a.metadata["kind"] for a in site.archives().values()} == {"Command"}
    assert site.run(now=NIGHT + timedelta(days=2)) == 0
    assert "Skipping bkt:Command/y-0 -- already done today" in capsys.readouterr().err


@pytest.mark.parametrize("prefix", ["web1", pytest.param("", marks=pytest.mark.slow)])
def test_a_bucket_alone_tells_what_a_command_stored(
    site: Site, prefix: str, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    site.settings["Prefix"] = prefix
    site.jobs = command("printf 'a\\0b'", name="it")
    assert site.run() == 0
    archive = "web1/Command/it-2" if prefix else "Command/it-2"
    assert list(site.archives()) == [archive]
    name = archive.removesuffix("-2")
    capsysbinary.readouterr()
    assert s3napback.main(["list", *site.bucket, "--json"]) == 0
    (source,) = json.loads(capsysbinary.readouterr().out)["sources"]
    assert (source["kind"], source["name"], source["prefix"]) == ("Command", "it", prefix)
    for words in (["restore", "--stdout", name], ["restore", "--stdout", archive]):
        done = program(*words, *site.bucket)
        assert (done.returncode, done.stdout) == (0, b"a\0b")
    assert s3napback.main(["verify", "--deep", *site.bucket]) == 0
    script = program("restore-script", name, *site.bucket).stdout
    place = site.folder / "by hand"
    subprocess.run(["sh", "-s", str(place)], input=script, check=True)
    assert place.read_bytes() == b"a\0b"


def test_a_prefix_that_looks_like_a_command_is_refused(site: Site, capsys: Capture) -> None:
    site.settings["Prefix"] = "a/Command"
    assert site.run() == 2
    assert "a part of it is one of MySQL, PostgreSQL, Command" in capsys.readouterr().err


def test_a_full_that_lost_nearly_all_is_stored_with_a_warning(
    site: Site, capsys: Capture
) -> None:
    site.jobs = command(f"cat '{site.data}/file'")
    (site.data / "file").write_bytes(os.urandom(5000))
    assert site.run() == 0
    (site.data / "file").write_bytes(b"little")
    assert site.run(now=NIGHT + timedelta(days=1)) == 3
    assert "the full backup before it 5." in capsys.readouterr().err
    assert restored(site) == b"little"


def test_test_mode_shows_a_line_to_paste_and_runs_nothing(site: Site, capsys: Capture) -> None:
    site.jobs = command(f"""echo "it's \\$1" | tee '{site.folder}/ran'""")
    site.settings["Compressor"] = "cat"
    assert site.run("-t") == 0
    assert not (site.folder / "ran").exists() and not site.archives()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "/bin/sh -c" in line]
    shown = line.partition("INFO ")[2].partition(" | gzip |")[0]
    assert subprocess.run(["sh", "-c", shown], capture_output=True).stdout == b"it's $1\n"


def test_a_command_sees_no_secret(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t")
    site.jobs = command("env; cat")  # and nothing to read
    assert site.run() == 0
    assert b"PATH=" in restored(site) and b"s3cr3t" not in restored(site)


# ---- what goes wrong ----

@pytest.mark.parametrize("temp", [False, True])
@pytest.mark.parametrize(
    ("run", "said"),
    [("head -c 5000 /dev/urandom; echo no room >&2; exit 1", "sh ended with status 1: no room"),
     ("head -c 5000 /dev/urandom; kill -9 $$", "sh was ended by SIGKILL")],
)
def test_nothing_is_stored_of_a_command_that_fails_in_the_middle(
    site: Site, run: str, said: str, temp: bool, capsys: Capture
) -> None:
    site.settings["SafeReplace"] = "On"
    site.jobs = command("echo old")
    assert site.run(now=NIGHT - timedelta(days=4)) == 0
    site.jobs = command(run, f"UseTempFile {int(temp)}") + f"\nDirectory {site.data}"
    assert site.run() == 1
    told = capsys.readouterr().err
    assert f"Backup to bkt:Command/x-2 failed: {said}" in told
    assert "1 stored, 0 skipped, 1 failed" in told
    assert len(site.archives()) == 2 and restored(site) == b"old\n"
    assert not list((site.folder / "temp").iterdir())


@pytest.mark.parametrize(
    ("run", "said"),
    [
        ("/no/such/program --all", "sh ended with status 127"),
        ("bash -o pipefail -c 'false | echo half'", "sh ended with status 1"),
        ("true", "the command wrote nothing: sh ended with status 0 (try it by hand)"),
        ("echo well >&2", "the command wrote nothing: sh ended with status 0: well"),
        ("exec >&-; sleep 0.1; exit 7", "sh ended with status 7"),
        ("echo 'if'; (", "sh ended with status 2"),
    ],
)
def test_nothing_is_stored_of_a_command_that_fails_or_writes_nothing(
    site: Site, run: str, said: str, capsys: Capture
) -> None:
    site.jobs = command(run)
    assert site.run() == 1
    assert f"Backup to bkt:Command/x-2 failed: {said}" in capsys.readouterr().err
    assert not site.archives()


@pytest.mark.parametrize("temp", [False, True])
def test_what_a_command_says_though_it_ends_well_is_logged(
    site: Site, temp: bool, capsys: Capture
) -> None:
    run = "echo out; seq 1000 1200 >&2; echo first >&2; printf 'database is \\033[31mlocked' >&2"
    site.jobs = command(run, f"UseTempFile {int(temp)}")
    assert site.run() == 0
    told = capsys.readouterr().err
    assert told.count("Command INFO 1") == 98 and "Command INFO first\n" in told
    assert "INFO database is " in told
    assert "\x1b" not in told and restored(site) == b"out\n"


@pytest.mark.parametrize("run", [
    "echo half; sleep 1000 | cat; true",
    '(trap "$t" TERM; echo half; sleep 1000 | cat; true) & exit 0',
    "echo half; timeout 1h sleep 1000; true",  # timeout(1) has a process group of its own
    pytest.param("sleep 1000 | cat", marks=pytest.mark.slow),
])
def test_a_run_that_is_ended_ends_all_that_a_command_started(site: Site, run: str) -> None:
    site.jobs = command(f"echo $$ > '{site.folder}/pid'; t='echo > {site.folder}/trapped';"
                        f' trap "$t" TERM; {run}')
    own = subprocess.Popen([sys.executable, START, "-c", str(site.write())],
                           stderr=subprocess.PIPE)
    pid = site.folder / "pid"
    wait_until(lambda: pid.exists() and pid.read_text().endswith("\n"), "the command")
    group = int(pid.read_text())
    wait_until(lambda: len(members(group)) >= 3, "what it starts")
    own.send_signal(signal.SIGTERM)
    assert own.wait(20) == 128 + signal.SIGTERM
    assert b"Ended by SIGTERM" in own.communicate()[1]
    wait_until(lambda: not members(group), "the end of it all", 5)
    assert (site.folder / "trapped").exists()  # it was asked first
    assert not site.archives()


def members(group: int) -> list[str]:
    done = subprocess.run(["ps", "-o", "stat=", "--no-headers", "-s", str(group)],
                          capture_output=True, text=True)
    return [line for line in done.stdout.splitlines() if not line.startswith("Z")]


def test_what_does_not_heed_sigterm_is_killed(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3napback, "_END_SECONDS", 0.1)
    stage = s3napback.Stage(
        ("/bin/sh", "-c", "trap '' TERM; echo $$; sleep 1000 & sleep 1000"), shell=True
    )
    with s3napback.Pipeline([stage, s3napback.Stage(("cat",))], os.environ) as pipeline:
        group = int(next(pipeline.blocks()))
    wait_until(lambda: not members(group), "the end of it all", 5)


def test_a_number_that_another_process_has_by_now_is_left_alone() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, start_new_session=True) as other:
        ended.pid = other.pid
        s3napback.end_session(ended)
        other.communicate(timeout=5)
        assert other.returncode == 0


# ---- the config ----


@pytest.mark.parametrize(
    ("line", "run"),
    [
        ("Run slapcat", "slapcat"),
        ("run true", "true"),
        ('Run "off"', "off"),
        ("Run slapcat  -n 1 -b 'a b' # x", "slapcat  -n 1 -b 'a b' # x"),
        ('Run "/a b/c" "d"', '"/a b/c" "d"'),
        ('Run "a  b\tc"', "a  b\tc"),
        ('Run "echo # no comment, $HOME `x` \\n \\\\ \\$x %p {} ~"',
         "echo # no comment, $HOME `x` \\n \\\\ \\$x %p {} ~"),
        ('Run "echo \\"$A\\" \'$B\'"', "echo \"$A\" '$B'"),
        ("Run 'echo \"$A\"'", 'echo "$A"'),
        ('Run "a | \\\n  b"', "a | b"),
        ('Run "<x> </x> < in > out & ;"', "<x> </x> < in > out & ;"),
        ('Run "caf\u00e9"', "caf\u00e9"),
    ],
)
def test_a_command_arrives_as_it_is_written(site: Site, line: str, run: str) -> None:
    site.jobs = f"<Command x>\n{line}\n</Command>"
    config = s3napback.read_config(str(site.write()))
    (job,) = s3napback.jobs_of(config)
    assert job.command == run
    assert not s3napback.config_warnings(config)


@pytest.mark.slow
def test_any_bytes_of_a_command_reach_the_shell(site: Site) -> None:
    site.jobs = ""
    raw = b"\"it's\" $HOME \\ * \xff ~ `"
    quoted = b"'\\\\''".join(raw.split(b"'")).replace(b'"', b'\\"')
    site.conf.write_bytes(site.write().read_bytes()
                          + b"<Command x>\nRun \"printf %s '" + quoted + b"'\"\n</Command>\n")
    done = subprocess.run([sys.executable, START, "-c", str(site.conf)],
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    ((name, _),) = site.archives().items()
    assert gzip.decompress(site.content(name)) == raw


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("Command x", 8, "Command x needs one Run, and has 0 (write <Command x>, Run"),
        ("<Command x>\nFulls 2\n</Command>", 8, "Command x needs one Run, and has 0"),
        ("<Command x>\nRun a\nRun b\n</Command>", 10, "Command x needs one Run, and has 2"),
        ("<Command>\nRun a\n</Command>", 8, "this Command has no name"),
        ("<Command a/b>\nRun a\n</Command>", 8, "a/b is no name for a Command (use letters"),
        ('<Command "a b">\nRun a\n</Command>', 8, "a b is no name for a Command"),
        ("<Command -x>\nRun a\n</Command>", 8, "-x is no name for a Command"),
        ("<Command x\u00e9>\nRun a\n</Command>", 8, "x\u00e9 is no name for a Command"),
    ],
)
def test_a_wrong_block_is_told_before_anything_runs(
    site: Site, text: str, line: int, said: str, capsys: Capture
) -> None:
    site.jobs = f"Directory {site.data}\n{text}"
    assert site.run() == 2
    assert f"{site.conf}:{line}: {said}" in capsys.readouterr().err
    assert not site.archives()


@pytest.mark.parametrize("line", ["Run", 'Run " "', "Run ''", "Run # slapcat"])
def test_a_run_without_a_command_is_told(site: Site, line: str, capsys: Capture) -> None:
    site.jobs = f"<Command x>\n{line}\n</Command>"
    assert site.run() == 2
    assert f"{site.conf}, line 8: Run has no command" in capsys.readouterr().err


def test_a_run_outside_a_command_is_told(site: Site, capsys: Capture) -> None:
    site.jobs = f'<Directory {site.data}>\nRun "x"\n</Directory>'
    assert site.run() == 0
    assert "Run is not used: <directory> is no Command" in capsys.readouterr().err


def test_check_tells_what_a_command_lacks_and_does_not_run_it(
    site: Site, capsys: Capture
) -> None:
    fine = "ok", ""
    lacks = "is not on PATH"
    told = {
        "LC_ALL=C TZ=UTC touch ran": fine,
        "set -e; touch 'a|b' || exit 1": fine,
        "(no-tool-1; $X)": fine,
        "bash -o pipefail -c 'touch ran | sort'": fine,
        "set -o pipefail; touch ran | sort": fine,
        "no-tool-1 | cat": ("error", f"no-tool-1 {lacks}"),
        "LC_ALL=C no-tool-1": ("error", f"no-tool-1 {lacks}"),
        "/no/tool": ("error", f"/no/tool {lacks}"),
        "touch ran | sort": ("warning", "of a pipe in it only the last status counts"),
        "echo '": ("error", "/bin/sh: 1: Syntax error: Unterminated quoted string"),
    }
    runs = [run.replace("ran", f"{site.folder}/ran") for run in told]
    site.jobs = "\n".join(command(run, name=f"x{n}") for n, run in enumerate(runs))
    assert s3napback.main(["check", "--json", "-c", str(site.write())]) == 1
    findings = json.loads(capsys.readouterr().out)
    for number, (run, (level, said)) in enumerate(told.items()):
        found = [one for one in findings if one["subject"] == f"Command x{number}"]
        assert any(one["level"] == level and said in one["text"] for one in found), (run, found)
        assert level != "ok" or [one["text"] for one in found] == [runs[number]]
    assert not (site.folder / "ran").exists()
