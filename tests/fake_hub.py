"""A Hub of models and kernels on loopback, small enough to read: repositories in memory, commits over HTTP.

Every file is announced as a "regular" upload, so its content arrives inside the commit and no LFS store is needed.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

_API = r"/api/(?:models|kernels)/(?P<repo>[^/]+/[^/]+)"


@dataclass
class Repo:
    """One repository: its files, the same on each of its branches, and the id of its last commit."""

    branches: set[str] = field(default_factory=lambda: {"main"})
    files: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    @property
    def sha(self):
        return hashlib.sha1(json.dumps(self.messages).encode()).hexdigest()

    def commit(self, lines):
        """Applies the lines of a commit request: a header, then files and deletions."""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(f"{len(self.messages)} {value['summary']}")
            elif line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del self.files[value["path"]]
            else:
                raise ValueError(f"the fake Hub does not know the commit operation {line['key']!r}")


class FakeHub:
    """Context manager: the server runs in a thread from enter to exit, on a free port of 127.0.0.1."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []

    def __enter__(self):
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, home):
        """The variables under which a process takes this server for the Hub; `home` is its cache folder."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": "hf_fake",
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._dispatch(
            ("/api/repos/create", self._create),
            ("/api/validate-yaml", self._validate_yaml),
            (rf"{_API}/branch/(?P<revision>[\w.]+)", self._branch),
            (rf"{_API}/preupload/(?P<revision>[\w.]+)", self._preupload),
            (rf"{_API}/commit/(?P<revision>[\w.]+)", self._commit),
            body=body,
        )

    def do_GET(self):
        revision = r"(?P<revision>[\w.]+)"
        self._dispatch(
            (_API, self._info),
            (rf"{_API}/refs", self._refs),
            (rf"{_API}/revision/{revision}", self._info),
            (rf"{_API}/tree/{revision}(?P<folder>/.*)?", self._tree),
            (rf"/(?:kernels/)?(?P<repo>[^/]+/[^/]+)/resolve/{revision}/(?P<path>.+)", self._file),
        )

    do_HEAD = do_GET

    def _dispatch(self, *routes, **extra):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        for pattern, answer in routes:
            match = re.fullmatch(pattern, path)
            if match is None:
                continue
            arguments = match.groupdict()
            if "repo" in arguments and arguments["repo"] not in self.hub.repos:
                return self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            if not self._has_revision(**arguments) and answer != self._branch:
                return self._send(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
            return answer(**arguments, **extra)
        return self._send(404, {"error": f"the fake Hub has no {self.command} {path}"})

    def _has_revision(self, repo=None, revision="main", **_):
        return repo is None or revision == self.hub.repos[repo].sha or revision in self.hub.repos[repo].branches

    def _send(self, status, payload, headers=None):
        content = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content))} | (headers or {})
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _create(self, body):
        if self.headers.get("Authorization") != "Bearer hf_fake":
            return self._send(401, {"error": "Invalid token"})
        request = json.loads(body)
        repo_id = f"{request.get('organization') or 'tester'}/{request['name']}"
        if repo_id in self.hub.repos:
            return self._send(409, {"error": "exists", "url": f"{self.hub.endpoint}/{repo_id}"})
        self.hub.repos[repo_id] = Repo()
        return self._send(200, {"url": f"{self.hub.endpoint}/{repo_id}"})

    def _validate_yaml(self, body):
        content = json.loads(body)["content"]
        errors = [] if content.startswith("---\n") else [{"message": "the card has no YAML block"}]
        self._send(400 if errors else 200, {"errors": errors, "warnings": []})

    def _branch(self, repo, revision, body):
        self.hub.repos[repo].branches.add(revision)
        self._send(200, {})

    def _refs(self, repo):
        stored = self.hub.repos[repo]
        rows = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": stored.sha} for b in sorted(stored.branches)]
        self._send(200, {"branches": rows, "tags": [], "converts": []})

    def _preupload(self, repo, revision, body):
        files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
        self._send(200, {"files": files})

    def _commit(self, repo, revision, body):
        stored = self.hub.repos[repo]
        stored.commit([json.loads(line) for line in body.splitlines()])
        url = f"{self.hub.endpoint}/{repo}/commit/{stored.sha}"
        self._send(200, {"success": True, "commitOid": stored.sha, "commitUrl": url})

    def _info(self, repo, revision="main"):
        stored = self.hub.repos[repo]
        siblings = [{"rfilename": name} for name in sorted(stored.files)]
        self._send(200, {"id": repo, "modelId": repo, "sha": stored.sha, "private": False, "siblings": siblings})

    def _tree(self, repo, revision, folder):
        prefix = f"{folder.strip('/')}/" if folder else ""
        found = {name: data for name, data in self.hub.repos[repo].files.items() if name.startswith(prefix)}
        if prefix and not found:
            return self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        rows = [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in sorted(found.items())
        ]
        # what lies deeper is there as its folder, too
        folders = {prefix + name[len(prefix) :].split("/")[0] for name in found if "/" in name[len(prefix) :]}
        rows += [{"type": "directory", "path": name, "oid": "0" * 40} for name in sorted(folders)]
        return self._send(200, rows)

    def _file(self, repo, revision, path):
        stored = self.hub.repos[repo]
        if path not in stored.files:
            return self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        content = stored.files[path]
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        return self._send(
            200, content, {"Content-Type": "application/octet-stream", "ETag": etag, "X-Repo-Commit": stored.sha}
        )
