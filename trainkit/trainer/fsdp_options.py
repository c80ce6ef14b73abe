"""The arguments ``fsdp`` and ``fsdp_config``: completed, checked, and as options of accelerate's plugin."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trainkit.trainer.arguments_checks import unserved
from trainkit.trainer.arguments_json import read_mapping
from trainkit.trainer.enums import FSDPOption

if TYPE_CHECKING:
    from trainkit.trainer.arguments import TrainingArguments

_XLA = ("xla", "xla_fsdp_v2", "xla_fsdp_grad_ckpt")
_KEYS = {
    "min_num_params", "transformer_layer_cls_to_wrap", "backward_prefetch", "forward_prefetch", "limit_all_gathers",
    "use_orig_params", "sync_module_states", "cpu_ram_efficient_loading", "activation_checkpointing", "version",
    "state_dict_type", "reshard_after_forward", "xla_fsdp_settings", *_XLA,
}  # fmt: skip
_SHARDINGS = (
    FSDPOption.FULL_SHARD,
    FSDPOption.SHARD_GRAD_OP,
    FSDPOption.NO_SHARD,
    FSDPOption.HYBRID_SHARD,
    FSDPOption.HYBRID_SHARD_ZERO2,
)


def settle_fsdp(args: TrainingArguments) -> list[str]:
    """``fsdp`` as a list of options, ``fsdp_config`` as a dict of its own without prefixes.

    Returns: one line for each old field that had something to say, with what to write.

    Raises: ValueError for an unknown word, TypeError for a configuration that is none, OSError for a missing file.
    """
    given: Any = args.fsdp
    words = given.split() if isinstance(given, str) else [FSDPOption.FULL_SHARD] if given is True else given or []
    args.fsdp = [FSDPOption(word) for word in words]
    args.fsdp_config, old = _settled_config(args)
    return [f"{name} (use fsdp_config)" for name in old]


def _settled_config(args: TrainingArguments) -> tuple[dict[str, Any], list[str]]:
    given = {} if args.fsdp_config is None else read_mapping("fsdp_config", args.fsdp_config)
    config = {key.removeprefix("fsdp_"): value for key, value in given.items()}
    old = []
    if args.fsdp_min_num_params > config.get("min_num_params", 0):
        old.append("fsdp_min_num_params")
    config["min_num_params"] = max(config.get("min_num_params", 0), args.fsdp_min_num_params)
    layers = config.get("transformer_layer_cls_to_wrap")
    layers = [layers] if isinstance(layers, str) else layers
    layer = args.fsdp_transformer_layer_cls_to_wrap
    if layer is not None and layer not in (layers or []):
        old.append("fsdp_transformer_layer_cls_to_wrap")
        layers = [*(layers or []), layer]
    if layers is not None:
        config["transformer_layer_cls_to_wrap"] = layers
    return {**config, **{key: config.get(key, False) for key in _XLA}}, old


def check_fsdp(args: TrainingArguments) -> None:
    """Refuse settings that exclude each other; one warning names those that mean nothing.

    Raises: ValueError.
    """
    fsdp: Any = args.fsdp
    config: Any = args.fsdp_config
    layers, size = config.get("transformer_layer_cls_to_wrap"), config["min_num_params"]
    for key in (*_XLA, "xla_fsdp_settings"):
        if config.get(key):
            raise unserved("fsdp_config", {key: config[key]}, "XLA", "leave it out")
    if fsdp and args.deepspeed:
        raise ValueError(f"fsdp: got {[word.value for word in fsdp]} together with deepspeed, expected one of them")
    if fsdp == [FSDPOption.OFFLOAD]:
        raise ValueError("fsdp: got 'offload' alone, expected it beside a sharding, such as 'full_shard offload'")
    if FSDPOption.FULL_SHARD in fsdp and FSDPOption.SHARD_GRAD_OP in fsdp:
        raise ValueError("fsdp: got 'full_shard' and 'shard_grad_op', expected one of them")
    if fsdp and size > 0 and layers is not None:
        raise ValueError(
            f"fsdp_config: got min_num_params={size} and transformer_layer_cls_to_wrap={layers}, expected one of them"
        )
    if fsdp and _true(config, "cpu_ram_efficient_loading", False) and not _true(config, "sync_module_states", True):
        raise ValueError("fsdp_config: cpu_ram_efficient_loading needs sync_module_states, got False for that")
    if fsdp and args.gradient_checkpointing and _true(config, "activation_checkpointing", False):
        raise ValueError(
            "gradient_checkpointing: got True together with activation_checkpointing in fsdp_config; choose the latter"
        )
    if (fsdp or args.deepspeed) and args.save_only_model and args.load_best_model_at_end:
        raise ValueError(
            "save_only_model: got True with load_best_model_at_end=True, which FSDP and DeepSpeed cannot load again"
        )
    _warn(args, fsdp, config)


def _warn(args: TrainingArguments, fsdp: list[FSDPOption], config: dict[str, Any]) -> None:
    causes = []
    if not fsdp and (config["min_num_params"] > 0 or config.get("transformer_layer_cls_to_wrap") is not None):
        causes.append("fsdp_config: its min_num_params and transformer_layer_cls_to_wrap mean nothing without fsdp")
    unknown = sorted(set(config) - _KEYS)
    if unknown:
        causes.append(f"fsdp_config: the keys {unknown} are not known and mean nothing; known are {sorted(_KEYS)}")
    if args.gradient_checkpointing and {FSDPOption.FULL_SHARD, FSDPOption.HYBRID_SHARD} & set(fsdp):
        causes.append(
            "gradient_checkpointing: with a full shard it gathers the parameters once more in the backward pass; use "
            "activation_checkpointing in fsdp_config"
        )
    if causes:
        warnings.warn("; ".join(causes), UserWarning, stacklevel=5)


def fsdp_plugin_options(args: TrainingArguments) -> dict[str, Any] | None:
    """The keyword arguments of ``accelerate.FullyShardedDataParallelPlugin``; None without ``fsdp``.

    Version 1 unless ``fsdp_config`` has ``version: 2``.

    Source: transformers 4.57, which hands them over as environment variables ``FSDP_*``.
    """
    if not args.fsdp:
        return None
    config: Any = args.fsdp_config
    fsdp = [FSDPOption(word) for word in args.fsdp]
    sharding = next((word for word in reversed(fsdp) if word in _SHARDINGS), FSDPOption.FULL_SHARD)
    options: dict[str, Any] = {
        "cpu_offload": FSDPOption.OFFLOAD in fsdp,
        "activation_checkpointing": _true(config, "activation_checkpointing", False),
        "limit_all_gathers": _true(config, "limit_all_gathers", True),
        **_wrapping(fsdp, config),
    }
    if "cpu_ram_efficient_loading" in config:
        # accelerate writes an environment variable as soon as it is told.
        options["cpu_ram_efficient_loading"] = _true(config, "cpu_ram_efficient_loading", False)
    if "state_dict_type" in config:
        options["state_dict_type"] = config["state_dict_type"]
    if int(config.get("version", 1)) == 2:
        reshard = _true(config, "reshard_after_forward", sharding != FSDPOption.SHARD_GRAD_OP)
        return {"fsdp_version": 2, "reshard_after_forward": reshard, **options}
    return {
        "fsdp_version": 1,
        "sharding_strategy": sharding.value.upper(),
        "backward_prefetch": str(config.get("backward_prefetch", "NO_PREFETCH")).upper(),
        "forward_prefetch": _true(config, "forward_prefetch", False),
        "sync_module_states": _true(config, "sync_module_states", True),
        "use_orig_params": _true(config, "use_orig_params", True),
        **options,
    }


def _wrapping(fsdp: list[FSDPOption], config: dict[str, Any]) -> dict[str, Any]:
    if FSDPOption.AUTO_WRAP not in fsdp:
        return {"auto_wrap_policy": "NO_WRAP"}
    if config["min_num_params"] > 0:
        return {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": config["min_num_params"]}
    wrap: dict[str, Any] = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    if config.get("transformer_layer_cls_to_wrap") is not None:
        wrap["transformer_cls_names_to_wrap"] = list(config["transformer_layer_cls_to_wrap"])
    return wrap


def _true(config: Mapping[str, Any], key: str, default: bool) -> bool:
    return str(config.get(key, default)).lower() == "true"
