"""What surrounds a run on an ordinary machine: locale, environment, open files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from conftest import START, Site, leave_out, require_tool, run

import s3napback

pytestmark = pytest.mark.slow


def call(
    *words: str, env: Mapping[str, str] | None = None, redirect: str = ""
) -> subprocess.CompletedProcess[str]:
    """The script itself, by a shell, with this environment and no other."""
    return subprocess.run(
        ["sh", "-c", f'exec env -i "$@" {redirect}', "sh",
         *(f"{name}={value}" for name, value in {"PATH": "/usr/bin:/bin", **(env or {})}.items()
           if value),
         sys.executable, START, *words],
        capture_output=True, text=True, errors="surrogateescape",
    )


@pytest.fixture
def quiet(site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A site whose calls do not write to /var/log: a copy of the script without a logconfig."""
    copy = site.folder / "s3napback.py"
    copy.write_bytes(Path(s3napback.__file__).read_bytes())
    monkeypatch.setattr(s3napback, "__file__", str(copy))
    return site


def test_names_are_utf8_whatever_the_locale(quiet: Site) -> None:
    """LANG=en_US is ISO-8859-1 where it is installed, and names are UTF-8 all the same."""
    locale = quiet.folder / "locales" / "de_DE"
    locale.parent.mkdir()
    run([require_tool("localedef"), "-i", "de_DE", "-f", "ISO-8859-1", str(locale)])
    # A Python without a locale leaves its children an LC_CTYPE (PEP 538), which would count first.
    env = {"LOCPATH": str(locale.parent), "LANG": "de_DE", "LC_CTYPE": ""}
    told = [sys.executable, "-c", "import sys; print(sys.getfilesystemencoding())"]
    assert run(told, env=env) == "iso8859-1\n"  # else this tests nothing
    quiet.data = quiet.folder / "zażółć €"
    quiet.data.mkdir()
    (quiet.data / "gęś").write_text("one")
    quiet.jobs = f'Directory "{quiet.data}"'
    conf, back = str(quiet.write()), quiet.folder / "back"
    assert call("-c", conf, env=env).returncode == 0
    done = call("list", "-c", conf, env=env)
    assert (done.returncode, "zażółć €-" in done.stdout) == (0, True)
    done = call("restore", "-c", conf, str(quiet.data), "--to", str(back),
                str(quiet.data / "gęś"), env=env)
    assert done.returncode == 0, done.stderr
    assert (back / str(quiet.data)[1:] / "gęś").read_text() == "one"


@pytest.mark.parametrize(
    ("env", "redirect"),
    [({}, "<&- >&- 2>&-"), ({"PATH": ""}, ""),
     ({"PYTHONWARNINGS": "error"}, ""), ({"PYTHONIOENCODING": "ascii", "TAR_OPTIONS": "-v"}, "")],
    ids=str,
)
def test_an_odd_environment_changes_nothing(
    env: dict[str, str], redirect: str, quiet: Site
) -> None:
    conf, back = str(quiet.write()), quiet.folder / "back"
    done = call("-c", conf, env=env, redirect=redirect)
    assert done.returncode == 0, done.stderr
    done = call("restore", "-c", conf, str(quiet.data), "--to", str(back), env=env,
                redirect=redirect)
    assert done.returncode == 0, done.stderr
    assert os.listdir(back / str(quiet.data)[1:]) == ["file"]


def test_a_read_only_home_of_gpg_is_called_that(
    quiet: Site, short_folder: Callable[[str], Path]
) -> None:
    """ProtectHome=read-only of systemd, say; not a key that is missing."""
    if os.geteuid():
        leave_out("mounting needs root")
    home = short_folder("")
    key = ["gpg", "--batch", "-q", "--passphrase", "", "--quick-generate-key", "b@example.com"]
    run([*key, "future-default", "default", "0"], env={"GNUPGHOME": str(home)})
    run(["gpgconf", "--homedir", str(home), "--kill", "all"])
    quiet.settings["GpgRecipient"] = "b@example.com"
    mount = f"mount --bind {home} {home} && mount -o remount,bind,ro {home} && exec \"$@\""
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, "sh", sys.executable, START, "-c",
         str(quiet.write())],
        env={"PATH": "/usr/bin:/bin", "GNUPGHOME": str(home)}, capture_output=True, text=True,
    )
    assert done.returncode == 2
    assert "gpg cannot list its keys: gpg: Fatal" in done.stderr


def test_without_docstrings_a_config_is_refused_with_a_sentence(quiet: Site) -> None:
    conf = str(quiet.write())
    done = call("-c", conf, env={"PYTHONOPTIMIZE": "2"})
    assert done.returncode == 2
    assert "without docstrings no config can be read (unset PYTHONOPTIMIZE" in done.stderr
    assert call("-c", conf, env={"PYTHONOPTIMIZE": "1"}).returncode == 0
