"""Reads a comparison from its YAML."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import yaml

from iqstar.compare.plan import SDFT, Comparison, Family, Method, merged
from iqstar.errors import InputError

TOP = {"common", "families", "methods", "budget", "principle"}
BUDGET = {"run", "sweep", "sweep_seed", "responses_per_step", "evaluations"}
FAMILY = {"sweep", "rates"}
METHOD = {"family", "settings", "responses", "seeds", "steps_per_rollout", "pairs", "control"}
"""What may stand in each mapping of the file."""


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
    if settings != SDFT:
        _check_optimizer(name, fields["family"], settings)
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


def _check_optimizer(name: str, family: str, settings: Mapping[str, Any]) -> None:
    """A rate of a method's own would be the one of all runs that try its family's."""
    arguments = settings.get("model", {}).get("init_args", {})
    optimizer = arguments.get("optimizer", {})
    place = f"methods.{name}.settings.model.init_args.optimizer"
    if not isinstance(optimizer, Mapping):
        raise ValueError(f"{place}: write it as a mapping of class_path and init_args")
    if "lr" in (optimizer.get("init_args") or {}):
        raise ValueError(
            f"{place}.init_args.lr: the learning rates are families.{family}.rates; take it out"
        )


def _positive(key: str, value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{key}: must be a whole number of at least 1, got {value!r}")
    return value


def _mapping(file: Path, what: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{file}: {what} must be a mapping of keys to values")
    return dict(value)
