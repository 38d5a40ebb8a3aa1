"""A server that speaks the few words of vLLM's that a rollout needs, and samples nothing.

It is no model: it answers each prompt with given ids. What it is for is the wire: which requests
arrive, in what order, with what in them, and what is made of the answers.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import AutoConfig

from iqstar.vllm_worker import SHAPE

Answer = tuple[list[int], str]


class StandIn(ThreadingHTTPServer):
    """What arrived, and what shall be answered.

    Args:
        model: The folder whose settings it claims to serve.
        answer: Token ids and the reason why they end, of a request's body.
    """

    daemon_threads = True
    request_queue_size = 256
    """Connections that may wait: at five, the default, some of a rollout's are reset."""

    def __init__(self, model: Path, answer: Callable[[dict[str, Any]], Answer]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        config = AutoConfig.from_pretrained(model)
        self.served: dict[str, Any] = {name: getattr(config, name, None) for name in SHAPE}
        self.served |= {"dtype": "bfloat16", "max_tokens": 512, "stops_at_split_prompts": False}
        self.answer = answer
        self.refusals: dict[str, tuple[int, str]] = {}
        self.log: list[str] = []
        self.asked: list[dict[str, Any]] = []
        self.weights: list[dict[str, Any]] = []
        self.folders: list[Path] = []
        self.resets = True
        self.dropped = 0
        """Connections that are still to be cut without an answer."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def reply(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request."""
        if path == "/reset_prefix_cache":
            self.log.append("reset")
            return {"success": self.resets}
        if path == "/inference/v1/generate":
            self.log.append("generate")
            self.asked.append(body)
            ids, reason = self.answer(body)
            return {"choices": [{"token_ids": ids, "finish_reason": reason, "logprobs": None}]}
        assert path == "/collective_rpc"
        if body["method"] == "iqstar_model":
            return {"results": [self.served]}
        assert body["method"] == "iqstar_load"
        self.log.append("load")
        self.folders.append(Path(body["kwargs"]["folder"]))
        (file,) = self.folders[-1].glob("*.safetensors")
        self.weights.append(load_file(file))
        return {"results": [None]}


class _Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.dropped:
            self.server.dropped -= 1
            return
        status, content = self.server.refusals.get(self.path, (200, ""))
        if status == 200:
            content = json.dumps(self.server.reply(self.path, body))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def stand_in(model: Path, answer: Callable[[dict[str, Any]], Answer]) -> Iterator[StandIn]:
    """One that listens for the length of a block."""
    server = StandIn(model, answer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
