"""Errors: what goes wrong is a sentence that says what is missing."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import NIGHT, NOWHERE, Site

import s3napback
from s3napback import Failure, Moment


@pytest.mark.parametrize(
    ("library", "use"),
    [
        ("apacheconfig", lambda site: s3napback.read_config(str(site.write()))),
        ("gnupg", lambda site: s3napback._public_keys("x", None, os.environ)),
        ("boto3", lambda site: s3napback.S3Store("bkt", NOWHERE).exists()),
        ("botocore", lambda site: s3napback.S3Store("bkt", NOWHERE).exists()),
        ("dateutil", lambda site: s3napback.parse_when("2026-11-20", Moment.of(NIGHT))),
    ],
)
def test_a_library_that_is_missing_is_named(
    site: Site, library: str, use: Callable[[Site], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n == library or n.startswith(f"{library}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(Failure, match=f"the Python library {library}.* is missing") as failure:
        use(site)
    assert "pip install -r" in failure.value.hint


def pretend(folder: Path, name: str, version: str) -> None:
    """A folder in which Python finds this release of a library."""
    marks = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    marks.mkdir(parents=True)
    (marks / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def call_with(site: Site, name: str, version: str, *words: str) -> tuple[int, str]:
    """The status and the output of the script, by a Python with this release of a library."""
    pretend(site.folder / "old", name, version)
    shutil.copy(s3napback.__file__, site.folder)
    done = subprocess.run([sys.executable, f"{site.folder}/s3napback.py", *words], text=True,
                          env={**os.environ, "PYTHONPATH": f"{site.folder}/old"},
                          capture_output=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "version"),
    [("boto3", "1.26.27"), ("apacheconfig", "0.3.1"), ("python-dateutil", "2.8.1"),
     ("python-gnupg", "0.4.9"), ("tqdm", "4.9.1")],
)
def test_a_library_that_is_too_old_is_named_with_what_is_needed(
    name: str, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(tmp_path, name, version)
    monkeypatch.syspath_prepend(str(tmp_path))
    s3napback.library_fault.cache_clear()
    with pytest.raises(Failure, match=f"library {name} {version} is older than ") as caught:
        s3napback.library(name).__enter__()
    s3napback.library_fault.cache_clear()
    assert caught.value.status == 2 and "pip install -r" in caught.value.hint


def test_an_old_library_is_a_sentence_and_not_a_traceback(site: Site) -> None:
    status, said = call_with(site, "boto3", "1.37.9", "list", "-b", "bkt",
                             "--endpoint", "http://127.0.0.1:1")
    assert status == 2
    assert said.startswith("s3napback: the Python library boto3 1.37.9 is older than 1.39 (run: ")
    assert said.count("\n") == 1


def test_where_a_library_is_too_old_the_venv_beside_the_script_is_taken(site: Site) -> None:
    python = site.folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho it runs in the .venv: $*\n")
    python.chmod(0o755)
    said = call_with(site, "tqdm", "4.9.1", "list", "-b", "bkt")
    assert said == (0, f"it runs in the .venv: {site.folder}/s3napback.py list -b bkt\n")


def test_another_library_in_the_place_of_one_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyPI's gnupg, whose name is the module of python-gnupg, takes other words."""
    (tmp_path / "gnupg.py").write_text("class GPG:\n    def __init__(self, binary=None): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "gnupg", raising=False)
    with pytest.raises(Failure, match=r"python-gnupg cannot be used: .* argument 'gpgbinary'"):
        s3napback._public_keys("x", None, os.environ)
    del sys.modules["gnupg"]


def test_the_releases_that_are_asked_for_are_those_of_requirements_txt() -> None:
    lines = (Path(s3napback.__file__).parent / "requirements.txt").read_text().splitlines()
    asked = dict(line.split(">=") for line in lines if not line.startswith("#"))
    assert asked == s3napback.LIBRARIES


@pytest.mark.parametrize(
    ("doing", "error", "said"),
    [
        ("read it", OSError(errno.EACCES, "Permission denied", "/x"),
         "cannot read it: /x: Permission denied"),
        ("read /x", OSError(errno.EACCES, "Permission denied", "/x"),
         "cannot read /x: Permission denied"),
        ("write it", OSError("odd"), "cannot write it: odd"),
        ("write it", OSError(errno.ENOSPC, "No space left on device", b"/x"),
         "cannot write it: /x: No space left on device (free some room there)"),
    ],
)
def test_an_error_of_the_system_names_its_file_once(doing: str, error: OSError, said: str) -> None:
    with pytest.raises(Failure) as caught, s3napback.os_failures(doing, status=2):
        raise error
    assert str(caught.value) == said
    assert caught.value.status == 2
    assert caught.value.__cause__ is error


def test_a_place_is_given_to_a_copy_which_is_the_same_kind_of_failure() -> None:
    failure = s3napback.TransientFailure("busy", "wait", status=7)
    failure.code = "SlowDown"
    with pytest.raises(s3napback.TransientFailure) as caught, s3napback.failures_at("here"):
        raise failure
    copied = caught.value
    assert (str(copied), copied.status, copied.code) == ("here: busy (wait)", 7, "SlowDown")
    assert str(failure) == "busy (wait)"
    assert str(copied.at(hint="run")) == "here: busy (run)"
    with pytest.raises(Failure, match="here: busy"), s3napback.failures_at("there"):
        raise copied  # it keeps the place that it has
    refused = s3napback.UsageFailure("no", where="x")
    assert (refused.at("y").status, str(refused.at("y"))) == (2, "y: no")
