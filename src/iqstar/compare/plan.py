"""What a comparison consists of: methods, sweeps of their learning rates, and the runs of both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from iqstar.errors import InputError

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


def read_comparison(file: Path, fast: bool = False) -> Comparison:
    """Reads a comparison's YAML (docs/compare.md has its keys).

    Args:
        file: Such as ``configs/compare.yaml``.
        fast: Take what its ``fast`` says in place of the budgets and seeds.

    Raises:
        InputError: If it cannot be read, or a key is missing, unknown or senseless.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--config: {file}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: {' '.join(str(error).split())}") from error
    content = _mapping(file, "the file", content)
    given = _mapping(file, "fast", content.pop("fast", {}))
    if fast:
        content = merged(content, given)
    try:
        for part in ("methods", "families") if fast else ():
            _leave_out(content, given, part)
        return _comparison(content)
    except KeyError as error:
        raise InputError(f"{file}: {error.args[0]} is missing") from error
    except (TypeError, ValueError) as error:
        raise InputError(f"{file}: {error}") from error


def _leave_out(content: dict[str, Any], fast: Mapping[str, Any], part: str) -> None:
    """Takes out what ``fast`` sets to null."""
    given, whole = _Keys(f"fast.{part}", fast.get(part, {})), _Keys(part, content[part])
    content[part] = {n: fields for n, fields in whole.items() if given.get(n, fields) is not None}


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping with another laid over it, level by level."""
    result = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = merged(result[key], value)
        else:
            result[key] = value
    return result


def _comparison(content: Mapping[str, Any]) -> Comparison:
    if unknown := sorted(content.keys() - TOP):
        raise ValueError(f"unknown key {unknown[0]}; known: {', '.join(sorted(TOP))}")
    budget = _Keys("budget", content["budget"], BUDGET)
    sweep = _positive("budget.sweep", budget["sweep"])
    methods = tuple(
        _method(name, _Keys(f"methods.{name}", fields, METHOD), budget)
        for name, fields in _Keys("methods", content["methods"]).items()
    )
    families = {
        name: _family(name, _Keys(f"families.{name}", fields, FAMILY))
        for name, fields in _Keys("families", content["families"]).items()
    }
    for method in methods:
        if method.family not in families:
            raise ValueError(f"methods.{method.name}.family: no family is called {method.family}")
        if method.responses <= sweep:
            raise ValueError(f"methods.{method.name}: needs more responses than budget.sweep")
    owners = {method.name: method.family for method in methods}
    for family in families.values():
        if family.sweep not in owners:
            raise ValueError(f"families.{family.name}.sweep: no method is called {family.sweep}")
        if (owner := owners[family.sweep]) != family.name:
            raise ValueError(
                f"families.{family.name}.sweep: {family.sweep} is of the family {owner}; name a "
                f"method of {family.name}"
            )
        if not family.rates or family.rates[0] <= 0:
            raise ValueError(f"families.{family.name}.rates: needs positive learning rates")
    return Comparison(
        common=_Keys("common", content["common"]),
        families=families,
        methods=methods,
        responses_per_step=_positive("budget.responses_per_step", budget["responses_per_step"]),
        sweep_responses=sweep,
        sweep_seed=int(budget.get("sweep_seed", 0)),
        evaluations=_positive("budget.evaluations", budget["evaluations"]),
        principle=content["principle"],
    )


TOP = {"common", "families", "methods", "budget", "principle"}
BUDGET = {"run", "sweep", "sweep_seed", "responses_per_step", "evaluations"}
FAMILY = {"sweep", "rates"}
METHOD = {"family", "settings", "responses", "seeds", "steps_per_rollout", "pairs", "control"}
"""What may stand in each mapping of the file."""


class _Keys(dict[str, Any]):
    """A mapping of the file; a key that is missing, or is none of those known, is named."""

    def __init__(self, place: str, content: Any, known: Set[str] | None = None) -> None:
        if not isinstance(content, Mapping):
            raise ValueError(f"{place}: must be a mapping of keys to values, found {content!r}")
        if known is not None and (unknown := sorted(content.keys() - known)):
            raise ValueError(
                f"{place}: unknown key {unknown[0]}; known: {', '.join(sorted(known))}"
            )
        super().__init__(content)
        self.place = place

    def __missing__(self, key: str) -> Any:
        raise KeyError(f"{self.place}.{key}")


def _family(name: str, fields: Mapping[str, Any]) -> Family:
    try:
        rates = tuple(sorted(float(rate) for rate in fields["rates"]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"families.{name}.rates: needs a list of learning rates") from error
    return Family(name=name, rates=rates, sweep=fields["sweep"])


def _method(name: str, fields: Mapping[str, Any], budget: Mapping[str, Any]) -> Method:
    settings = fields["settings"]
    if settings != SDFT and not isinstance(settings, Mapping):
        raise ValueError(f"methods.{name}.settings: give settings of iqstar fit, or {SDFT}")
    seeds = fields.get("seeds", [0])
    if not (isinstance(seeds, list) and seeds and all(isinstance(seed, int) for seed in seeds)):
        raise ValueError(f"methods.{name}.seeds: needs a list of one or more whole numbers")
    return Method(
        name=name,
        family=fields["family"],
        settings=settings,
        responses=_positive(f"methods.{name}.responses", fields.get("responses", budget["run"])),
        seeds=tuple(seeds),
        steps_per_rollout=_positive(
            f"methods.{name}.steps_per_rollout", fields.get("steps_per_rollout", 1)
        ),
        pairs=bool(fields.get("pairs", False)),
        control=bool(fields.get("control", False)),
    )


def _positive(key: str, value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{key}: must be a whole number of at least 1, got {value!r}")
    return value


def _mapping(file: Path, what: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{file}: {what} must be a mapping of keys to values")
    return dict(value)
