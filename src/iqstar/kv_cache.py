"""Keys and values of the tokens so far, kept in place while responses grow."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from iqstar.precision import product_dtype


def holds(config: Any, length: int) -> bool:
    """Whether a :class:`RolloutCache` can stand in for the cache that a model would make.

    Not where some layers keep another state than keys and values, or share them; nor where they
    forget tokens in less than ``length``.
    """
    text = config.get_text_config(decoder=True)
    window = local_window(text)
    if getattr(text, "num_kv_shared_layers", 0) or (window is not None and window <= length):
        return False
    return all(
        type(layer) is DynamicLayer
        or (type(layer) is DynamicSlidingWindowLayer and layer.sliding_window > length)
        for layer in DynamicCache(config=config).layers
    )


def local_window(config: Any) -> int | None:
    """Tokens that some layers see, in models whose window transformers' caches know nothing of.

    Such a layer counts the entries of the cache, padding included.
    """
    names = ("window_size", "attention_window_size")
    sizes = [size for name in names if isinstance(size := getattr(config, name, None), int)]
    return min(sizes, default=None)


class RolloutLayer(DynamicLayer):
    """Keys and values of one layer, with room for all tokens of a rollout.

    transformers' own layer copies all of them whenever a token is added. Under autocast they are
    held in its dtype: attention would cast them, to the same bits, at every step.

    Args:
        like: A layer that holds some prompts; it tells the sizes.
        rows: Of the rollout.
        length: Tokens of each, prompt and response.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, like: Any, rows: int, length: int) -> None:
        super().__init__()
        self.room = tuple(_room(states, rows, length) for states in (like.keys, like.values))
        self.dtype, self.device = self.room[0].dtype, self.room[0].device
        self.is_initialized = True
        self.show(rows, 0)

    def show(self, rows: int, filled: int) -> None:
        """Makes so many rows, and so many tokens of them, what attention sees."""
        self.keys, self.values = (room[:rows, :, :filled] for room in self.room)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Adds tokens; returns all keys and values so far."""
        rows, _, start, _ = self.keys.shape
        self.show(rows, start + key_states.shape[2])
        self.keys[:, :, start:] = key_states
        self.values[:, :, start:] = value_states
        return self.keys, self.values


class ReadingLayer(DynamicLayer):
    """Keys and values of one layer while prompts are read, under autocast in its dtype too."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Adds tokens; returns all keys and values so far."""
        new = (states.to(product_dtype(states)) for states in (key_states, value_states))
        return super().update(*new, *args, **kwargs)


def reading_cache(config: Any) -> DynamicCache:
    """The cache that a model would make to read prompts, with layers that hold them as a rollout.

    Args:
        config: Of a model that a rollout's cache :func:`holds`.
    """
    cache = DynamicCache(config=config)
    cache.layers = [ReadingLayer() if type(x) is DynamicLayer else x for x in cache.layers]
    return cache


def _room(
    states: Float[Tensor, "prompts groups seq size"], rows: int, length: int
) -> Float[Tensor, "batch groups length size"]:
    shape = (rows, states.shape[1], length, states.shape[3])
    return states.new_empty(shape, dtype=product_dtype(states))


def _layers(cache: DynamicCache) -> list[Any]:
    return cache.layers  # all of them hold keys and values, as :func:`holds` made sure


class RolloutCache(Cache):
    """The cache of a rollout: rows are stored prompt by prompt, and leave when they end.

    Args:
        like: The cache of some prompts; it tells layers and sizes.
        rows: Of the rollout.
        length: Tokens of each, prompt and response.
    """

    def __init__(self, like: DynamicCache, rows: int, length: int) -> None:
        self.kept = [RolloutLayer(layer, rows, length) for layer in _layers(like)]
        super().__init__(layers=[*self.kept])

    @property
    def nbytes(self) -> int:
        """Bytes of its room."""
        return sum(room.nbytes for layer in self.kept for room in layer.room)

    def store(
        self, prompts: DynamicCache, source: list[int], rows: list[int], prefix: int, width: int
    ) -> None:
        """Copies prompts into rows: their common prefix, padding, and the rest of each.

        Args:
            prompts: Their cache, of the same form.
            source: Which of its rows is wanted,
            rows: in which row of this cache.
            prefix: Tokens that all prompts of the rollout have in common.
            width: Tokens of a prompt in this cache.
        """
        for layer, stored in zip(self.kept, _layers(prompts), strict=True):
            for room, states in zip(layer.room, (stored.keys, stored.values), strict=True):
                rest = states.shape[2] - prefix
                room[rows, :, :prefix] = states[source, :, :prefix].to(room.dtype)
                room[rows, :, prefix : width - rest] = 0  # masked, but must be finite
                room[rows, :, width - rest : width] = states[source, :, prefix:].to(room.dtype)
            layer.show(len(layer.room[0]), width)

    def keep(self, rows: int, source: list[int], target: list[int]) -> None:
        """Gives up all rows but the first ones, after some were moved there.

        Args:
            rows: How many are kept.
            source: Rows that move,
            target: and where to.
        """
        for layer in self.kept:
            if source:
                for states in (layer.keys, layer.values):
                    states[target] = states[source]
            layer.show(rows, layer.keys.shape[2])
