"""PPO's value model: a linear head on the policy's own states, or on a trunk of its own."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from iqstar.mdp import TokenSequences
from iqstar.policy import CausalLM


class ValueHead(nn.Module):
    """V(s_t) at the state before each response token; 0 everywhere at the start.

    Args:
        policy: Whose states are read.
        separate: Whether to read a trained copy of the policy's model instead, so that the two
            losses share no weights; it takes the policy's memory once more.
    """

    def __init__(self, policy: CausalLM, separate: bool = False) -> None:
        super().__init__()
        weight = policy.head().weight
        self.linear = nn.Linear(
            weight.shape[1], 1, dtype=torch.promote_types(weight.dtype, torch.float32)
        )
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.trunk = copy.deepcopy(policy) if separate else None
        if self.trunk is not None:
            output, embedding = (
                self.trunk.plain.get_output_embeddings(),
                self.trunk.plain.get_input_embeddings(),
            )
            if output.weight is not embedding.weight:
                output.requires_grad_(False)  # its logits are never asked for

    def forward(
        self, hidden: Float[Tensor, "tokens dim"], sequences: TokenSequences
    ) -> Float[Tensor, " tokens"]:
        """The values, in float32 (float64 for a float64 model), also under autocast.

        Args:
            hidden: The policy's states that predict the response tokens; a trunk of its own
                needs none.
            sequences: What they were computed from.
        """
        if self.trunk is not None:
            hidden = self.trunk.hidden(sequences)
        with torch.autocast(hidden.device.type, enabled=False):
            weight, bias = self.linear.weight, self.linear.bias  # in 16 bits under bf16-true
            dtype = torch.promote_types(weight.dtype, torch.float32)
            return linear(hidden.to(dtype), weight.to(dtype), bias.to(dtype))[:, 0]
