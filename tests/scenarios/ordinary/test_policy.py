"""The rights of access keys: what `policy` prints is enough, and none of it is too much."""

from __future__ import annotations

import fnmatch
import html
import json
import os
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import moto.settings
import pytest
from conftest import NIGHT, Capture, Site
from moto.core.models import DEFAULT_ACCOUNT_ID
from moto.iam.models import iam_backends

import s3napback

KEY = "arn:aws:kms:us-east-1:123456789012:key/1234abcd-12ab-34cd-56ef-1234567890ab"
README = (Path(s3napback.__file__).parent / "README.md").read_text()


def policy(site: Site, capsys: Capture, *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert site.run("policy", *words) == 0
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return printed


def rights(printed: dict[str, Any]) -> list[str]:
    return [right for one in printed["Statement"] for right in one["Action"]]


@pytest.fixture
def bucket(s3_site: Site, s3_server: Any) -> Site:
    """A site whose bucket is there, and empty."""
    s3_server.client().create_bucket(Bucket="bkt")
    s3_site.settings["Parallel"] = "1"  # each request is judged before the next comes
    s3_site.jobs = f"<Directory {s3_site.data}>\nDiffs 1\nFulls 1\n</Directory>"
    return s3_site


def nights(site: Site, capsys: Capture, count: int = 4) -> bytes:
    """Backups of several chunks, each of which replaces an older one; what is there at last."""
    for day in range(count):
        (site.data / "file").write_bytes(data := os.urandom(5000))
        status = site.run(now=NIGHT + timedelta(days=day))
        assert status == 0, capsys.readouterr().err
    return data


def a_whole_life(site: Site, capsys: Capture) -> None:
    data = nights(site, capsys)
    for words in (("list",), ("verify", "--deep"), ("plan",)):
        assert site.run(*words) == 0, capsys.readouterr()
    assert (site.restored() / "file").read_bytes() == data
    capsys.readouterr()
    assert site.run("check") in (0, 3)
    assert "error" not in capsys.readouterr().out


# ---- what is printed ----


def test_the_policy_of_the_readme_is_what_the_command_prints(site: Site, capsys: Capture) -> None:
    site.settings |= {"Bucket": "BUCKET", "Prefix": "web1", "S3Endpoint": ""}
    assert site.run("policy") == 0
    section = README.partition("<!-- policy:")[2].partition("```json\n")[2].partition("```")[0]
    assert capsys.readouterr().out == section


def test_the_readme_names_every_right_of_the_program() -> None:
    section = README.partition("### What the key must be allowed")[2].partition("### If someone")[0]
    named = set(re.findall(r"(?:s3|kms):\w+", section))
    for right in s3napback._RIGHTS.values():
        assert set(right.split(" and ")) <= named | {"s3:DeleteBucket"}


def test_a_key_of_kms_adds_its_rights(site: Site, capsys: Capture) -> None:
    site.settings |= {"S3Endpoint": "", "ServerSideEncryption": "aws:kms", "KmsKey": KEY}
    *_, last = policy(site, capsys)["Statement"]
    assert last == {"Effect": "Allow", "Action": ["kms:GenerateDataKey", "kms:Decrypt"],
                    "Resource": KEY}
    assert "kms:Decrypt" not in rights(policy(site, capsys, "--write-only"))


@pytest.mark.parametrize("kind", ["AES256", "aws:kms"])
def test_keys_of_amazon_add_none(site: Site, capsys: Capture, kind: str) -> None:
    site.settings |= {"S3Endpoint": "", "ServerSideEncryption": kind}
    assert not [right for right in rights(policy(site, capsys)) if right.startswith("kms:")]


def test_no_policy_lets_older_versions_be_deleted(site: Site, capsys: Capture) -> None:
    site.settings |= {"S3Endpoint": ""}
    printed = policy(site, capsys)
    assert rights(printed) == ["s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject"]
    assert [one["Effect"] for one in printed["Statement"]] == ["Allow", "Allow"]
    assert "Condition" not in printed["Statement"][0]
    assert printed["Statement"][1]["Resource"] == "arn:aws:s3:::bkt/*"


def test_a_prefix_is_meant_letter_by_letter(site: Site, capsys: Capture) -> None:
    """In a policy * and ? are wildcards, and ${...} is a variable."""
    site.settings |= {"S3Endpoint": "", "Prefix": "w*b?/$1"}
    listing, objects = policy(site, capsys)["Statement"]
    assert listing["Condition"] == {"StringLike": {"s3:prefix": "w${*}b${?}/${$}1/*"}}
    assert objects["Resource"] == "arn:aws:s3:::bkt/w${*}b${?}/${$}1/*"


@pytest.mark.parametrize(
    ("settings", "words", "why"),
    [
        ({}, (), "a bucket in a folder has no policy"),
        ({"ServerSideEncryption": "aws:kms", "KmsKey": "alias/x"}, (), "by its ARN"),
        ({}, ("--write-only",), "a folder"),
        ({"S3Endpoint": ""}, ("--write-only",), "needs KmsKey"),
        ({"ServerSideEncryption": "aws:kms", "KmsKey": KEY, "SafeReplace": "On"},
         ("--write-only",), "no SafeReplace"),
        ({"Bucket": ""}, (), "Bucket must be defined"),
    ],
)
def test_what_cannot_be_said_is_refused(
    site: Site, capsys: Capture, settings: dict[str, str], words: tuple[str, ...], why: str
) -> None:
    if "KmsKey" in settings:
        site.settings["S3Endpoint"] = ""
    site.settings |= settings
    assert site.run("policy", *words) == 2
    said = capsys.readouterr()
    assert why in said.err and not said.out


# ---- moto's IAM ----


@pytest.fixture
def as_user(
    bucket: Site, s3_server: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Makes the site's key that of a user of moto's IAM who has a policy, and nothing else."""
    before = s3_server.key, s3_server.secret
    backend = iam_backends[DEFAULT_ACCOUNT_ID]["aws"]

    def become(printed: dict[str, Any]) -> None:
        backend.reset()
        backend.create_user("us-east-1", "backup")
        backend.put_user_policy("backup", "least", json.dumps(printed))
        made = backend.create_access_key("backup")
        s3_server.key, s3_server.secret = made.access_key_id, made.secret_access_key
        s3_server.write_keyfile(Path(bucket.settings["S3Keyfile"]))
        monkeypatch.setattr(moto.settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0)

    yield become
    s3_server.key, s3_server.secret = before
    backend.reset()


@pytest.mark.slow
def test_a_user_of_iam_with_the_policy_can_live_a_whole_life(
    bucket: Site, capsys: Capture, as_user: Callable[[Any], None]
) -> None:
    bucket.settings["SafeReplace"] = "On"
    as_user(policy(bucket, capsys))
    a_whole_life(bucket, capsys)


@pytest.mark.slow
@pytest.mark.parametrize(
    "right", ["s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject"]
)
def test_without_one_of_the_rights_something_fails_and_names_it(
    bucket: Site, capsys: Capture, as_user: Callable[[Any], None], right: str
) -> None:
    printed = policy(bucket, capsys)
    as_user(printed)
    nights(bucket, capsys, 2)
    for one in printed["Statement"]:
        one["Action"] = [action for action in one["Action"] if action != right]
    printed["Statement"] = [one for one in printed["Statement"] if one["Action"]]
    as_user(printed)
    capsys.readouterr()
    (bucket.data / "file").write_bytes(os.urandom(5000))
    statuses = [bucket.run(now=NIGHT + timedelta(days=2)), bucket.run("verify", "--deep"),
                bucket.run("check")]
    assert 1 in statuses
    said = capsys.readouterr()
    assert f"lacks the right {right}" in said.out + said.err
    assert "Traceback" not in said.err


# ---- with conditions, and rights of KMS, which moto's IAM knows nothing of ----

ACTIONS = {"GET": "s3:GetObject", "HEAD": "s3:GetObject", "PUT": "s3:PutObject",
           "DELETE": "s3:DeleteObject"}


def enforced(printed: dict[str, Any], s3_server: Any) -> Callable[..., Any]:
    """A fault that refuses whatever a policy does not allow, as IAM would."""

    def allowed(action: str, resource: str, prefix: str = "") -> bool:
        return any(
            action in one["Action"]
            and fnmatch.fnmatchcase(resource, one["Resource"])
            and fnmatch.fnmatchcase(
                prefix, one.get("Condition", {}).get("StringLike", {}).get("s3:prefix", "*"))
            for one in printed["Statement"]
        )

    def kms_rights(method: str, bucket: str, key: str) -> Iterator[str]:
        headers, objects = s3_server.headers[-1], s3_server._backend.buckets[bucket].keys
        if method == "PUT" and "x-amz-server-side-encryption" in headers:
            yield "kms:GenerateDataKey"
            if "x-amz-copy-source" in headers:
                yield "kms:Decrypt"
        if method == "GET" and key in objects and objects[key].kms_key_id:
            yield "kms:Decrypt"

    def fault(method: str, path: str, query: dict[str, str], body: bytes | None) -> Any:
        bucket, _, key = path.lstrip("/").partition("/")
        keys = [key]
        if "delete" in query:
            keys = [html.unescape(k.decode()) for k in re.findall(b"<Key>(.*?)</Key>", body or b"")]
            method = "DELETE"
        if not keys[0]:
            listing = method == "GET" and query.get("list-type") == "2"
            place, prefix = f"arn:aws:s3:::{bucket}", query.get("prefix", "")
            good = listing and allowed("s3:ListBucket", place, prefix)
        else:
            places = [f"arn:aws:s3:::{bucket}/{key}" for key in keys]
            good = all(allowed(ACTIONS[method], place) for place in places)
            absent = key not in s3_server._backend.buckets[bucket].keys
            good = good and not (method == "HEAD" and absent)  # without ListBucket as a whole
            for right in kms_rights(method, bucket, key) if good else ():
                if not allowed(right, KEY):
                    return (403, "AccessDenied", f"User: x is not authorized to perform: {right} on"
                            " the resource associated with this ciphertext")
        return None if good else (403, "AccessDenied", "Access Denied")

    return fault


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"SafeReplace": "On", "ServerSideEncryption": "aws:kms", "KmsKey": KEY}],
)
def test_the_policy_of_a_prefix_is_enough(
    bucket: Site, s3_server: Any, capsys: Capture, settings: dict[str, str]
) -> None:
    bucket.settings |= {"Prefix": "web1", **settings}
    s3_server.fail = enforced(policy(bucket, capsys), s3_server)
    a_whole_life(bucket, capsys)


@pytest.mark.slow
def test_a_key_that_can_only_write_cannot_read(
    bucket: Site, s3_server: Any, capsys: Capture
) -> None:
    bucket.settings |= {"ServerSideEncryption": "aws:kms", "KmsKey": KEY}
    whole = enforced(policy(bucket, capsys), s3_server)
    s3_server.fail = enforced(policy(bucket, capsys, "--write-only"), s3_server)
    data = nights(bucket, capsys)
    assert bucket.run("verify") == 0  # which looks up
    capsys.readouterr()
    assert bucket.restore(bucket.folder / "back") == 1
    assert "lacks the right kms:Decrypt" in capsys.readouterr().err
    s3_server.fail = whole
    assert (bucket.restored() / "file").read_bytes() == data
    s3_server.fail = enforced({"Statement": policy(bucket, capsys)["Statement"][:2]}, s3_server)
    (bucket.data / "file").write_bytes(os.urandom(5000))
    assert bucket.run("-f", now=NIGHT + timedelta(days=9)) == 1
    assert "lacks the right kms:GenerateDataKey" in capsys.readouterr().err


@pytest.mark.slow
def test_in_a_bucket_with_versions_the_key_cannot_take_away_what_was_stored(
    bucket: Site, s3_server: Any, capsys: Capture
) -> None:
    """Whoever has it deletes all that he finds; the older versions bring it back."""
    client = s3_server.client()
    client.put_bucket_versioning(Bucket="bkt", VersioningConfiguration={"Status": "Enabled"})
    s3_server.fail = enforced(policy(bucket, capsys), s3_server)
    nights(bucket, capsys)
    stored = {name: archive.size for name, archive in bucket.archives().items()}
    keys = [item.key for item in bucket.store().iter_objects()]
    bucket.store().delete(keys)
    assert not bucket.archives()
    s3_server.fail = None
    for version in client.list_object_versions(Bucket="bkt")["DeleteMarkers"]:
        if version["IsLatest"] and version["Key"] in keys:
            client.delete_object(Bucket="bkt", Key=version["Key"], VersionId=version["VersionId"])
    assert {name: archive.size for name, archive in bucket.archives().items()} == stored
    assert bucket.run("verify", "--deep") == 0
