"""Responses sampled by vLLM, with the policy's weights brought to it before every rollout."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from lightning import Trainer
from torch import distributed, nn

from iqstar.engine import RolloutEngine
from iqstar.errors import InputError
from iqstar.losses import TokenLoss
from iqstar.mdp import Prompt, Rollout, make_rollout
from iqstar.policy import CausalLM, Policy
from iqstar.pretrained import resolve_model
from iqstar.ranks import gather, world_size
from iqstar.rollouts import _ended, rollout_seed
from iqstar.sharding import is_sharded
from iqstar.vllm_engines import KEY, Engine, InProcess, Request, Response, Server
from iqstar.vllm_worker import SHAPE
from iqstar.weight_files import effective_weights, weight_folder

_log = logging.getLogger(__name__)
_NEVER = -1e9
"""Added to the logits of the vocabulary's padding."""


class VLLMRollout(RolloutEngine):
    """Samples with vLLM: a server's, or one that this process starts.

    Before every rollout vLLM gets the policy's weights of that moment (with adapters, the merged
    ones), so the responses are on-policy. They pass through a folder that both sides see. How to
    start a server: docs/rollouts.md.

    Args:
        url: Of the server, such as ``http://localhost:8000``; null starts vLLM in this
            environment, for runs on one device.
        max_new_tokens: Length limit of a response; one that reaches it is *truncated*.
        responses_per_prompt: Responses to each prompt of a batch.
        stop_strings: Texts that end a response besides the end-of-sequence ids; null for those of
            the chat format (``hh``: the next human turn).
        batch_size: Responses asked for at once; null for all, which vLLM schedules itself.
        transfer_folder: Where weights pass through, a folder that vLLM can read too; null for
            shared memory (``/dev/shm``) if it has room, else the temporary folder.
        timeout: Seconds to wait for a server's answer.
        llm: Without ``url``, further arguments of ``vllm.LLM``, such as
            ``{max_model_len: 1024, gpu_memory_utilization: 0.3}``.

    Attributes:
        sync_seconds: What the last transfer of weights took.
    """

    on_policy = True

    def __init__(
        self,
        url: str | None = "http://localhost:8000",
        max_new_tokens: int = 64,
        responses_per_prompt: int = 1,
        stop_strings: list[str] | None = None,
        batch_size: int | None = None,
        transfer_folder: str | None = None,
        timeout: float = 600.0,
        llm: dict[str, Any] | None = None,
    ) -> None:
        for name, value in (
            ("max_new_tokens", max_new_tokens),
            ("responses_per_prompt", responses_per_prompt),
            ("batch_size", 1 if batch_size is None else batch_size),
        ):
            if value < 1:
                raise InputError(f"{KEY}.{name}: must be at least 1, got {value}")
        if url is not None and not url.startswith(("http://", "https://")):
            raise InputError(f"{KEY}.url: {url!r} is no address; write http://HOST:PORT, or null")
        if url is not None and llm:
            raise InputError(
                f"{KEY}.llm: these are settings of a vLLM that this process starts, but url names "
                "a server; give them to the server, or set url to null"
            )
        if timeout <= 0:
            raise InputError(f"{KEY}.timeout: must be positive, got {timeout}")
        self.url = url
        self.max_new_tokens = max_new_tokens
        self.responses_per_prompt = responses_per_prompt
        self.stop_strings = stop_strings
        self.batch_size = batch_size
        self.transfer_folder = transfer_folder
        self.timeout = timeout
        self.llm = dict(llm or {})
        self.sync_seconds = 0.0
        self.engine: Engine | None = None
        self._served: dict[str, Any] = {}
        self._needed = True

    def needs_reference(self, trainer: Trainer) -> bool:
        """See :meth:`RolloutEngine.needs_reference`; notes whether there will be rollouts."""
        self._needed = trainer.state.fn not in ("validate", "test")
        return True

    def setup(
        self,
        policy: Policy,
        estimator: nn.Module,
        loss: TokenLoss,
        temperature: float,
        precision: str,
    ) -> None:
        """Finds the engine before any time is spent; see :meth:`RolloutEngine.setup`."""
        if self._needed:
            self.connect(policy)

    def connect(self, policy: Policy) -> Engine:
        """The engine, which is started or looked for at the first call.

        Args:
            policy: Whose model it shall serve.

        Raises:
            InputError: If there is none, or it serves another model, or would stop in the run.
        """
        if self.engine is None:
            model = resolve_model(policy.spec.model)
            engine: Engine
            if self.url is not None:
                engine = Server(self.url, model, self.timeout)
            elif world_size() > 1:
                raise InputError(
                    f"{KEY}.url: null starts vLLM inside of a run on one device, but this one has "
                    f"{world_size()} processes; start a vLLM server and give its url"
                )
            else:
                engine = InProcess(model, self.llm)
            self._served = engine.model()
            _check_same_model(policy.actor, self._served, model)
            _check_reads_prompts_whole(self._served)
            self.engine = engine
        return self.engine

    def roll_out(
        self, policy: Policy, prompts: Sequence[Prompt], temperature: float, seed: int
    ) -> Rollout:
        """See :meth:`RolloutEngine.roll_out`.

        Every response has a seed of its own. The same seeds give the same responses where vLLM
        computes the same bits, which depends on what it computes at the same time.
        """
        engine = self.connect(policy)
        self.synchronise(policy)
        rows = [p for p in prompts for _ in range(self.responses_per_prompt)]
        requests = self._requests(policy.actor, rows, temperature, seed)
        size = self.batch_size or len(requests)
        responses: list[Response] = []
        for start in range(0, len(requests), size):
            responses += engine.generate(requests[start : start + size])
        chat = policy.actor.chat
        ends = chat.eos_ids, self.max_new_tokens, self._stops(policy.actor), chat.tokenizer.decode
        ended = [_ended(response.ids, *ends) for response in responses]
        for (ids, cut), response in zip(ended, responses, strict=True):
            if cut and len(ids) < self.max_new_tokens:
                raise InputError(
                    f"{KEY}.url: vLLM ended a response after {len(ids)} tokens, reason "
                    f"{response.reason!r}, at no end that the chat format knows; start the server "
                    "without stop tokens or length limits of its own"
                )
        kept, truncated = zip(*ended, strict=True)
        return make_rollout(rows, kept, truncated, chat.pad_id).to(policy.actor.device)

    def synchronise(self, policy: Policy) -> None:
        """Brings the policy's weights to vLLM; every rank of a run must call it.

        Args:
            policy: Whose weights.

        Raises:
            InputError: If they cannot be written or loaded, on every rank.
        """
        engine = self.connect(policy)
        started = time.perf_counter()
        gather(None)  # until every rank has what it asked of the old weights
        first = not distributed.is_initialized() or distributed.get_rank() == 0
        # Sharded weights are gathered from all ranks; else the others have nothing to do.
        needed = first or is_sharded(policy.actor)
        where = self.transfer_folder, f"{KEY}.transfer_folder"
        problem: Exception | None = None
        try:
            weights = effective_weights(policy.actor) if needed else {}
            if first:
                with weight_folder(policy.actor, weights, self._served["dtype"], *where) as folder:
                    engine.load(folder)
        except Exception as error:  # of the server, say: the other ranks wait to be told
            problem = error
        told = None if problem is None else str(problem) or type(problem).__name__
        failures = [f for f in gather(told) if f is not None]
        if problem is not None:
            raise problem
        if failures:
            raise InputError(failures[0])
        self.sync_seconds = time.perf_counter() - started
        _log.debug("The policy's weights were brought to vLLM in %.2f s", self.sync_seconds)

    def _stops(self, model: CausalLM) -> tuple[str, ...]:
        stops = model.chat.stop_strings if self.stop_strings is None else self.stop_strings
        return tuple(stops)

    def _requests(
        self, model: CausalLM, rows: Sequence[Prompt], temperature: float, seed: int
    ) -> list[Request]:
        """What is asked of vLLM: every setting of sampling, for it would fill in its own."""
        if temperature <= 0:
            raise InputError(f"model.temperature: must be positive, got {temperature}")
        chat, stops = model.chat, self._stops(model)
        contexts = [chat.prompt_ids(row.messages) for row in rows]
        longest, limit = max(len(c) for c in contexts), self._served["max_tokens"]
        if longest + self.max_new_tokens > limit:
            raise InputError(
                f"data.max_prompt_tokens: a prompt of {longest} tokens and {self.max_new_tokens} "
                f"new ones exceed vLLM's {limit} positions; lower data.max_prompt_tokens or "
                f"{KEY}.max_new_tokens, or give vLLM a larger max_model_len"
            )
        padding = range(chat.vocab_size, self._served["vocab_size"])
        sampling = {
            "temperature": temperature,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "min_tokens": 0,
            "max_tokens": self.max_new_tokens,
            "ignore_eos": True,  # the ids below say what ends a response, and nothing else
            "stop_token_ids": list(chat.eos_ids),
            "stop": list(stops),
            "detokenize": bool(stops),
            "skip_special_tokens": False,
            "logit_bias": {token: _NEVER for token in padding} or None,
        }
        return [
            Request(prompt=context, sampling=sampling | {"seed": rollout_seed(seed, row)})
            for row, context in enumerate(contexts)
        ]


def _check_same_model(ours: CausalLM, served: dict[str, Any], name: str) -> None:
    """Raises an InputError unless the policy's weights fit into what vLLM serves."""
    config = ours.plain.config.get_text_config()
    for setting in SHAPE:
        own = getattr(config, setting, None)
        if own != served[setting]:
            raise InputError(
                f"{KEY}.url: vLLM serves another model than the policy: its {setting} is "
                f"{served[setting]}, the policy's {own}; let it serve {name}"
            )


def _check_reads_prompts_whole(served: dict[str, Any]) -> None:
    """Raises an InputError where vLLM would stop at the first prompt that it reads in parts."""
    if served["stops_at_split_prompts"]:
        raise InputError(
            f"{KEY}.url: on a CPU, vLLM stops when it reads a prompt in parts, as it may; start "
            "the server with --no-enable-chunked-prefill and --max-num-batched-tokens of "
            f"{served['max_tokens']} or more (without a server, these are {KEY}.llm: "
            "{enable_chunked_prefill: false, max_num_batched_tokens: ...})"
        )
