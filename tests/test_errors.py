"""Errors: what goes wrong is a sentence that says what is missing."""

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
