"""An endpoint of chat completions on the loopback interface that answers as a test tells it: well, badly, late."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Answer:
    """One HTTP answer: ``text`` becomes a chat completion, ``body`` is sent as it is."""

    text: str | None = None
    status: int = 200
    body: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    finish: str = "stop"
    model: str = "judge-2026-11"

    def content(self) -> bytes:
        if self.body is not None:
            return self.body.encode()
        choice = {"index": 0, "finish_reason": self.finish, "message": {"role": "assistant", "content": self.text}}
        whole = {"id": "1", "object": "chat.completion", "created": 0, "model": self.model, "choices": [choice]}
        return json.dumps(whole).encode()


class JudgeServer:
    """Asks ``answer`` what to send.

    Args:
        answer: told the texts of the request (instruction, reference, answer) and how many requests came before.
    """

    def __init__(self, answer: Callable[[dict[str, str], int], Answer]) -> None:
        self.answer = answer
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        """Authorization headers that came."""
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def __enter__(self) -> JudgeServer:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._http.shutdown()
        self._http.server_close()

    def take(self, http: BaseHTTPRequestHandler) -> None:
        request = json.loads(http.rfile.read(int(http.headers["Content-Length"])))
        with self._lock:
            answer = self.answer(json.loads(request["messages"][1]["content"]), len(self.requests))
            self.requests.append({"path": http.path, **request})
            self.keys.add(http.headers.get("Authorization"))
        if answer.seconds and self._closing.wait(answer.seconds):
            return
        content = answer.content()
        try:
            http.send_response(answer.status)
            for name, value in {"Content-Type": "application/json", **answer.headers}.items():
                http.send_header(name, value)
            http.send_header("Content-Length", str(len(content)))
            http.end_headers()
            http.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):
            return  # whoever asked has waited long enough


def _handler(server: JudgeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            server.take(self)

        def log_message(self, *_: object) -> None:
            return

    return Handler
