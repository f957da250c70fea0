"""The long run of the fault harness, by hand: python tests/tools/soak.py [--help]

Prints one line for each month, at the end the sums, and every violation as it is found.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import datetime, timezone
from multiprocessing import Pool
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from conftest import GpgHome  # noqa: E402
from harness import SETTINGS, FaultyS3, Violation, World, live_a_month  # noqa: E402

START = datetime(2026, 12, 15, 3, 0, tzinfo=timezone.utc)  # over New Year


# Name, runs by fault, failed requests by fault, moments restored, the violation that ended it.
Month = tuple[str, Counter[str], Counter[str], int, str]


def month(number: int, arguments: argparse.Namespace) -> Month:
    """One month, in a process of its own."""
    setting = SETTINGS[number % len(SETTINGS)]
    seed = f"{arguments.seed}-{number // len(SETTINGS)}"
    with tempfile.TemporaryDirectory(prefix="s3nb-", dir="/tmp") as place:
        folder = Path(place)
        home = folder / "gpg"
        home.mkdir(mode=0o700)
        gpg = GpgHome(home)
        make = ["--passphrase", "", "--quick-generate-key", f"Backup <{gpg.recipient}>"]
        gpg.run(*make, "future-default", "default", "0")
        server = FaultyS3()
        world = World(folder, server, gpg, setting, seed)
        moments, violation = 0, ""
        try:
            moments = live_a_month(
                world, arguments.nights, arguments.kills, arguments.faults, START
            )
        except Violation as found:
            violation = str(found)
        finally:
            world.close()
            server.stop()
            subprocess.run(["gpgconf", "--homedir", str(home), "--kill", "all"], check=False)
    return f"{setting}, seed {seed}", world.count, world.injected, moments, violation


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", default="1")
    parser.add_argument("--months", type=int, default=len(SETTINGS))
    parser.add_argument("--first", type=int, default=0, help="number of the first month")
    parser.add_argument("--nights", type=int, default=31)
    parser.add_argument("--kills", type=int, default=3, help="in a night")
    parser.add_argument("--faults", type=int, default=3, help="in a night")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    started = time.monotonic()
    runs: Counter[str] = Counter()
    injected: Counter[str] = Counter()
    moments = violations = 0
    with Pool(arguments.jobs, maxtasksperchild=1) as pool:
        numbers = range(arguments.first, arguments.first + arguments.months)
        results = [pool.apply_async(month, (n, arguments)) for n in numbers]
        for result in results:
            name, count, faults, restored, violation = result.get()
            print(f"{name}: {dict(count)}, {restored} moments restored", flush=True)
            runs, injected, moments = runs + count, injected + faults, moments + restored
            if violation:
                violations += 1
                print(f"VIOLATION: {violation}", flush=True)
    idle = runs.pop("without effect", 0)  # the run was over before it came to that
    print(f"kills: {runs['kill']}; faults: {runs.total() - runs['kill']} {dict(runs)};"
          f" without effect: {idle}")
    print(f"requests that failed: {injected.total()} {dict(injected)}")
    print(f"moments restored: {moments}; violations: {violations}")
    print(f"{time.monotonic() - started:.0f} s")
    return bool(violations)


if __name__ == "__main__":
    sys.exit(main())
