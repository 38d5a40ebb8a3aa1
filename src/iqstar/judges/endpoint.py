"""An OpenAI-compatible chat endpoint over HTTP, with retries and without surprises."""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any

from iqstar.errors import InputError
from iqstar.judges.base import warn_once

KEY = "PairwiseJudge"
"""Named in errors, since any key of a YAML may hold a judge."""
LONGEST_PAUSE = 60.0
"""Seconds; also where the endpoint asks for more."""
OUTAGE = 3
"""Requests in a row, each with all its retries, after which the others are not tried."""
HOPELESS = 8
"""Answers of a working endpoint of which none is of use, after which the others are not asked for:
a judge that is right now and then has given one by then."""
NO_VERDICT = (
    "it answers, but without a verdict: a model that thinks before it answers needs more "
    "options.max_tokens, or to be told not to, by options.chat_template_kwargs with "
    "enable_thinking false on some servers"
)
_AGAIN = {408, 409, 425, 429}
_REMEDIES = {
    401: "set the environment variable {key} to a valid key",
    403: "set the environment variable {key} to a key that may use this model",
    404: "check url (it ends in /v1 for most servers) and model",
}
_LOCAL = {"localhost", "127.0.0.1", "::1"}


class Outage:
    """Whether asking has become pointless, shared by the requests that are given up together.

    Attributes:
        final: Nothing more is to be asked.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._useful = False
        self._useless = 0
        self._told = False
        self.final = False

    def note(self, answered: bool, useful: bool) -> None:
        """Counts a request.

        Args:
            answered: Whether the endpoint works.
            useful: Whether its answer is of use.
        """
        with self._lock:
            self._in_a_row = 0 if answered else self._in_a_row + 1
            self._useful = self._useful or useful
            self._useless += answered and not useful
            hopeless = not self._useful and self._useless >= HOPELESS
            self.final = self.final or hopeless or self._in_a_row >= OUTAGE

    def tell(self, text: str) -> None:
        """Warns, of the first request that failed only: the others' reasons are much the same."""
        with self._lock:
            told, self._told = self._told, True
        if not told:
            warn_once(text)


class ChatEndpoint:
    """Sends chat requests; redirections are not followed, they could carry the key elsewhere.

    Args:
        url: The endpoint up to, not including, ``/chat/completions``.
        api_key_env: Environment variable that holds the key.
        timeout: Seconds to wait for an answer.
        retries: Further attempts.
        backoff: Seconds of pause before the first of these; it doubles with each.
        workers: Requests that may be open at once.

    Raises:
        InputError: If a setting makes no sense.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key_env: str,
        timeout: float,
        retries: int,
        backoff: float,
        workers: int,
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"{KEY}.url: {url!r} is no address; write http://HOST:PORT/v1")
        for name, value, least in (
            ("timeout", timeout, 0.001),
            ("retries", retries, 0),
            ("backoff", backoff, 0),
            ("workers", workers, 1),
        ):
            if value < least:
                raise InputError(f"{KEY}.{name}: must be at least {least}, got {value}")
        self.url = url.rstrip("/").removesuffix("/chat/completions")
        self.api_key_env = api_key_env
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        self.workers = workers
        handlers: list[Any] = [_NoRedirect()]
        if parts.hostname in _LOCAL:  # no proxy of the environment reaches this machine better
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)

    def ask(
        self, body: dict[str, Any], accepts: Callable[[str], bool], outage: Outage
    ) -> str | None:
        """The text of an answer that is accepted; None if there is none after all attempts.

        Args:
            body: Of the request.
            accepts: Whether an answer's text is of use.
            outage: Shared by the requests that are given up together.
        """
        reason, answered = "", False
        for attempt in range(self.retries + 1):
            if outage.final:
                return None
            pause = self.backoff * 2**attempt * random.uniform(0.75, 1.25)
            try:
                text, answered = _text_of(self._post(body)), True
                if accepts(text):
                    outage.note(answered, useful=True)
                    return text
                reason, pause = NO_VERDICT, 0.0  # it is not busy
            except urllib.error.HTTPError as error:
                code, wanted = error.code, error.headers.get("Retry-After", "")
                reason = f"status {code}: {self._detail(error)}"
                if code in _REMEDIES:  # as it will be for all others
                    outage.final = True
                    reason += f"; {_REMEDIES[code].format(key=self.api_key_env)}"
                if code not in _AGAIN and code < 500:
                    answered = code not in _REMEDIES  # it has read this one, and works
                    break
                pause = max(pause, float(wanted) if wanted.isdecimal() else 0.0)
            except _NonsenseError as error:
                reason = str(error)
            except (OSError, http.client.HTTPException) as error:
                reason = str(getattr(error, "reason", None) or error) or type(error).__name__
            except ValueError:  # its text may hold the key
                reason = f"the request cannot be sent; check url and {self.api_key_env}"
                break
            if attempt < self.retries:
                time.sleep(min(pause, LONGEST_PAUSE))
        outage.note(answered, useful=False)
        outage.tell(
            f"The pairwise judge at {self.url} gave no verdict ({self._hidden(reason)}); such "
            "pairs are counted as missing"
        )
        return None

    def _post(self, body: dict[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json"}
        if key := self._key():
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            f"{self.url}/chat/completions", data=json.dumps(body).encode(), headers=headers
        )
        with self._opener.open(request, timeout=self.timeout) as answer:
            content: bytes = answer.read()
        return content

    def _detail(self, error: urllib.error.HTTPError) -> str:
        try:
            return " ".join(error.read(2000).decode(errors="replace").split())[:200]
        except (OSError, http.client.HTTPException):
            return "no further word"

    def _key(self) -> str:
        return os.environ.get(self.api_key_env, "").strip()

    def _hidden(self, text: str) -> str:
        key = self._key()
        return text.replace(key, "***") if key else text


class _NonsenseError(ValueError):
    """An answer that is not of the chat completions' form."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _text_of(content: bytes) -> str:
    try:
        text = json.loads(content)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise _NonsenseError("its answer is not that of a chat completion") from error
    if not isinstance(text, str):
        raise _NonsenseError(
            "its answer has no text; if the model thinks first, raise options.max_tokens"
        )
    return text
