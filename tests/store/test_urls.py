"""What is shown of a URL never gives access."""

from __future__ import annotations

from pathlib import Path

import pytest

from trajectory_store import InvalidNameError, StoreUnavailableError, TrajectoryStore, without_secrets
from trajectory_store.__main__ import main


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://key:sec%2Fret@bucket/runs?region=x", "s3://bucket/runs?region=x"),
        ("s3://key@bucket", "s3://bucket"),
        ("s3://key:sec/ret@bucket/runs", "s3://bucket/runs"),
        ("http://user:p@ss@host:5000/api", "http://host:5000/api"),
        ("postgresql+psycopg2://user:pass@host/db?password=a&sslmode=x", "postgresql+psycopg2://host/db?password=***&sslmode=x"),
        ("abfs://container:key@account.dfs.core.windows.net/runs", "abfs://container@account.dfs.core.windows.net/runs"),
        ("abfs://:key@account/container", "abfs://account/container"),
        ("abfss://container@account/runs?sv=1&sig=a%3D&client_secret=b", "abfss://container@account/runs?sv=1&sig=***&client_secret=***"),
        ("https://host/a?X-Amz-Signature=a&X-Amz-Security-Token=b&AWSAccessKeyId=c", "https://host/a?X-Amz-Signature=***&X-Amz-Security-Token=***&AWSAccessKeyId=***"),
        ("cannot open 's3://a:b@c/d' and 'http://e:f@g'", "cannot open 's3://c/d' and 'http://g'"),
    ],
)  # fmt: skip
def test_what_gives_access_is_left_out(url: str, shown: str) -> None:
    assert without_secrets(url) == shown
    assert without_secrets(shown) == shown


@pytest.mark.parametrize(
    "url",
    [
        "/runs/a@b",
        "s3://bucket/run@2?endpoint_override=localhost:9000&scheme=http&allow_bucket_creation=true",
        "http://[::1]:5000/x@y",
        "http://host:80/x@y",
        "sqlite:////runs/a:b@c/mlflow.db?timeout=60",
        "file:///a:b@c",
        "https://host/a?tokenizer=b",
    ],
)
def test_the_rest_is_left_alone(url: str) -> None:
    assert without_secrets(url) == url


@pytest.mark.parametrize("url", [Path("s3://key:word@bucket/store"), "s3:/bucket/store", "file:/tmp/store"])
def test_a_url_that_lost_a_slash_is_no_local_folder(url: str | Path) -> None:
    with pytest.raises(InvalidNameError, match=r"two slashes: .*://") as refused:
        TrajectoryStore(url)
    assert "word" not in str(refused.value)


def test_a_store_that_cannot_be_opened_is_named_without_its_key(capsys: pytest.CaptureFixture[str]) -> None:
    for url in ("s3://key:hush@bucket?bogus=1", "s3://key:hu/hush@bucket", "gopher://key:hush@there"):
        with pytest.raises(StoreUnavailableError) as refused:
            TrajectoryStore(url)
        assert "cannot open the store at" in str(refused.value) and "hush" not in str(refused.value)
        assert refused.value.__cause__ is None, "a traceback would show the library's words"
    assert main(["export", "s3://key:hush@bucket", "there"]) == 2
    assert "hush" not in capsys.readouterr().err
    round_ = TrajectoryStore("s3://key:hush@bucket?region=us-east-1").round(1)
    assert round_.folder.s3 is not None and round_.folder.s3.secret_key == "hush"
    assert "hush" not in repr(round_)
