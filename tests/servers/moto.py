"""moto in its server mode with authentication: right about conditional writes, ranges and error shapes."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator

import botocore.config
import botocore.session
import pytest

from servers.process import HOST, Server, free_port, responds, started
from servers.s3 import S3Server

# As many calls as it takes to make a user, a key and a policy; after them every request is checked.
_FREE_CALLS = 4


@contextlib.contextmanager
def moto_server() -> Iterator[tuple[S3Server, Server]]:
    """A server with one bucket, and its process."""
    port = free_port()
    url = f"http://{HOST}:{port}"
    with started(
        [sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(port)],
        # This page is not an action, so it is not counted.
        ready=responds(f"{url}/moto-api/"),
        name="moto",
        env={"INITIAL_NO_AUTH_ACTION_COUNT": str(_FREE_CALLS)},
    ) as process:
        session = botocore.session.get_session()
        iam = session.create_client(
            "iam", region_name="us-east-1", endpoint_url=url, aws_access_key_id="x", aws_secret_access_key="x",
            config=botocore.config.Config(proxies={}),
        )  # fmt: skip
        iam.create_user(UserName="tester")
        key = iam.create_access_key(UserName="tester")["AccessKey"]
        policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}
        iam.put_user_policy(UserName="tester", PolicyName="all", PolicyDocument=json.dumps(policy))
        server = S3Server(url, "blocks", key["AccessKeyId"], key["SecretAccessKey"])
        server.client().create_bucket(Bucket=server.bucket)
        yield server, process


@pytest.fixture(name="moto_s3", scope="session")
def moto_s3_fixture() -> Iterator[S3Server]:
    with moto_server() as (server, _):
        yield server
