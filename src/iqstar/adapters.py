"""Low-rank adapters (PEFT): their settings, putting them on, and computing without them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from iqstar.errors import InputError


@dataclass(kw_only=True)
class LoRASpec:
    """Low-rank adapters (PEFT); the reference is then the same weights with adapters off.

    Args:
        rank: Rank of the adapters, at least 1.
        alpha: Scale of the adapters, at least 1: they are multiplied by alpha / rank.
        target_modules: Names of the linear layers to adapt, or ``all-linear``: all of them
            except the output head.
        rslora: Whether the scale is alpha / √rank instead.
    """

    rank: int = 16
    alpha: int = 32
    target_modules: str | list[str] = "all-linear"
    rslora: bool = False

    def __post_init__(self) -> None:
        for name, value in (("rank", self.rank), ("alpha", self.alpha)):
            if value < 1:
                raise InputError(f"model.policy.lora.{name}: must be at least 1, got {value}")


def with_adapters(model: nn.Module, lora: LoRASpec) -> nn.Module:
    """The model with adapters that start as the identity.

    Raises:
        InputError: If the targets do not exist, or include the output head.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=lora.target_modules,
        use_rslora=lora.rslora,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        adapted: Any = get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"model.policy.lora.target_modules: {error}") from error
    if hasattr(adapted.get_base_model().get_output_embeddings(), "base_layer"):
        raise InputError(
            "model.policy.lora.target_modules: the output head cannot be adapted, since its "
            "log-probs are computed from the plain weight; leave it out"
        )
    return adapted


def leave_casts_to_autocast(model: nn.Module) -> None:
    """Keeps PEFT from casting what adapters read, in place, for a model that runs under autocast.

    Autocast casts that back, to the same bits; both copies would be kept for the backward pass.
    """
    for layer in _adapted_layers(model):
        layer.cast_input_dtype_enabled = False


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """PEFT's layers without their adapters.

    Unlike PEFT's own context it leaves ``requires_grad`` alone, which would not reach weights
    that are gathered from shards. Within itself it changes nothing.
    """
    layers = [layer for layer in _adapted_layers(model) if not layer._disable_adapters]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def _adapted_layers(model: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
