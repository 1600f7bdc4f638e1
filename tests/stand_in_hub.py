"""A stand-in for the Hugging Face hub on the loopback address: what its clients ask for models and
data sets (info, tree, files with etags and ranges) and what a push sends (login, create, commit).

Every change of a repository is a commit. `statuses` and `cuts` are the faults of a bad line. Left
out: LFS and xet, pages of long listings, pull requests.
"""

import base64
import hashlib
import json
import os
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from posttrain.serve.local_server import LocalServer

TOKEN = "hf_of_the_stand_in"
REPOSITORY = "/api/{kind:str}/{owner:str}/{name:str}"


@dataclass
class Repository:
    """`commits` are hash -> path -> content; `refs` are branch or tag -> hash."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        digest = hashlib.sha1(f"{len(self.commits)}".encode())
        for path in sorted(files):
            digest.update(path.encode() + b"\0" + files[path])
        sha = digest.hexdigest()
        self.commits[sha], self.refs[branch] = files, sha
        return sha


class StandInHub:
    """`with StandInHub() as hub:` serves at `hub.url`; `hub.environment(cache)` points a command at
    it."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.statuses: dict[str, list[int]] = {}
        """The end of a path -> the statuses of its next requests."""
        self.cuts: Counter[str] = Counter()
        """The end of a path -> of how many more of its bodies only a half arrives."""
        routes = [
            Route("/api/whoami-v2", self._whoami),
            Route("/api/repos/create", self._create, methods=["POST"]),
            Route("/api/validate-yaml", lambda _: JSONResponse({"warnings": [], "errors": []}), methods=["POST"]),
            Route(REPOSITORY, self._info),
            Route(REPOSITORY + "/revision/{revision}", self._info),
            Route(REPOSITORY + "/tree/{revision}", self._tree),
            Route(REPOSITORY + "/tree/{revision}/{folder:path}", self._tree),
            Route(REPOSITORY + "/paths-info/{revision}", self._tree, methods=["POST"]),
            Route(REPOSITORY + "/preupload/{revision}", self._preupload, methods=["POST"]),
            Route(REPOSITORY + "/commit/{revision}", self._commit, methods=["POST"]),
            Route("/datasets/{owner:str}/{name:str}/resolve/{revision}/{path:path}", self._file),
            Route("/{owner:str}/{name:str}/resolve/{revision}/{path:path}", self._file),
        ]
        self._app = Starlette(routes=routes)

    def put(self, name: str, files: Path | dict[str, bytes], kind: str = "models", branch: str = "main") -> str:
        """A commit with exactly these files; returns its hash."""
        if isinstance(files, Path):
            folder = files
            files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        return self.repositories.setdefault(f"{kind}/{name}", Repository()).commit(files, branch)

    def files(self, name: str) -> dict[str, bytes]:
        repository = self.repositories[f"models/{name}"]
        return repository.commits[repository.refs["main"]]

    def environment(self, cache: Path, token: str | None = None, offline: bool = False) -> dict[str, str]:
        """Of a command that knows this hub alone, with a cache of its own."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_HUB_CACHE": str(cache / "hub"),
            "HF_DATASETS_CACHE": str(cache / "datasets"),
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_TOKEN": token or "",
            "NO_PROXY": ",".join(filter(None, ("127.0.0.1", os.environ.get("NO_PROXY")))),
        }

    def __enter__(self) -> "StandInHub":
        self._server = LocalServer(self._app)
        self.url = self._server.url
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.close()

    # --- what is read ----------------------------------------------------------------------------

    def _found(self, request: Request) -> tuple[Repository, str, dict[str, bytes]] | Response:
        """The repository, a commit's hash and its files."""
        self.requests.append(f"{request.method} {request.url.path}")
        for end, statuses in self.statuses.items():
            if request.url.path.endswith(end) and statuses:
                return Response(status_code=statuses.pop(0))
        where = request.path_params
        kind = where.get("kind") or ("datasets" if request.url.path.startswith("/datasets/") else "models")
        repository = self.repositories.get(f"{kind}/{where['owner']}/{where['name']}")
        if repository is None or (repository.private and not _token(request)):
            return _error(401 if not _token(request) else 404, "RepoNotFound")
        revision = where.get("revision", "main")
        sha = repository.refs.get(revision, revision)
        if sha not in repository.commits:
            return _error(404, "RevisionNotFound")
        return repository, sha, repository.commits[sha]

    def _info(self, request: Request) -> Response:
        found = self._found(request)
        if isinstance(found, Response):
            return found
        repository, sha, files = found
        name = f"{request.path_params['owner']}/{request.path_params['name']}"
        listed = [{"rfilename": path} for path in sorted(files)]
        about = {"id": name, "sha": sha, "private": repository.private, "gated": repository.gated, "siblings": listed}
        return JSONResponse(about | {"tags": [], "downloads": 0, "likes": 0})

    async def _tree(self, request: Request) -> Response:
        found = self._found(request)
        if isinstance(found, Response):
            return found
        files = found[2]
        folders = {str(parent) for path in files for parent in Path(path).parents} - {"."}
        if request.method == "POST":
            is_json = "json" in request.headers["content-type"]
            paths = (await request.json())["paths"] if is_json else (await request.form()).getlist("paths")
            listed = [str(path) for path in paths]
        else:
            folder = request.path_params.get("folder", "")
            if folder and folder not in folders:
                return _error(404, "EntryNotFound")
            listed = [path for path in (*files, *folders) if path.startswith(folder and folder + "/")]
            if request.query_params.get("recursive", "").lower() != "true":
                listed = [path for path in listed if str(Path(path).parent) == (folder or ".")]
        rows: list[dict[str, Any]] = [
            {"type": "file", "path": path, "size": len(files[path]), "oid": hashlib.sha1(files[path]).hexdigest()}
            for path in sorted(listed)
            if path in files
        ]
        rows += [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in listed if path in folders]
        return JSONResponse(rows)

    def _file(self, request: Request) -> Response:
        found = self._found(request)
        if isinstance(found, Response):
            return found
        repository, sha, files = found
        path = request.path_params["path"]
        if repository.gated:
            return _error(403 if _token(request) else 401, "GatedRepo")
        if path not in files:
            return _error(404, "EntryNotFound")
        content, status = files[path], 200
        headers = {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        if wanted := request.headers.get("range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            begin, end = int(first), min(int(last or len(content)) + 1, len(content))
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
            content, status = content[begin:end], 206
        if request.method == "GET":
            for ending in self.cuts:
                if path.endswith(ending) and self.cuts[ending] > 0:
                    self.cuts[ending] -= 1
                    return StreamingResponse(_half(content), headers=headers | {"Content-Length": str(len(content))})
        return Response(content, status, headers)

    # --- what is pushed --------------------------------------------------------------------------

    def _whoami(self, request: Request) -> Response:
        return JSONResponse({"name": "me", "type": "user"}) if _token(request) else _error(401, None)

    async def _create(self, request: Request) -> Response:
        body = await request.json()
        name = f"{body.get('organization') or 'me'}/{body['name']}"
        if f"models/{name}" in self.repositories:
            return JSONResponse({"error": "You already created this model repo"}, 409)
        visibility = body.get("visibility", "public")
        self.repositories[f"models/{name}"] = Repository(private=bool(body.get("private")) or visibility == "private")
        self.put(name, {".gitattributes": b""})
        return JSONResponse({"url": f"{self.url}/{name}", "id": name, "name": name})

    async def _preupload(self, request: Request) -> Response:
        files = (await request.json())["files"]
        return JSONResponse(
            {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]}
        )

    async def _commit(self, request: Request) -> Response:
        found = self._found(request)
        if isinstance(found, Response):
            return found
        repository, _, files = found
        lines = [json.loads(line) for line in (await request.body()).splitlines()]
        new = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
        }
        sha = repository.commit(files | new)
        address = f"{self.url}/{request.path_params['owner']}/{request.path_params['name']}/commit/{sha}"
        return JSONResponse({"commitOid": sha, "commitUrl": address, "hookOutput": ""})


def _token(request: Request) -> bool:
    return request.headers.get("authorization") == f"Bearer {TOKEN}"


def _error(status: int, code: str | None) -> Response:
    headers = {"X-Error-Code": code, "X-Error-Message": code} if code else {}
    return JSONResponse({"error": code or "Unauthorized"}, status, headers)


async def _half(content: bytes) -> AsyncIterator[bytes]:
    yield content[: len(content) // 2]
    raise ConnectionAbortedError("the line is cut")
