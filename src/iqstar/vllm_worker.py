"""What vLLM's workers learn from iqstar: to take the policy's weights from a folder.

vLLM loads this class into each of its workers (``--worker-extension-cls
iqstar.vllm_worker.WeightSync``), in an environment that may hold nothing else that iqstar needs:
this file imports neither iqstar's parts nor, before it is used, vLLM.
"""

from __future__ import annotations

from typing import Any

SHAPE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
)
"""Settings in which two models must agree for weights of one to be loaded into the other."""


class WeightSync:
    """Methods added to vLLM's worker; ``collective_rpc`` calls them by name."""

    model_runner: Any
    reload_weights: Any

    def iqstar_model(self) -> dict[str, Any]:
        """What is served: ``dtype``, ``max_tokens`` and the settings named in :data:`SHAPE`.

        ``stops_at_split_prompts`` is true where vLLM may read a prompt in parts and would then
        stop: on CPUs it cannot take back the random number of a request that has a seed (0.32).
        """
        model = self.model_runner.model_config
        served = {name: getattr(model.hf_text_config, name, None) for name in SHAPE}
        dtype = str(model.dtype).removeprefix("torch.")
        splits = bool(self.model_runner.scheduler_config.enable_chunked_prefill)
        return {
            "dtype": dtype,
            "max_tokens": int(model.max_model_len),
            "stops_at_split_prompts": splits and self.model_runner.device.type == "cpu",
            **served,
        }

    def iqstar_load(self, folder: str) -> None:
        """Replaces all weights, in place, by those of a folder in Hugging Face format.

        Args:
            folder: Where they are; it is not needed any more afterwards.
        """
        self.reload_weights(weights_path=folder)
        self._refresh_tied_heads()

    def _refresh_tied_heads(self) -> None:
        """Packs output heads anew that share the embedding's weight.

        On CPUs vLLM multiplies by a packed copy of each matrix. Its reload packs what it loads,
        and it loads a tied weight as the embedding's: the head would keep the old copy (0.32).
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        for module in self.model_runner.get_model().modules():
            if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
                module.quant_method.process_weights_after_loading(module)
