"""A real S3-compatible server process (moto) for tests. It checks signatures, parts and ranges as S3 does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class S3Server:
    endpoint: str
    key_id: str
    secret: str
    region: str = "us-east-1"

    @property
    def environment(self) -> dict[str, str]:
        """What a program needs in its environment to use the server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": self.region,
            "AWS_ACCESS_KEY_ID": self.key_id,
            "AWS_SECRET_ACCESS_KEY": self.secret,
        }

    def client(self, service: str = "s3") -> Any:
        """A boto3 client."""
        return _client(service, self.endpoint, self.region, self.key_id, self.secret)

    def make_bucket(self, name: str) -> None:
        self.client().create_bucket(Bucket=name)


def _client(service: str, endpoint: str, region: str, key_id: str, secret: str) -> Any:
    import boto3

    return boto3.client(
        service, endpoint_url=endpoint, region_name=region, aws_access_key_id=key_id, aws_secret_access_key=secret
    )


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Start a server on a free port, with one user who may do everything in S3; everyone else is denied."""
    # The first requests, which make that user, are not checked.
    environment = os.environ | {"INITIAL_NO_AUTH_ACTION_COUNT": "3", "PYTHONUNBUFFERED": "1"}
    for name in [name for name in environment if name.startswith(("AWS_", "WOODFROG_"))]:
        del environment[name]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        assert process.stderr
        endpoint = ""
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"Running on (http://127\.0\.0\.1:[1-9]\d*)", line):
                endpoint = found[1]
                break
        if not endpoint:
            raise RuntimeError(f"the S3 server did not start: {''.join(lines)[-2000:]}")
        threading.Thread(target=process.stderr.read, daemon=True).start()  # its log must not fill the pipe

        region = "us-east-1"
        iam = _client("iam", endpoint, region, "nobody", "nothing")
        iam.create_user(UserName="tests")
        allow = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
        iam.put_user_policy(UserName="tests", PolicyName="all", PolicyDocument=json.dumps(allow))
        made = iam.create_access_key(UserName="tests")["AccessKey"]
        yield S3Server(endpoint, made["AccessKeyId"], made["SecretAccessKey"], region)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
