"""A server that speaks the words of an OpenAI-compatible chat endpoint, and judges as it is told.

It is no model: what it is for is the wire, and what is made of answers of all kinds.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, str]


def completion(text: str | None) -> Answer:
    """A well-formed answer with this text."""
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


def shown(body: dict[str, Any]) -> tuple[str, str]:
    """Responses A and B of a request."""
    text = body["messages"][-1]["content"]
    a, b = (re.search(rf"<response_{x}>\n(.*)\n</response_{x}>", text, re.DOTALL) for x in "AB")
    return a[1], b[1]


def prefers(word: str) -> Callable[[dict[str, Any]], Answer]:
    """A judge without a bias: the response with the word is better, else it is a tie."""

    def answer(body: dict[str, Any]) -> Answer:
        a, b = (word in text for text in shown(body))
        return completion(f"So it is. [[{'C' if a == b else 'A' if a else 'B'}]]")

    return answer


class ChatStandIn(ThreadingHTTPServer):
    """What arrived, and what shall be answered.

    Args:
        answer: Status and content of the answer to a request's body.
    """

    daemon_threads = True
    request_queue_size = 256
    """Connections that may wait: at five, the default, some of many workers' are reset."""

    def __init__(self, answer: Callable[[dict[str, Any]], Answer]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.headers: dict[str, str] = {}
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: ChatStandIn

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        self.server.keys.append(self.headers["Authorization"])
        status, content = self.server.answer(body)
        if self.server.closing.is_set():
            return
        self.send_response(status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content.encode())

    def do_GET(self) -> None:
        """What a redirection becomes if it is followed."""
        self.server.asked.append({})
        self.server.keys.append(self.headers["Authorization"])
        self.send_error(405)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def chat_stand_in(answer: Callable[[dict[str, Any]], Answer]) -> Iterator[ChatStandIn]:
    """One that listens for the length of a block."""
    server = ChatStandIn(answer)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
