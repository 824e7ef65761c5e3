"""A hub on this host: the part of the Hugging Face hub's protocol that reading data sets takes.

Repositories are folders, and a revision is a folder of one; `datasets` and `huggingface_hub` reach
it by `HF_ENDPOINT`, which they read when they are imported: a process of its own uses it.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """Data sets by name and revision.

    Args:
        repositories: Folder of each data set's revision, ``{"owner/name": {"main": folder}}``.
    """

    def __init__(self, repositories: Mapping[str, Mapping[str, Path]]) -> None:
        self.repositories = repositories
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def endpoint(self) -> str:
        """For `HF_ENDPOINT`."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, folder: Path) -> list[Path]:
        """Files of a revision."""
        return sorted(path for path in folder.rglob("*") if path.is_file())

    def commit(self, folder: Path) -> str:
        """Its id: 40 hex digits, of its content."""
        content = b"".join(path.read_bytes() for path in self.files(folder))
        return hashlib.sha1(content).hexdigest()

    def revision(self, name: str, wanted: str) -> tuple[str, Path] | None:
        """Commit and folder of a revision, by its name or commit."""
        for revision, folder in self.repositories.get(name, {}).items():
            if wanted in (revision, self.commit(folder)):
                return self.commit(folder), folder
        return None


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """An answer, or 404."""
        self._answer()

    def do_HEAD(self) -> None:
        """Its headers."""
        self._answer()

    def do_POST(self) -> None:
        """Some paths of a revision, asked for in the body."""
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: dict[str, Any] | None = None) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        found = self._found(path.strip("/").split("/"), body)
        if found is None:
            error = "EntryNotFound" if "/resolve/" in path else "RepoNotFound"
            self._send(404, b"{}", {"X-Error-Code": error, "X-Error-Message": "not here"})
        elif isinstance(found, Path):
            content = found.read_bytes()
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
            self._send(200, content, headers | {"X-Repo-Commit": self._commit})
        else:
            self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def _found(self, parts: list[str], body: dict[str, Any] | None) -> Any:
        """A file, what the API says, or None."""
        is_api = parts[0] == "api"
        kind, owner, name, *rest = [*parts[is_api:], "", "", ""]
        action = rest[0] if rest[0] else "revision"
        wanted = rest[1] if len(rest) > 1 and rest[1] else "main"
        revision = self.server.revision(f"{owner}/{name}", wanted)
        if kind != "datasets" or revision is None:
            return None
        self._commit, folder = revision
        where = folder.joinpath(*filter(None, rest[2:]))
        if not is_api:
            return where if action == "resolve" and where.is_file() else None
        if action == "revision":
            siblings = [{"rfilename": self._name(p, folder)} for p in self.server.files(folder)]
            names = {"id": f"{owner}/{name}", "sha": self._commit, "siblings": siblings}
            return names | {"private": False, "gated": False, "disabled": False, "tags": []}
        if action == "tree":
            return [self._entry(p, folder) for p in sorted(where.rglob("*"))] or None
        if action == "paths-info" and body is not None:
            asked = [folder / path for path in body["paths"]]
            return [self._entry(path, folder) for path in asked if path.exists()]
        return None

    def _name(self, path: Path, folder: Path) -> str:
        return path.relative_to(folder).as_posix()

    def _entry(self, path: Path, folder: Path) -> dict[str, Any]:
        name = self._name(path, folder)
        oid = hashlib.sha1(name.encode()).hexdigest()
        if path.is_dir():
            return {"type": "directory", "oid": oid, "size": 0, "path": name}
        return {"type": "file", "oid": oid, "size": path.stat().st_size, "path": name}

    def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def hub(repositories: Mapping[str, Mapping[str, Path]]) -> Iterator[Hub]:
    """A hub while the context lasts."""
    with Hub(repositories) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
