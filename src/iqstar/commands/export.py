"""``iqstar export``: the trained model of a checkpoint in Hugging Face format.

Example:
    ``iqstar export --ckpt runs/quickstart --out kind``
"""

from __future__ import annotations

import sys
import warnings
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import jsonargparse
import yaml
from torch import Tensor, nn

from iqstar.adapters import with_adapters
from iqstar.card import model_card, record_of_checkpoint
from iqstar.checkpoints import checkpoint_at, read_checkpoint
from iqstar.commands.options import OptionParser, path
from iqstar.errors import InputError
from iqstar.export import SHARD_SIZE, Dtype, check_replaceable, check_shard_size, export_policy
from iqstar.loading import load_whole
from iqstar.policy import CausalLM, Policy, PolicySpec
from iqstar.pretrained import quiet_transformers, resolve_model
from iqstar.settings import read_yaml

PREFIX = "actor.model."
"""How the names of the policy's weights start in a checkpoint."""


def main(argv: list[str]) -> int:
    """Exports a checkpoint.

    Args:
        argv: The arguments after ``iqstar export``.

    Returns:
        The exit code, 0.

    Raises:
        InputError: If the arguments are wrong, the checkpoint cannot be exported, or the folder
            cannot be written.
    """
    options = _parse(argv)
    out = options.out.resolve()  # a link stays, its folder is replaced
    check_shard_size(options.max_shard_size, "--max_shard_size")
    _check_out(out, options.overwrite)
    ckpt = checkpoint_at(options.ckpt)
    checkpoint = read_trained(ckpt)
    settings = _read_config(options.config) if options.config else None
    record = record_of_checkpoint(checkpoint, settings)
    spec = policy_spec(record.settings, str(options.config or ckpt))
    if Path(resolve_model(spec.model)).resolve() == out:
        raise InputError(
            f"--out: {out} is the model that this one was trained from; choose another folder"
        )
    if options.merge and spec.lora is None:
        raise InputError(
            f"--merge: {ckpt} has no adapters to fold in, all weights were trained; "
            "leave --merge out"
        )
    with quiet_transformers(bars=False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*`is_gradient_checkpointing` is deprecated.*")
        policy = restored(spec, checkpoint, str(ckpt))
    fingerprint = policy.actor.fingerprint
    export_policy(
        merged(policy) if options.merge else policy,
        out,
        card=model_card(record, spec, merged=options.merge, fingerprint=fingerprint),
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
    )
    sys.stdout.write(f"Exported {ckpt} to {out}\n")
    return 0


def policy_spec(settings: Mapping[str, Any], where: str) -> PolicySpec:
    """What the run trained, from its settings.

    Args:
        settings: The run's YAML as a mapping.
        where: The file that they are from, for messages.

    Raises:
        InputError: If they do not say it, or not in a way that this version understands.
    """
    try:
        given = settings["model"]["init_args"]["policy"]
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{where}: it does not say which model was trained (model.init_args.policy), as for a "
            "run from Python; give a YAML that does with --config, such as the run's config.yaml"
        ) from error
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--policy", type=PolicySpec)
    try:
        spec: PolicySpec = parser.instantiate(parser.parse_object({"policy": given})).policy
    except jsonargparse.ArgumentError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise InputError(
            f"{where}: model.init_args.policy is not understood: {lines[-1]}; give the config.yaml "
            "of the run with --config"
        ) from error
    return spec


def restored(spec: PolicySpec, checkpoint: Mapping[str, Any], where: str) -> Policy:
    """The policy as it was when a checkpoint was saved.

    Args:
        spec: What was trained.
        checkpoint: With ``state_dict`` and ``iqstar``.
        where: The checkpoint's file, for messages.

    Raises:
        InputError: If the base model is not the one that the checkpoint was trained from, or
            weights are missing or do not fit.
    """
    # How training computed is no concern of the weights, and may not be possible here.
    plain = replace(spec, attn_implementation=None, gradient_checkpointing=False)
    actor = load_whole(plain, plain.chat())
    then = checkpoint["iqstar"].get("frozen", {}).get("reference", actor.fingerprint)
    if then != actor.fingerprint:
        raise InputError(
            f"--ckpt: {where} was trained from another base model: {spec.model} has changed since "
            f"(SHA-256 {then[:12]} then, {actor.fingerprint[:12]} now); name the right one with "
            "--config, or pin model.policy.revision"
        )
    if spec.lora is not None:
        actor.model = with_adapters(actor.model, spec.lora)
    load_weights(actor.model, of_policy(checkpoint["state_dict"]), where)
    return Policy(actor=actor, frozen=None, spec=spec)


def of_policy(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's weights of the policy; it may hold others, such as PPO's value head.

    Args:
        weights: By their names in the module.

    Returns:
        By their names in the policy's model.
    """
    return {n.removeprefix(PREFIX): w for n, w in weights.items() if n.startswith(PREFIX)}


def load_weights(
    model: nn.Module, weights: Mapping[str, Tensor], where: str, key: str = "--ckpt"
) -> None:
    """Puts trained weights in their places.

    Args:
        model: The policy's.
        weights: By their names in it.
        where: The checkpoint's file, for messages.
        key: What the user gave it with.

    Raises:
        InputError: If one is missing, unknown or of another shape.
    """
    own = model.state_dict()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    misfits = sorted(trained - weights.keys()) + sorted(weights.keys() - own.keys())
    misfits += [n for n in weights.keys() & own.keys() if weights[n].shape != own[n].shape]
    if misfits:
        raise InputError(
            f"{key}: {where} does not fit the model of its settings ({len(misfits)} weights "
            f"differ, {misfits[0]} among them); give the config.yaml of the run with --config"
        )
    model.load_state_dict(weights, strict=False)


def merged(policy: Policy) -> Policy:
    """The same policy with its adapters folded into the weights.

    Raises:
        InputError: If that would change the output head.
    """
    model = policy.actor.model
    base = model.get_base_model()
    if hasattr(base.get_input_embeddings(), "base_layer") and base.all_tied_weights_keys:
        raise InputError(
            "--merge: the adapted embeddings are also the output head, which was not adapted; "
            "leave --merge out and export the adapter"
        )
    return replace(policy, actor=CausalLM(model.merge_and_unload(), policy.actor.chat))


def _parse(argv: list[str]) -> Namespace:
    parser = OptionParser(
        "export",
        "Writes the trained model of a checkpoint as a Hugging Face folder (or a PEFT "
        "adapter) with tokenizer, chat template, generation config and a model card.",
    )
    add = parser.add_argument
    add("--ckpt", "--ckpt_path", type=path, required=True, metavar="CKPT",
        help="checkpoint of a run, or a folder: the newest one below it")  # fmt: skip
    add("--out", "--output", type=path, required=True, metavar="FOLDER",
        help="where to; must be empty or not exist")  # fmt: skip
    add("--overwrite", action="store_true", help="replace an earlier export there")
    add("--merge", action="store_true", help="fold LoRA adapters into the weights")
    add("--dtype", choices=get_args(Dtype), help="of the weights; as trained by default")
    add("--max_shard_size", default=SHARD_SIZE, metavar="SIZE",
        help="largest file of weights, such as 500MB; default: %(default)s")  # fmt: skip
    add(
        "--config",
        type=path,
        metavar="FILE",
        help="the run's YAML, in place of the one in the checkpoint",
    )
    return parser.options(argv)


def _check_out(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"--out: {out} is a file; give a folder")
    if Path.cwd().is_relative_to(out.resolve()):
        raise InputError(
            f"--out: {out} holds the folder that you are in, which cannot be replaced; name another"
        )
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise InputError(
            f"--out: {out} is not empty; choose another folder, or add --overwrite to replace it"
        )
    check_replaceable(out, "--overwrite", "choose another folder")


def read_trained(path: Path, key: str = "--ckpt") -> dict[str, Any]:
    """A checkpoint that holds a policy; its optimiser is left out where that is possible.

    Args:
        path: The checkpoint.
        key: What the user gave it with.

    Raises:
        InputError: If it cannot be read, or is not one of a run.
    """
    checkpoint = read_checkpoint(path, key, optimizer=False)
    if not any(name.startswith(PREFIX) for name in checkpoint.get("state_dict", {})):
        raise InputError(
            f"{key}: {path} holds no weights of a policy; give a .ckpt that iqstar fit saved"
        )
    if "iqstar" not in checkpoint:
        raise InputError(f"{key}: {path} was not saved by iqstar fit; give one that was")
    return checkpoint


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise InputError(f"--config: {file} does not exist or is not a file")
    read_yaml(file)  # names the line of what is wrong
    return dict(yaml.safe_load(file.read_text(encoding="utf-8")))
