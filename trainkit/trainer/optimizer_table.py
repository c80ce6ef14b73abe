"""The optimizers that ``TrainingArguments.optim`` names: one row each, found when asked for.

A row says where the class lives, what to install for it, and which arguments it gets besides ``lr``: from the
TrainingArguments, from the text ``optim_args``, and fixed ones.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


class OptimArgs:
    """The text ``optim_args`` ("key=value, key=value"), which remembers what was asked for.

    Args:
        text: as above, or None; spaces do not count.

    Raises: ValueError for a part that is not one key, one "=" and one value, or for a key that comes twice.

    Example:
        >>> given = OptimArgs("rank=64, proj=random")
        >>> given.integer("rank", 128), given.integer("gap", 200), given.unused()
        (64, 200, ['proj'])

    Source: Trainer 4.57: ``get_optimizer_cls_and_kwargs``.
    """

    def __init__(self, text: str | None) -> None:
        self._values: dict[str, str] = {}
        self._asked: set[str] = set()
        for part in (text or "").replace(" ", "").split(",") if text and text.strip() else ():
            key, *values = part.split("=")
            if not key or len(values) != 1 or key in self._values:
                raise ValueError(f"optim_args: cannot read {part!r} in {text!r}, expected key=value,key=value")
            self._values[key] = values[0]

    def word(self, name: str, default: Any) -> Any:
        """The value as text; ``default`` where it is not given."""
        self._asked.add(name)
        return self._values.get(name, default)

    def number(self, name: str, default: Any) -> Any:
        """The value as a float. Raises: ValueError if it is none."""
        return self._parsed(name, default, float, "a number")

    def integer(self, name: str, default: Any) -> Any:
        """The value as an integer. Raises: ValueError if it is none."""
        return self._parsed(name, default, int, "an integer")

    def flag(self, name: str, default: Any) -> Any:
        """The value as True or False, or None for "None". Raises: ValueError if it is none of them."""
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "none": None}
        return self._parsed(name, default, lambda text: words[text.lower()], "True or False")

    def all(self) -> dict[str, Any]:
        """All values, as the Python numbers and truth values that they look like, else as text."""
        self._asked.update(self._values)
        return {name: _literal(text) for name, text in self._values.items()}

    def unused(self) -> list[str]:
        """The keys that nobody has asked for."""
        return [name for name in self._values if name not in self._asked]

    def _parsed(self, name: str, default: Any, parse: Callable[[str], Any], expected: str) -> Any:
        text = self.word(name, None)
        if text is None:
            return default
        try:
            return parse(text)
        except (KeyError, ValueError):
            raise ValueError(f"optim_args: {name}={text!r}, expected {expected}") from None


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


Kwargs = Callable[[Any, OptimArgs], dict[str, Any]]
"""``(TrainingArguments, optim_args) -> keyword arguments``."""


@dataclass(frozen=True)
class Row:
    """How one name is made.

    Args:
        where: "module:Class", several where it has moved; empty if it is refused.
        install: what ``pip install`` needs to be told; empty for what is always there.
        kwargs: from TrainingArguments and ``optim_args``.
        fixed: further keyword arguments.
        targets: options of the groups that ``optim_target_modules`` selects (low-rank optimizers).
        layerwise: one optimizer per parameter, stepped during the backward pass.
        takes_model: the constructor takes the model in the place of groups.
        refused: why there is no such optimizer here, and what to use instead.
    """

    where: tuple[str, ...] = ()
    install: str = ""
    kwargs: Kwargs = lambda args, given: {}
    fixed: Mapping[str, Any] = field(default_factory=dict)
    targets: Kwargs | None = None
    layerwise: bool = False
    takes_model: bool = False
    refused: str = ""


# -- arguments -------------------------------------------------------------------------------------------------------


def _none(args: Any, given: OptimArgs) -> dict[str, Any]:
    return {}


def _betas(args: Any, given: OptimArgs) -> dict[str, Any]:
    return {"betas": (args.adam_beta1, args.adam_beta2)}


def _adam(args: Any, given: OptimArgs) -> dict[str, Any]:
    return {**_betas(args, given), "eps": args.adam_epsilon}


def _everything(args: Any, given: OptimArgs) -> dict[str, Any]:
    return given.all()


def _ademamix(args: Any, given: OptimArgs) -> dict[str, Any]:
    betas = (("beta1", args.adam_beta1), ("beta2", args.adam_beta2), ("beta3", 0.9999))
    counts = {name: given.integer(name, None) for name in ("t_alpha", "t_beta3")}
    return {
        "betas": tuple(given.number(name, default) for name, default in betas),
        "alpha": given.number("alpha", 5.0),
        "eps": given.number("eps", args.adam_epsilon),
        **{name: count for name, count in counts.items() if count is not None},
    }


def _grokadamw(args: Any, given: OptimArgs) -> dict[str, Any]:
    defaults = {
        "alpha_init": 0.98,
        "lamb": 2.0,
        "gamma": 0.1,
        "grokking_signal_decay_rate": 0.1,
        "gradient_clipping": 1.0,
    }
    return {name: given.number(name, default) for name, default in defaults.items()}


def _averaging(args: Any, given: OptimArgs) -> dict[str, Any]:
    power, r = given.number("weight_lr_power", 2.0), given.number("r", 0.0)
    return {"weight_decay": args.weight_decay, "weight_lr_power": power, "r": r}


def _schedule_free_sgd(args: Any, given: OptimArgs) -> dict[str, Any]:
    return {**_averaging(args, given), "warmup_steps": args.warmup_steps}


def _schedule_free_adamw(args: Any, given: OptimArgs) -> dict[str, Any]:
    return {**_adam(args, given), **_schedule_free_sgd(args, given)}


def _schedule_free_radam(args: Any, given: OptimArgs) -> dict[str, Any]:
    return {**_adam(args, given), **_averaging(args, given)}


def _stable_adamw(args: Any, given: OptimArgs) -> dict[str, Any]:
    return {
        **_adam(args, given),
        "weight_decay": args.weight_decay,
        "max_lr": given.number("max_lr", None),
        "kahan_sum": given.flag("kahan_sum", None),
        "decouple_lr": given.flag("decouple_lr", False),
    }


def _galore_targets(args: Any, given: OptimArgs) -> dict[str, Any]:
    return {
        "rank": given.integer("rank", 128),
        "update_proj_gap": given.integer("update_proj_gap", 200),
        "scale": given.number("scale", 0.25),
        "proj_type": given.word("proj_type", "std"),
    }


def _apollo_targets(args: Any, given: OptimArgs) -> dict[str, Any]:
    return {
        "rank": given.integer("rank", 128),
        "proj": given.word("proj", "random"),
        "scale_type": given.word("scale_type", "channel"),
        "update_proj_gap": given.integer("update_proj_gap", 200),
        "scale": given.number("scale", 1.0),
        "proj_type": given.word("proj_type", "std"),
        **_adam(args, given),
    }


# -- rows ------------------------------------------------------------------------------------------------------------


def _torch(name: str, kwargs: Kwargs = _none, **fixed: Any) -> Row:
    return Row((f"torch.optim:{name}",), kwargs=kwargs, fixed=fixed)


def _bitsandbytes(name: str, kwargs: Kwargs, bits: int, paged: bool | None = False) -> Row:
    fixed = {"optim_bits": bits} if paged is None else {"optim_bits": bits, "is_paged": paged}
    return Row((f"bitsandbytes.optim:{name}",), "bitsandbytes", kwargs, fixed)


def _torchao(name: str) -> Row:
    return Row((f"torchao.optim:{name}", f"torchao.prototype.low_bit_optim:{name}"), "torchao", _adam)


def _galore(name: str, *, layerwise: bool = False, **fixed: Any) -> Row:
    where = (f"galore_torch:{name}",)
    return Row(where, "galore-torch", fixed=fixed, targets=_galore_targets, layerwise=layerwise)


def _apollo(*, layerwise: bool = False) -> Row:
    where = ("apollo_torch:APOLLOAdamW",)
    return Row(where, "apollo-torch", targets=_apollo_targets, layerwise=layerwise)


def _lomo(name: str) -> Row:
    return Row((f"lomo_optim:{name}",), "lomo-optim", takes_model=True)


def _schedulefree(name: str, kwargs: Kwargs, version: str = "schedulefree") -> Row:
    return Row((f"schedulefree:{name}",), version, kwargs)


def _refused(why: str) -> Row:
    return Row(refused=why)


_OWN_RATE = {"scale_parameter": False, "relative_step": False}
"""Adafactor with the learning rate that it is given."""

OPTIMIZERS: Mapping[str, Row] = {
    "adamw_torch": _torch("AdamW", _adam),
    "adamw_torch_fused": _torch("AdamW", _adam, fused=True),
    "sgd": _torch("SGD"),
    "adagrad": _torch("Adagrad"),
    "rmsprop": _torch("RMSprop"),
    "adafactor": Row(("trainkit.trainer.adafactor:Adafactor",), fixed=_OWN_RATE),
    "adamw_torch_4bit": _torchao("AdamW4bit"),
    "adamw_torch_8bit": _torchao("AdamW8bit"),
    "adamw_bnb_8bit": _bitsandbytes("AdamW", _adam, 8),
    "adamw_8bit": _bitsandbytes("AdamW", _adam, 8),
    "paged_adamw_32bit": _bitsandbytes("AdamW", _adam, 32, paged=True),
    "paged_adamw_8bit": _bitsandbytes("AdamW", _adam, 8, paged=True),
    "ademamix": _bitsandbytes("AdEMAMix", _ademamix, 32),
    "ademamix_8bit": _bitsandbytes("AdEMAMix", _ademamix, 8),
    "paged_ademamix_32bit": _bitsandbytes("AdEMAMix", _ademamix, 32, paged=True),
    "paged_ademamix_8bit": _bitsandbytes("AdEMAMix", _ademamix, 8, paged=True),
    "lion_32bit": _bitsandbytes("Lion", _betas, 32),
    "lion_8bit": _bitsandbytes("Lion", _betas, 8),
    "paged_lion_32bit": _bitsandbytes("Lion", _betas, 32, paged=True),
    "paged_lion_8bit": _bitsandbytes("Lion", _betas, 8, paged=True),
    "rmsprop_bnb": _bitsandbytes("RMSprop", _everything, 32, paged=None),
    "rmsprop_bnb_8bit": _bitsandbytes("RMSprop", _everything, 8, paged=None),
    "rmsprop_bnb_32bit": _bitsandbytes("RMSprop", _everything, 32, paged=None),
    "galore_adamw": _galore("GaLoreAdamW"),
    "galore_adamw_8bit": _galore("GaLoreAdamW8bit"),
    "galore_adafactor": _galore("GaLoreAdafactor", **_OWN_RATE),
    "galore_adamw_layerwise": _galore("GaLoreAdamW", layerwise=True),
    "galore_adamw_8bit_layerwise": _galore("GaLoreAdamW8bit", layerwise=True),
    "galore_adafactor_layerwise": _galore("GaLoreAdafactor", layerwise=True, **_OWN_RATE),
    "apollo_adamw": _apollo(),
    "apollo_adamw_layerwise": _apollo(layerwise=True),
    "lomo": _lomo("Lomo"),
    "adalomo": _lomo("AdaLomo"),
    "grokadamw": Row(("grokadamw:GrokAdamW",), "grokadamw", _grokadamw),
    "schedule_free_radam": _schedulefree("RAdamScheduleFree", _schedule_free_radam, "'schedulefree>=1.4'"),
    "schedule_free_adamw": _schedulefree("AdamWScheduleFree", _schedule_free_adamw),
    "schedule_free_sgd": _schedulefree("SGDScheduleFree", _schedule_free_sgd),
    "stable_adamw": Row(("optimi:StableAdamW",), "torch-optimi", _stable_adamw),
    "adamw_anyprecision": _refused(
        "it comes from torchdistx, which is no longer maintained and runs with no current torch; use 'stable_adamw' "
        "(kahan_sum=True for bfloat16 weights), or 'adamw_torch'"
    ),
    "adamw_torch_xla": _refused("it is for TPUs through torch_xla; use 'adamw_torch'"),
    "adamw_torch_npu_fused": _refused("it is for Ascend NPUs through torch_npu; use 'adamw_torch'"),
    "adamw_apex_fused": _refused("it comes from NVIDIA Apex, whose kernel torch has by now; use 'adamw_torch_fused'"),
}
"""All names of ``OptimizerNames`` 4.57."""
