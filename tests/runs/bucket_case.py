"""A Google bucket on this machine: a server that is not ours, and the clients that a run has, gcsfs and TensorStore.

What it does not have: authentication, TLS, latency, quotas, the rates of real buckets. (Tried by hand against a second
server that is not ours, fake-gcs-server: the same.)
"""

import contextlib
import json
import os
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator

import pytest

NAME = "bucket"


class Bucket:
    """Answers at `environment`'s addresses; `requests` are the lines that came in."""

    def __init__(self, port: int):
        self.address = f"http://127.0.0.1:{port}"
        self.requests: list[str] = []
        self.environment = {
            "STORAGE_EMULATOR_HOST": self.address,  # gcsfs
            "TENSORSTORE_GCS_HTTP_URL": self.address,
            "FSSPEC_GS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks by gRPC first, for a minute
        }

    def url(self, path: str = "", *, content: bool = False) -> str:
        name = urllib.parse.quote(path, safe="")
        return f"{self.address}/{'download/' if content else ''}storage/v1/b/{NAME}/o/{name}".rstrip("/")

    def names(self, prefix: str = "") -> list[str]:
        """Of all objects, by the server itself."""
        with urllib.request.urlopen(f"{self.url()}?prefix={urllib.parse.quote(prefix)}") as answer:
            return sorted(item["name"] for item in json.load(answer).get("items", ()))

    def read(self, path: str) -> bytes:
        with urllib.request.urlopen(f"{self.url(path, content=True)}?alt=media") as answer:
            return answer.read()

    def write(self, path: str, data: bytes) -> None:
        address = (
            f"{self.address}/upload/storage/v1/b/{NAME}/o?uploadType=media&name={urllib.parse.quote(path, safe='')}"
        )
        urllib.request.urlopen(urllib.request.Request(address, data, method="POST")).close()

    def renames(self) -> list[str]:
        """Requests that only a rename or a copy makes: a bucket has neither at one instant."""
        return [
            line for line in self.requests if any(word in line for word in ("moveTo", "copyTo", "rewriteTo", "compose"))
        ]


def _close(response, close) -> None:
    """What this server lacks: a download says which generation it is of; TensorStore builds its next write on that."""
    handler = response._handler
    parts = urllib.parse.urlsplit(handler.path)
    match = re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)/o/(.+)", parts.path)
    if match and "alt=media" in parts.query and response.status < 300:
        response["x-goog-generation"] = handler.storage.get_file_obj(match[1], urllib.parse.unquote(match[2]))[
            "generation"
        ]
    with contextlib.suppress(BrokenPipeError):  # a client that was killed
        close(response)


@contextlib.contextmanager
def bucket() -> Iterator[Bucket]:
    """Skips, loudly, where the server or the client is not installed."""
    server = pytest.importorskip(
        "gcp_storage_emulator.server", reason="pip install gcp-storage-emulator: no bucket to test with"
    )
    pytest.importorskip("gcsfs", reason="no gcsfs, of the extra gcs: gs:// cannot be tested")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = Bucket(port)
    log, close = server.RequestHandler.log_message, server.Response.close
    server.RequestHandler.log_message = lambda self, text, *arguments: found.requests.append(text % arguments)
    server.Response.close = lambda response: _close(response, close)
    running = server.create_server("127.0.0.1", port, in_memory=True, default_bucket=NAME)
    running.start()
    before = {name: os.environ.get(name) for name in found.environment}
    os.environ |= found.environment
    try:
        yield found
    finally:
        running.stop()
        server.RequestHandler.log_message, server.Response.close = log, close
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
