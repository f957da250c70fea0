"""A month of nights against a real S3 server, with real tools and servers; each night's archives
are fetched by hand and compared with what was there; and every evening all is well by its standing.

By hand: `js3tream -o | gpg -d | tar`, `mysql`, `psql`, `svnadmin load`. A DIFF goes on top of what
the night before gave, a FULL into an empty place, just as somebody in need would do it.
"""

import os
import random
import shutil
import subprocess
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import inventory, program, require_tool, run

import s3napback

# Over New Year, where SimpleCycle starts again: a round of its 8 nights before, one and a night
# after it. HanoiCycle with Discs 3 goes round every 4 nights.
NIGHTS = {"SimpleCycle": 17, "HanoiCycle": 6}
FIRST = datetime(2027, 12, 24, 3, 0)

CYCLES = {
    "SimpleCycle": "Frequency 1\nDiffs 3\nFulls 2",
    "HanoiCycle": "CycleType HanoiCycle\nDiscs 3",
}


class Month:
    """The data of a machine, changed a little every day, and its backups."""

    def __init__(self, folder: Path, cycle: str, s3: Any, gpg: Any, maria: Any, pg: Any) -> None:
        self.folder, self.s3, self.maria, self.pg = folder, s3, maria, pg
        self.random = random.Random(cycle)
        self.tree, self.repo = folder / "tree", folder / "repo"
        self.back, self.back_repo = folder / "back", folder / "back-repo"
        self.keyfile = s3.write_keyfile(folder / "key.txt")
        for name in ("diffs", "temp", "tree"):
            (folder / name).mkdir()
        self.conf = folder / "month.conf"
        self.conf.write_text(
            f"DiffDir {folder}/diffs\nTempDir {folder}/temp\nBucket dev.example.com.month\n"
            f"S3Keyfile {self.keyfile}\nS3Endpoint {s3.endpoint}\nChunkSize 8000\n"
            f"GpgRecipient {gpg.recipient}\n<Cycle all>\n{CYCLES[cycle]}\n"
            f"Directory {self.tree}\nExclude *.skip\nSubversion {self.repo}\n"
            f"MySQL {maria.socket}:month\nPostgreSQL {pg.user}@month\n</Cycle>\n"
        )
        self.cycle = s3napback.jobs_of(s3napback.read_config(str(self.conf)))[0].cycle
        maria.run("CREATE OR REPLACE DATABASE month; CREATE TABLE month.t (d INT, x BLOB)")
        for name in ("month", "back"):
            pg.run("postgres", f"DROP DATABASE IF EXISTS {name}; CREATE DATABASE {name}")
        pg.run("month", "CREATE TABLE t (d int, x text)")

    # ---- a day's changes ----

    def live(self, day: int, svn_repo_factory: Any) -> None:
        chance = self.random
        files = sorted(p for p in self.tree.rglob("*") if p.is_file() and not p.is_symlink())
        for path in chance.sample(files, min(len(files), 2)):
            path.unlink()
        for n in range(3):
            path = self.tree / f"dir{chance.randrange(4)}" / f"file {day} {n} ż"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(chance.randbytes(chance.randrange(3000)))
            path.chmod(chance.choice([0o600, 0o644, 0o755, 0o4711]))
            if os.geteuid() == 0:
                os.chown(path, chance.randrange(3000), chance.randrange(3000))
        (self.tree / f"left-out-{day}.skip").write_text("x")
        if day % 5 == 1:
            os.link(path, self.tree / f"hard-{day}")
            os.symlink(f"hard-{day}", self.tree / f"soft-{day}")
            os.mkfifo(self.tree / f"fifo-{day}")
        if day % 7 == 3:
            shutil.rmtree(self.tree / "dir0", ignore_errors=True)
            (self.tree / "dir1").rename(self.tree / "dir0")
        self.maria.run(f"INSERT INTO month.t VALUES ({day}, 0x{chance.randbytes(500).hex()});"
                       f"DELETE FROM month.t WHERE d = {day - 3}")
        self.pg.run("month", f"INSERT INTO t VALUES ({day}, '{chance.randbytes(300).hex()}');"
                             f"DELETE FROM t WHERE d = {day - 4}")
        if day % 3 != 2:
            svn_repo_factory(self.repo, 1)

    # ---- what is told of it ----

    def verdicts(self, now: datetime) -> set[tuple[str, str]]:
        """(kind, verdict) of each source."""
        jobs = s3napback.jobs_of(s3napback.read_config(str(self.conf)))
        access = s3napback.Access(self.s3.endpoint, "us-east-1",
                                  *s3napback.read_key_file(str(self.keyfile)))
        store = s3napback.open_store("dev.example.com.month", access, lambda: 0.0)
        watched = s3napback.Recovery(store, 4, self.s3.endpoint, dict(os.environ), (), "",
                                     None, (), jobs=jobs)
        found = s3napback.standings(watched, s3napback.Moment.of(now), 12 * 3600, 1e9)
        return {(one.kind, one.verdict) for _, one in found}

    # ---- recovery by hand ----

    def fetched(self) -> dict[str, str]:
        """The archives that the last run stored: source → archive."""
        found = {}
        for path in {p for method, p in self.s3.requests if method == "PUT"}:
            archive = path[1:].partition("/")[2].rpartition(":")[0]
            if archive:
                kind, name, _, _ = s3napback.parse_archive_name(archive)  # type: ignore[misc]
                found[kind or name] = archive
        return found

    def by_hand(self, archive: str, then: str) -> None:
        stored = program("js3tream", "--debug", "-n", "-f", "-v", "-K", str(self.keyfile), "-o",
                         "--endpoint", self.s3.endpoint, "-b", f"dev.example.com.month:{archive}")
        assert stored.returncode == 0, stored.stderr.decode()
        line = ["bash", "-o", "pipefail", "-c", f"gpg --batch -q -d | {then}"]
        done = subprocess.run(line, input=stored.stdout, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()

    def bring_back(self, archives: dict[str, str]) -> None:
        tree = archives[str(self.tree)]
        if tree.endswith("FULL") or not self.back.exists():  # the first DIFF holds everything
            shutil.rmtree(self.back, ignore_errors=True)
            self.back.mkdir()
        self.by_hand(
            tree,
            f"tar xzp --same-owner --numeric-owner --listed-incremental=/dev/null -C {self.back}",
        )
        if str(self.repo) in archives:
            if archives[str(self.repo)].endswith("FULL"):
                shutil.rmtree(self.back_repo, ignore_errors=True)
                run(["svnadmin", "create", str(self.back_repo)])
            self.by_hand(archives[str(self.repo)],
                         f"gunzip | svnadmin load -q {self.back_repo}")
        self.maria.run("CREATE OR REPLACE DATABASE back")
        self.by_hand(archives["MySQL"],
                     f"gunzip | mariadb --no-defaults -u root -S {self.maria.socket} back")
        self.pg.run("back", "DROP TABLE IF EXISTS t")
        self.by_hand(archives["PostgreSQL"], "gunzip | psql -qX -v ON_ERROR_STOP=1 -d back")

    def compare(self, links: bool) -> None:
        """links: also hard links; tar keeps those between files of one archive."""
        back = self.back / str(self.tree)[1:]
        tree = inventory(self.tree, links=links, unit=0)
        wanted = {name: entry for name, entry in tree.items() if not name.endswith(".skip")}
        assert inventory(back, links=links, unit=0) == wanted
        rows = "SELECT d, HEX(x) FROM {}.t ORDER BY d"
        assert self.maria.run(rows.format("back")) == self.maria.run(rows.format("month"))
        rows = "SELECT d, x FROM t ORDER BY d"
        assert self.pg.run("back", rows) == self.pg.run("month", rows)
        dump = ["svnadmin", "dump", "-q", "--incremental"]
        there, again = (
            [line for line in run([*dump, str(path)]).splitlines() if "UUID" not in line]
            for path in (self.repo, self.back_repo)
        )
        assert again == there


@pytest.mark.slow
@pytest.mark.parametrize("cycle", CYCLES)
def test_every_night_comes_back(
    cycle: str, tmp_path: Path, s3_server: Any, gpg_home: Any, mariadb: Any, postgres: Any,
    svn_repo_factory: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:
    for tool in ("tar", "gzip", "svnadmin", "svnlook", "mysqldump", "pg_dump"):
        require_tool(tool)
    monkeypatch.setattr(s3napback, "read_logconfig", lambda: s3napback.LogConfig("", ""))
    for name, value in {**gpg_home.env, **postgres.env}.items():
        monkeypatch.setenv(name, value)
    month = Month(tmp_path, cycle, s3_server, gpg_home, mariadb, postgres)
    nights = []
    for day in range(NIGHTS[cycle]):
        month.live(day, svn_repo_factory)
        s3_server.requests.clear()
        assert s3napback.main(["-c", str(month.conf)], now=FIRST + timedelta(days=day)) == 0
        archives = month.fetched()
        nights.append(archives)
        assert len(archives) >= 3
        month.bring_back(archives)
        month.compare(links=archives[str(month.tree)].endswith("FULL"))
        evening = FIRST + timedelta(days=day, hours=17)
        kinds = ("Directory", "Subversion", "MySQL", "PostgreSQL")
        assert month.verdicts(evening) == {(kind, "ok") for kind in kinds}
        if day % 4 == 0:  # had the next night been missed, without a commit
            missed = evening + timedelta(days=1)
            is_full = s3napback.slot_and_mode(
                month.cycle, s3napback.Moment.of(missed).day, dumps=False)[1] == "FULL"
            assert month.verdicts(missed) == {
                (kind, "ok" if kind == "Subversion" and not is_full else "late") for kind in kinds}
    fulls = [n for n, archives in enumerate(nights) if archives[str(month.tree)].endswith("FULL")]
    if cycle == "HanoiCycle":
        assert len(fulls) == NIGHTS[cycle]
    else:
        assert 8 in fulls  # 2028-01-01: yday 0
        assert 4 <= len(fulls) <= 6
