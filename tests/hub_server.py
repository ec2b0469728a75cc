"""A small Hugging Face Hub on loopback: enough of its HTTP API for the real client.

Repository info (with and without a revision), the file tree, ``resolve`` by HEAD and GET, large files behind
a redirect to another host name with ``X-Linked-*`` headers, range requests, entity tags, gated and private
repositories, and downloads that are cut; and for uploads: creating a repository, checking a card's metadata, the
preupload call, large files by the LFS protocol, commits. What was asked for is kept in ``HubServer.requests``.

The header names and error codes are those of https://huggingface.co/docs/hub/api and of the
``huggingface_hub`` client (``X-Repo-Commit``, ``X-Error-Code: RepoNotFound`` and so on).
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants


@dataclass
class Repository:
    """Files by revision name; a commit id is made from their contents."""

    files: dict[str, bytes]
    revisions: dict[str, dict[str, bytes]] = field(default_factory=dict)
    token: str | None = None  # needed to see that the repository exists (private)
    gate: str | None = None  # token needed to download files (gated)
    large: int = 1000  # bytes from which a file lies behind a redirect

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        for name, files in {"main": self.files, **self.revisions}.items():
            commit = commit_id(files)
            if revision in (name, commit):
                return commit, files
        return None


@dataclass(frozen=True)
class Request:
    """One request as the server saw it."""

    method: str
    host: str
    path: str
    headers: Message


def commit_id(files: dict[str, bytes]) -> str:
    """40 hexadecimal digits that depend on names and contents."""
    digest = hashlib.sha1()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + files[name])
    return digest.hexdigest()


class HubServer:
    """The server, in a thread. Use as a context manager; give ``endpoint`` to the client as
    ``HF_ENDPOINT``."""

    def __init__(self, repositories: dict[str, Repository]) -> None:
        self.repositories = repositories
        self.requests: list[Request] = []
        self.cuts: list[int] = []  # bytes after which each next large download is cut off
        self.status: int | None = None  # answer everything with this status
        self.writers: dict[str, str] = {}  # the namespace that a token may write to
        self.refusals: dict[str, int] = {}  # status by step: create, validate, preupload, batch, lfs, commit
        self.messages: list[str] = []  # of commits
        self.large_files: dict[str, bytes] = {}  # uploaded, by SHA-256
        server = self

        class Handler(_Handler):
            hub = server

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Close the port: the Hub cannot be reached any more."""
        if self._thread.is_alive():
            self._http.shutdown()
            self._thread.join()
        self._http.server_close()

    def downloads(self) -> list[Request]:
        """Requests for the contents of files."""
        return [
            r for r in self.requests if r.method == "GET" and ("/cdn/" in r.path or "/resolve/" in r.path)
        ]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._take()

    def do_PUT(self) -> None:
        self._take()

    def _take(self) -> None:
        """Everything that uploads."""
        body = self._body()
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.requests.append(Request(self.command, self.headers.get("Host", ""), path, self.headers))
        if path == "/api/repos/create":
            return self._step(
                "create", lambda: self._create(json.loads(body)), json.loads(body)["organization"]
            )
        if path == "/api/validate-yaml":
            return self._step("validate", lambda: self._json({"errors": [], "warnings": []}, ""))
        if match := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
            return self._step("lfs", lambda: self._large(match[1], body))
        if match := re.fullmatch(r"/([^/]+)/([^/]+)\.git/info/lfs/objects/batch", path):
            return self._step("batch", lambda: self._batch(json.loads(body)), match[1])
        if match := re.fullmatch(r"/api/models/([^/]+)/([^/]+)/(preupload|commit)/main", path):
            name = f"{match[1]}/{match[2]}"
            if match[3] == "preupload":
                return self._step("preupload", lambda: self._preupload(name, json.loads(body)), match[1])
            return self._step("commit", lambda: self._commit(name, body), match[1])
        return self._error(404, "", "no such route")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _step(self, name: str, answer: Callable[[], None], namespace: str | None = None) -> None:
        """Answer unless this step is to be refused, or the token may not write to ``namespace``."""
        if status := self.hub.refusals.get(name):
            return self._error(status, "", f"{name} refused on purpose")
        if namespace is not None and self._token() is None:
            return self._error(401, "", "Invalid username or password.")
        if namespace is not None and self.hub.writers.get(self._token() or "") != namespace:
            return self._error(403, "", f"You don't have the rights to create a model under {namespace}")
        return answer()

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            body = json.dumps({"error": "exists", "url": f"{self.hub.endpoint}/{name}"}).encode()
            return self._send(409, body, {})
        self.hub.repositories[name] = Repository({})
        return self._json({"url": f"{self.hub.endpoint}/{name}", "name": name, "id": "0"}, "")

    def _preupload(self, name: str, asked: dict[str, Any]) -> None:
        large = self.hub.repositories[name].large
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] >= large else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in asked["files"]
        ]
        return self._json({"files": files}, "")

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = [
            item | {"actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{item['oid']}"}}}
            for item in asked["objects"]
        ]
        return self._json({"transfer": "basic", "objects": objects}, "")

    def _large(self, digest: str, body: bytes) -> None:
        if _sha256(body) != digest:
            return self._error(400, "", "the content has another SHA-256")
        self.hub.large_files[digest] = body
        return self._send(200, b"", {})

    def _commit(self, name: str, body: bytes) -> None:
        files: dict[str, bytes] = {}
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.large_files[value["oid"]]
        repository = self.hub.repositories[name]
        repository.files.update(files)
        commit = commit_id(repository.files)
        return self._json(
            {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{commit}", "commitOid": commit}, commit
        )

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.requests.append(Request(self.command, self.headers.get("Host", ""), path, self.headers))
        if self.hub.status is not None:
            return self._error(self.hub.status, "", "broken on purpose")
        if match := re.fullmatch(r"/cdn/([0-9a-f]{64})", path):
            return self._cdn(match[1])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?(?:/.*)?", path):
            return self._api(match[1], match[2], match[3] or "main", parse_qs(url.query))
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(match[1], match[2], match[3])
        return self._error(404, "", "no such route")

    def _visible(self, name: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.token and repository.token != self._token()):
            # The Hub answers the same for both, so that names of private repositories do not leak.
            self._error(404 if self._token() else 401, "RepoNotFound", "Repository not found")
            return None
        return repository

    def _token(self) -> str | None:
        header = self.headers.get("Authorization", "")
        return header.removeprefix("Bearer ") or None

    def _api(self, name: str, what: str | None, revision: str, query: dict[str, list[str]]) -> None:
        repository = self._visible(name)
        if repository is None:
            return None
        found = repository.at(revision)
        if found is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        commit, files = found
        if what == "tree":
            return self._json(
                [
                    {"type": "file", "path": path, "size": len(data), "oid": _blob(data)}
                    | (
                        {"lfs": {"oid": _sha256(data), "size": len(data), "pointerSize": 134}}
                        if len(data) >= repository.large
                        else {}
                    )
                    for path, data in sorted(files.items())
                ],
                commit,
            )
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(files)]
        if query.get("blobs"):
            for sibling in siblings:
                data = files[sibling["rfilename"]]
                sibling |= {"size": len(data), "blobId": _blob(data)}
                if len(data) >= repository.large:
                    sibling["lfs"] = {"sha256": _sha256(data), "size": len(data), "pointerSize": 134}
        info = {
            "_id": "0",
            "id": name,
            "modelId": name,
            "sha": commit,
            "private": repository.token is not None,
        }
        info |= {"gated": "manual" if repository.gate else False, "disabled": False, "tags": []}
        return self._json(info | {"downloads": 0, "likes": 0, "siblings": siblings}, commit)

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repository = self._visible(name)
        if repository is None:
            return None
        if repository.gate and repository.gate != self._token():
            return self._error(401, "GatedRepo", f"Access to model {name} is restricted.")
        found = repository.at(revision)
        if found is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        commit, files = found
        if path not in files:
            return self._error(404, "EntryNotFound", "Entry not found", commit)
        data = files[path]
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if len(data) < repository.large:
            return self._send(200, data, headers | {"ETag": f'"{_blob(data)}"'})
        headers |= {
            "Location": f"http://localhost:{self.hub.port}/cdn/{_sha256(data)}",
            "X-Linked-Etag": f'"{_sha256(data)}"',
            "X-Linked-Size": str(len(data)),
        }
        return self._send(302, b"Found", headers)

    def _cdn(self, digest: str) -> None:
        every = (
            (path, data)
            for repository in self.hub.repositories.values()
            for files in (repository.files, *repository.revisions.values())
            for path, data in files.items()
        )
        path, data = next(((path, data) for path, data in every if _sha256(data) == digest), ("", None))
        if data is None:
            return self._error(404, "", "no such blob")
        headers = {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        headers["Content-Disposition"] = f'attachment; filename="{path}";'
        status, start = 200, 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start, status = int(match[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = self.hub.cuts.pop(0) if self.command == "GET" and self.hub.cuts else None
        return self._send(status, data[start:], headers, cut)

    def _json(self, content: Any, commit: str) -> None:
        headers = {"Content-Type": "application/json; charset=utf-8", "X-Repo-Commit": commit}
        self._send(200, json.dumps(content).encode(), headers)

    def _error(self, status: int, code: str, message: str, commit: str | None = None) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        if commit:
            headers["X-Repo-Commit"] = commit
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def use_hub(monkeypatch: pytest.MonkeyPatch, endpoint: str, cache: Any, *, offline: bool = False) -> None:
    """Point the client of this process at ``endpoint``, as its environment variables would at its import."""
    url = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", f"{cache}/no-token")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
