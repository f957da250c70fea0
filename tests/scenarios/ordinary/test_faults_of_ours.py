"""A fault of the program itself is one job's."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from conftest import NIGHT, Capture, Site

import s3napback


def two_jobs(site: Site) -> None:
    (site.folder / "other").mkdir()
    (site.folder / "other" / "file").write_text("other")
    site.jobs = f"Directory {site.data}\nDirectory {site.folder}/other"


@pytest.mark.parametrize("place", ["tar_stage", "archive_objects", "archive_name"])
def test_a_fault_in_one_job_is_logged_and_the_next_one_runs(
    site: Site, place: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    two_jobs(site)
    assert site.run() == 0
    real = getattr(s3napback, place)

    def fault(*given: Any, **named: Any) -> Any:
        if any(str(site.data) in str(one) for one in given):
            raise ZeroDivisionError("of ours")
        return real(*given, **named)

    monkeypatch.setattr(s3napback, place, fault)
    assert site.run(now=NIGHT + timedelta(days=1)) == 1
    said = capsys.readouterr().err
    assert "failed, by a fault of this program: ZeroDivisionError: of ours" in said
    assert "Traceback (most recent call last)" in said and "in fault" in said
    assert "1 stored, 0 skipped, 1 failed" in said
