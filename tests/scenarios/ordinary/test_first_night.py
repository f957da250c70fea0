"""The first night after the Perl script: its diff files moved on, its uploads failed.

The recorded bucket of day 4, then nights of real `tar -g` that uploaded nothing, then the port.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from conftest import GOLDEN, NIGHT, Capture, Site, leave_out, run

import s3napback

pytestmark = pytest.mark.slow

RECORDED = GOLDEN / "perl-archives" / "plain-day4"
ROOT = "/tmp/perlrun"  # where the recorded machine had its things
DAY = datetime(2025, 1, 1, 4, 0, tzinfo=timezone.utc)  # day 0 of the recordings

CONF = """\
DiffDir {root}/diffs
Bucket oracle.plain
ChunkSize 20000
S3Endpoint file://{root}/buckets
RetryHours 0
<Directory {root}/src/tree>
Diffs 2
Fulls 2
</Directory>
<Directory {root}/src/han>
CycleType HanoiCycle
Discs 3
</Directory>
<Subversion {root}/svn/proj>
Diffs 2
Fulls 2
</Subversion>
"""


class Machine:
    """The recorded machine, with its folders at their place in a mount namespace of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("diffs", "buckets", "src/tree", "src/han", "svn"):
            (folder / name).mkdir(parents=True)
        (folder / "conf").write_text(CONF.format(root=ROOT))
        bucket = folder / "buckets" / "oracle.plain"
        shutil.copytree(RECORDED / "objects" / "oracle.plain", bucket)
        index = json.loads((RECORDED / "index.json").read_text())
        for entry in index["buckets"]["oracle.plain"]["objects"].values():
            at = datetime.fromisoformat(entry["last_modified"].replace("Z", "+00:00")).timestamp()
            os.utime(bucket / entry["file"], (at, at))
        for path in (RECORDED / "diffs").iterdir():
            shutil.copy(path, folder / "diffs")
        for name in ("src/tree", "src/han", "svn/proj"):
            self.restore(name)
            if name.startswith("src"):
                back = folder / "back" / ROOT[1:] / name
                (folder / name).rmdir()
                back.rename(folder / name)
                shutil.rmtree(folder / "back")
            else:
                (folder / "back").rename(folder / name)

    def restore(self, name: str) -> Path:
        back = self.folder / "back"
        shutil.rmtree(back, ignore_errors=True)
        endpoint = f"file://{self.folder}/buckets"
        words = ["restore", "-b", "oracle.plain", "--endpoint", endpoint, f"{ROOT}/{name}"]
        assert s3napback.main([*words, "--to", str(back)]) == 0
        return back

    def inside(self, *argv: str) -> subprocess.CompletedProcess[str]:
        script = f'mkdir -p {ROOT} && mount --bind "$0" {ROOT} && exec "$@"'
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", script, str(self.folder), *argv],
            capture_output=True, text=True, env={**os.environ, "TZ": "UTC"},
        )
        if "unshare failed" in done.stderr or "permission denied" in done.stderr:
            leave_out("a mount namespace needs root")
        return done

    def port(self, now: datetime, *words: str) -> subprocess.CompletedProcess[str]:
        code = (
            "import sys; from datetime import datetime; import s3napback;"
            "sys.exit(s3napback.main(sys.argv[2:], now=datetime.fromisoformat(sys.argv[1])))"
        )
        return self.inside("env", f"PYTHONPATH={Path(s3napback.__file__).parent}", sys.executable,
                           "-c", code, now.isoformat(), *words, "-c", f"{ROOT}/conf")

    def perl_night(self, at: datetime, n: int) -> None:
        """What the script's night left: the diff files moved on, and nothing is in the bucket."""
        for name in ("tree", "han"):
            (self.folder / "src" / name / f"of night {n}").write_text(f"{n}")
            diff_file = f"{ROOT}/diffs/_tmp_perlrun_src_{name}.diff"
            done = self.inside("tar", "-f", "/dev/null", "-g", diff_file, "-C", "/", "-czp",
                               f"{ROOT}/src/{name}")
            assert done.returncode == 0, done.stderr
        repository = self.folder / "svn" / "proj"
        put = ["svnmucc", "--non-interactive", "-m", "x", "-U", repository.as_uri()]
        run([*put, "put", "/dev/null", f"of-night-{n}"])
        revision = run(["svnlook", "youngest", str(repository)])
        (self.folder / "diffs" / "_tmp_perlrun_svn_proj.diff").write_text(revision)
        for path in (self.folder / "diffs").iterdir():
            os.utime(path, (at.timestamp(), at.timestamp()))


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*") if path.is_file() and not path.is_symlink()
    }


@pytest.mark.parametrize(
    ("lost", "step", "turn"),
    [(0, 1, "DIFF"), (1, 1, "DIFF"), (2, 1, "DIFF"), (4, 1, "FULL"), (12, 30, "DIFF")],
    ids=["no night", "one night", "two nights", "until a FULL", "a year"],
)
def test_what_the_script_did_not_upload_is_in_the_first_archive(
    tmp_path: Path, lost: int, step: int, turn: str
) -> None:
    machine = Machine(tmp_path)
    for n in range(1, lost + 1):
        machine.perl_night(DAY + timedelta(days=4 + n * step), n)
    night = DAY + timedelta(days=5 + lost * step)
    while ((night.timetuple().tm_yday - 1) % 3 == 0) != (turn == "FULL"):
        night += timedelta(days=1)
    check = machine.port(night, "check")
    assert check.stdout.count("the next archive holds everything") == 3, check.stdout
    done = machine.port(night)
    assert done.returncode == 0, done.stderr
    sentence = "the diff file is the Perl script's: everything is stored in it, once"
    assert done.stderr.count(sentence) == 3, done.stderr
    for name in ("tree", "han"):
        back = machine.restore(f"src/{name}")
        assert tree(back / ROOT[1:] / "src" / name) == tree(tmp_path / "src" / name)
    youngest = run(["svnlook", "youngest", str(machine.restore("svn/proj"))])
    assert youngest == run(["svnlook", "youngest", str(tmp_path / "svn/proj")])
    # From the second night on there is a chain.
    (tmp_path / "src" / "tree" / "later").write_text("later")
    done = machine.port(night + timedelta(days=1))
    assert done.returncode == 0 and "Perl script's" not in done.stderr
    back = machine.restore("src/tree")
    assert tree(back / ROOT[1:] / "src/tree") == tree(tmp_path / "src/tree")
    sizes = {
        path.name: path.stat().st_size
        for path in (tmp_path / "buckets" / "oracle.plain").iterdir() if "tree" in path.name
    }
    slot = ((night + timedelta(days=1)).timetuple().tm_yday - 1) % 6
    if slot % 3:
        (size,) = [size for name, size in sizes.items() if f"tree-{slot}-DIFF" in name
                   and len(name.rpartition("%3A")[2]) == 13]
        assert size < 2000


def test_the_scripts_diff_file_goes_on_under_its_name(site: Site) -> None:
    diff_file = site.folder / "diffs" / s3napback.diff_file_name(str(site.data))
    subprocess.run(["tar", "-g", diff_file, "-cf", "/dev/null", site.data], capture_output=True)
    assert site.run() == 0
    assert site.diff_files() == [diff_file]
    ((_, archive),) = site.archives().items()
    assert archive.metadata["state"].startswith("-:")
    assert site.run(now=NIGHT + timedelta(days=1)) == 0
    assert len([a for a in site.archives().values() if a.metadata["state"].startswith("-")]) == 1


def test_check_tells_the_size_beforehand(site: Site, capsys: Capture) -> None:
    site.settings["ChunkSize"] = "1000000"
    (site.data / "big").write_bytes(os.urandom(1_500_000))
    diff_file = site.folder / "diffs" / s3napback.diff_file_name(str(site.data))
    subprocess.run(["tar", "-g", diff_file, "-cf", "/dev/null", site.data], capture_output=True)
    s3napback.main(["check", "-c", str(site.write())], now=NIGHT)
    said = capsys.readouterr().out
    assert "the next archive holds everything, once: about 1.5 MB" in said
    # A FULL of a night before tells it better: compressed, encrypted.
    diff_file.unlink()
    assert site.run(now=datetime(2026, 11, 19, 3)) == 0
    for path in (site.folder / "diffs").glob(".s3napback-*"):
        path.unlink()
    (site.data / "big").unlink()
    s3napback.main(["check", "-c", str(site.write())], now=NIGHT)
    assert "the next archive holds everything, once: about 1.5 MB" in capsys.readouterr().out
