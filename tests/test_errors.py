"""Errors: what goes wrong is a sentence that says what is missing."""

import errno
import os
import sys
from collections.abc import Callable
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
