"""The data module: rows → prompts → filters → a split by prompt → loaders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info

from iqstar.data.loader import EvalBatches, RepeatedBatches
from iqstar.data.reading import Row, find_files, read_file, read_hub
from iqstar.data.report import DataReport, quantiles
from iqstar.data.turns import (
    NO_ROOM,
    HeldOut,
    RowError,
    UnusableRowError,
    count_chars,
    first_turn,
    heldout_size,
    split_key,
    split_prompts,
)
from iqstar.errors import InputError
from iqstar.mdp import Prompt, PromptBatch

NO_RESPONSE = "no response"
"""Why a prompt is skipped where responses are replayed."""


class PromptDataModule(LightningDataModule, ABC):
    """Prompts for rollouts. No label and no response decides which prompts, or in what order.

    Prompts are made distinct, filtered, and split by a hash of the seed and of how a conversation
    opens: no prompt is on both sides, nor is a conversation and its continuation.

    Args:
        path: Local .jsonl, .json (both also .gz) or .parquet file, a list of them, or a folder of
            them; null reads the data set from the hub.
        subset: Part of the hub's data set: for HHRLHF a folder such as harmless-base, for
            BeaverTails a split such as 330k_train.
        batch_size: Prompts per rollout on each device.
        eval_batch_size: Prompts per evaluation batch on each device.
        val_prompts: Number of held-out prompts, for validate, test and predict alike; auto for 64,
            but half of the prompts where there are fewer than 128; null holds all prompts out
            (nothing is left to train on).
        first_turn_only: Keep only the first human turn of every conversation.
        min_prompt_chars: Skip prompts with fewer characters, summed over the turns that are kept.
        max_prompt_chars: Skip prompts with more characters, summed over the turns that are kept.
        max_prompt_tokens: Skip prompts whose rendering has more tokens; null for no bound.
        limit: Train on at most this many prompts.
        shuffle: Whether to train in a new order every epoch.
        seed: Seed of the split and of the order.
        drop_last: Leave the last, smaller batch of an epoch out.
    """

    hub_id: ClassVar[str | None] = None
    layouts: ClassVar[tuple[tuple[str, ...], ...]]

    def __init__(
        self,
        path: str | list[str] | None = None,
        subset: str | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 32,
        val_prompts: HeldOut = "auto",
        first_turn_only: bool = False,
        min_prompt_chars: int | None = None,
        max_prompt_chars: int | None = None,
        max_prompt_tokens: int | None = 1024,
        limit: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = True,
    ) -> None:
        super().__init__()
        self.path = path
        self.subset = subset
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.val_prompts = val_prompts
        self.first_turn_only = first_turn_only
        self.min_prompt_chars = min_prompt_chars
        self.max_prompt_chars = max_prompt_chars
        self.max_prompt_tokens = max_prompt_tokens
        self.limit = limit
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.train_prompts: tuple[Prompt, ...] = ()
        self.heldout_prompts: tuple[Prompt, ...] = ()
        self.report: DataReport | None = None
        self._counter: Callable[[Prompt], int] | None = None
        self._room: int | None = None

    # ---- what a data set says about itself

    @abstractmethod
    def parse(self, row: Mapping[str, Any]) -> Prompt:
        """The prompt of a row, from nothing that a label or the final response could change.

        Raises:
            RowError: If the row is malformed.
            UnusableRowError: If it is well formed but no prompt; such rows are counted.
        """

    @abstractmethod
    def summarize(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The counts of :meth:`audit` that come from the raw rows."""

    def hub_options(self) -> dict[str, Any]:
        """Arguments of ``datasets.load_dataset`` that select the part to read from the hub."""
        return {"split": "train"}

    def rows(self) -> Iterator[Row]:
        """The raw rows, checked for their columns.

        Raises:
            InputError: If a file or the hub's data set cannot be read, or has other columns.
        """
        if self.path is None:
            if self.hub_id is None:
                raise InputError(f"data.path: {type(self).__name__} needs a file or folder to read")
            yield from map(self._checked, read_hub(self.hub_id, self.hub_options()))
        else:
            for file in find_files(self.path, hub_id=self.hub_id):
                yield from map(self._checked, read_file(file))

    def heldout_rows(self) -> Iterator[Row] | None:
        """Rows of a held-out set that the data set brings along, or None to split the rows."""
        return None

    def _checked(self, row: Row) -> Row:
        present = {name for name, value in row.values.items() if value is not None}
        if any(present.issuperset(layout) for layout in self.layouts):
            return row
        expected = " or ".join(" + ".join(layout) for layout in self.layouts)
        raise InputError(
            f"{row.place}: unknown column layout: found {', '.join(sorted(present)) or 'nothing'};"
            f" {type(self).__name__} expects {expected}: rename the columns or choose another"
            " data class"
        )

    # ---- prompts

    def prepare_data(self) -> None:
        """Downloads the hub's data set once per node."""
        if self.path is None and self.hub_id is not None:
            for _ in self.rows():
                break

    def setup(self, stage: str | None = None) -> None:
        """Reads, filters and splits the prompts; logs :attr:`report`.

        With a trainer, its module's ``count_prompt_tokens(prompt)`` measures prompts against
        ``max_prompt_tokens`` and its ``prompt_room()``; without one, these do not apply. Where its
        rollout replays responses, prompts without one are left out.

        Raises:
            InputError: If the data cannot be read, or no prompt is left for the stage.
        """
        module = getattr(self.trainer, "lightning_module", None)
        counter = getattr(module, "count_prompt_tokens", None)
        report = self.report
        if report is None or counter != self._counter:
            self._counter, self._room = counter, getattr(module, "prompt_room", lambda: None)()
            report = self._build()
            rank_zero_info("%s: %s", type(self).__name__, report)
        if stage == "fit" and not self.train_prompts:
            remedy = "repair the rows or loosen the filters"
            if NO_RESPONSE in report.skipped:
                remedy = "give data with responses, or have them sampled (model.rollout)"
            elif self.heldout_prompts:
                remedy = "lower data.val_prompts or loosen the filters"
            raise InputError(f"data: no prompt is left to train on ({report}); {remedy}")

    def check_values(self) -> None:
        """Refuses settings that make no data, with an InputError."""
        if self.subset is not None and (self.path is not None or self.hub_id is None):
            raise InputError(
                "data.subset selects a part of a hub data set; none is read here: set it to null"
            )
        least_of = {"batch_size": 1, "eval_batch_size": 1, "val_prompts": 0, "limit": 1}
        for key, least in least_of.items():
            value = getattr(self, key)
            if isinstance(value, int) and value < least:
                raise InputError(f"data.{key}: {value} is too small; give at least {least}")

    def _build(self) -> DataReport:
        self.check_values()
        counts: Counter[str] = Counter()
        own = self.heldout_rows()
        prompts = self._prompts(self.rows(), counts)
        if own is None:
            size = heldout_size(self.val_prompts, len(prompts))
            heldout, train = split_prompts(prompts, size, self.seed)
        else:
            every, _ = split_prompts(self._prompts(own, counts), None, self.seed)
            heldout = every[: heldout_size(self.val_prompts)]
            keys = {split_key(p, self.seed) for p in every}
            ordered, _ = split_prompts(prompts, None, self.seed)
            train = [p for p in ordered if split_key(p, self.seed) not in keys]
            prompts = [*prompts, *heldout]
        if siblings := len(prompts) - len(heldout) - len(train):
            counts["skipped: opens like a held-out prompt"] += siblings
        engine = getattr(getattr(self.trainer, "lightning_module", None), "rollout", None)
        if getattr(engine, "needs_responses", False):
            replayed = [prompt for prompt in train if prompt.response]
            if len(replayed) < len(train):
                counts[f"skipped: {NO_RESPONSE}"] += len(train) - len(replayed)
            train = replayed
        if self.limit is not None and len(train) > self.limit:
            counts["skipped: over limit"] += len(train) - self.limit
            train = train[: self.limit]
        self.train_prompts, self.heldout_prompts = tuple(train), tuple(heldout)
        self.report = report = DataReport(
            rows=counts["rows"],
            skipped={
                name.removeprefix("skipped: "): n
                for name, n in sorted(counts.items())
                if name.startswith("skipped: ")
            },
            cut=counts["cut"],
            train=len(train),
            heldout=len(heldout),
        )
        return report

    def _prompts(self, rows: Iterable[Row], counts: Counter[str]) -> list[Prompt]:
        """The distinct prompts that pass the filters, in the order of the rows."""
        prompts: dict[Any, Prompt] = {}
        for row in rows:
            counts["rows"] += 1
            try:
                whole = self.parse(row.values)
                prompt = first_turn(whole) if self.first_turn_only else whole
            except UnusableRowError as reason:
                counts[f"skipped: {reason}"] += 1
                continue
            except RowError as error:
                if self.path is None:
                    counts["skipped: malformed row"] += 1
                    continue
                raise InputError(f"{row.place}: {error}") from error
            counts["cut"] += prompt is not whole
            if prompt.messages in prompts:
                counts["skipped: duplicate prompt"] += 1
            elif problem := self._problem(prompt):
                counts[f"skipped: {problem}"] += 1
            else:
                prompts[prompt.messages] = prompt
        return list(prompts.values())

    def _problem(self, prompt: Prompt) -> str | None:
        """Which of the user's bounds the prompt breaks."""
        chars = count_chars(prompt)
        if self.min_prompt_chars is not None and chars < self.min_prompt_chars:
            return f"under min_prompt_chars={self.min_prompt_chars}"
        if self.max_prompt_chars is not None and chars > self.max_prompt_chars:
            return f"over max_prompt_chars={self.max_prompt_chars}"
        if self._counter is None or (self.max_prompt_tokens is None and self._room is None):
            return None
        tokens = self._counter(prompt)
        if self.max_prompt_tokens is not None and tokens > self.max_prompt_tokens:
            return f"over max_prompt_tokens={self.max_prompt_tokens}"
        if self._room is not None and tokens > self._room:
            return NO_ROOM.format(self._room)
        return None

    # ---- loaders

    def train_dataloader(self) -> RepeatedBatches:
        """Training batches, each repeated as often as the module trains on one rollout."""
        rank, world_size = self._place()
        module = getattr(self.trainer, "lightning_module", None)
        loader = RepeatedBatches(
            self.train_prompts,
            self.batch_size,
            getattr(module, "training_steps", lambda num_prompts: 1),
            shuffle=self.shuffle,
            seed=self.seed,
            drop_last=self.drop_last,
            rank=rank,
            world_size=world_size,
        )
        if len(loader) == 0:
            raise InputError(
                f"data.batch_size: {len(self.train_prompts)} training prompts do not fill one batch"
                f" of {self.batch_size} on {world_size} device(s); lower it or set"
                " data.drop_last=false"
            )
        return loader

    def val_dataloader(self) -> EvalBatches:
        """The held-out prompts, in a fixed order."""
        return EvalBatches(self.heldout_prompts, self.eval_batch_size, *self._place())

    def test_dataloader(self) -> EvalBatches:
        """The same held-out prompts."""
        return self.val_dataloader()

    def predict_dataloader(self) -> EvalBatches:
        """The same held-out prompts."""
        return self.val_dataloader()

    def transfer_batch_to_device(
        self, batch: PromptBatch, device: torch.device, dataloader_idx: int
    ) -> PromptBatch:
        """Prompts are text and stay where they are (Lightning cannot copy frozen classes)."""
        return batch

    def _place(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    # ---- audit

    def audit(self) -> dict[str, Any]:
        """What the rows hold and what the filters leave of them, as plain JSON values.

        Raises:
            InputError: If the data cannot be read.
        """
        self.check_values()
        rows = [*self.rows(), *(self.heldout_rows() or ())]
        summary = self.summarize([row.values for row in rows])
        report = self._build()
        details = summary.setdefault("details", {})
        details["skipped"] = report.skipped
        details["cut_to_first_turn"] = report.cut
        details["split"] = {"train": report.train, "heldout": report.heldout}
        if kept := [*self.train_prompts, *self.heldout_prompts]:
            details["prompt_chars"] = quantiles([count_chars(p) for p in kept])
            details["prompt_turns"] = quantiles([len(p.messages) for p in kept])
        short = self.drop_last and report.train < self.batch_size
        if short and self.val_prompts is not None:
            details["warnings"] = [
                f"{report.train} training prompts do not fill one batch of {self.batch_size} "
                "(data.batch_size): lower it, or hold fewer out (data.val_prompts)"
            ]
        return summary
