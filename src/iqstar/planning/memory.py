"""Bytes on each device by part and phase: pure arithmetic on a footprint and a layout.

The phases of a run, in time: an *evaluation* (it comes before and after training), a *rollout*,
its *scoring* under the frozen models, the *update*'s forward and backward pass, and the
optimiser's *step*. Gradients live from a backward pass to the step after it; the memory that they
had on a CPU stays in the process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from iqstar.planning.footprint import Footprint, Weights

GIB = 2**30
WHOLE_BLOCKS_MARGIN = 1.5
"""Free memory, in sizes of the blocks, above which ``sharding.whole_blocks`` gathers them all."""
CASTS = "copies in autocast's dtype"
PACKED = "packed matrices"
FREED = ("KV cache", "activations", "logits and their gradients", "buffers", CASTS, PACKED)
"""Parts that are given back when a phase ends."""
BLOCKS_AT_ONCE = 2
"""Gathered blocks of a sharded model: the one that computes, and the next one on its way."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The devices of a run.

    Args:
        devices: Number of them, on all nodes; each has one process.
        strategy: ``single``, ``ddp`` (all of it on each) or ``fsdp`` (weights sharded).
        gpu: Whether they are GPUs.
        memory: Of each, in bytes.
        libraries: What Python, PyTorch and the like take of it, in bytes.
        offload_frozen: Whether shards of frozen models are in main memory.
        heap_keeps: On CPUs, whether the C library keeps large blocks that were freed.
    """

    devices: int
    strategy: Literal["single", "ddp", "fsdp"]
    gpu: bool
    memory: int
    libraries: int
    offload_frozen: bool = False
    heap_keeps: bool = True


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Memory of each device and the work of one optimiser step.

    Args:
        phases: Bytes by phase and part.
        whole_blocks: Whether generation holds all blocks of a sharded policy.
        flops: Of one optimiser step on all devices, by phase.
        memory: Of a device, in bytes.
    """

    phases: dict[str, dict[str, int]]
    whole_blocks: bool
    flops: dict[str, int]
    memory: int

    @property
    def totals(self) -> dict[str, int]:
        """Bytes of each phase."""
        return {phase: sum(parts.values()) for phase, parts in self.phases.items()}

    @property
    def peak(self) -> int:
        """Bytes of the phase that takes most."""
        return max(self.totals.values())

    @property
    def fits(self) -> bool:
        """Whether the peak is at most the device's memory."""
        return self.peak <= self.memory


def make_plan(run: Footprint, layout: Layout) -> Plan:
    """What a run takes of each device of a layout."""
    always = lasting(run, layout)
    copies = {CASTS: run.casts - gathered_casts(run, layout) + run.head_casts}
    if not layout.gpu:
        copies[PACKED] = run.packed
    free = 0 if layout.gpu else gradient_bytes(run, layout)  # copies lie where the gradients were
    generating = {name: max(size - free, 0) for name, size in copies.items()}
    computing = gathered(run, layout, whole=False)
    room = layout.memory - sum(always.values()) - sum(root_groups(run, layout).values())
    blocks = run.policy.blocks - gathered_casts(run, layout)
    whole = not layout.gpu or blocks * WHOLE_BLOCKS_MARGIN <= room
    sampling = gathered(run, layout, whole=whole)
    phases: dict[str, dict[str, int]] = {}
    if run.evaluation.cache:
        scoring, working = run.evaluation_scoring, run.evaluation.working
        own = {"KV cache": run.evaluation.cache, "activations": working}
        either = ({**generating, **sampling, **own}, {**computing, "activations": scoring})
        phases["evaluation"] = max(either, key=lambda parts: sum(parts.values()))
    if run.rollout.cache:
        own = {"KV cache": run.rollout.cache, "activations": run.rollout.working}
        phases["rollout"] = {**generating, **sampling, **own}
    stored = {"frozen models' hidden states": run.stored}
    phases["scoring"] = {**computing, **stored, "activations": run.scoring}
    gradients = {"gradients": gradient_bytes(run, layout)}
    phases["update"] = {
        **gradients,
        **computing,
        **stored,
        "activations": run.activations,
        "logits and their gradients": run.loss,
        "buffers": backward_buffers(run, layout),
    }
    phases["step"] = {
        **gradients,
        **root_groups(run, layout),
        **stored,
        "buffers": step_buffers(run, layout),
    }
    if not layout.gpu:
        for name, left in heap(phases, layout.heap_keeps).items():
            phases[name]["heap"] = left
    return Plan(
        phases={name: {**always, **parts} for name, parts in phases.items()},
        whole_blocks=whole,
        flops={phase: flops * layout.devices for phase, flops in run.flops.items()},
        memory=layout.memory,
    )


def heap(phases: dict[str, dict[str, int]], keeps: bool) -> dict[str, int]:
    """On CPUs, what the C library holds of memory that was given back.

    Measured rather than derived: a cache that grows token by token leaves about its own size
    behind; where large blocks are kept, they leave holes, so that the phases add up.

    Args:
        phases: Bytes by phase and part.
        keeps: Whether large blocks are kept (:func:`iqstar.allocator.has_huge_pages`).
    """
    own = {name: parts.get("KV cache", 0) for name, parts in phases.items()}
    if not keeps:
        return own
    freed = {
        name: sum(parts.get(part, 0) for part in FREED) + own[name]
        for name, parts in phases.items()
    }
    return {name: sum(freed.values()) - freed[name] + own[name] for name in phases}


def lasting(run: Footprint, layout: Layout) -> dict[str, int]:
    """What a device holds in all phases."""
    shards = layout.devices if layout.strategy == "fsdp" else 1
    frozen = 0 if layout.strategy == "fsdp" and layout.offload_frozen else 1
    return {
        "libraries": layout.libraries,
        "policy": run.policy.total // shards,
        "weights as read": 0 if layout.gpu or layout.strategy == "fsdp" else run.as_read,
        **{name: frozen * weights.total // shards for name, weights in run.frozen.items()},
        "gradients": 0 if layout.gpu else gradient_bytes(run, layout),
        "optimiser states": run.states // shards,
    }


def gradient_bytes(run: Footprint, layout: Layout) -> int:
    """Bytes of the trained weights' gradients on a device."""
    return run.gradients.total // (layout.devices if layout.strategy == "fsdp" else 1)


def root_groups(run: Footprint, layout: Layout) -> dict[str, int]:
    """Embeddings, last norms and heads of sharded models, whole once they were used."""
    if layout.strategy != "fsdp":
        return {}
    return {"gathered weights": sum(w.rest for w in (run.policy, *run.frozen.values()))}


def gathered_casts(run: Footprint, layout: Layout) -> int:
    """Bytes that gathering trained matrices in autocast's dtype saves, twice.

    They are sent at half the size, and autocast has nothing left to copy
    (:func:`iqstar.sharding.shard`). Beside adapters, matrices are frozen and were cast before.
    """
    full = run.trained == run.parameters
    return run.casts if layout.strategy == "fsdp" and full else 0


def gathered(run: Footprint, layout: Layout, whole: bool) -> dict[str, int]:
    """Weights that are whole while a sharded model computes.

    Args:
        run: The run.
        layout: Its devices.
        whole: Whether all blocks of the policy are gathered at once.
    """
    if layout.strategy != "fsdp":
        return {}
    policy = run.policy.blocks - gathered_casts(run, layout)
    block = policy * run.policy.block // max(run.policy.blocks, 1)
    largest = max(block, *(w.block for w in run.frozen.values()), 0)
    blocks = policy if whole else BLOCKS_AT_ONCE * largest
    return {"gathered weights": root_groups(run, layout)["gathered weights"] + blocks}


def backward_buffers(run: Footprint, layout: Layout) -> int:
    """What the backward pass takes beyond activations, logits and gradients.

    Sharded, it makes whole gradients of a group of weights before it reduces and scatters them.
    They come when the logits are gone.
    """
    if layout.strategy != "fsdp":
        return run.backward
    gradients: Weights = run.gradients
    return max(run.backward, 2 * gradients.rest + BLOCKS_AT_ONCE * gradients.block - run.loss, 0)


def step_buffers(run: Footprint, layout: Layout) -> int:
    """What the optimiser takes for a moment.

    On GPUs PyTorch's optimisers take a root of all second moments at once, of shards and on CPUs
    weight by weight; fused ones take none.
    """
    if layout.strategy == "fsdp":
        return run.step_buffers // layout.devices
    at_once = layout.gpu and run.foreach
    return max(run.step_buffers, run.gradients.total) if at_once else run.step_buffers
