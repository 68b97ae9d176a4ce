"""A small W&B server for tests: takes one run after another as wandb-core sends it, or fails as it is told to.

It answers what wandb 0.31 asks for in an online run: who the key belongs to, the state of a run that may be resumed,
the run's record, the file stream with the history, and files and artifacts. It is no W&B server otherwise.
"""

from __future__ import annotations

import gzip
import json
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Fault = int | Literal["hang", "drop"]
"""An HTTP status, no answer until the server closes, or a connection that is cut."""
ENTITY = "lab"


@dataclass
class ReceivedRun:
    """What the server knows of one run."""

    record: dict[str, Any] = field(default_factory=dict)
    """The last value that was sent of every field of UpsertBucket."""
    lines: dict[int, str] = field(default_factory=dict)
    """History by offset, as the file stream sends it."""
    sent: int = 0
    """History lines that arrived, repeats included."""
    summary: dict[str, Any] = field(default_factory=dict)
    exit_codes: list[int] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)

    def history(self) -> list[dict[str, Any]]:
        """Points in the order of their offsets, without wandb's own keys other than ``_step``."""
        rows = [json.loads(self.lines[offset]) for offset in sorted(self.lines)]
        return [{k: v for k, v in row.items() if k == "_step" or not k.startswith("_")} for row in rows]

    def bucket(self, name: str) -> dict[str, Any]:
        """The run as ``RunResumeStatus`` gives it."""
        last = [self.lines[max(self.lines)]] if self.lines else []
        return {
            "id": f"id-{name}", "name": name, "displayName": self.record.get("displayName"),
            "summaryMetrics": json.dumps(self.summary), "config": self.record.get("config") or "{}",
            "historyLineCount": len(self.lines), "eventsLineCount": 0, "logLineCount": 0,
            "historyTail": json.dumps(last), "eventsTail": "[]", "tags": self.record.get("tags") or [],
            "notes": None, "wandbConfig": json.dumps({"t": 1} if self.record.get("config") else {}),
        }  # fmt: skip


class WandbServer:
    """Listens on a free port of 127.0.0.1 while it is used as a context manager.

    Args:
        fault: called with the name of what is asked (an operation of GraphQL, ``file_stream``, ``upload`` or
            ``other``) and how often it was asked before; None answers properly.
    """

    def __init__(self, fault: Callable[[str, int], Fault | None] = lambda *_: None) -> None:
        self.fault = fault
        self.runs: dict[str, ReceivedRun] = {}
        self.artifacts: dict[str, dict[str, Any]] = {}
        """Id to the input of CreateArtifact, ``committed`` and ``files``: name to bytes."""
        self.asked: list[str] = []
        self.unknown: list[str] = []
        self.keys: set[str] = set()
        """Authorization headers that came."""
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._http.shutdown()
        self._http.server_close()

    def take(self, http: BaseHTTPRequestHandler) -> None:
        """Answers one request."""
        body = http.rfile.read(int(http.headers.get("Content-Length") or 0))
        body = gzip.decompress(body) if http.headers.get("Content-Encoding") == "gzip" else body
        query = json.loads(body) if http.path == "/graphql" else {}
        kind = _kind(http.path, query)
        with self._lock:
            fault = self.fault(kind, self.asked.count(kind))
            self.asked.append(kind)
            self.keys.add(http.headers.get("Authorization") or "")
            answer = self._answer(kind, http.path, body, query) if fault is None else {"error": "as told"}
        if fault == "hang":
            self._closing.wait()
        if fault in ("hang", "drop"):
            http.close_connection = True
            http.connection.shutdown(socket.SHUT_RDWR)
            return
        content = json.dumps(answer).encode()
        http.send_response(fault if isinstance(fault, int) else 200)
        http.send_header("Content-Type", "application/json")
        http.send_header("Content-Length", str(len(content)))
        http.end_headers()
        if http.command != "HEAD":
            http.wfile.write(content)

    def _answer(self, kind: str, path: str, body: bytes, query: dict[str, Any]) -> Any:
        if kind == "file_stream":
            return self._stream(path.split("/")[-2], json.loads(body))
        if kind == "upload":
            _, _, owner, name = path.split("/", 3)
            files = self.artifacts[owner]["files"] if owner in self.artifacts else self.runs[owner].files
            files[name] = body
            return {}
        if kind == "other":
            return {}
        operation = getattr(self, f"_{kind}", None)
        if operation is None:
            self.unknown.append(kind)
            return {"data": None, "errors": [{"message": f"no such operation: {kind}"}]}
        return {"data": operation(query.get("variables") or {})}

    def _stream(self, name: str, sent: dict[str, Any]) -> dict[str, Any]:
        run = self.runs[name]
        for file, chunk in (sent.get("files") or {}).items():
            if file == "wandb-history.jsonl":
                run.sent += len(chunk["content"])
                run.lines |= {chunk["offset"] + at: line for at, line in enumerate(chunk["content"])}
            elif file == "wandb-summary.json":
                run.summary = json.loads(chunk["content"][-1])
        if sent.get("complete"):
            run.exit_codes.append(sent["exitcode"])
        return {"limits": {}}

    def _Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        user = {"id": "u", "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}", "teams": {"edges": []}}
        return {"viewer": user}

    def _ServerFeaturesQuery(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _RunResumeStatus(self, asked: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(asked["name"])
        bucket = run.bucket(asked["name"]) if run else None
        return {"model": {**_project(asked["project"]), "bucket": bucket}}

    def _UpsertBucket(self, asked: dict[str, Any]) -> dict[str, Any]:
        inserted = asked["name"] not in self.runs
        run = self.runs.setdefault(asked["name"], ReceivedRun())
        run.record |= {key: value for key, value in asked.items() if value is not None}
        bucket = run.bucket(asked["name"]) | {"project": _project(run.record["project"]), "sweepName": None}
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def _CreateRunFiles(self, asked: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{asked['run']}/{name}"} for name in asked["files"]]
        return {"createRunFiles": {"runID": f"id-{asked['run']}", "uploadHeaders": [], "files": files}}

    def _CreateArtifact(self, asked: dict[str, Any]) -> dict[str, Any]:
        name = f"artifact-{len(self.artifacts)}"
        self.artifacts[name] = {**asked["input"], "committed": False, "files": {}}
        artifact = {"id": name, "state": "PENDING", "artifactSequence": {"id": "s", "latestArtifact": None}}
        return {"createArtifact": {"artifact": artifact}}

    def _CreateArtifactManifest(self, asked: dict[str, Any]) -> dict[str, Any]:
        file = self._upload_to(asked["artifactID"], asked["name"])
        manifest = {"id": f"{asked['artifactID']}/{asked['name']}", "file": file}
        return {"createArtifactManifest": {"artifactManifest": manifest}}

    def _UpdateArtifactManifest(self, asked: dict[str, Any]) -> dict[str, Any]:
        owner, name = asked["artifactManifestID"].split("/", 1)
        manifest = {"id": asked["artifactManifestID"], "file": self._upload_to(owner, name)}
        return {"updateArtifactManifest": {"artifactManifest": manifest}}

    def _CreateArtifactFiles(self, asked: dict[str, Any]) -> dict[str, Any]:
        nodes = []
        for file in asked["input"]["artifactFiles"]:
            place = self._upload_to(file["artifactID"], file["name"])
            nodes.append({**place, "storagePath": None, "uploadMultipartUrls": None, "name": file["name"],
                          "displayName": file["name"], "artifact": {"id": file["artifactID"]}})  # fmt: skip
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def _CommitArtifact(self, asked: dict[str, Any]) -> dict[str, Any]:
        artifact = self.artifacts[asked["artifactID"]]
        artifact["committed"] = True
        return {"commitArtifact": {"artifact": {"id": asked["artifactID"], "digest": artifact["digest"]}}}

    def _upload_to(self, owner: str, name: str) -> dict[str, Any]:
        return {"id": "f", "name": name, "uploadUrl": f"{self.url}/upload/{owner}/{name}", "uploadHeaders": []}


def _project(name: str) -> dict[str, Any]:
    return {"id": "p", "name": name, "entity": {"id": "e", "name": ENTITY}}


def _kind(path: str, query: dict[str, Any]) -> str:
    if path == "/graphql":
        return str(query.get("operationName"))
    return "file_stream" if path.endswith("/file_stream") else "upload" if path.startswith("/upload/") else "other"


def _handler(server: WandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle(self) -> None:
            with suppress(ConnectionError):  # wandb-core hangs up as it likes
                super().handle()

        def log_message(self, *_: Any) -> None: ...

        def _take(self) -> None:
            server.take(self)

        do_GET = do_POST = do_PUT = do_HEAD = _take

    return Handler
