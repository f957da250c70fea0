"""A Subversion repository that is another one than last night's, at the same path."""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path

import pytest
from conftest import NIGHT, Capture, Site, require_tool, run

import s3napback


def made(path: Path, revisions: int, text: str) -> Path:
    """A repository whose every revision adds a file with the text."""
    shutil.rmtree(path, ignore_errors=True)
    run([require_tool("svnadmin"), "create", str(path)])
    commits(path, 1, revisions, text)
    return path


def commits(path: Path, first: int, last: int, text: str) -> None:
    for n in range(first, last + 1):
        put = ["-m", f"{text} {n}", "--", "put", "-", f"file{n}"]
        run([require_tool("svnmucc"), "--non-interactive", "-U", path.as_uri(), *put], stdin=text)


def contents(path: Path, revisions: int) -> list[str]:
    return [run(["svnlook", "cat", str(path), f"file{n}"]) for n in range(1, revisions + 1)]


@pytest.fixture
def repository(site: Site) -> Path:
    repository = made(site.folder / "repository", 3, "old")
    site.jobs = f"Subversion {repository}"
    assert site.run() == 0
    return repository


@pytest.mark.parametrize("revisions", [2, 3, 5])
def test_another_repository_at_the_path_is_stored_whole(
    revisions: int, site: Site, repository: Path, capsys: Capture
) -> None:
    """With fewer revisions, as many, or more: its revisions do not continue the old ones."""
    made(repository, revisions, "new")
    assert site.run(now=NIGHT + timedelta(days=1)) == 0
    assert "was replaced" in capsys.readouterr().err
    back = site.folder / "back"
    words = ["restore", "-c", str(site.conf), str(repository), "--to", str(back)]
    assert site_main(*words) == 0
    assert contents(back, revisions) == ["new"] * revisions


def test_a_repository_that_was_set_back_is_stored_whole(site: Site, repository: Path) -> None:
    """Brought back from an older copy, it has the same UUID, and lived on."""
    older = site.folder / "older"
    shutil.copytree(repository, older)
    commits(repository, 4, 5, "lost")
    assert site.run(now=NIGHT + timedelta(days=1)) == 0
    shutil.rmtree(repository)
    older.rename(repository)
    commits(repository, 4, 6, "lives on")
    assert site.run(now=NIGHT + timedelta(days=2)) == 0
    commits(repository, 7, 7, "and on")
    assert site.run(now=NIGHT + timedelta(days=3)) == 0
    back = site.folder / "back"
    assert site_main("restore", "-c", str(site.conf), str(repository), "--to", str(back)) == 0
    assert contents(back, 7) == ["old"] * 3 + ["lives on"] * 3 + ["and on"]


def site_main(*words: str) -> int:
    return s3napback.main(list(words), now=NIGHT + timedelta(days=9))
