"""A server on loopback that speaks S3: moto's, in a process of its own, so that a test may fork and kill."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

_numbers = itertools.count()


@dataclass
class S3Server:
    """Its address, and how a client gets there."""

    endpoint: str
    environment: dict[str, str] = field(default_factory=dict[str, str])

    def client(self) -> Any:
        import boto3

        keys = {
            "aws_access_key_id": "test",
            "aws_secret_access_key": "a-secret-of-this-test-alone",
            "region_name": "us-east-1",
        }
        return boto3.client("s3", endpoint_url=self.endpoint, **keys)

    def new_bucket(self) -> str:
        name = f"bucket-{os.getpid()}-{next(_numbers)}"
        self.client().create_bucket(Bucket=name)
        return name

    def names(self, url: str) -> list[str]:
        """Of the objects of a run."""
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
        return [found["Key"].removeprefix(f"{prefix}/") for page in pages for found in page.get("Contents", ())]


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """A server with nothing in it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "a-secret-of-this-test-alone",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }
        yield S3Server(environment["AWS_ENDPOINT_URL"], environment)
    finally:
        process.terminate()
        process.wait(10)
