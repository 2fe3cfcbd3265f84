"""Conditional writes to S3, which pyarrow's client cannot make: ``If-None-Match: *`` and ``If-Match: <etag>``.

Everything else about S3 goes through pyarrow. boto3 is asked for only when something is created or replaced on S3, so
reading needs no more than pyarrow and numpy. Both look for credentials in the places all AWS clients look in.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from trajectory_store.errors import StoreUnavailableError

PRECONDITION_FAILED = 412
CONFLICT = 409
"""Another conditional write to the same key is under way: ask again."""
ATTEMPTS = 8


@dataclass(frozen=True)
class S3Access:
    """How an ``s3://`` URL reaches its server: what boto3 needs to know to reach the same one."""

    region: str
    endpoint_url: str | None
    access_key: str | None = field(repr=False)
    secret_key: str | None = field(repr=False)

    @classmethod
    def of(cls, url: str, region: str) -> S3Access:
        """What the URL says, in pyarrow's notation (``s3://key:secret@bucket/path?endpoint_override=...&scheme=...``)."""
        parts = urlsplit(url)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        endpoint = query.get("endpoint_override")
        if endpoint and "://" not in endpoint:
            endpoint = f"{query.get('scheme', 'https')}://{endpoint}"
        return cls(
            region=region,
            endpoint_url=endpoint,
            access_key=unquote(parts.username) if parts.username else None,
            secret_key=unquote(parts.password) if parts.password else None,
        )

    def create(self, path: str, content: Any) -> bool:
        """Put an object only if there is none; of simultaneous creators exactly one is told True.

        Args:
            path: ``bucket/key``.

        Raises:
            StoreUnavailableError: boto3 is missing or the server refused.
        """
        return self._put(path, content, {"IfNoneMatch": "*"})

    def replace(self, path: str, expected: bytes, content: Any) -> bool:
        """Put an object only if the one there holds `expected`.

        Raises:
            StoreUnavailableError: boto3 is missing or the server refused.
        """
        found = self._get(path)
        return found is not None and found[0] == expected and self._put(path, content, {"IfMatch": found[1]})

    def _put(self, path: str, content: Any, condition: dict[str, str]) -> bool:
        failures = _sdk().exceptions
        bucket, _, key = path.partition("/")
        body = bytes(content)
        for attempt in range(ATTEMPTS):
            try:
                self._client.put_object(Bucket=bucket, Key=key, Body=body, **condition)
                return True
            except failures.ClientError as error:
                status = error.response["ResponseMetadata"]["HTTPStatusCode"]
                if status == PRECONDITION_FAILED:
                    # Ours after all, when the answer to an earlier attempt was lost and boto3 asked again.
                    found = self._get(path)
                    return found is not None and found[0] == body
                if status != CONFLICT or attempt == ATTEMPTS - 1:
                    raise StoreUnavailableError(f"cannot write s3://{path} conditionally: {error}") from error
                time.sleep(0.05 * 2**attempt)
            except failures.BotoCoreError as error:
                raise StoreUnavailableError(f"cannot write s3://{path}: {error}") from error
        raise AssertionError("unreachable")

    def _get(self, path: str) -> tuple[bytes, str] | None:
        """An object's content and its etag."""
        failures = _sdk().exceptions
        bucket, _, key = path.partition("/")
        try:
            answer = self._client.get_object(Bucket=bucket, Key=key)
            return answer["Body"].read(), answer["ETag"]
        except failures.ClientError as error:
            if error.response["Error"]["Code"] == "NoSuchKey":
                return None
            raise StoreUnavailableError(f"cannot read s3://{path}: {error}") from error
        except failures.BotoCoreError as error:
            raise StoreUnavailableError(f"cannot read s3://{path}: {error}") from error

    @property
    def _client(self) -> Any:
        return _client(self, os.getpid())  # a client's connections must not be shared with a forked child


def _sdk() -> Any:
    """botocore; imported on first use, for it takes a third of a second that local stores need not pay."""
    try:
        import boto3  # noqa: F401  # what `_client` needs, so that one message says what is missing
        import botocore.exceptions
    except ImportError as error:
        raise StoreUnavailableError(
            "writing to a store on S3 needs boto3, for conditional writes: pip install 'jf-cluster[s3]'"
        ) from error
    return botocore


@lru_cache(maxsize=16)
def _client(access: S3Access, process_id: int) -> Any:
    import boto3

    return boto3.session.Session().client(
        "s3",
        region_name=access.region,
        endpoint_url=access.endpoint_url,
        aws_access_key_id=access.access_key,
        aws_secret_access_key=access.secret_key,
    )
