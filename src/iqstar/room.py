"""How long a prompt may be, so that what is added to it in training still fits the model."""

from __future__ import annotations

from iqstar.chat import ChatFormat
from iqstar.estimators import OptimalPolicyEstimator
from iqstar.policy import PolicySpec
from iqstar.pretrained import load_config, positions


def prompt_room(
    spec: PolicySpec,
    chat: ChatFormat,
    new_tokens: int,
    estimator: OptimalPolicyEstimator | None = None,
) -> int | None:
    """Tokens that a rendered prompt may have; None where the model names no limit.

    Reads no weights. An estimator's model of its own may have fewer positions still.

    Args:
        spec: The policy.
        chat: Its chat format.
        new_tokens: Length limit of a response.
        estimator: What else is told to the model.
    """
    config = load_config(
        spec.model, trust_remote_code=spec.trust_remote_code, revision=spec.revision
    )
    limit = positions(config)
    if limit is None:
        return None
    return limit - new_tokens - (estimator.added_tokens(chat) if estimator else 0)
