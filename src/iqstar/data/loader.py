"""Loaders that yield :class:`~iqstar.mdp.PromptBatch`, sharded over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

from torch.utils.data import DistributedSampler

from iqstar.mdp import Prompt, PromptBatch


class RepeatedBatches:
    """Training prompts: every batch is yielded once for each training step on its rollout.

    It has a length, so that Lightning does not fetch a batch ahead (rollouts would be stale), and
    a state, so that a run resumes inside an epoch. The order depends on the seed and the epoch
    only; all ranks get equally many batches.

    Args:
        prompts: The prompts of all ranks.
        batch_size: Prompts per batch on each rank.
        steps: Number of prompts of a batch → number of times the batch is yielded.
        shuffle: Whether every epoch has an order of its own.
        seed: Seed of the order.
        drop_last: Leave out what does not fill a batch on every rank; otherwise the last batch is
            smaller, and up to world_size - 1 prompts appear twice to keep the ranks even.
        rank: This process.
        world_size: Number of processes.

    Attributes:
        steps: Training steps on each batch of an epoch.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        batch_size: int,
        steps: Callable[[int], int] = lambda num_prompts: 1,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._prompts = prompts
        self._order: DistributedSampler[int] = DistributedSampler(
            range(len(prompts)),  # type: ignore[arg-type]  # it only asks for the length
            num_replicas=world_size,
            rank=rank,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
        )
        sizes = batch_sizes(len(self._order), batch_size, drop_last)
        self._spans = list(pairwise([0, *accumulate(sizes)]))
        self._share = batch_size * world_size
        self.steps = [steps(size) for size in sizes]
        self._shape = [self._share, world_size, *self.steps[:1]]
        self._epoch = 0
        self._yielded = 0
        self._resumed = False

    def __len__(self) -> int:
        """Training steps in an epoch."""
        return sum(self.steps)

    @property
    def sampler(self) -> RepeatedBatches:
        """Where Lightning looks for :meth:`set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Moves on to a later epoch; asking for the current or an earlier one does nothing."""
        if epoch > self._epoch:
            self._epoch, self._yielded, self._resumed = epoch, 0, False

    @property
    def position(self) -> int:
        """Training steps of this epoch that were yielded, or that a resumed run leaves out."""
        return self._yielded

    def __iter__(self) -> Iterator[PromptBatch]:
        # Without a trainer that counts them, every further iteration is the next epoch.
        if self._yielded and (not self._resumed or self._yielded >= len(self)):
            self._epoch, self._yielded = self._epoch + 1, 0
        self._resumed = False
        self._order.set_epoch(self._epoch)
        indices = list(self._order)
        done, position = self._yielded, 0
        for number, ((start, stop), steps) in enumerate(zip(self._spans, self.steps, strict=True)):
            prompts = tuple(self._prompts[i] for i in indices[start:stop])
            for step in range(steps):
                position += 1
                if position <= done:
                    continue
                self._yielded = position
                yield PromptBatch(
                    prompts=prompts,
                    step=step,
                    steps=steps,
                    last=number == len(self._spans) - 1,
                )

    def state_dict(self) -> dict[str, Any]:
        """The position: the epoch, what was yielded in it, and how many prompts that finished."""
        done = sum(end <= self._yielded for end in accumulate(self.steps))
        return {
            "epoch": self._epoch,
            "yielded": self._yielded,
            "finished": done * self._share,
            "shape": self._shape,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The next iteration goes on from the saved position.

        With another number of ranks or another batch size, after the last batch that was
        finished.
        """
        self._epoch, self._yielded = state_dict["epoch"], state_dict["yielded"]
        if state_dict["shape"] != self._shape:
            self._yielded = sum(self.steps[: state_dict["finished"] // self._share])
        self._resumed = True


class EvalBatches:
    """Held-out prompts: a fixed order and composition, no duplicates, equally many batches a rank.

    The ranks share the prompts out one by one. As collectives run inside evaluation, each rank
    cuts its share into the same number of batches, as even as possible. Only with fewer prompts
    than ranks do some ranks evaluate a prompt that another one has too.

    Args:
        prompts: The prompts of all ranks.
        batch_size: Largest number of prompts in a batch (one more where a size of 1 would leave
            a rank without prompts for its last batch).
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(
        self, prompts: Sequence[Prompt], batch_size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        total = len(prompts)
        mine = list(prompts[rank::world_size]) or list(prompts[rank % max(total, 1) :][:1])
        batches = evaluation_batches(total, batch_size, world_size)
        # The largest share decides the number of batches; the k-th gets every share's k-th part.
        cuts = [len(mine) * k // batches for k in range(batches + 1)] if mine else [0]
        self._batches = [
            PromptBatch(prompts=tuple(mine[a:b]), last=b == len(mine)) for a, b in pairwise(cuts)
        ]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[PromptBatch]:
        return iter(self._batches)


def evaluation_batches(total: int, batch_size: int, world_size: int) -> int:
    """Batches that each of ``world_size`` ranks cuts its share of ``total`` prompts into."""
    return min(-(-total // (world_size * batch_size)), max(total // world_size, 1))


def batch_sizes(total: int, batch_size: int, drop_last: bool) -> list[int]:
    """Sizes of the batches that ``total`` items make."""
    full, rest = divmod(total, batch_size)
    return [batch_size] * full + ([rest] if rest and not drop_last else [])
