"""Services that speak S3 in their own way, and the libraries that speak it for us."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import Site

import s3napback
from s3napback import Access


@pytest.fixture
def service(s3_server: Any) -> s3napback.S3Store:
    """The S3 server with the bucket of `Site`."""
    access = Access(s3_server.endpoint, "us-east-1", s3_server.key, s3_server.secret)
    store = s3napback.S3Store("bkt", access)
    store.create()
    return store


# ---- boto3 ----


def test_service_models_of_ones_own_do_no_harm(
    s3_site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.setenv("AWS_DATA_PATH", str(tmp_path / "models"))
    assert s3_site.run() == 0
    assert all(archive.complete for archive in s3_site.archives().values())


def test_no_upload_waits_for_leave(s3_server: Any, service: s3napback.S3Store) -> None:
    """Without `Expect: 100-continue`, which many services never answer: a second each time."""
    service.put("k", b"x" * 2_000_000, {})
    assert ("PUT", "/bkt/k") in s3_server.requests
    assert not any("expect" in headers for headers in s3_server.headers)
