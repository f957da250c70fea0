"""What is broken around a run is one sentence and the right status, never a traceback."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Site, leave_out, require_tool

import s3napback

pytestmark = pytest.mark.slow

# {script}, {conf}, {folder}: what their names say. Each line is one surrounding: the command of a
# shell, the exit status, and what the last line says.
SURROUNDINGS = {
    "closed input": ("{script} -c {conf} <&-", 0, "Finished: 1 stored"),
    "closed output": ("{script} -c {conf} >&-", 0, "Finished: 1 stored"),
    "closed errors": ("{script} -c {conf} 2>&-", 0, ""),
    "all closed": ("{script} -c {conf} <&- >&- 2>&-", 0, ""),
    "check, all closed": ("{script} check -c {conf} <&- >&- 2>&-", 0, ""),
    "list, output closed": ("{script} list -c {conf} >&-", 1, "bucket bkt does not exist"),
    "demo, output closed": ("{script} demo >&-", 2, "standard output is closed"),
    "a full output": ("{script} check -c {conf} >/dev/full", 1, "No space left on device"),
    "no HOME": ("env -u HOME {script} -c {conf}", 0, "Finished: 1 stored"),
    "an absent HOME": ("HOME=/absent {script} -c {conf}", 0, "Finished: 1 stored"),
    "an odd TZ": ("TZ=Nowhere/Land {script} -c {conf}", 0, "Finished: 1 stored"),
    "a TZ of signs": ("TZ=:%% {script} -c {conf}", 0, "Finished: 1 stored"),
    "no locale": ("env -u LANG -u LC_ALL {script} -c {conf}", 0, "Finished: 1 stored"),
    "LC_ALL=C": ("LC_ALL=C {script} -c {conf}", 0, "Finished: 1 stored"),
    "an absent locale": ("LC_ALL=xx_YY.UTF-8 {script} -c {conf}", 0, "Finished: 1 stored"),
    "nothing at all": ("env -i {script} -c {conf}", 0, "Finished: 1 stored"),
    "no PATH": ("PATH= {script} -c {conf}", 1, "0 stored, 0 skipped, 1 failed"),
    "an absent TMPDIR": ("TMPDIR=/absent {script} -c {conf}", 0, "Finished: 1 stored"),
    "AWS_DATA_PATH": ("AWS_DATA_PATH=/absent {script} -c {conf}", 0, "Finished: 1 stored"),
    "a folder that is gone": ("mkdir {folder}/gone; cd {folder}/gone; rmdir {folder}/gone;"
                              " {script} -c {conf}", 0, "Finished: 1 stored"),
    "umask 0": ("umask 0; {script} -c {conf}", 0, "Finished: 1 stored"),
    "umask 777": ("umask 777; {script} -c {conf}", 0, "Finished: 1 stored"),
    "few open files": ("ulimit -n 20; {script} -c {conf}", 0, "Finished: 1 stored"),
    "too few open files": ("ulimit -n 10; {script} -c {conf}", 1, "1 failed"),
    "a config that is a folder": ("{script} -c {folder}", 2, "Is a directory (-c takes a config"),
    "a config that is absent": ("{script} -c {folder}/no", 2, "or directory (-c takes a config"),
    "a config of zeros": ("{script} -c /dev/zero", 2, "is this a config file?"),
}


@pytest.fixture
def script(site: Site, compiled: Path) -> str:
    """The words that start the program: it finds no logconfig, so that the log is on the screen."""
    shutil.copytree(compiled, site.folder, dirs_exist_ok=True)
    return f"{sys.executable} {site.folder}/run"


def call(
    site: Site, script: str, line: str, ordinary: bool = False
) -> subprocess.CompletedProcess[str]:
    """Runs the line. ordinary: without what root may and others may not."""
    drop = [require_tool("setpriv"), "--bounding-set=-all", "--inh-caps=-all"]
    words = drop if ordinary and os.geteuid() == 0 else []
    env = {"PATH": "/usr/bin:/bin", "HOME": str(site.folder), "LANG": "C.UTF-8"}
    line = line.format(script=script, conf=site.write(), folder=site.folder)
    done = subprocess.run([*words, "bash", "-c", line], env=env, capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    assert "Exception" not in done.stderr
    return done


@pytest.mark.parametrize(
    ("line", "status", "said"), SURROUNDINGS.values(), ids=[*SURROUNDINGS]
)
def test_what_is_broken_around_a_run_is_one_sentence(
    line: str, status: int, said: str, site: Site, script: str
) -> None:
    (site.data / "żółć").write_text("outside ASCII")
    done = call(site, script, line)
    assert done.returncode == status, done.stderr
    assert said in (done.stderr.splitlines() or [""])[-1], done.stderr
    if status == 0 and "check" not in line:
        assert s3napback.main(["verify", "--deep", "-c", str(site.conf)]) == 0
        for file in (site.folder / "diffs").iterdir():
            assert not file.stat().st_mode & 0o077, f"{file.name} can be read by others"


@pytest.mark.parametrize("words", ["", "check", "list", "verify --deep"])
def test_without_a_folder_for_temporary_files_it_says_so(
    words: str, site: Site, script: str
) -> None:
    if os.geteuid():
        leave_out("mounting needs root")
    require_tool("unshare")
    assert site.run("-f") == 0
    mount = "mount -t tmpfs -o ro tmpfs /var/tmp; mount --bind /tmp /tmp; cd /proc;" \
        " mount -o remount,bind,ro /tmp; mount --bind {folder} {folder} &&" \
        " mount -o remount,bind,rw {folder};"
    force = "-f" if words == "" else ""
    words_of_all = f"{{script}} {words} -c {{conf}} {force}"
    done = call(site, script, f"unshare -m bash -c '{mount} {words_of_all}'")
    if words == "list":
        assert done.returncode == 0
    else:
        assert done.returncode == 1
        said = done.stdout + done.stderr
        assert "No usable temporary directory found in ['/tmp', '/var/tmp'," in said
        assert "set TMPDIR in the crontab" in said
        assert "not on PATH" not in said


RIGHTS = {
    "an unreadable config": ("chmod 0 {conf}", 2, 2,
                             "Permission denied (make it readable for the user that runs this)"),
    "an unreadable folder of configs": ("chmod 0 {folder}/etc", 2, 2, "Permission denied"),
    "a DiffDir that cannot be written": ("chmod 500 {folder}/diffs", 2, 0, "cannot write in Diff"),
    "a DiffDir that cannot be read": ("chmod 0 {folder}/diffs", 1, 0, "cannot open DiffDir"),
    "a closed bucket": ("chmod 0 {folder}/buckets/bkt", 1, 1, "Permission denied"),
    "a bucket that cannot be written": ("chmod 500 {folder}/buckets/bkt", 1, 0, "Permission de"),
    "closed buckets": ("chmod 0 {folder}/buckets", 1, 1, "Permission denied"),
    "a TempDir that cannot be written": ("chmod 500 {folder}/temp", 1, 0, "write in TempDir"),
    "a log that cannot be written": ("chmod 0 {folder}/log/x.log", 0, 0, "cannot write log file"),
    "a logconfig that cannot be read": ("chmod 0 {folder}/s3napback.logconfig", 0, 0,
                                        "cannot read {folder}/s3napback.logconfig"),
}


@pytest.mark.parametrize("what", [*RIGHTS])
def test_rights_that_an_ordinary_user_lacks_are_told(what: str, site: Site, script: str) -> None:
    change, status, status_of_list, said = RIGHTS[what]
    site.jobs = f"<Directory {site.data}>\nUseTempFile On\n</Directory>"
    (site.folder / "log").mkdir()
    (site.folder / "s3napback.logconfig").write_text(
        "log4perl.rootLogger = INFO, F, S\n"
        "log4perl.appender.S = Log::Log4perl::Appender::Screen\n"
        "log4perl.appender.F = Log::Log4perl::Appender::File\n"
        f"log4perl.appender.F.filename = {site.folder}/log/x.log\n"
    )
    (site.folder / "log" / "x.log").touch()
    assert site.run() == 0
    (site.folder / "etc").mkdir()
    shutil.copy(site.conf, site.folder / "etc")
    line = "{script} WORDS -c {folder}/" + ("etc/" if "etc" in change else "") + "my.conf"
    try:
        call(site, script, change)
        done = call(site, script, line.replace("WORDS", "-f"), ordinary=True)
        assert done.returncode == status, done.stderr
        assert said.format(folder=site.folder) in done.stderr
        done = call(site, script, line.replace("WORDS", "list"), ordinary=True)
        assert done.returncode == status_of_list, done.stderr
        done = call(site, script, line.replace("WORDS", "check"), ordinary=True)
        assert done.returncode == (1 if status else 3), done.stdout
    finally:
        call(site, script, "chmod -R u+rwX {folder}")


@pytest.mark.parametrize("folder", ["absent", "empty", "others"])
def test_models_of_awss_own_are_looked_for_in_vain(
    folder: str, s3_site: Site, s3_server: Any, script: str
) -> None:
    """AWS_DATA_PATH: where the libraries of AWS look for descriptions of services."""
    if folder != "absent":
        (s3_site.folder / folder).mkdir()
    if folder == "others":
        (s3_site.folder / folder / "s3").mkdir()
    line = f"AWS_DATA_PATH={s3_site.folder}/{folder} {{script}} WORDS -c {{conf}}"
    for words in ("", "check", "list", "verify --deep") if folder == "others" else ("",):
        done = call(s3_site, script, line.replace("WORDS", words))
        assert done.returncode == 0, done.stdout + done.stderr
