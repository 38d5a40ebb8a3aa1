"""Runs tests on other computing paths: no speed-up may change what they find.

``IQSTAR_PATHS=plain`` turns the optimisations off: nothing that rows share is read once, padding is
read, responses come from transformers' ``generate``, weights are cast at every product and never
packed, layers are transformers' own. ``IQSTAR_PATHS=fast`` turns on what is off by default: the
attention of the shipped configs, with which no padding is read.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import wraps


def choose() -> None:
    """Changes defaults as the environment says; also called in processes that tests start."""
    from iqstar import decoding, loading, policy

    paths = os.environ.get("IQSTAR_PATHS")
    if not paths:
        return
    changed = {
        "plain": {"share_prefixes": False, "padding_free": False},
        "fast": {"attn_implementation": "grouped"},
    }
    own = policy.PolicySpec.__init__

    @wraps(own)
    def init(self, **given):
        own(self, **{**changed[paths], **given})

    policy.PolicySpec.__init__ = init
    if paths == "plain":
        decoding.fits = lambda *_: False
        policy.casts_kept = lambda *_: nullcontext()
        policy.weights_packed = lambda *_: nullcontext()
        loading.keep_less = lambda _: None
