"""A model Hub for tests: loopback only, in memory, and able to fail on purpose."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors",)  # what goes through the large-file store


def identity(name: str, data: bytes) -> str:
    """A file's id as the Hub makes it: SHA-256 of large files, git's blob id of others."""
    if name.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


class StandInHub:
    """`commits[repository]`: list of (id, {name: bytes}), oldest first. `gated`: repositories nobody may read.

    `fail(method, path)` says what to do with a request: nothing special (None), answer with a status, "drop" it by
    hanging up, or "truncate" the file that it asks for.
    """

    def __init__(self, token: str = "hf_test") -> None:
        self.token = token
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.visibility: dict[str, str | None] = {}
        self.gated: set[str] = set()
        self.stored: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []
        self.fail: Callable[[str, str], int | str | None] = lambda method, path: None
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self, repository: str) -> dict[str, bytes]:
        """The files at the head of a repository."""
        return self.commits[repository][-1][1]

    def at(self, repository: str, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        """The commit of that id, or the head."""
        log = self.commits[repository]
        return log[-1] if revision in (None, "main") else next((entry for entry in log if entry[0] == revision), None)

    def commit(self, repository: str, files: dict[str, bytes]) -> str:
        """Adds a commit; returns its id."""
        log = self.commits.setdefault(repository, [])
        names = sorted((name, identity(name, data)) for name, data in files.items())
        oid = hashlib.sha1(repr((repository, len(log), names)).encode()).hexdigest()
        log.append((oid, files))
        return oid


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StandInHub
    truncated = False

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def answer(self, value: Any = None, status: int = 200, data: bytes | None = None, **headers: str) -> None:
        body = json.dumps(value).encode() if data is None else data
        self.send_response(status)
        for name, content in headers.items():
            self.send_header(name.replace("_", "-"), content)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if self.truncated else body)
            self.close_connection = self.truncated

    def refuse(self, status: int, code: str, **headers: str) -> None:
        self.answer({"error": code}, status, X_Error_Code=code, X_Error_Message=code, **headers)

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path))
        failure = self.hub.fail(self.command, path)
        if failure == "drop":
            self.close_connection = True
            self.connection.close()
            return None
        if isinstance(failure, int):
            return self.refuse(failure, "Injected")
        open_to_all = path.startswith("/stored/") or path == "/api/validate-yaml"
        if not open_to_all and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.refuse(401, "Unauthorized")
        for pattern, method in ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                given = found.groupdict()
                if "repo" in given and given["repo"] not in self.hub.commits:
                    return self.refuse(404, "RepoNotFound")
                if given.get("repo") in self.hub.gated:
                    return self.refuse(403, "GatedRepo")
                if "rev" in given and self.hub.at(given["repo"], given["rev"]) is None:
                    return self.refuse(404, "RevisionNotFound")
                self.truncated = failure == "truncate"
                return method(self, body, **given)
        return self.refuse(404, "EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.hub.commits:
            return self.answer({"error": "exists", "url": f"{self.hub.url}/{name}"}, 409)
        self.hub.commit(name, {})
        self.hub.visibility[name] = asked.get("visibility")
        return self.answer({"url": f"{self.hub.url}/{name}", "name": name})

    def valid(self, body: bytes) -> None:
        self.answer({"errors": [], "warnings": []})

    def before_upload(self, body: bytes, repo: str, rev: str) -> None:
        old = self.hub.files(repo)
        names = [entry["path"] for entry in json.loads(body)["files"]]
        answers = [
            {
                "path": name,
                "shouldIgnore": False,
                "uploadMode": "lfs" if name.endswith(LARGE) else "regular",
                "oid": identity(name, old[name]) if name in old else None,
            }
            for name in names
        ]
        self.answer({"files": answers})

    def large_files(self, body: bytes, repo: str) -> None:
        def one(entry: dict[str, Any]) -> dict[str, Any]:
            known = entry["oid"] in self.hub.stored
            upload = {"actions": {"upload": {"href": f"{self.hub.url}/stored/{entry['oid']}"}}}
            return {"oid": entry["oid"], "size": entry["size"], **({} if known else upload)}

        self.answer({"transfer": "basic", "objects": [one(entry) for entry in json.loads(body)["objects"]]})

    def store(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.refuse(400, "BadHash")
        self.hub.stored[oid] = body
        return self.answer({})

    def add_commit(self, body: bytes, repo: str, rev: str) -> None:
        files = dict(self.hub.files(repo))
        for line in map(json.loads, body.splitlines()):
            entry = line["value"]
            match line["key"]:
                case "file":
                    files[entry["path"]] = base64.b64decode(entry["content"])
                case "lfsFile":
                    files[entry["path"]] = self.hub.stored[entry["oid"]]
                case "deletedFile":
                    files.pop(entry["path"], None)
        oid = self.hub.commit(repo, files)
        self.answer({"commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "pullRequestUrl": None})

    def describe(self, body: bytes, repo: str, rev: str | None = None) -> None:
        oid, files = self.hub.at(repo, rev) or ("", {})
        names = [{"rfilename": name} for name in sorted(files)]
        self.answer({"id": repo, "sha": oid, "private": False, "tags": [], "siblings": names})

    def tree(self, body: bytes, repo: str, rev: str) -> None:
        def one(name: str, data: bytes) -> dict[str, Any]:
            large = {"lfs": {"oid": identity(name, data), "size": len(data), "pointerSize": 130}}
            entry = {"type": "file", "path": name, "size": len(data), "oid": identity("", data)}
            return entry | (large if name.endswith(LARGE) else {})

        _, files = self.hub.at(repo, rev) or ("", {})
        self.answer([one(name, data) for name, data in sorted(files.items())])

    def download(self, body: bytes, repo: str, rev: str, name: str) -> None:
        oid, files = self.hub.at(repo, rev) or ("", {})
        if name not in files:
            return self.refuse(404, "EntryNotFound", X_Repo_Commit=oid)
        data, about = files[name], {"X_Repo_Commit": oid, "ETag": f'"{identity(name, files[name])}"'}
        first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if first == 0:
            return self.answer(data=data, **about)
        return self.answer(data=data[first:], status=206, Content_Range=f"bytes {first}-{len(data) - 1}/{len(data)}")


REPO, REV = "(?P<repo>[^/]+/[^/]+)", "(?P<rev>[^/]+)"
ROUTES: list[tuple[str, Callable[..., None]]] = [
    ("POST /api/repos/create", _Handler.create),
    ("POST /api/validate-yaml", _Handler.valid),
    (f"POST /api/models/{REPO}/preupload/{REV}", _Handler.before_upload),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", _Handler.large_files),
    ("PUT /stored/(?P<oid>[0-9a-f]{64})", _Handler.store),
    (f"POST /api/models/{REPO}/commit/{REV}", _Handler.add_commit),
    (f"GET /api/models/{REPO}(?:/revision/{REV})?", _Handler.describe),
    (f"GET /api/models/{REPO}/tree/{REV}", _Handler.tree),
    (f"(?:GET|HEAD) /{REPO}/resolve/{REV}/(?P<name>.+)", _Handler.download),
]
