"""Rewards to advantages: pure functions of PPO and GRPO."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def penalised_rewards(
    scores: Float[Tensor, " batch"],
    log_ratio: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    coefficient: float,
) -> Float[Tensor, "batch time"]:
    """The token rewards of (1): −β·log(π_θ/π_ref) at each, and the score at the last.

    Args:
        scores: Of the responses.
        log_ratio: log π_θ − log π_ref of their tokens, 0 at padding.
        mask: True at tokens.
        coefficient: β.
    """
    last = mask & ~torch.nn.functional.pad(mask, (0, 1))[:, 1:]
    return torch.where(last, scores[:, None], 0.0) - coefficient * log_ratio


def generalized_advantages(
    rewards: Float[Tensor, "batch time"],
    values: Float[Tensor, "batch time"],
    gamma: float,
    lam: float,
) -> Float[Tensor, "batch time"]:
    """Σ_k (γλ)^k δ_{t+k} with δ_t = r_t + γ·V(s_{t+1}) − V(s_t) (GAE, arXiv 1506.02438, eq. 16).

    The value after the last token is 0, also of a truncated response: its horizon is part of the
    state.

    Args:
        rewards: Of the tokens, 0 at padding, which is on the right.
        values: V(s_t), of the state *before* token t, 0 at padding.
        gamma: Discount.
        lam: λ, from 0 (one step ahead) to 1 (the return itself).
    """
    following = torch.nn.functional.pad(values, (0, 1))[:, 1:]
    steps = (rewards + gamma * following - values).unbind(dim=1)
    advantages = []
    running = torch.zeros_like(steps[0])
    for step in reversed(steps):
        running = step + gamma * lam * running
        advantages.append(running)
    return torch.stack(advantages[::-1], dim=1)


def clipped_value_loss(
    values: Float[Tensor, " tokens"],
    before: Float[Tensor, " tokens"],
    returns: Float[Tensor, " tokens"],
    clip: float | None,
) -> Float[Tensor, " tokens"]:
    """½·max((V − R)², (clip(V, V_old ± ε) − R)²): a value moves by no more than ε in a rollout.

    Args:
        values: V at the current weights.
        before: V at the rollout's weights.
        returns: R, what they should be.
        clip: ε; None for a plain squared error.
    """
    loss = (values - returns) ** 2
    if clip is not None:
        near = before + (values - before).clamp(-clip, clip)
        loss = torch.maximum(loss, (near - returns) ** 2)
    return 0.5 * loss


def group_advantages(
    scores: Float[Tensor, " batch"], group: int, scale: bool = True
) -> Float[Tensor, " batch"]:
    """(r − mean)/(std + 1e-4) over the responses to one prompt (GRPO, arXiv 2402.03300, 4.1.2).

    Responses without a score (NaN) are left out of their group, and get 0; so does a group in
    which fewer than two have one.

    Args:
        scores: Those of one prompt side by side.
        group: Responses to each prompt.
        scale: Whether to divide by the standard deviation.
    """
    grouped = scores.view(-1, group)
    known = ~grouped.isnan()
    count = known.sum(dim=1, keepdim=True)
    filled = grouped.nan_to_num()
    centred = torch.where(known, filled - filled.sum(dim=1, keepdim=True) / count.clamp(min=1), 0.0)
    if scale:
        variance = (centred**2).sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + 1e-4)
    return torch.where(count > 1, centred, 0.0).view(-1)
