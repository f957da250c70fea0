"""`check`: what it says of set-ups that will work, and of those that will not."""

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import NIGHT, Capture, Site, fake_tool, require_tool
from ping_server import Healthchecks

import s3napback
from s3napback import Moment

Check = Callable[..., dict[str, Any]]


@pytest.fixture
def check(site: Site, capsys: Capture) -> Check:
    """Runs it; subject → the worst finding there, with the exit status under "status"."""

    def run(*words: str, conf: Path | None = None) -> dict[str, Any]:
        before = site.state()
        path = conf or site.write()
        capsys.readouterr()
        status = s3napback.main(["check", "--json", *words, "-c", str(path)], now=NIGHT)
        found: dict[str, Any] = {"status": status}
        order = ("error", "warning", "ok")
        for one in json.loads(capsys.readouterr().out):
            known = found.get(one["subject"])
            if known is None or order.index(one["level"]) < order.index(known["level"]):
                found[one["subject"]] = one
        assert site.state() == before, "it left something"
        return found

    return run


def test_a_set_up_that_will_work_is_all_well(
    s3_site: Site, s3_server: Any, check: Check, gpg_home: Any
) -> None:
    s3_site.settings |= {"GpgRecipient": gpg_home.recipient, "SafeReplace": "On"}
    os.environ["GNUPGHOME"] = str(gpg_home.home)
    try:
        assert s3_site.run() == 0
        objects = list(s3_site.store().iter_objects())
        found = check()
    finally:
        del os.environ["GNUPGHOME"]
    assert found["status"] == 0, found
    assert f"gpg encrypts for {gpg_home.recipient}" in found["GpgRecipient"]["text"]
    assert found["clock"]["level"] == found["tar"]["level"] == found["DiffDir"]["level"] == "ok"
    assert list(s3_site.store().iter_objects()) == objects
    probes = [path for method, path in s3_server.requests if "s3napback-check" in path]
    assert any("//s3napback-check//a b%41+?&=é:" in path for path in probes)


def test_the_worst_finding_is_the_status(site: Site, capsys: Capture) -> None:
    site.jobs = f"Directory {site.data}\nDirectory /absent"
    assert s3napback.main(["check", "-c", str(site.write())]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert f"ok       Directory {site.data}: can be read" in lines
    assert ("error    Directory /absent: directory /absent does not exist: mount it, or take it out"
            " of the config") in lines
    site.jobs = f"Directory {site.data}"
    assert s3napback.main(["check", "-c", str(site.write())]) == 0
    assert "the first run makes it" in capsys.readouterr().out


def test_what_the_bucket_has_of_a_source_is_told_beside_it(
    site: Site, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3napback, "host_name", lambda: "web1")
    site.jobs = f"Directory {site.data}\n<Command x>\nRun \"echo x\"\n</Command>"
    assert site.run() == 0
    monkeypatch.setattr(s3napback, "host_name", lambda: "web2")
    assert s3napback.main(["check", "--json", "-c", str(site.write())], now=NIGHT) == 1
    found = json.loads(capsys.readouterr().out)
    assert [list(one) for one in found] == [["level", "subject", "text", "hint"]] * len(found)
    subjects = [f"Directory {site.data}", "Command x"]
    assert [one["subject"] for one in found[-4:]] == [subjects[n] for n in (0, 0, 1, 1)]
    assert ["of the host web1" in one["text"] for one in found[-4:]] == [False, True] * 2


def test_a_bad_call_of_check_is_told(site: Site, capsys: Capture) -> None:
    assert s3napback.main(["check", "-h"]) == 0
    assert "usage: s3napback.py check" in capsys.readouterr().out
    assert s3napback.main(["check"]) == 2
    assert s3napback.main(["check", "--deep"]) == 2
    assert s3napback.main(["check", "nowhere"]) == 2
    assert "see: s3napback.py check -h" in capsys.readouterr().err


def test_as_cron_the_same_is_found(site: Site) -> None:
    """A tool that is only on our PATH, a variable that is only in our shell: cron has neither."""
    (site.folder / "bin").mkdir()
    (site.folder / "bin" / "squeeze").symlink_to("/bin/gzip")
    site.settings["Compressor"] = "squeeze"
    words = [*installed(site), "check", "-c", str(site.write())]
    env = {**os.environ, "PATH": f"{site.folder}/bin:{os.environ['PATH']}"}
    here = subprocess.run(words, env=env, capture_output=True, text=True)
    assert "ok       squeeze" in here.stdout, here
    cron = subprocess.run([*words, "--cro"], env=env, capture_output=True, text=True)
    assert cron.returncode == 1
    assert "error    squeeze: is not on PATH (/usr/bin:/bin): install it" in cron.stdout


def installed(site: Site) -> list[str]:
    """The script in a folder of its own, with a .venv beside it, and the python that runs it."""
    folder = site.folder / "opt"
    folder.mkdir()
    shutil.copy(s3napback.__file__, folder)
    (folder / ".venv").symlink_to(sys.prefix)
    return [sys.executable, str(folder / "s3napback.py")]


def as_cron(words: list[str], conf: str, cwd: Path) -> tuple[int, str]:
    done = subprocess.run([*words, "check", "--cron", "-c", conf], capture_output=True, text=True,
                          cwd=cwd)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_as_cron_the_script_runs_by_its_first_line(site: Site) -> None:
    words, conf = installed(site), str(site.write())
    script = Path(words[1])
    status, said = as_cron(words, conf, site.folder)
    assert status in (0, 3)  # 3: /var/log may not be written here
    assert f"ok       Directory {site.data}" in said
    script.chmod(0o644)
    status, said = as_cron(words, conf, site.folder)
    assert status == 1
    assert f"error    cron: {script} does not run: " in said
    assert said.endswith(f"Permission denied: chmod +x {script}\n")
    script.chmod(0o755)
    (script.parent / ".venv").unlink()
    text = script.read_text()
    # A python3 that is on cron's PATH and has no libraries, as most have none.
    script.write_text(text.replace("env python3", f"env -S {sys.executable} -S", 1))
    status, said = as_cron(words, conf, site.folder)
    assert status == 1
    assert "error    config: the Python library" in said and "/bin/pip install -r" in said
    script.write_text(text.replace("env python3", "env no-such-python", 1))
    status, said = as_cron(words, conf, site.folder)
    assert status == 1
    assert "no-such-python" in said and "try by hand: cd; env -i PATH=/usr/bin:/bin HOME=" in said


@pytest.mark.slow
def test_as_cron_there_is_no_terminal(site: Site) -> None:
    """On one, pg_dump and mysqldump would ask for a password that nobody types at night."""
    asks = site.folder / "asks"
    asks.write_text("#!/bin/bash\n(: </dev/tty) 2>/dev/null && exec echo asked\nexec gzip\n")
    asks.chmod(0o755)
    site.settings["Compressor"] = str(asks)
    words = [*installed(site), "check", "-c", str(site.write())]

    def on_a_terminal(*more: str) -> str:
        call = [require_tool("script"), "-qec", shlex.join([*words, *more]), "/dev/null"]
        return subprocess.run(call, capture_output=True, text=True).stdout

    assert "what it writes cannot be read back" in on_a_terminal()
    assert "can be read back" in on_a_terminal("--cron")


def test_as_cron_a_relative_config_is_not_found(site: Site) -> None:
    site.write()
    status, said = as_cron(installed(site), "my.conf", site.folder)
    assert status == 1
    assert f"warning  cron: my.conf is not a whole path, and cron starts in {Path.home()}" in said
    assert "error    config: Unable to open file 'my.conf'" in said


def test_as_cron_a_bad_call_is_told(site: Site) -> None:
    done = subprocess.run([*installed(site), "check", "--cron", "nowhere"], capture_output=True,
                          text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("s3napback: no config for nowhere")


@pytest.mark.parametrize(
    ("change", "subject", "text", "level"),
    [
        ({"DiffDir": "/nowhere/diffs"}, "config", "DiffDir", "error"),
        ({"ChunkSize": "x"}, "config", "ChunkSize", "error"),
        ({"S3Keyfile": "/nowhere/key"}, "S3Keyfile", "cannot read S3Keyfile", "error"),
        ({"GpgRecipient": "no-one@example.com"}, "GpgRecipient", "not found in", "error"),
        ({"Compressor": "no-such-tool -3"}, "no-such-tool", "is not on PATH", "error"),
        ({"Parallell": "3"}, "config", "Parallell", "warning"),
    ],
)
def test_a_setting_that_will_not_work_is_told(
    s3_site: Site, check: Check, change: dict[str, str], subject: str, text: str, level: str
) -> None:
    s3_site.settings |= change
    found = check()
    assert found[subject]["level"] == level, found
    assert text in found[subject]["text"]
    assert found["status"] == (1 if level == "error" else 3)


def test_faster_compressors_are_named_where_none_is_set(
    site: Site, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "igzip" not in check().get("Compressor", {"text": ""})["text"] or shutil.which("igzip")
    fake_tool(site, monkeypatch, "igzip", 'exec gzip "$@"')
    found = check()
    assert '"igzip -3"' in found["Compressor"]["text"]
    assert (found["Compressor"]["level"], found["status"]) == ("ok", 0)
    site.settings["Compressor"] = "gzip"
    assert "igzip" not in check()["Compressor"]["text"]


def test_every_error_is_told_at_once(site: Site, check: Check) -> None:
    site.settings |= {"GpgRecipient": "no-one@example.com", "TempDir": "/nowhere"}
    site.jobs = f"<Directory /absent>\nUseTempFile 1\n</Directory>\nDirectory {site.data}"
    found = check()
    wrong = {subject for subject, one in found.items()
             if subject != "status" and one["level"] == "error"}
    assert wrong == {"GpgRecipient", "TempDir", "Directory /absent"}


def test_jobs_in_each_others_way_are_told(site: Site, check: Check) -> None:
    site.jobs = f"Directory {site.data}\n<Cycle a>\nDirectory {site.data}\n</Cycle>"
    found = check()
    assert "writes to the same archives" in found[f"Directory {site.data}"]["text"]


def test_a_key_file_that_others_can_read_is_a_warning(s3_site: Site, check: Check) -> None:
    Path(s3_site.settings["S3Keyfile"]).chmod(0o644)
    found = check()
    assert found["S3Keyfile"]["level"] == "warning"
    assert found["S3Keyfile"]["hint"].startswith("chmod 600 ")
    assert found["status"] == 3


def test_without_a_key_file_it_says_where_the_key_is_from(s3_site: Site, check: Check) -> None:
    s3_site.settings["S3Keyfile"] = ""
    assert "no S3 credentials" in check()["bucket"]["text"]


def test_another_run_at_work_is_a_warning(site: Site, check: Check) -> None:
    state = s3napback.DiffDir(site.settings["DiffDir"] + "/", Moment.of(NIGHT))
    with state.lock():
        found = check()
    assert "another run is at work" in found["DiffDir"]["text"]
    assert found["status"] == 3


def test_what_comes_and_goes_in_diff_dir_is_no_fault(site: Site, check: Check) -> None:
    Path(site.settings["DiffDir"], "draft").symlink_to("gone")
    assert check()["status"] == 0


def test_little_room_is_a_warning(
    site: Site, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3napback, "_LITTLE_ROOM", 1 << 60)
    monkeypatch.setattr(s3napback, "_LITTLE_TEMP_ROOM", 1 << 60)
    site.jobs = f"<Directory {site.data}>\nUseTempFile 1\n</Directory>"
    found = check()
    for subject in ("DiffDir", "TempDir"):
        assert found[subject]["level"] == "warning"
        assert "are free" in found[subject]["text"]


def test_a_tar_that_is_not_gnus_is_an_error(
    site: Site, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tool(site, monkeypatch, "tar", "echo bsdtar 3.6")
    assert "is not GNU tar" in check()["tar"]["text"]


# ---- the bucket ----


@pytest.mark.parametrize(
    ("where", "answer", "text"),
    [
        ("GET", (403, "AccessDenied", "no"), "AccessDenied"),
        ("PUT", (403, "AccessDenied", "no"), "AccessDenied"),
        ("POST DELETE", (403, "AccessDenied", "no"), "AccessDenied"),
        ("GET", (403, "SignatureDoesNotMatch", "no"), "the secret in S3Keyfile is wrong"),
    ],
)
def test_each_right_that_is_missing_is_named(
    s3_site: Site, s3_server: Any, check: Check, where: str, answer: tuple[int, str, str], text: str
) -> None:
    assert s3_site.run() == 0
    s3_server.fail = lambda method, *_: answer if method in where.split() else None
    found = check()
    assert found["status"] == 1
    assert text in found["bucket"]["text"] + found["bucket"]["hint"]


def lock_objects(s3_server: Any, **retention: int) -> None:
    """Makes a bucket that keeps what is stored in it, by default for so many Days or Years."""
    client = s3_server.client()
    client.create_bucket(Bucket="bkt", ObjectLockEnabledForBucket=True)
    client.put_object_lock_configuration(
        Bucket="bkt", ObjectLockConfiguration={
            "ObjectLockEnabled": "Enabled",
            "Rule": {"DefaultRetention": {"Mode": "GOVERNANCE", **retention}},
        },
    )


def test_what_the_bucket_keeps(s3_site: Site, s3_server: Any, check: Check) -> None:
    lock_objects(s3_server, Days=30)
    facts = s3_site.store().about()  # type: ignore[attr-defined]
    assert facts == s3napback.BucketFacts("us-east-1", True, "30 days", ())
    s3_server.fail = lambda method, path, query, body: (
        (501, "NotImplemented", "") if {"versioning", "object-lock"} & set(query) else None
    )
    found = check()
    assert found["status"] == 0
    facts = s3_site.store().about()  # type: ignore[attr-defined]
    assert facts.unknown == ("versions", "an object lock")


def test_versions_are_noted(s3_site: Site, s3_server: Any, check: Check) -> None:
    client = s3_server.client()
    client.create_bucket(Bucket="bkt")
    client.put_bucket_versioning(Bucket="bkt", VersioningConfiguration={"Status": "Enabled"})
    found = check()
    assert "it keeps old versions" in found["bucket"]["text"]
    assert found["status"] == 3


def test_an_object_lock_is_noted(s3_site: Site, s3_server: Any, capsys: Any) -> None:
    lock_objects(s3_server, Years=1)
    assert s3napback.main(["check", "-c", str(s3_site.write())]) == 3
    assert "object lock keeps what is stored (1 years)" in capsys.readouterr().out


@pytest.mark.parametrize(("seconds", "level"), [(5, "ok"), (100, "warning"), (-2000, "error")])
def test_a_clock_that_is_wrong_is_told(
    s3_site: Site, check: Check, monkeypatch: pytest.MonkeyPatch, seconds: int, level: str
) -> None:
    ours = SimpleNamespace(**{**vars(time), "time": lambda: time.time() + seconds})
    monkeypatch.setattr(s3napback, "time", ours)
    found = check()
    assert found["clock"]["level"] == level
    assert ("ahead of" if seconds > 0 else "behind") in found["clock"]["text"]


def test_a_service_that_alters_what_it_stores_is_an_error(
    site: Site, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    (site.folder / "buckets" / "bkt").mkdir()
    real = s3napback.FolderStore.fetch

    def fetch(self: s3napback.FolderStore, key: str, into: s3napback.Buffer) -> dict[str, str]:
        metadata = real(self, key, into)
        into.fill(io.BytesIO(bytes(into)[::-1]).readinto)
        return metadata

    monkeypatch.setattr(s3napback.FolderStore, "fetch", fetch)
    assert "came back other than it was stored" in check()["bucket"]["text"]
    monkeypatch.setattr(s3napback.FolderStore, "fetch", real)
    monkeypatch.setattr(
        s3napback.FolderStore, "iter_objects", lambda self, prefix="": iter(())
    )
    assert "is not listed" in check()["bucket"]["text"]


def test_a_probe_that_stays_is_told(
    site: Site, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (site.folder / "buckets" / "bkt").mkdir()
    monkeypatch.setattr(s3napback.FolderStore, "delete", lambda self, keys: None)
    assert s3napback.main(["check", "-c", str(site.write())]) == 1
    assert "could not be deleted: delete it by hand" in capsys.readouterr().out


@pytest.fixture
def between(s3_server: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a layer between us and S3: it may change a request's path, and an answer's headers."""
    real = s3_server._app

    def put(path: Callable[[str], str], header: Callable[[str], str | None]) -> None:
        def app(environ: dict[str, Any], start_response: Any) -> Any:
            def start(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
                kept = [(header(name), value) for name, value in headers]
                return start_response(status, [pair for pair in kept if pair[0]], *rest)

            for name in ("PATH_INFO", "RAW_URI", "REQUEST_URI"):
                environ[name] = path(environ[name])
            return real(environ, start)

        monkeypatch.setattr(s3_server, "_app", app)

    return put


def as_it_is(text: str) -> str:
    return text


def is_mark(name: str) -> bool:
    return name.lower().startswith("x-amz-meta-")


def test_the_first_fault_is_told_not_that_of_the_tidying_up(
    s3_site: Site, s3_server: Any, check: Check
) -> None:
    assert s3_site.run() == 0
    s3_server.fail = lambda method, *_: {
        "PUT": (403, "AccessDenied", "no storing"), "POST": (403, "AccessDenied", "no deleting"),
        "DELETE": (403, "AccessDenied", "no deleting"),
    }.get(method)
    found = check()["bucket"]
    assert "no storing" in found["text"]
    assert "no deleting" not in found["text"]


def test_a_bucket_that_is_absent_and_cannot_be_made(
    s3_site: Site, s3_server: Any, check: Check
) -> None:
    s3_server.fail = lambda method, *_: (403, "AccessDenied", "no") if method == "PUT" else None
    found = check()
    assert found["status"] == 1
    assert "cannot make bucket bkt: AccessDenied" in found["bucket"]["text"]


def test_an_absent_folder_bucket_that_cannot_be_made(site: Site, check: Check) -> None:
    site.settings["S3Endpoint"] = "file:///proc/self/fd"
    found = check()
    assert found["status"] == 1
    assert found["bucket"]["text"].startswith("cannot make the bucket /proc/self/fd/bkt")


def test_an_absent_bucket_is_absent_afterwards(
    s3_site: Site, s3_server: Any, capsys: Capture
) -> None:
    assert s3napback.main(["check", "-c", str(s3_site.write())]) == 0
    assert "bkt is not there; it can be made: the first run makes it" in capsys.readouterr().out
    assert not s3_server.client().list_buckets()["Buckets"]


def test_an_absent_bucket_that_cannot_be_removed_again_is_told(
    s3_site: Site, s3_server: Any, capsys: Capture
) -> None:
    s3_server.fail = lambda method, path, *_: (
        (403, "AccessDenied", "") if method == "DELETE" and path == "/bkt" else None
    )
    assert s3napback.main(["check", "-c", str(s3_site.write())]) == 0
    assert "was not there, and is there now" in capsys.readouterr().out


@pytest.mark.parametrize("safe", ["On", "Off"])
def test_metadata_may_change_its_capitals(
    s3_site: Site, check: Check, between: Callable[..., None], safe: str
) -> None:
    s3_site.settings["SafeReplace"] = safe
    between(as_it_is, lambda name: name.title() if is_mark(name) else name)
    assert check()["status"] == 0


@pytest.mark.parametrize("safe", ["On", "Off"])
def test_a_service_without_metadata_is_an_error(
    s3_site: Site, s3_server: Any, check: Check, between: Callable[..., None], safe: str
) -> None:
    s3_site.settings["SafeReplace"] = safe
    s3_server.client().create_bucket(Bucket="bkt")
    between(as_it_is, lambda name: None if is_mark(name) else name)
    found = check()
    assert found["status"] == 1
    assert "does not keep the metadata" in found["bucket"]["text"]


def test_a_service_that_strips_the_leading_slash_is_an_error(
    s3_site: Site, s3_server: Any, check: Check, between: Callable[..., None]
) -> None:
    s3_server.client().create_bucket(Bucket="bkt")
    between(lambda path: path.replace("/bkt//", "/bkt/").replace("/bkt/%2F", "/bkt/"), as_it_is)
    found = check()
    assert found["status"] == 1
    assert "does not keep keys that begin with a slash" in found["bucket"]["text"]
    assert "Prefix" in found["bucket"]["hint"]
    s3_site.settings["Prefix"] = "web1"
    assert check()["status"] == 0
    assert not s3_server.client().list_objects_v2(Bucket="bkt").get("Contents")


@pytest.mark.parametrize("sign", ["%", "+", "?", "é", " "])
def test_a_service_that_cannot_take_a_letter_is_an_error(
    s3_site: Site, s3_server: Any, check: Check, sign: str
) -> None:
    s3_server.client().create_bucket(Bucket="bkt")
    s3_server.fail = lambda method, path, *_: (
        (400, "InvalidURI", "bad letter") if method == "PUT" and sign in path else None
    )
    found = check()
    assert found["status"] == 1
    assert "InvalidURI, bad letter" in found["bucket"]["text"]


# ---- gpg ----


def test_a_key_that_expires_soon_is_a_warning(
    site: Site, check: Check, gpg_home: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    who = "soon@example.com"
    gpg_home.run("--passphrase", "", "--quick-generate-key", f"Soon <{who}>", "future-default",
                 "default", "20d")
    monkeypatch.setenv("GNUPGHOME", str(gpg_home.home))
    site.settings["GpgRecipient"] = who
    words = ["check", "--json", "-c", str(site.write())]
    assert s3napback.main(words) == 3  # of the real time, as gpg's
    site.settings["GpgRecipient"] = gpg_home.recipient
    assert check()["GpgRecipient"]["level"] == "ok"


def test_a_recipient_may_be_a_group_of_gpgs_config(
    site: Site, check: Check, gpg_home: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = site.folder / "gnupg"
    shutil.copytree(gpg_home.home, home, ignore=shutil.ignore_patterns("S.*"))
    (home / "gpg.conf").write_text(f"group all = {gpg_home.recipient}\n")
    monkeypatch.setenv("GNUPGHOME", str(home))
    site.settings["GpgRecipient"] = "all"
    assert check()["GpgRecipient"]["text"] == "gpg encrypts for all"


def test_a_gpg_that_does_not_encrypt_is_an_error(
    site: Site, check: Check, gpg_home: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GNUPGHOME", str(gpg_home.home))
    site.settings["GpgRecipient"] = gpg_home.recipient
    fake_tool(site, monkeypatch, "gpg", '[ -p /dev/stdin ] || exec "$REAL" "$@"; cat')
    assert "gpg does not encrypt" in check()["GpgRecipient"]["text"]


# ---- sources ----


def test_databases_and_repositories_are_asked(
    site: Site, check: Check, mariadb: Any, postgres: Any, svn_repo_factory: Any
) -> None:
    (site.folder / "repos").mkdir()
    repository = svn_repo_factory(site.folder / "repos" / "one", 2)
    (site.folder / "empty").mkdir()
    site.jobs = (
        f"MySQL {mariadb.socket}:mysql\nMySQL {mariadb.socket}:absent\n"
        f"PostgreSQL {postgres.user}@postgres\nPostgreSQL {postgres.user}@absent\n"
        f"Subversion {repository}\nSubversion /absent\nSubversionDir {site.folder}/repos\n"
        f"SubversionDir {site.folder}/empty\nSubversionDir /absent"
    )
    os.environ.update(postgres.env)
    try:
        found = check()
    finally:
        for name in postgres.env:
            del os.environ[name]
    levels = {subject: one["level"] for subject, one in found.items() if subject != "status"}
    assert levels[f"MySQL {mariadb.socket}:mysql"] == "ok"
    assert levels[f"MySQL {mariadb.socket}:absent"] == "error"
    assert levels[f"PostgreSQL {postgres.user}@postgres"] == "ok"
    assert levels[f"PostgreSQL {postgres.user}@absent"] == "error"
    assert found[f"Subversion {repository}"]["text"] == "answers, at revision 2"
    assert levels["Subversion /absent"] == levels["SubversionDir /absent"] == "error"
    assert levels[f"SubversionDir {site.folder}/empty"] == "warning"


def test_a_database_that_hangs_is_not_waited_for(
    site: Site, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_tool("mysqldump")
    fake_tool(site, monkeypatch, "mysqldump", "exec sleep 30")
    monkeypatch.setattr(s3napback, "_DUMP_TIMEOUT", 0.2)
    site.jobs = "MySQL shop"
    assert "does not answer within" in check()["MySQL shop"]["text"]


# ---- New Year ----


def test_a_plan_that_loses_at_new_year_is_told(site: Site, check: Check) -> None:
    site.jobs = f"<Directory {site.data}>\nFulls 2\nDiffs 20\n</Directory>\n"
    found = check()
    assert "at New Year the rotation starts anew" in found[f"Directory {site.data}"]["text"]
    site.jobs = f"<Directory {site.data}>\nFrequency 0\n</Directory>\n"
    assert check()["status"] == 1


def test_a_log_that_cannot_be_written_is_told(
    site: Site, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "log4perl.rootLogger = INFO, F\nlog4perl.appender.F = Log::Log4perl::Appender::File\n"
        "log4perl.appender.F.filename = /nowhere/x.log\n"
        "log4perl.appender.F.layout = Log::Log4perl::Layout::SimpleLayout\n"
    )
    monkeypatch.setattr(
        s3napback, "read_logconfig", lambda: s3napback.LogConfig(text, "my.logconfig")
    )
    found = check()
    assert "/nowhere/x.log" in found["log"]["text"]
    assert found["status"] == 3


def test_a_fault_of_the_program_ends_no_other_check(
    site: Site, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3napback.FolderStore, "exists", lambda self: 1 / 0)
    found = check()
    assert found["status"] == 1
    assert "a fault of this program: ZeroDivisionError" in found["bucket"]["text"]
    assert found[f"Directory {site.data}"]["level"] == "ok"


def test_check_leaves_the_log_as_it_is(
    site: Site, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = site.folder / "x.log"
    file.write_text("last night's\n")
    text = (
        "log4perl.rootLogger = INFO, F\nlog4perl.appender.F = Log::Log4perl::Appender::File\n"
        f"log4perl.appender.F.filename = {file}\nlog4perl.appender.F.mode = write\n"
        "log4perl.appender.F.header_text = of tonight\n"
    )
    monkeypatch.setattr(s3napback, "read_logconfig", lambda: s3napback.LogConfig(text, "x"))
    assert check()["log"]["level"] == "ok"
    assert file.read_text() == "last night's\n"


def test_a_filter_of_the_log_that_is_not_understood(
    site: Site, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "log4perl.rootLogger = INFO, S\nlog4perl.appender.S = Log::Dispatch::Screen\n"
        "log4perl.appender.S.Filter = F\nlog4perl.filter.F = Log::Log4perl::Filter::StringMatch\n"
        "log4perl.filter.F.StringToMatch = x\n"
    )
    monkeypatch.setattr(
        s3napback, "read_logconfig", lambda: s3napback.LogConfig(text, "my.logconfig")
    )
    found = check()
    assert found["status"] == 3
    assert found["log"]["text"].startswith("my.logconfig:4: filter class Log::Log4perl::Filter::St")


@pytest.mark.parametrize(
    ("zone", "known"),
    [("Nowhere/Land", False), (":%%", False), ("Europe/Berlin", True), (":Europe/Berlin", True),
     ("CET-1CEST,M3.5.0,M10.5.0/3", True), ("<+0330>-3:30", True), ("", True)],
)
def test_a_time_zone_that_is_not_known_is_told(
    site: Site, check: Check, monkeypatch: pytest.MonkeyPatch, zone: str, known: bool
) -> None:
    monkeypatch.setenv("TZ", zone)
    assert ("TZ" in check()) != known


def test_numbers_that_make_no_rotation_are_told_by_check(site: Site, capsys: Capture) -> None:
    site.jobs = f"<Directory {site.data}>\nFulls 1e308\nDiffs 1e308\n</Directory>"
    assert s3napback.main(["check", "-c", str(site.write())]) == 1
    assert "make" in capsys.readouterr().out


def test_a_database_without_its_tool_is_told(
    site: Site, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(site.folder))
    site.jobs = "MySQL shop"
    assert s3napback.main(["check", "-c", str(site.write())]) == 1
    said = capsys.readouterr().out
    assert "error    MySQL shop: mysqldump is not on PATH" in said


def test_a_directive_with_a_typo_is_told_where_the_right_one_is_missing(
    tmp_path: Path, capsys: Capture
) -> None:
    conf = tmp_path / "typo.conf"
    conf.write_text(f"DiffDir {tmp_path}\nChunkSize 1000\nBuckett x\nDirectory /etc\n")
    assert s3napback.main(["check", "-c", str(conf)], now=NIGHT) == 1
    told = capsys.readouterr().out
    assert f'warning  config: {conf}:3: unknown directive "Buckett" (did you mean Bucket?)' in told
    assert "Bucket must be defined: write Bucket NAME" in told


def test_the_servers_of_pings_are_asked_for_no_more_than_whether_they_answer(
    site: Site, check: Check, watcher: Healthchecks, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.settings["PingURL"] = f"{watcher.url}/5f3c-secret {watcher.url}/p?status=%s"
    found = check()
    assert (found["status"], found["PingURL"]["level"]) == (0, "ok")
    assert found["PingURL"]["text"] == f"{watcher.url[7:]} answers"
    assert watcher.requests == ["HEAD /"] * 2  # whatever is asked of the URL itself is a signal
    watcher.behaviour = "500"
    assert check()["PingURL"]["level"] == "ok"
    watcher.behaviour = "dead"
    monkeypatch.setattr(s3napback, "_WATCH_TIMEOUT", 0.2)
    found = check()
    assert (found["status"], found["PingURL"]["level"]) == (3, "warning")
    assert found["PingURL"]["text"].startswith(f"{watcher.url[7:]} does not answer: ")
    watcher.stop()
    assert "Connection refused" in check()["PingURL"]["text"]
    assert not watcher.pings


@pytest.mark.parametrize(
    ("mode", "name", "text"),
    [
        (0o755, "x.prom", ""),
        (0o750, "x.prom", ""),
        (0o777, "x.prom", "{folder} can be written by everybody"),
        (0o1777, "x.prom", "{folder} can be written by everybody"),
        (0o700, "x.prom", "{folder} is closed to node_exporter"),
        (0o755, "x.txt", "{folder}/x.txt: node_exporter reads no file but *.prom"),
    ],
)
def test_the_folder_of_the_metrics_is_open_to_whom_it_may_concern(
    site: Site, check: Check, mode: int, name: str, text: str
) -> None:
    folder = site.folder / "prom"
    folder.mkdir()
    folder.chmod(mode)
    site.settings["MetricsFile"] = f"{folder}/{name}"
    found = check()
    assert found["status"] == (3 if text else 0)
    wanted = text.format(folder=folder) or f"{folder} can be written, "
    assert found["MetricsFile"]["text"].startswith(wanted)
    assert not os.listdir(folder)


def test_a_folder_of_the_metrics_that_is_not_there_is_an_error(site: Site, check: Check) -> None:
    site.settings["MetricsFile"] = f"{site.folder}/absent/x.prom"
    found = check()
    assert found["status"] == 1
    assert "my.conf:7: MetricsFile " in found["config"]["text"]
    assert found["config"]["hint"] == f"run: mkdir {site.folder}/absent"
