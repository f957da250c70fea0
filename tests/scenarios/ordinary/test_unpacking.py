"""What a restore brings back of a directory or a repository, and what it says of the rest."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import Site, leave_out, require_tool

import s3napback


def restore(site: Site, name: str, place: Path, *words: str) -> int:
    return s3napback.main(["restore", "-c", str(site.write()), name, "--to", str(place), *words])


def script_of(site: Site, name: str, capfdbinary: Any) -> Path:
    """The restore script of a name."""
    capfdbinary.readouterr()
    assert s3napback.main(["restore-script", "-c", str(site.write()), name]) == 0
    script = site.folder / "restore.sh"
    script.write_bytes(capfdbinary.readouterr().out)
    return script


@pytest.mark.parametrize("by", ["restore", "restore-script"])
def test_capabilities_and_other_attributes_come_back(
    site: Site, by: str, capfdbinary: Any
) -> None:
    if os.geteuid():
        leave_out("capabilities need root")
    setcap, setfattr = require_tool("setcap"), require_tool("setfattr")
    tool = site.data / "tool"
    tool.write_bytes(b"x")
    subprocess.run([setcap, "cap_net_raw+ep", tool], check=True)
    subprocess.run([setfattr, "-n", "trusted.note", "-v", "x", site.data], check=True)
    assert site.run() == 0
    place = site.folder / "back"
    if by == "restore":
        assert restore(site, str(site.data), place) == 0
    else:
        script = script_of(site, str(site.data), capfdbinary)
        subprocess.run(["sh", script, place], check=True)
    for path, name in ((tool, "security.capability"), (site.data, "trusted.note")):
        assert os.getxattr(f"{place}{path}", name) == os.getxattr(path, name)


@pytest.mark.parametrize("by", ["restore", "restore-script"])
def test_a_log_message_with_a_carriage_return_is_loaded(
    site: Site, by: str, capfdbinary: Any, svn_repo_factory: Any
) -> None:
    repo = svn_repo_factory(site.folder / "repo", 1)
    revision = repo / "db" / "revprops" / "0" / "1"
    revision.chmod(0o644)
    message = revision.read_bytes().replace(b"V 8\ncommit 1", b"V 8\nco\rmit 1")
    assert b"\r" in message
    revision.write_bytes(message)
    site.jobs = f"Subversion {repo}"
    assert site.run() == 0
    place = site.folder / "again"
    if by == "restore":
        assert restore(site, str(repo), place) == 0
    else:
        script = script_of(site, str(repo), capfdbinary)
        subprocess.run(["sh", script, place], check=True)
    log = subprocess.run(["svnlook", "log", place, "-r", "1"], capture_output=True, check=True)
    assert log.stdout.startswith(b"co")
