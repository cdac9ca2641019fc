"""Stores of parts: a directory, and object storage."""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
from services import create_bucket, s3_server

from audiences_async import ConfigurationError
from audiences_async._distributed import parts
from audiences_async.distributed import PartsError, PartStore, open_store

SECRET = "s3cr3t-access-key"


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Start an S3 with one bucket, and return its URL."""
    with s3_server() as endpoint:
        create_bucket(endpoint, "bucket")
        yield endpoint


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the credentials as a user does."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", SECRET)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")


@pytest.fixture(params=["directory", "file://", "memory://", "s3://"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PartStore:
    """Return an empty store of each kind."""
    if request.param == "s3://":
        monkeypatch.setenv("AWS_ENDPOINT_URL", request.getfixturevalue("s3"))
        return open_store(f"s3://bucket/{tmp_path.name}")
    urls = {"directory": str(tmp_path), "file://": tmp_path.as_uri(), "memory://": "memory://"}
    return open_store(urls[request.param])


@pytest.mark.slow
async def test_a_part_is_kept_until_it_is_removed(store: PartStore) -> None:
    """Read what was written last, list a job's parts without those of others, and remove them."""
    await store.put("job/a.ndjson", BytesIO(b"old"))
    await store.put("job/a.ndjson", BytesIO(b"new" * parts.IN_MEMORY))
    await store.put("other/b.ndjson", BytesIO(b""))
    assert await store.names("job") == ["job/a.ndjson"]
    file = await store.get("job/a.ndjson")
    assert file is not None
    with file:
        assert file.read() == b"new" * parts.IN_MEMORY
    await store.remove("job/a.ndjson")
    await store.remove("job/a.ndjson")
    await store.put("job/c.ndjson", BytesIO(b""))
    await store.remove_all("job")
    assert (await store.get("job/a.ndjson"), await store.names("job")) == (None, [])
    assert await store.names("other") == ["other/b.ndjson"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("s3://missing", "cannot write to s3://missing: it does not exist "),
        ("az://bucket", "invalid URL of parts az://bucket: GenericError"),  # there is no account
    ],
)
async def test_a_bucket_that_cannot_be_used(s3: str, monkeypatch: pytest.MonkeyPatch, url: str, told: str) -> None:
    """Report a missing bucket or account without the service's own words, which may repeat a secret."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    with pytest.raises((PartsError, ConfigurationError), match=told) as caught:
        await parts.check(open_store(url))
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("", "is empty"),
        ("file://", "absolute path and no host"),
        ("file://host/parts", "absolute path and no host"),
        ("ftp://host", "a URL that begins with s3://, gs://, az://, file://"),
        (f"s3://user:{SECRET}@bucket", "must not contain credentials"),
        (f"az://container?sig={SECRET}", "must not contain credentials"),
    ],
)
def test_a_url_that_is_refused(url: str, told: str) -> None:
    """Refuse other schemes and credentials in the URL, without repeating them."""
    with pytest.raises(ConfigurationError, match=told) as caught:
        open_store(url)
    assert SECRET not in str(caught.value)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Name the extra to install if obstore is missing."""
    monkeypatch.setattr(parts, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'audiences_async\[objectstore\]'"):
        open_store("s3://bucket")


async def test_a_directory_that_cannot_be_used(tmp_path: Path) -> None:
    """Report why a directory cannot be written, or read."""
    (tmp_path / "file").touch()
    with pytest.raises(PartsError, match=f"cannot write to {tmp_path}/file: Not a directory"):
        await parts.check(open_store(tmp_path / "file"))
    with pytest.raises(PartsError, match="cannot read .*: Not a directory"):
        await open_store(tmp_path / "file").get("job/part")
