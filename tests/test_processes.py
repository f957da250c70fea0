"""Processes: how a stage ends says what the archive is worth; keys of gpg."""

import fcntl
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import NIGHT, Capture, Site, bad_compressor, fake_tool, require_tool

import s3napback
from s3napback import Failure

# ---- how a stage ends ----


DYING = {
    "at once": "exit 9",
    "in the middle": 'head -c 2500 <("$REAL" "$@"); exit 9',
    "at the end": '"$REAL" "$@"; exit 9',
    "by a signal": '"$REAL" "$@"; kill -KILL $$',
    "quietly cut, then fails": '"$REAL" "$@" | head -c 1700; exit 9',
}


@pytest.mark.parametrize("temp", [False, True])
@pytest.mark.parametrize("how", DYING)
@pytest.mark.parametrize("tool", ["tar", "gzip", "gpg"])
def test_a_stage_that_dies_stores_nothing(
    site: Site, gpg_home: Any, monkeypatch: pytest.MonkeyPatch,
    capsys: Capture, tool: str, how: str, temp: bool,
) -> None:
    monkeypatch.setenv("GNUPGHOME", str(gpg_home.home))
    (site.data / "big").write_bytes(os.urandom(9000))
    site.settings |= {"GpgRecipient": gpg_home.recipient, "Compressor": "gzip"}
    site.jobs = f"<Directory {site.data}>\nUseTempFile {int(temp)}\n</Directory>"
    assert site.run() == 0
    before = site.state()
    (site.data / "big").write_bytes(os.urandom(9000))
    script = DYING[how]
    if tool == "gzip":
        script = script.replace('"$REAL" "$@"', "gzip")
        site.settings["Compressor"] = bad_compressor(site.folder, script)
    elif tool == "gpg":  # the check of the key must still pass
        script = f'[ "$(head -c 1 | wc -c)" = 0 ] && exec "$REAL" "$@" </dev/null\n{script}'
    if tool != "gzip":
        fake_tool(site, monkeypatch, tool, script)
    capsys.readouterr()
    later = NIGHT + timedelta(days=1)
    assert site.run(now=later) == 1
    said = capsys.readouterr().err
    assert "failed: " in said
    assert ("bad-compressor" if tool == "gzip" else tool) in said.split("failed: ")[1]
    assert "Finished: 0 stored, 0 skipped, 1 failed" in said
    assert site.state() == before  # the archive of another slot, and what DiffDir describes
    monkeypatch.undo()
    monkeypatch.setattr(s3napback, "read_logconfig", lambda: s3napback.LogConfig("", ""))
    monkeypatch.setenv("GNUPGHOME", str(gpg_home.home))
    site.settings["Compressor"] = "gzip"
    assert site.run(now=later) == 0
    assert len(site.archives()) == 2


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ('"$REAL" "$@"; echo "tar: x: file changed as we read it" >&2; exit 1', "x: file changed"),
        ('"$REAL" "$@"; echo "tar: y: Cannot open: Permission denied" >&2; exit 2', "y: Cannot op"),
    ],
)
def test_tars_warnings_are_stored_and_told(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: Capture, script: str, said: str
) -> None:
    fake_tool(site, monkeypatch, "tar", script)
    assert site.run() == 3
    ((_, archive),) = site.archives().items()
    assert archive.complete
    assert archive.metadata["status"] == "warnings"
    captured = capsys.readouterr().err
    assert said in captured
    assert "1 stored (1 with warnings)" in captured
    assert len(site.diff_files()) == 1


def test_tar_that_gives_up_stores_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    script = '"$REAL" "$@"; echo "tar: Error is not recoverable: exiting now" >&2; exit 2'
    fake_tool(site, monkeypatch, "tar", script)
    assert site.run() == 1
    assert not site.archives()
    assert not list((site.folder / "diffs").iterdir())


@pytest.mark.parametrize("status", [1, 2])
def test_a_source_that_ended_with_a_warning_is_not_waited_for(
    site: Site, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """tar is through, and the compressor holds more than a pipe takes: it is read on, not waited
    for."""
    (site.data / "big").write_bytes(os.urandom(6_000_000))
    fake_tool(site, monkeypatch, "tar", f'"$REAL" "$@"; exit {status}')
    holding = bad_compressor(site.folder, "d=$(base64); echo $d")
    site.settings |= {"Compressor": holding, "ChunkSize": "100000"}
    assert site.run() == 3
    ((_, archive),) = site.archives().items()
    assert archive.complete
    assert archive.size > 6_000_000


def test_a_tar_that_wrote_nothing_stores_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert site.run() == 0
    before = site.state()
    fake_tool(site, monkeypatch, "tar", "echo 'tar: unrecognized option' >&2; exit 1")
    assert site.run("-f", now=NIGHT.replace(month=12, day=1)) == 1
    assert "tar wrote no snapshot file (install GNU tar as tar)" in capsys.readouterr().err
    assert site.state() == before


def test_many_messages_are_counted_not_kept(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(s3napback, "_MAX_MESSAGES", 10)
    fake_tool(site, monkeypatch, "tar", '"$REAL" "$@"; seq 1 100 >&2; exit 1')
    assert site.run() == 3
    said = capsys.readouterr().err
    assert "WARN 10\n" in said
    assert "WARN 11\n" not in said
    assert "90 more messages of tar, the last of them:" in said
    assert "WARN 100\n" in said


@pytest.mark.parametrize("tool", ["tar", "gzip", "gpg", "mysqldump", "svnlook"])
def test_a_tool_that_is_not_on_path_is_named(
    site: Site, gpg_home: Any, monkeypatch: pytest.MonkeyPatch,
    capsys: Capture, svn_repo_factory: Any, tool: str,
) -> None:
    monkeypatch.setenv("GNUPGHOME", str(gpg_home.home))
    site.settings["GpgRecipient"] = gpg_home.recipient
    repo = svn_repo_factory(site.folder / "repo", 1)
    site.jobs = {"mysqldump": "MySQL all", "svnlook": f"Subversion {repo}"}.get(tool, site.jobs)
    folder = site.folder / "bin"
    folder.mkdir()
    for name in {"tar", "gzip", "gpg", "svnlook", "svnadmin"} - {tool}:
        (folder / name).symlink_to(require_tool(name))
    monkeypatch.setenv("PATH", str(folder))
    assert site.run() == 1
    assert f"{tool} is not on PATH (install it, or set PATH in the crontab)" in (
        capsys.readouterr().err
    )
    assert not site.archives()
    assert not list((site.folder / "diffs").iterdir())


def test_a_tar_that_ends_early_stores_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tool(site, monkeypatch, "tar", "echo 'tar: no' >&2; exit 2")
    with pytest.raises(Failure, match="tar ended with status 2: tar: no"):
        s3napback.run_tar(iter([bytes(1 << 20)] * 20), str(site.folder), dict(os.environ))


def test_the_pipes_between_stages_are_wide() -> None:
    stages = [s3napback.Stage(("cat", "/dev/zero")), s3napback.Stage(("cat",))]
    with s3napback.Pipeline(stages, dict(os.environ)) as pipeline:
        for process in pipeline._processes:
            if process.stdout and not process.stdout.closed:
                assert fcntl.fcntl(process.stdout, fcntl.F_GETPIPE_SZ) == 1 << 20


# ---- gpg ----


def sh(script: str) -> s3napback.Stage:
    return s3napback.Stage(("sh", "-c", script))


def processes_of(marker: str) -> str:
    return subprocess.run(["pgrep", "-f", marker], capture_output=True, text=True).stdout


def test_a_filter_that_fails_is_told_at_the_end_of_its_output() -> None:
    read = b""
    with (
        pytest.raises(Failure, match="sh ended with status 7: no more"),
        s3napback.run_filter(sh("cat; echo no more >&2; exit 7"), [b"a", b"b"], os.environ) as out,
    ):
        for block in out:
            read += block
    assert read == b"ab"


def test_of_what_a_tool_says_at_its_end_the_line_that_tells_is_shown() -> None:
    """As pg_dump and libpq write it: the reason, and a question below it, indented."""
    script = r"printf 'pg_dump: no such socket\n\tIs the server running?\n' >&2; exit 1"
    with (
        pytest.raises(Failure, match=r"sh ended with status 1: pg_dump: no such socket$"),
        s3napback.run_filter(sh(script), [], os.environ) as out,
    ):
        list(out)


def test_a_stream_that_fails_ends_the_filter_and_is_raised() -> None:
    def blocks() -> Iterator[bytes]:
        yield b"a"
        raise Failure("the bucket is gone")

    with (
        pytest.raises(Failure, match="the bucket is gone"),
        s3napback.run_filter(sh("cat; exit 0"), blocks(), os.environ) as out,
    ):
        list(out)


def test_who_leaves_a_filter_early_kills_it() -> None:
    with s3napback.run_filter(sh("echo one; exec sleep 98765"), [b"a"], os.environ) as out:
        assert next(out) == b"one\n"
        assert processes_of("sleep 98765")
    assert not processes_of("sleep 98765")


def test_a_pipeline_that_cannot_start_whole_leaves_nothing() -> None:
    stages = [sh("exec sleep 98764"), s3napback.Stage(("no-such",))]
    with pytest.raises(Failure, match="no-such is not on PATH"):
        s3napback.Pipeline(stages, os.environ).__enter__()
    assert not processes_of("sleep 98764")


def test_a_pipeline_that_cannot_start_whole_waits_for_no_output() -> None:
    """A wrapper around mysqldump may leave a process behind that has its pipe open."""
    dump = s3napback.Stage(("sh", "-c", "sleep 20 & sleep 20"), watched=True)
    stages = [dump, sh("cat"), s3napback.Stage(("no-such",))]
    started = time.monotonic()
    with pytest.raises(Failure, match="no-such is not on PATH"):
        s3napback.Pipeline(stages, os.environ).__enter__()
    assert time.monotonic() - started < 10


def test_the_last_bytes_of_a_watched_stage_are_kept() -> None:
    source = s3napback.Stage(("seq", "100009"), watched=True)
    with s3napback.Pipeline([source, sh("cat")], os.environ) as pipeline:
        output = b"".join(pipeline.blocks())
        first, second = pipeline.results()
    assert (first.status, second.status) == (0, 0)
    assert output.endswith(first.tail)
    assert len(first.tail) == 4096


@pytest.mark.parametrize(
    ("closing", "is_whole"),
    [
        (b"-- Dump completed on 2026-11-27  3:00:01\n", True),
        (b"/*!40111 SET SQL_NOTES=@OLD_SQL_NOTES */;\n", True),
        (b"/*M!100616 SET NOTE_VERBOSITY=@OLD_NOTE_VERBOSITY */;\n", True),
        (b"/*M!100616 SET @OLD_NOTE_VERBOSITY=@@NOTE_VERBOSITY, NOTE_VERBOSITY=0 */;\n", False),
    ],
)
def test_the_closing_lines_of_mysql_and_mariadb_tell_a_whole_dump(
    closing: bytes, is_whole: bool
) -> None:
    """With --force, and a status of 2; without --skip-comments and with it."""
    said = ("mysqldump: Got error: 1146: \"Table 'x' doesn't exist\" when using LOCK TABLES",)
    dump = s3napback.Stage(("mysqldump", "--force"), watched=True)
    assert s3napback.StageResult(dump, 2, said, tail=closing).is_whole == is_whole


def test_a_watched_stage_whose_reader_ends_early_is_not_taken_for_whole() -> None:
    source = s3napback.Stage(("seq", "10000000"), watched=True)
    with s3napback.Pipeline([source, sh("head -c 10")], os.environ) as pipeline:
        assert b"".join(pipeline.blocks()) == b"1\n2\n3\n4\n5\n"
        with pytest.raises(Failure, match=r"seq (was )?ended"):
            pipeline.finish()


def test_a_tool_that_does_not_end_in_time_is_killed() -> None:
    with pytest.raises(Failure, match="sleep does not answer within"):
        s3napback.run_tool(("sleep", "98763"), os.environ, timeout=0.1)
    assert not processes_of("sleep 98763")


def test_a_gpg_that_does_not_work_is_told_in_its_words(
    site: Site, gpg_home: Any, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    site.settings["GpgRecipient"] = gpg_home.recipient
    fake_tool(site, monkeypatch, "gpg", "exit 9")
    assert site.run() == 2
    assert "gpg does not work: Error invoking gpg: 9" in capsys.readouterr().err


def recipient_failure(
    site: Site, monkeypatch: pytest.MonkeyPatch, home: Path, capsys: Capture
) -> str:
    monkeypatch.setenv("GNUPGHOME", str(home))
    before = site.state()
    assert site.run() == 2
    assert site.state() == before
    return capsys.readouterr().err


def key_maker(home: Path, recipient: str, expiry: str = "0") -> None:
    env = {**os.environ, "GNUPGHOME": str(home)}
    subprocess.run(
        ["gpg", "--batch", "-q", "--passphrase", "", "--quick-generate-key", recipient,
         "future-default", "default", expiry],
        env=env, check=True, capture_output=True,
    )


def test_a_recipient_that_cannot_be_encrypted_for_is_told_with_its_remedy(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: Capture,
    short_folder: Callable[[str], Path], gpg_home: Any,
) -> None:
    home = short_folder("")
    env = {**os.environ, "GNUPGHOME": str(home)}
    site.settings["GpgRecipient"] = "who@example.com"
    said = recipient_failure(site, monkeypatch, home, capsys)
    assert "GPG recipient who@example.com not found in " in said
    assert "gpg --import" in said
    # expired: made in the past
    faketime = require_tool("faketime")
    subprocess.run(
        [faketime, "2020-01-01", "gpg", "--batch", "-q", "--passphrase", "",
         "--quick-generate-key", "old@example.com", "future-default", "default", "1y"],
        env=env, check=True, capture_output=True,
    )
    site.settings["GpgRecipient"] = "old@example.com"
    said = recipient_failure(site, monkeypatch, home, capsys)
    assert "expired on 2020-12-31" in said
    assert "gpg --edit-key" in said
    # not trusted: someone else's public key
    public = gpg_home.run("--armor", "--export", gpg_home.recipient)
    subprocess.run(["gpg", "--batch", "-q", "--import"], input=public, text=True, env=env,
                   check=True, capture_output=True)
    site.settings["GpgRecipient"] = gpg_home.recipient
    said = recipient_failure(site, monkeypatch, home, capsys)
    assert "is not trusted" in said
    assert "trust" in said.rpartition("gpg --edit-key ")[2]
    # disabled
    key_maker(home, "off@example.com")
    subprocess.run(["gpg", "--no-tty", "--command-fd", "0", "--edit-key", "off@example.com"],
                   input="disable\nsave\n", text=True, env=env, capture_output=True)
    site.settings["GpgRecipient"] = "off@example.com"
    assert "is disabled" in recipient_failure(site, monkeypatch, home, capsys)
    # revoked
    key_maker(home, "gone@example.com")
    listing = subprocess.run(["gpg", "--list-keys", "--with-colons", "gone@example.com"],
                             env=env, capture_output=True, text=True).stdout
    fingerprint = next(x.split(":")[9] for x in listing.splitlines() if x.startswith("fpr"))
    revocation = (home / "openpgp-revocs.d" / f"{fingerprint}.rev").read_text()
    subprocess.run(["gpg", "--batch", "--import"], env=env, text=True, capture_output=True,
                   input=revocation.replace(":-----BEGIN", "-----BEGIN"))
    site.settings["GpgRecipient"] = "gone@example.com"
    assert "is revoked" in recipient_failure(site, monkeypatch, home, capsys)
    subprocess.run(["gpgconf", "--kill", "all"], env=env)


def test_a_keyring_of_its_own_is_used(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: Capture,
    short_folder: Callable[[str], Path], gpg_home: Any,
) -> None:
    home, ring = short_folder(""), site.folder / "backup.gpg"
    env = {**os.environ, "GNUPGHOME": str(home)}
    public = gpg_home.run("--armor", "--export", gpg_home.recipient)
    subprocess.run(
        ["gpg", "--batch", "-q", "--no-default-keyring", "--keyring", str(ring), "--import"],
        input=public, text=True, env=env, check=True, capture_output=True,
    )
    (home / "gpg.conf").write_text("trust-model always\n")
    monkeypatch.setenv("GNUPGHOME", str(home))
    site.settings |= {"GpgRecipient": gpg_home.recipient, "GpgKeyring": str(ring)}
    assert site.run() == 0
    site.settings["GpgKeyring"] = str(site.folder / "absent.gpg")
    said = recipient_failure(site, monkeypatch, home, capsys)
    assert "absent.gpg does not exist" in said
    (site.folder / "absent.gpg").write_text(public)
    said = recipient_failure(site, monkeypatch, home, capsys)
    assert "absent.gpg a keyring? gpg --import makes one" in said
    (home / "gpg.conf").unlink()
    site.settings["GpgKeyring"] = str(ring)
    said = recipient_failure(site, monkeypatch, home, capsys)
    assert f"is not trusted (run: gpg --keyring {ring} --edit-key" in said


@pytest.mark.parametrize("written", ["{}/pubring.kbx", "pubring.kbx"])
def test_the_keyring_that_gpg_opens_anyway_is_none_besides(
    site: Site, monkeypatch: pytest.MonkeyPatch, gpg_home: Any, written: str
) -> None:
    monkeypatch.setenv("GNUPGHOME", str(gpg_home.home))
    ring = written.format(gpg_home.home)
    site.settings |= {"GpgRecipient": gpg_home.recipient, "GpgKeyring": ring}
    assert site.run() == 0


def test_a_keyring_that_gnupg_ignores_is_told(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: Capture, gpg_home: Any
) -> None:
    # GnuPG 2.4 with use-keyboxd says so, and goes on with its own keys.
    note = 'gpg: Note: Specified keyrings are ignored due to option "use-keyboxd"'
    fake_tool(site, monkeypatch, "gpg", f"echo '{note}' >&2; exec \"$REAL\" \"$@\"")
    site.settings |= {"GpgRecipient": gpg_home.recipient, "GpgKeyring": "/x.gpg"}
    said = recipient_failure(site, monkeypatch, gpg_home.home, capsys)
    assert "gpg ignores GpgKeyring /x.gpg" in said
    assert "take use-keyboxd out of common.conf" in said
