"""A local server that speaks as much of the Hugging Face Hub's HTTP protocol as its Python client needs.

Repos of models, datasets and Spaces, branches and pull requests, commits with large files (Git LFS, one part), file
trees, downloads with ETags, private repos, tokens. It checks what the real one checks: the token and its namespace,
sizes and SHA-256 of large files, the parent commit, the metadata of a card, the SDK of a Space, which it does not
build. It offers no Xet, so clients run with ``HF_HUB_DISABLE_XET=1``.
Its connection can be cut, before, in or after any request.

    with HubServer(tokens={"hf_…": "user"}) as hub:
        HfApi(endpoint=hub.url, token="hf_…").create_repo("user/name")
"""

import base64
import hashlib
import json
import re
import secrets
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".pt", ".gguf")


@dataclass
class Blob:
    """A file's content; ``lfs`` files are named by SHA-256, others as git does."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        content = self.content
        if self.lfs:
            content = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\n".encode()
            content += f"size {len(self.content)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


Commit = tuple[str, str, dict[str, Blob]]  # hash, message, files
MOMENT = "2025-01-01T00:00:00.000Z"


@dataclass
class PullRequest:
    """A pull request; its commits are those of the ref ``refs/pr/NUM``."""

    num: int
    title: str
    author: str
    status: str = "draft"


@dataclass
class Repo:
    """Commits of each branch and pull request of one repo, oldest first."""

    private: bool
    refs: dict[str, list[Commit]] = field(default_factory=lambda: {"main": []})
    pulls: list[PullRequest] = field(default_factory=list)

    @property
    def commits(self) -> list[Commit]:
        """Those of the main branch."""
        return self.refs["main"]

    def commit(self, message: str, files: dict[str, Blob], ref: str = "main") -> str:
        tree = "".join(f"{name} {blob.oid}\n" for name, blob in sorted(files.items()))
        history = self.refs[ref]
        oid = hashlib.sha1(f"{len(history)}{ref}{message}{tree}".encode()).hexdigest()
        history.append((oid, message, files))
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, Blob]]:
        oid, _, files = self.history(revision)[-1]
        return oid, files

    def history(self, revision: str) -> list[Commit]:
        """Commits up to a branch, a pull request's ref or a hash."""
        if revision in self.refs:
            return self.refs[revision]
        for history in self.refs.values():
            for i, (oid, _, _) in enumerate(history):
                if oid == revision:
                    return history[: i + 1]
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")


class Refusal(Exception):
    """An HTTP error in the Hub's form."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


class HubServer(ThreadingHTTPServer):
    """The server; a context manager that runs it on a free port of this machine.

    Attributes:
        tokens: User of each token.
        repos: Repos by type and id.
        requests: Method, path and whether the request was authorised, in order.
        failures: Status to answer with, by a regular expression that ``METHOD path`` must contain.
        cut_at: Number of the request, from 0 and from when this was set, from which on the connection is cut.
        damaged: Name of a file of which other bytes are kept than those sent.
        lose_answer: End of the paths of the requests whose answers are lost, though they are carried out.
        cut_how: Whether that request is cut off before it is read, in its body, or before its answer comes.
    """

    daemon_threads = True

    def __init__(self, tokens: dict[str, str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.tokens = tokens
        self.repos: dict[tuple[str, str], Repo] = {}
        self.large: dict[str, bytes] = {}
        self.expected: dict[str, tuple[str, int]] = {}
        self.requests: list[tuple[str, str, bool]] = []
        self.failures: dict[str, int] = {}
        self.damaged: str | None = None
        self.lose_answer: str | None = None
        self.cut_at: int | None = None
        self.cut_how: Literal["before", "during", "after"] = "before"
        self.lock = threading.RLock()

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()
        self.server_close()

    def files(self, repo_type: str, repo_id: str) -> dict[str, bytes]:
        """Content of each file of a repo's last commit."""
        return {name: blob.content for name, blob in self.repos[repo_type, repo_id].commits[-1][2].items()}


class Handler(BaseHTTPRequestHandler):
    """Routes a request to the method that answers it, with the named parts of its path."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the body of an answer waits 40 ms for the head to be acknowledged
    server: HubServer
    rev = r"/(?P<revision>[^/]+)"  # quoted, so that refs/pr/1 is one part of the path
    api = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo_id>[^/]+/[^/]+)"
    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/repos/create", "create_repo"),
        ("GET", api, "repo_info"),
        ("GET", api + r"/revision" + rev, "repo_info"),
        ("GET", api + r"/tree" + rev + r"(?:/(?P<folder>.+))?", "tree"),
        ("POST", api + r"/paths-info" + rev, "paths_info"),
        ("POST", api + r"/preupload" + rev, "preupload"),
        ("POST", api + r"/commit" + rev, "commit"),
        ("GET", api + r"/refs", "list_refs"),
        ("POST", api + r"/branch/(?P<branch>[^/]+)", "create_branch"),
        ("DELETE", api + r"/branch/(?P<branch>[^/]+)", "delete_branch"),
        ("GET", api + r"/discussions", "list_pulls"),
        ("POST", api + r"/discussions", "create_pull"),
        ("GET", api + r"/discussions/(?P<num>\d+)", "pull"),
        ("POST", api + r"/discussions/(?P<num>\d+)/status", "change_pull"),
        ("POST", r"/(?P<kind>datasets/|spaces/)?(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<key>\w+)", "lfs_put"),
        ("POST", r"/lfs-verify", "lfs_verify"),
        ("GET", r"/(?P<kind>datasets/|spaces/)?(?P<repo_id>[^/]+/[^/]+)/resolve" + rev + r"/(?P<path>.+)", "resolve"),
    )

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def do_DELETE(self) -> None:
        self._answer("DELETE")

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, method: str) -> None:
        with self.server.lock:
            how = None if self.server.cut_at is None or self.server.cut_at > 0 else self.server.cut_how
            if how is not None:
                self.server.cut_how = "before"  # and so for all that follow: the line is down
            elif self.server.cut_at is not None:
                self.server.cut_at -= 1
        size = int(self.headers.get("Content-Length") or 0)
        if how in ("before", "during"):
            self.rfile.read(size // 2 if how == "during" else 0)
            self._hang_up()
            return
        self.body = self.rfile.read(size)
        self.answers = how is None and not (self.server.lose_answer and self.path.endswith(self.server.lose_answer))
        parts = urlsplit(self.path)
        path, self.query = unquote(parts.path), parse_qs(parts.query)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.user = self.server.tokens.get(token)
        with self.server.lock:
            self.server.requests.append((self.command, path, self.user is not None))
            try:
                for pattern, status in self.server.failures.items():
                    if re.search(pattern, f"{self.command} {path}"):
                        raise Refusal(status, "as the test wants it")
                if token and self.user is None:
                    raise Refusal(401, "Invalid credentials in Authorization header")
                for verb, pattern, name in self.ROUTES:
                    match = re.fullmatch(pattern, parts.path) if verb == method else None
                    if match:
                        named = {key: value and unquote(value) for key, value in match.groupdict().items()}
                        return getattr(self, name)(**named)
                raise Refusal(404, f"no such route: {method} {path}")
            except Refusal as refusal:
                self._json({"error": refusal.message, **refusal.body}, refusal.status, refusal)

    def _json(self, value: Any, status: int = 200, refusal: Refusal | None = None) -> None:
        headers = {"Content-Type": "application/json"}
        if refusal is not None:
            headers["X-Error-Message"] = refusal.message
            if refusal.code is not None:
                headers["X-Error-Code"] = refusal.code
        self._send(json.dumps(value).encode(), headers, status)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
        if not self.answers:
            return self._hang_up()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _repo(self, kind: str | None, repo_id: str, write: bool = False) -> Repo:
        """A repo the user may see; the Hub hides private ones as if they did not exist."""
        repo_type = (kind or "models").rstrip("/").removesuffix("s")
        repo = self.server.repos.get((repo_type, repo_id))
        if repo is None or (repo.private and self.user != repo_id.partition("/")[0]):
            raise Refusal(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write and self.user != repo_id.partition("/")[0]:
            raise Refusal(403, f"you may not write to {repo_id}")
        return repo

    def whoami(self) -> None:
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        self._json({"type": "user", "name": self.user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def validate_yaml(self) -> None:
        request = json.loads(self.body)
        parts = re.match(r"---\n(.*?)\n---\n", request["content"], flags=re.DOTALL)
        try:
            metadata = yaml.safe_load(parts[1]) if parts else {}
        except yaml.YAMLError as error:
            return self._json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        errors = [{"message": message} for message in metadata_errors(metadata, request["repoType"])]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def create_repo(self) -> None:
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        request = json.loads(self.body)
        repo_type = request.get("type", "model")
        owner = request.get("organization") or self.user
        if owner != self.user:
            raise Refusal(403, f"You don't have the rights to create a {repo_type} under {owner!r}")
        repo_id = f"{owner}/{request['name']}"
        url = f"{self.server.url}/{'' if repo_type == 'model' else f'{repo_type}s/'}{repo_id}"
        if repo_type == "space" and request.get("sdk") not in ("gradio", "docker", "static"):
            raise Refusal(400, '"sdk" must be one of gradio, docker, static')
        if (repo_type, repo_id) in self.server.repos:
            raise Refusal(409, "You already created this repo", url=url)
        repo = self.server.repos[repo_type, repo_id] = Repo(
            private=request.get("visibility") == "private" or bool(request.get("private"))
        )
        first = {".gitattributes": Blob(b"*.safetensors filter=lfs\n", lfs=False)}
        if repo_type == "space":  # which cannot be built without a card
            first["README.md"] = Blob(
                f"---\ntitle: {request['name']}\nsdk: {request['sdk']}\n---\n".encode(), lfs=False
            )
        repo.commit("initial commit", first)
        self._json({"url": url, "name": repo_id, "id": secrets.token_hex(12)})

    def repo_info(self, kind: str, repo_id: str, revision: str = "main") -> None:
        repo = self._repo(kind, repo_id)
        oid, files = repo.at(revision)
        self._json(
            {
                "_id": "0",
                "id": repo_id,
                "modelId": repo_id,
                "author": repo_id.partition("/")[0],
                "sha": oid,
                "private": repo.private,
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "lastModified": MOMENT,
                "createdAt": MOMENT,
                "siblings": [{"rfilename": name} for name in sorted(files)],
            }
        )

    def _entry(self, name: str, blob: Blob) -> dict[str, Any]:
        entry = {"type": "file", "path": name, "size": len(blob.content), "oid": blob.oid}
        if blob.lfs:
            entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 134}
        return entry

    def tree(self, kind: str, repo_id: str, revision: str, folder: str | None) -> None:
        _, files = self._repo(kind, repo_id).at(revision)
        root = f"{folder}/" if folder else ""
        files = {name: blob for name, blob in sorted(files.items()) if name.startswith(root)}
        if folder is not None and not files:
            raise Refusal(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        entries, folders = [], set()
        for name, blob in files.items():
            above = [name[: match.start()] for match in re.finditer("/", name) if match.start() > len(root)]
            folders |= set(above[:1] if self.query.get("recursive") != ["true"] else above)
            if self.query.get("recursive") == ["true"] or not above:
                entries.append(self._entry(name, blob))
        self._json([{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in folders] + entries)

    def list_refs(self, kind: str, repo_id: str) -> None:
        repo = self._repo(kind, repo_id)
        heads = {name: history[-1][0] for name, history in repo.refs.items()}
        found = {
            what: [
                {"name": name, "ref": name if pulls else f"refs/heads/{name}", "targetCommit": oid}
                for name, oid in heads.items()
                if name.startswith("refs/pr/") == pulls
            ]
            for what, pulls in (("branches", False), ("pullRequests", True))
        }
        self._json({**found, "converts": [], "tags": []})

    def create_branch(self, kind: str, repo_id: str, branch: str) -> None:
        repo = self._repo(kind, repo_id, write=True)
        if branch in repo.refs:
            raise Refusal(409, f"Reference already exists: refs/heads/{branch}")
        repo.refs[branch] = list(repo.history(json.loads(self.body or b"{}").get("startingPoint", "main")))
        self._json({})

    def delete_branch(self, kind: str, repo_id: str, branch: str) -> None:
        repo = self._repo(kind, repo_id, write=True)
        if branch == "main":
            raise Refusal(403, "Cannot delete the main branch")
        if branch not in repo.refs:
            raise Refusal(404, f"Reference does not exist: refs/heads/{branch}", "RevisionNotFound")
        del repo.refs[branch]
        self._json({})

    def _pull(self, kind: str, repo_id: str, pull: PullRequest) -> dict[str, Any]:
        return {
            "num": pull.num,
            "title": pull.title,
            "author": {"name": pull.author},
            "createdAt": MOMENT,
            "status": pull.status,
            "isPullRequest": True,
            "repo": {"name": repo_id, "type": kind.removesuffix("s")},
            "changes": {"base": "refs/heads/main"},
            "filesWithConflicts": [],
            "events": [],
            "diff": "",
        }

    def list_pulls(self, kind: str, repo_id: str) -> None:
        pulls = self._repo(kind, repo_id).pulls
        (status,) = self.query.get("status", ["all"])
        (author,) = self.query.get("author", [None])
        open_or_not = {"open": ("open", "draft"), "closed": ("closed", "merged")}.get(status)
        found = [
            self._pull(kind, repo_id, pull)
            for pull in pulls
            if (open_or_not is None or pull.status in open_or_not) and author in (None, pull.author)
        ]
        self._json({"discussions": found, "count": len(found), "start": 0})

    def create_pull(self, kind: str, repo_id: str) -> None:
        repo = self._repo(kind, repo_id)  # whoever may read may propose
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        request = json.loads(self.body)
        pull = PullRequest(len(repo.pulls) + 1, request["title"], self.user)
        repo.pulls.append(pull)
        repo.refs[f"refs/pr/{pull.num}"] = list(repo.commits)
        self._json(self._pull(kind, repo_id, pull))

    def pull(self, kind: str, repo_id: str, num: str) -> None:
        pulls = self._repo(kind, repo_id).pulls
        if int(num) > len(pulls):
            raise Refusal(404, "Discussion not found")
        self._json(self._pull(kind, repo_id, pulls[int(num) - 1]))

    def change_pull(self, kind: str, repo_id: str, num: str) -> None:
        pull = self._repo(kind, repo_id).pulls[int(num) - 1]
        if self.user not in (pull.author, repo_id.partition("/")[0]):
            raise Refusal(403, "you may not change this pull request")
        pull.status = json.loads(self.body)["status"]
        event = {"id": "0" * 24, "type": "status-change", "createdAt": MOMENT, "data": {"status": pull.status}}
        self._json({"newStatus": event})

    def paths_info(self, kind: str, repo_id: str, revision: str) -> None:
        _, files = self._repo(kind, repo_id).at(revision)
        if "json" in (self.headers.get("Content-Type") or ""):
            wanted = json.loads(self.body)["paths"]
        else:
            wanted = parse_qs(self.body.decode()).get("paths", [])
        self._json([self._entry(name, files[name]) for name in wanted if name in files])

    def preupload(self, kind: str, repo_id: str, revision: str) -> None:
        _, files = self._writable(kind, repo_id, revision).at(revision)
        answer = []
        for item in json.loads(self.body)["files"]:
            lfs = item["path"].endswith(LFS_SUFFIXES) or item["size"] > 10 << 20
            entry = {"path": item["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if item["path"] in files:
                blob = files[item["path"]]
                entry["oid"] = blob.sha256 if blob.lfs else blob.oid
            answer.append(entry)
        self._json({"files": answer})

    def lfs_batch(self, kind: str | None, repo_id: str) -> None:
        if self._repo(kind, repo_id) and self.user is None:
            raise Refusal(401, "Invalid username or password.")
        objects = []
        for item in json.loads(self.body)["objects"]:
            entry = {"oid": item["oid"], "size": item["size"], "authenticated": True}
            if item["oid"] not in self.server.large:
                key = secrets.token_hex(8)  # as a presigned URL: whoever knows it may put this object, once
                self.server.expected[key] = (item["oid"], item["size"])
                entry["actions"] = {
                    "upload": {"href": f"{self.server.url}/lfs/{key}"},
                    "verify": {"href": f"{self.server.url}/lfs-verify"},
                }
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, key: str) -> None:
        if key not in self.server.expected:
            raise Refusal(403, "SignatureDoesNotMatch")
        oid, size = self.server.expected.pop(key)
        if (hashlib.sha256(self.body).hexdigest(), len(self.body)) != (oid, size):
            raise Refusal(400, "the content does not match its SHA-256")
        self.server.large[oid] = self.body
        self._send(b"", {"ETag": f'"{oid}"'})

    def lfs_verify(self) -> None:
        request = json.loads(self.body)
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        if len(self.server.large.get(request["oid"], b"")) != request["size"]:
            raise Refusal(404, "object not found")
        self._json({})

    def _writable(self, kind: str, repo_id: str, revision: str) -> Repo:
        """A repo that the user may write to at this revision: a pull request's author may at its own."""
        repo = self._repo(kind, repo_id)
        own = any(revision == f"refs/pr/{pull.num}" and pull.author == self.user for pull in repo.pulls)
        return repo if own else self._repo(kind, repo_id, write=True)

    def commit(self, kind: str, repo_id: str, revision: str) -> None:
        repo = self._writable(kind, repo_id, revision)
        if revision not in repo.refs:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        head, files = repo.at(revision)
        header, *operations = (json.loads(line) for line in self.body.splitlines())
        if header["key"] != "header" or not header["value"]["summary"]:
            raise Refusal(400, "the first line must be the header")
        if header["value"].get("parentCommit", head) != head:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.server.large:
                    raise Refusal(400, f"{value['path']} was not uploaded")
                files[value["path"]] = Blob(self.server.large[value["oid"]], lfs=True)
            elif operation["key"] == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            else:
                raise Refusal(400, f"cannot {operation['key']} {value['path']}")
        if self.server.damaged in files:
            blob = files[self.server.damaged]
            files[self.server.damaged] = Blob(b"not " + blob.content, blob.lfs)
        oid = repo.commit(header["value"]["summary"], files, revision)
        self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{repo_id}/commit/{oid}"})

    def resolve(self, kind: str | None, repo_id: str, revision: str, path: str) -> None:
        oid, files = self._repo(kind, repo_id).at(revision)
        if path not in files:
            self._send(b"", {"X-Repo-Commit": oid, "X-Error-Code": "EntryNotFound"}, 404)
            return
        blob = files[path]
        headers = {
            "X-Repo-Commit": oid,
            "ETag": f'"{blob.sha256 if blob.lfs else blob.oid}"',
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        content, total = blob.content, len(blob.content)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            self._send(content, headers)
            return
        first, last = int(wanted[1]), min(int(wanted[2] or total - 1), total - 1)
        self._send(content[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{total}"}, 206)


def metadata_errors(metadata: Any, repo_type: str) -> list[str]:
    """What the Hub refuses in a card's metadata, for the keys this project writes."""
    if not isinstance(metadata, dict):
        return ["metadata must be a mapping"]
    errors = []
    for key, kinds in {
        "license": str,
        "base_model": (str, list),
        "datasets": (str, list),
        "models": (str, list),
        "tags": list,
        "language": (str, list),
        "pipeline_tag": str,
        "library_name": str,
        "task_categories": list,
        "configs": list,
    }.items():
        if key in metadata and not isinstance(metadata[key], kinds):
            errors.append(f'"{key}" has the wrong type')
    repo_id = re.compile(r"[\w.-]+(/[\w.-]+)?")
    for key in ("base_model", "datasets", "models"):
        values = metadata.get(key) or []
        for value in [values] if isinstance(values, str) else values:
            if not repo_id.fullmatch(str(value)):
                errors.append(f'"{key}" with value "{value}" is not valid: it must be a repo id')
    if repo_type == "space":
        colors = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
        for key, allowed in {"sdk": ("gradio", "docker", "static"), "colorFrom": colors, "colorTo": colors}.items():
            if metadata.get(key) not in (allowed if key == "sdk" else (None, *allowed)):
                errors.append(f'"{key}" must be one of {", ".join(allowed)}')
        for key in ("sdk_version", "python_version"):
            if not isinstance(metadata.get(key, ""), str):
                errors.append(f'"{key}" must be a string')
    if repo_type == "model":
        for model in metadata.get("model-index", []):
            for result in model.get("results", [{}]):
                if not {"task", "metrics"} <= result.keys() or not result["task"].get("type"):
                    errors.append('"model-index[0].results" needs a task and metrics')
                for metric in result.get("metrics", []):
                    if not {"type", "value"} <= metric.keys():
                        errors.append('"model-index[0].results[0].metrics" needs type and value')
                if "dataset" in result and not {"type", "name"} <= result["dataset"].keys():
                    errors.append('"model-index[0].results[0].dataset" needs type and name')
    return errors
