"""GpgRecipient: one or several, each with a key that can be used tonight."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Capture, GpgHome, Site, require_tool, run

import s3napback

KEYS = ("anna@example.com", "bert@example.com", "carla@example.com")


@pytest.fixture
def keys(short_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[GpgHome]:
    """A home of gpg with three keys, and two that cannot encrypt."""
    gpg = GpgHome(short_folder(""))
    for name in KEYS:
        gpg.run("--passphrase", "", "--quick-generate-key", name, "future-default", "default", "0")
    gpg.run("--passphrase", "", "--quick-generate-key", "sign@example.com", "ed25519", "cert,sign",
            "0")
    monkeypatch.setenv("GNUPGHOME", str(gpg.home))
    yield gpg
    run([require_tool("gpgconf"), "--homedir", str(gpg.home), "--kill", "all"])


def fingerprint(gpg: GpgHome, who: str) -> str:
    lines = gpg.run("--list-keys", "--with-colons", who).splitlines()
    return next(line.split(":")[9] for line in lines if line.startswith("fpr"))


def checked(site: Site, capsys: Capture) -> list[dict[str, str]]:
    """What `check` says of the recipients, at the real time, as gpg sees it."""
    capsys.readouterr()
    s3napback.main(["check", "--json", "-c", str(site.write())])
    findings = json.loads(capsys.readouterr().out)
    return [finding for finding in findings if finding["subject"] == "GpgRecipient"]


@pytest.mark.parametrize(
    "lines", ["{0} {1} {2}", "{0}\nGpgRecipient {1}\nGpgRecipient {2}", "{0} {1}\nGpgRecipient {2}"]
)
def test_each_recipient_can_restore_alone(
    site: Site, keys: GpgHome, short_folder: Callable[[str], Path], lines: str,
    monkeypatch: pytest.MonkeyPatch, capsys: Capture,
) -> None:
    site.settings["GpgRecipient"] = lines.format(*KEYS)
    assert site.run() == 0
    assert [f["level"] for f in checked(site, capsys)] == ["ok", "ok", "ok"]
    for number, name in enumerate(KEYS):
        secret = site.folder / f"{number}.asc"
        secret.write_text(keys.run("--armor", "--export-secret-keys", name))
        place = site.folder / f"back{number}"
        monkeypatch.setenv("GNUPGHOME", str(short_folder("")))  # nothing but that key
        assert s3napback.main(["restore", "-c", str(site.conf), "--secret-key", str(secret),
                               str(site.data), "--to", str(place)]) == 0
        assert (place / str(site.data).lstrip("/") / "file").read_text() == "one"
        monkeypatch.setenv("GNUPGHOME", str(keys.home))


def test_test_mode_shows_every_recipient(site: Site, keys: GpgHome, capsys: Capture) -> None:
    site.settings["GpgRecipient"] = f"{KEYS[0]} {KEYS[1]}"
    assert site.run("-t") == 0
    assert f"gpg --batch -r {KEYS[0]} -r {KEYS[1]} -e" in capsys.readouterr().err


@pytest.mark.parametrize("order", [0, 1])
def test_every_recipient_is_checked(site: Site, keys: GpgHome, order: int, capsys: Capture) -> None:
    names = [KEYS[0], "nobody@example.com"]
    site.settings["GpgRecipient"] = " ".join(names[order:] + names[:order])
    assert site.run() == 2
    assert "recipient nobody@example.com not found" in capsys.readouterr().err
    assert site.archives() == {}
    levels = sorted(f["level"] for f in checked(site, capsys))
    assert levels == ["error", "ok"]


def test_a_comment_behind_a_recipient_is_no_recipient(
    site: Site, keys: GpgHome, capsys: Capture
) -> None:
    site.settings["GpgRecipient"] = f"{KEYS[0]} # the admin"
    assert site.run() == 0
    assert "GpgRecipient: the list of names ends at #" in capsys.readouterr().err


def test_a_key_without_a_subkey_for_encryption_is_refused(
    site: Site, keys: GpgHome, capsys: Capture
) -> None:
    site.settings["GpgRecipient"] = f"{KEYS[0]} sign@example.com"
    assert site.run() == 2
    said = capsys.readouterr().err
    assert "of GPG recipient sign@example.com has no subkey for encryption" in said
    assert f"--quick-add-key {fingerprint(keys, 'sign@example.com')}" in said


def test_a_subkey_that_has_expired_is_refused(site: Site, keys: GpgHome, capsys: Capture) -> None:
    who = "past@example.com"
    gpg = ["gpg", "--batch", "-q", "--passphrase", ""]
    then, later = ([require_tool("faketime"), day, *gpg] for day in ("2020-01-01", "2020-01-02"))
    run([*then, "--quick-generate-key", who, "ed25519", "cert,sign", "0"], env=keys.env)
    run([*later, "--quick-add-key", fingerprint(keys, who), "cv25519", "encr", "1y"], env=keys.env)
    site.settings["GpgRecipient"] = who
    assert site.run() == 2
    said = capsys.readouterr().err
    assert f"GPG recipient {who} has no subkey for encryption that is valid: " in said
    assert "expired on 2021-01-01" in said
    assert [f["level"] for f in checked(site, capsys)] == ["error"]


def test_check_warns_of_a_subkey_that_expires(site: Site, keys: GpgHome, capsys: Capture) -> None:
    mark = fingerprint(keys, "sign@example.com")
    keys.run("--passphrase", "", "--quick-add-key", mark, "cv25519", "encr", "10d")
    site.settings["GpgRecipient"] = f"{KEYS[0]} sign@example.com"
    first, second = checked(site, capsys)
    assert first["level"] == "ok"
    assert second["level"] == "warning"
    assert "the subkey " in second["text"] and "sign@example.com expires on" in second["text"]
    # A second one that lasts is what gpg then takes.
    keys.run("--passphrase", "", "--quick-add-key", mark, "cv25519", "encr", "0")
    assert [f["level"] for f in checked(site, capsys)] == ["ok", "ok"]


@pytest.mark.parametrize("spelled", ["~/ring.gpg", "sub/ring.gpg"])
def test_a_keyring_in_the_home_or_by_a_relative_path(
    site: Site, keys: GpgHome, short_folder: Callable[[str], Path], spelled: str,
    monkeypatch: pytest.MonkeyPatch, capsys: Capture,
) -> None:
    (site.folder / "sub").mkdir()
    home = short_folder("")
    for path in (site.folder / "ring.gpg", site.folder / "sub" / "ring.gpg"):
        run(["gpg", "--batch", "-q", "--no-default-keyring", "--keyring", str(path), "--import"],
            env={"GNUPGHOME": str(home)}, stdin=keys.run("--armor", "--export", KEYS[0]))
    (home / "gpg.conf").write_text("trust-model always\n")
    monkeypatch.setenv("GNUPGHOME", str(home))
    monkeypatch.setenv("HOME", str(site.folder))
    monkeypatch.chdir(site.folder)
    site.settings |= {"GpgRecipient": KEYS[0], "GpgKeyring": spelled}
    assert site.run() == 0
    assert [f["level"] for f in checked(site, capsys)] == ["ok"]
    # What is wrong is told, and not that the keyring lacks.
    site.settings["GpgRecipient"] = "nobody@example.com"
    assert site.run() == 2
    assert "nobody@example.com not found" in capsys.readouterr().err
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", "/")
    assert site.run() == 2
    assert f"GpgKeyring {spelled} does not exist" in capsys.readouterr().err
