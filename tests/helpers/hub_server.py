"""A small Hugging Face hub on this machine: one repository, range requests, and a count of the bytes sent."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

# The hub's answers by repository: (status, code that its client turns into an exception).
REFUSALS = {"own/gated": (403, "GatedRepo"), "own/none": (404, "RepoNotFound"), "own/private": (401, "")}


class Hub(ThreadingHTTPServer):
    """A hub with the repository `own/model`, whose files are those of a folder.

    Attributes:
        folder: the files.
        commit: the commit of the branch main.
        sent: bytes of each file that were sent.
    """

    def __init__(self, folder: Path, commit: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.commit, self.sent = folder, commit, Counter[str]()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def weight_bytes(self) -> int:
        """Bytes that were sent of files of weights."""
        return sum(n for name, n in self.sent.items() if name.endswith(".safetensors"))


class Handler(BaseHTTPRequestHandler):
    """Answers what huggingface_hub asks: a revision, and a file or a part of it."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        is_api = parts[0] == "api"
        name = "/".join(parts[2:4] if is_api else parts[:2])
        revision = (parts[5] if len(parts) > 5 else "main") if is_api else parts[3]
        if name in REFUSALS:
            self.refuse(*REFUSALS[name])
        elif name != "own/model" or revision not in ("main", self.server.commit):
            self.refuse(404, "RevisionNotFound")
        elif is_api:
            files = [{"rfilename": path.name} for path in sorted(self.server.folder.iterdir())]
            tree = [{"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0"}
                    for path in self.server.folder.iterdir()]  # fmt: skip
            info = {"id": name, "sha": self.server.commit, "siblings": files}
            self.answer(json.dumps(tree if parts[4] == "tree" else info).encode())
        else:
            self.send_file(self.server.folder / parts[4])

    do_HEAD = do_GET

    def send_file(self, path: Path) -> None:
        """Answer with a file or, if the client asks for a range of bytes, with these."""
        if not path.is_file():
            return self.refuse(404, "EntryNotFound")
        first, last, size = 0, path.stat().st_size - 1, path.stat().st_size
        if wanted := self.headers.get("Range"):
            begin, end = map(int, wanted.removeprefix("bytes=").split("-"))
            first, last = begin, min(end, last)
        headers = {"ETag": f'"{path.name}"', "Content-Range": f"bytes {first}-{last}/{size}"}
        if self.command == "HEAD":
            return self.answer(b"", n_bytes=size, **headers)
        with path.open("rb") as file:
            file.seek(first)
            content = file.read(last + 1 - first)
        self.server.sent[path.name] += len(content)
        self.answer(content, 206 if wanted else 200, **headers)

    def answer(self, content: bytes, status: int = 200, n_bytes: int | None = None, **headers: str) -> None:
        """Send an answer. n_bytes: of the whole file, where `content` is left out."""
        self.send_response(status)
        length = len(content) if n_bytes is None else n_bytes
        known = {"X-Repo-Commit": self.server.commit, "Content-Length": str(length)}
        for key, value in (known | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def refuse(self, status: int, code: str) -> None:
        self.answer(b"", status, **{"X-Error-Code": code} if code else {})

    def log_message(self, *_) -> None:
        pass


@contextmanager
def serve_hub(folder: Path, commit: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve a folder as the hub's repository `own/model` to this process.

    Args:
        folder: the repository's files.
        commit: the commit of its branch main.
        cache: the hub's cache of this process meanwhile.
        monkeypatch: the test's.
    """
    with Hub(folder, commit) as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        yield hub
        hub.shutdown()
        thread.join()
