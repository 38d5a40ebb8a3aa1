"""What a run asks of one device, and what it takes of it: plain numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Sizes of one device's work.

    Args:
        prompt_tokens: Length of every prompt.
        new_tokens: Length of every response.
        rollout_rows: Responses of one rollout.
        generated_rows: Responses generated at once in a rollout; 0 where none is generated.
        micro_rows: Responses in one forward and backward pass.
        evaluated_rows: Responses generated at once in an evaluation; 0 where there is none.
        scored_rows: Responses scored at once in an evaluation.
        step_rows: Responses that one optimiser step learns from.
        passes: Passes over each rollout.
    """

    prompt_tokens: int
    new_tokens: int
    rollout_rows: int
    generated_rows: int
    micro_rows: int
    evaluated_rows: int
    scored_rows: int
    step_rows: int
    passes: int = 1


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Bytes of some tensors of a model, by where they are in it.

    Args:
        blocks: Those of all transformer blocks.
        block: Those of the largest one.
        rest: Those outside: embeddings, last norm, output head.
    """

    blocks: int = 0
    block: int = 0
    rest: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.blocks + self.rest


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What generating takes: bytes of the filled KV cache, and of all else at its worst."""

    cache: int = 0
    working: int = 0
    flops: int = 0


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a run takes of one device that holds everything; in bytes, if nothing else is said.

    Args:
        parameters: Number of weights of the policy.
        trained: Number of those that are trained.
        policy: Its weights.
        as_read: Of matrices that were cast after reading: their file stays mapped on a CPU.
        frozen: Weights of the frozen models: the reference's (none with LoRA), the estimator's own.
        gradients: Of the trained weights.
        states: The optimiser's.
        states_assumed: Whether these are a guess, since the optimiser could not be traced.
        step_buffers: What the optimiser takes for a moment, weight by weight.
        foreach: Whether on GPUs it takes them for all weights at once, as PyTorch's do unless
            they are fused.
        head_casts: Autocast's copy of the output head, which generation keeps.
        casts: Its copies of all other trained matrices, likewise.
        packed: Matrices that generating packs on a CPU.
        rollout: Generating one.
        evaluation: Generating in an evaluation.
        evaluation_scoring: Scoring in an evaluation.
        scoring: Scoring one micro-batch under the frozen models.
        stored: What scoring leaves for the update: hidden states of the whole rollout.
        activations: What the backward pass needs.
        loss: Logits of a chunk, and gradients of head and hidden states.
        backward: What the backward pass takes beyond all that.
        flops: Of one optimiser step, by phase.
    """

    parameters: int
    trained: int
    policy: Weights
    as_read: int
    frozen: dict[str, Weights]
    gradients: Weights
    states: int
    states_assumed: bool
    step_buffers: int
    foreach: bool
    head_casts: int
    casts: int
    packed: int
    rollout: Generation
    evaluation: Generation
    evaluation_scoring: int
    scoring: int
    stored: int
    activations: int
    loss: int
    backward: int
    flops: dict[str, int]
