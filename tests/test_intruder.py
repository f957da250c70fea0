"""Whoever may write to the bucket: what they put there ends in a sentence, and in `--to`.

test_hostile.py has the archives, keys and metadata of one attack each; here are those that need
two archives, numbers of thousands of digits, and a folder bucket that others write in.
"""

import gzip
import io
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import NIGHT, Site, require_tool

import s3napback
from s3napback import META, Failure, Found

DIGITS = "9" * 5000  # int() takes 4300 (Python's limit for conversions from text)


# ---- numbers ----


@pytest.mark.parametrize("key", [f"a-0-FULL:{DIGITS}", f"a-0-FULL:{'9' * 21}"])
def test_a_number_of_any_length_makes_a_foreign_key(key: str) -> None:
    assert s3napback.parse_chunk_key(key) is None


@pytest.mark.parametrize("name", [f"a-{DIGITS}-FULL", f"a--{DIGITS}-DIFF", f"MySQL/a-{DIGITS}"])
def test_a_slot_of_any_length_makes_a_foreign_name(name: str) -> None:
    assert s3napback.parse_archive_name(name) is None


@pytest.mark.parametrize("number", ["²", "٣", DIGITS, "-1", " 1"])
def test_a_revision_that_is_none_is_followed_by_nothing(number: str) -> None:
    def one(made: float, mode: str, before: str, after: str) -> Found:
        return Found(f"/svn-{made}", "Subversion", "/svn", 0, mode, made, 1, 1, "", before, after)

    found = [one(1.0, "FULL", "0", "4"), one(2.0, "DIFF", number, "9")]
    with pytest.raises(Failure, match="continues an archive that is no longer there"):
        s3napback.choose_chain(found, 3.0)


@pytest.mark.parametrize("words", [["-z", DIGITS], ["--parallel", DIGITS]])
def test_an_option_of_any_length(
    words: list[str], site: Site, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x")))
    place = ["-b", "bkt:a", "--endpoint", site.settings["S3Endpoint"]]
    assert s3napback.main(["js3tream", "-i", *words, *place]) == 2
    assert "is not a whole number from 1 to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("archive", "kind", "shown"),
    [
        ("/x-0-FULL", "Directory", "Directory"), ("/x-0-FULL", "Subversion", "Subversion"),
        ("/x-0-FULL", "Everything is fine", None), ("/x-0-FULL", "MySQL", None),
        ("MySQL/x-0", "Directory", "MySQL"), ("PostgreSQL/x-0", "MySQL", "PostgreSQL"),
    ],
)
def test_a_kind_is_one_that_fits_the_name(
    site: Site, archive: str, kind: str, shown: str | None
) -> None:
    store = site.store()
    store.create()
    store.put(f"{archive}:0000000000000", b"x", {f"{META}chunks": "1", f"{META}kind": kind})
    ((_, found),) = s3napback.catalogue(store)
    assert found.kind == shown
