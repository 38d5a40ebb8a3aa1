"""Settings that follow from others: the class of a part that nobody names, the number of steps.

Constructors leave such parts at null, which the parser can neither print nor change one setting of.
So it gets the class, with its arguments, wherever the user names none. A class that is named
starts from its own defaults, not from these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from iqstar.alignment import AlignmentModule
from iqstar.baselines import PPO
from iqstar.module import InverseQStar
from iqstar.optim import ADAMW
from iqstar.precision import default_precision
from iqstar.settings import Explainer, Setting
from iqstar.signatures import parameters, public_path

PARTS: Mapping[type, Mapping[str, Any]] = {
    AlignmentModule: {
        "rollout": {"class_path": "iqstar.rollouts.GenerateRollout"},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": ADAMW},
        "schedule": {"class_path": "iqstar.optim.WarmupCosine"},
    },
    InverseQStar: {
        "loss": {
            "class_path": "iqstar.losses.DistributionImitationLoss",
            "init_args": {"divergence": {"class_path": "iqstar.losses.ReverseKL"}},
        },
    },
    PPO: {"kl": {"class_path": "iqstar.baselines.FixedKL"}},
}
"""By method: what its parts are where their settings are null."""
METHOD = Setting(path=("model",), value="iqstar.InverseQStar", place="")
"""The method where none is named."""


def default_model(settings: Sequence[Setting]) -> dict[str, Any]:
    """The method, with the parts that no setting names.

    Args:
        settings: What the user set.
    """
    known_classes = Explainer([METHOD, *settings], {"model": AlignmentModule}, ())
    cls = known_classes.class_at(("model",)) or InverseQStar
    known = parameters(cls)
    parts = {
        name: part
        for owner, own in PARTS.items()
        if issubclass(cls, owner)
        for name, part in own.items()
        if name in known and not is_named(settings, "model", name)
    }
    return {"class_path": public_path(cls), "init_args": parts}


def default_trainer(settings: Sequence[Setting], printing: bool) -> dict[str, Any]:
    """What the trainer's settings are where others or the machine decide, by their keys.

    Args:
        settings: What the user set.
        printing: Whether they are only shown; a run chooses its precision when it starts.
    """
    given = {s.path[-1]: s.value for s in settings if s.path[:-1] == ("trainer",)}
    found: dict[str, Any] = {}
    if "max_steps" not in given and given.get("max_epochs", "") not in ("", "null", "~", "-1"):
        found["trainer.max_steps"] = -1  # the default would end the run before its epochs do
    if printing:
        found["trainer.precision"] = default_precision(given.get("accelerator", "auto"))
    return found


def as_settings(model: Mapping[str, Any]) -> list[Setting]:
    """The classes of :func:`default_model` as if they had been given, to explain errors with."""
    parts = {("model", name): part["class_path"] for name, part in model["init_args"].items()}
    given = [Setting(path=path, value=value, place="") for path, value in parts.items()]
    return [METHOD, *given]


def is_named(settings: Sequence[Setting], *path: str) -> bool:
    """Whether a setting names the class at a place, or says that there is none."""
    return any(
        setting.plain == path
        and setting.value
        and (not setting.value.startswith("{") or "class_path" in setting.value)
        for setting in settings
    )
