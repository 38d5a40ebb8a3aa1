"""Short runs on tiny models: through a real Lightning Trainer, or step by step without one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import Tensor

from iqstar import InverseQStar, LoRASpec, PolicySpec
from iqstar.data import RepeatedBatches
from iqstar.estimators import ContrastiveEstimator, OptimalPolicyEstimator
from iqstar.losses import (
    DistributionImitationLoss,
    ForwardKL,
    GeneralizedJSD,
    ReverseKL,
    RewardImitationLoss,
    TokenPolicyGradientLoss,
)
from iqstar.mdp import Message, Prompt, PromptBatch
from iqstar.optim import Constant
from iqstar.rollouts import GenerateRollout
from iqstar.sharding import whole
from paths import choose

choose()
# Tiny tensors: threads only cost, most of all on a busy machine.
torch.set_num_threads(1)

#: Trained with the adapters' usual targets; everything else of the tiny model stays frozen.
LORA = LoRASpec(rank=4, alpha=8)
LOSSES = {
    "reward": RewardImitationLoss,
    "reverse": lambda: DistributionImitationLoss(ReverseKL()),
    "forward": lambda: DistributionImitationLoss(ForwardKL()),
    "jsd": lambda: DistributionImitationLoss(GeneralizedJSD(0.3)),
    "gradient": TokenPolicyGradientLoss,
}


def ask(text: str, response: str | None = None, complete: bool = True) -> Prompt:
    """A single-turn prompt."""
    messages = (Message(role="user", content=text),)
    return Prompt(messages=messages, response=response, complete=complete)


#: Of different lengths, so that every batch needs padding.
PROMPTS = tuple(ask(t) for t in ("Hi", "Why is it so?", "And you, is the inner ring on?", "Go on."))


def contrast(strength: float = 2.0, **options: Any) -> ContrastiveEstimator:
    """An estimator with credit far from 0 on a tiny model."""
    return ContrastiveEstimator("Be kind to all.", "Be rude!", strength=strength, **options)


def sgd(lr: float) -> Any:
    """Plain SGD: unlike Adam, its step is proportional to the gradient."""
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def adamw(lr: float = 1e-2) -> Any:
    """AdamW without weight decay."""
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)


def make_module(
    folder: Any,
    estimator: OptimalPolicyEstimator | None = None,
    *,
    kind: type[InverseQStar] = InverseQStar,
    spec: dict[str, Any] | None = None,
    **options: Any,
) -> InverseQStar:
    """A module on the model of a folder, with a short rollout unless one is given."""
    fields: dict[str, Any] = {
        "rollout": GenerateRollout(max_new_tokens=5),
        "optimizer": adamw(),
        "schedule": Constant(),
        **options,
    }
    policy = PolicySpec(model=str(folder), **(spec or {}))
    return kind(policy=policy, estimator=estimator or contrast(), **fields)


class Prompts(LightningDataModule):
    """Given prompts in their order, through the product's own loader."""

    def __init__(self, prompts: Sequence[Prompt], batch_size: int, drop_last: bool = True) -> None:
        super().__init__()
        self.prompts, self.batch_size, self.drop_last = prompts, batch_size, drop_last

    def train_dataloader(self) -> RepeatedBatches:
        return RepeatedBatches(
            self.prompts,
            self.batch_size,
            self.trainer.lightning_module.training_steps,
            shuffle=False,
            drop_last=self.drop_last,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )

    def transfer_batch_to_device(
        self, batch: PromptBatch, device: torch.device, dataloader_idx: int
    ) -> PromptBatch:
        return batch


class Recorder(Callback):
    """Keeps the pre-clip gradient, the curves and the weights of every optimiser step."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []
        self.losses: list[float] = []
        self.curves: list[dict[str, float]] = []
        self.weights: list[Tensor] = []
        self.objective = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.start = trainer.global_step
        self.weights.append(flat(trained(pl_module)))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        parameters = [p for p in pl_module.actor.parameters() if p.requires_grad]
        grads = [whole(torch.zeros_like(p) if p.grad is None else p.grad) for p in parameters]
        self.gradients.append(flat(dict(enumerate(grads))))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        # Curves are logged in float32; this is the sum of what was differentiated, in full.
        self.objective += float(args[0]["loss"])
        if len(self.losses) < trainer.global_step - self.start:
            curves = {k: float(v) for k, v in trainer.callback_metrics.items()}
            self.losses.append(curves["train/loss"])
            self.curves.append({k: v for k, v in curves.items() if k.startswith("train/")})
            self.weights.append(flat(trained(pl_module)))


class SaveAt(Callback):
    """Saves a checkpoint after one optimiser step."""

    def __init__(self, step: int, path: Any) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def make_trainer(precision: str = "32-true", **options: Any) -> Trainer:
    """A Trainer on the CPU that writes nothing."""
    fields: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "precision": precision,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": -1 if options.get("max_steps") else 1,
    }
    return Trainer(**{**fields, **options})


def fit(
    module: InverseQStar,
    prompts: Sequence[Prompt] = PROMPTS,
    batch_size: int = 4,
    drop_last: bool = True,
    ckpt_path: Any = None,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> Recorder:
    """Trains, and returns what happened at every optimiser step."""
    recorder = Recorder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = make_trainer(callbacks=[recorder, *callbacks], **options)
        data = Prompts(prompts, batch_size, drop_last)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return recorder


def attach(module: InverseQStar, precision: str = "32-true") -> InverseQStar:
    """Loads the module's models as a Trainer would, without running it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module.trainer = make_trainer(precision)
    module.configure_model()
    return module.train()


def trained(module: InverseQStar) -> dict[Any, Tensor]:
    """The trained weights."""
    return {n: whole(p.detach()) for n, p in module.actor.named_parameters() if p.requires_grad}


def copied(weights: dict[Any, Tensor]) -> dict[Any, Tensor]:
    """A copy that training does not change."""
    return {name: value.detach().clone() for name, value in weights.items()}


def flat(tensors: dict[Any, Tensor]) -> Tensor:
    """All tensors in one vector, copied."""
    return torch.cat([t.detach().flatten().clone() for t in tensors.values()])


def same_bits(a: dict[Any, Tensor], b: dict[Any, Tensor]) -> bool:
    """Whether all tensors are equal, bit for bit."""
    return a.keys() == b.keys() and all(
        torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8)) for n in a
    )


def distance(a: Tensor, b: Tensor) -> float:
    """Relative L2 distance."""
    return float((a - b).norm() / b.norm())
