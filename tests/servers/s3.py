"""What the tests know of a running S3 server, and a plain client for looking behind the provider's back."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import botocore.config
import botocore.session


@dataclass(frozen=True, slots=True)
class S3Server:
    """Where it is, one bucket that exists, and credentials that may do everything."""

    endpoint: str
    bucket: str
    access_key: str
    secret_key: str

    def config(self, **more: Any) -> dict[str, Any]:
        """The provider object for it."""
        return {"type": "s3", "endpoint": self.endpoint, "bucket": self.bucket, **more}

    @contextlib.contextmanager
    def credentials(self, secret_key: str | None = None, access_key: str | None = None) -> Iterator[None]:
        """Put credentials into the environment of this process."""
        values = {
            "AWS_ACCESS_KEY_ID": access_key or self.access_key,
            "AWS_SECRET_ACCESS_KEY": secret_key or self.secret_key,
        }
        before = {name: os.environ.get(name) for name in values}
        os.environ.update(values)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value

    def client(self) -> Any:
        """An independent client: botocore's."""
        return _client(self.endpoint, self.access_key, self.secret_key)


@functools.cache  # making one takes a second
def _client(endpoint: str, access_key: str, secret_key: str) -> Any:
    return botocore.session.get_session().create_client(
        "s3",
        region_name="us-east-1",
        endpoint_url=endpoint,
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
        config=botocore.config.Config(s3={"addressing_style": "path"}, proxies={}),
    )
