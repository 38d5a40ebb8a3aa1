"""What a comparison consists of: methods, sweeps of their learning rates, and the runs of both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

SDFT = "trl-sdft"
"""In place of settings: TRL's SDFTTrainer, the outside peer."""
TRL = "trl==1.16.0"
"""The release that has it as it is compared here; newer ones may change it."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One curve of the comparison.

    Args:
        name: In tables and plots.
        family: Whose learning rate it takes.
        settings: What it adds to the common settings of ``iqstar fit``, or :data:`SDFT`.
        responses: Sampled in a whole run.
        seeds: One run each.
        steps_per_rollout: Optimiser steps that the responses of one rollout serve.
        pairs: Whether it trains on pairs sampled from the reference and ordered by the judge.
        control: Whether it is expected to gain little.
    """

    name: str
    family: str
    settings: Mapping[str, Any] | str
    responses: int
    seeds: tuple[int, ...]
    steps_per_rollout: int = 1
    pairs: bool = False
    control: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """Methods that share a learning rate.

    Args:
        name: Of the family.
        rates: Tried, all with the same budget, ascending.
        sweep: The method that tries them.
    """

    name: str
    rates: tuple[float, ...]
    sweep: str

    @property
    def swept(self) -> bool:
        """Whether there are several rates to choose from."""
        return len(set(self.rates)) > 1


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A whole comparison; what its YAML says.

    Args:
        common: Settings of ``iqstar fit`` that all methods share.
        families: By name.
        methods: In the order of the tables.
        responses_per_step: Responses of one rollout.
        sweep_responses: Budget of each run of a sweep.
        sweep_seed: Its seed.
        evaluations: Of a run that is compared, besides the one before training.
        principle: What TRL's SDFT is told.
    """

    common: Mapping[str, Any]
    families: Mapping[str, Family]
    methods: tuple[Method, ...]
    responses_per_step: int
    sweep_responses: int
    sweep_seed: int
    evaluations: int
    principle: str

    def with_common(self, settings: Mapping[str, Any]) -> Comparison:
        """The same with other common settings laid over."""
        return replace(self, common=merged(self.common, settings))

    def method(self, name: str) -> Method:
        """The method of a name."""
        return next(m for m in self.methods if m.name == name)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run.

    Args:
        method: What is trained.
        rate: The learning rate.
        seed: Of data order and rollouts.
        responses: Sampled in it.
        evaluations: During it, the last one at its end, besides the one before training.
    """

    method: Method
    rate: float
    seed: int
    responses: int
    evaluations: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.method.name}-lr{self.rate:g}-seed{self.seed}-{self.responses}"

    def steps(self, responses_per_step: int) -> int:
        """Optimiser steps of the run."""
        rollouts = max(self.responses // responses_per_step, 1)
        return rollouts * self.method.steps_per_rollout


def sweep_runs(comparison: Comparison) -> Iterator[Run]:
    """The runs that look for each family's learning rate, by the score at their end.

    A family with one rate needs none.
    """
    for family in comparison.families.values():
        if not family.swept:
            continue
        method = comparison.method(family.sweep)
        for rate in family.rates:
            yield Run(
                method=method,
                rate=rate,
                seed=comparison.sweep_seed,
                responses=comparison.sweep_responses,
                evaluations=1,
            )


def main_runs(comparison: Comparison, rates: Mapping[str, float]) -> Iterator[Run]:
    """The runs that are compared: first seeds first, so that an early look has every method.

    Args:
        comparison: What to run.
        rates: The chosen learning rate of each family; methods of others are left out.
    """
    for number in range(max(len(method.seeds) for method in comparison.methods)):
        for method in comparison.methods:
            if number < len(method.seeds) and method.family in rates:
                yield Run(
                    method=method,
                    rate=rates[method.family],
                    seed=method.seeds[number],
                    responses=method.responses,
                    evaluations=comparison.evaluations,
                )


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping with another laid over it, level by level."""
    result = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = merged(result[key], value)
        else:
            result[key] = value
    return result
