"""iqstar: Inverse-Q*, token-level alignment of language models without preference labels."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Export": "iqstar.export_callback",
    "InverseQStar": "iqstar.module",
    "PolicySpec": "iqstar.policy",
    "LoRASpec": "iqstar.adapters",
    "RunSummary": "iqstar.summary",
}
__all__ = ["Export", "InverseQStar", "LoRASpec", "PolicySpec", "RunSummary", "__version__"]


def __getattr__(name: str) -> Any:
    """Imports what is asked for only then: ``iqstar --help`` need not wait for torch."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'iqstar' has no attribute {name!r}")
