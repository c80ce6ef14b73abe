"""How each experiment tracker is started, told of a run, and ended: one record of functions per service.

A service's package is imported when its run starts, not before. Settings come from the environment variables that the
services and transformers name.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainkit.trainer.processing import write_processing
from trainkit.trainer.secrets import without_secrets
from trainkit.trainer.state import TrainerState

SUMMARY = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")
"""Values of a whole run, which some services keep apart from the series."""


@dataclass(frozen=True)
class Moment:
    """What a service may ask about the run when something happens.

    Args:
        args: the arguments of the run.
        state: of the run.
        model: the bare model, or None.
        processing_class: tokenizer or processor, or None.
    """

    args: Any
    state: TrainerState
    model: Any = None
    processing_class: Any = None

    def checkpoint(self) -> Path:
        """The folder of the checkpoint of this step."""
        return Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"


def nothing(*_: Any) -> None:
    """What a service does that has no use for an event."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """One experiment tracker.

    Args:
        packages: what is imported; one of them is enough.
        install: what pip is asked for.
        start: ``(session before or None, moment) -> session``, a run of the service.
        describe: ``(session, moment, config)``: arguments and model configuration, once per run.
        log: ``(session, values, moment)``.
        save: ``(session, moment)``, after a checkpoint.
        complete: ``(session, moment)``, after training, while the run is open.
        finish: ``(session)``: ends the run of the service.
        stays_open: whether the run is left open after training, for what its user still logs.
        per_machine: whether the main process of each machine has a run, not only that of all.
    """

    packages: tuple[str, ...]
    install: str
    start: Callable[[Any, Moment], Any]
    describe: Callable[[Any, Moment, dict[str, Any]], None] = nothing
    log: Callable[[Any, dict[str, Any], Moment], None] = nothing
    save: Callable[[Any, Moment], None] = nothing
    complete: Callable[[Any, Moment], None] = nothing
    finish: Callable[[Any], None] = nothing
    stays_open: bool = False
    per_machine: bool = False


def rewrite_logs(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Names by split: ``eval_x`` becomes ``eval/x``, ``test_x`` ``test/x``, any other ``train/x``.

    Example:
        >>> rewrite_logs({"loss": 1.0, "eval_loss": 2.0, "test_loss": 3.0})
        {'train/loss': 1.0, 'eval/loss': 2.0, 'test/loss': 3.0}

    Source: Trainer 4.57: ``rewrite_logs``.
    """
    return {"/".join(split_name(name)): value for name, value in logs.items()}


def split_name(name: str) -> tuple[str, str]:
    """Split and quantity of a logged name."""
    head, _, rest = name.partition("_")
    return (head, rest) if head in ("eval", "test") and "_" in name else ("train", name)


def numbers(logs: Mapping[str, Any], service: str) -> dict[str, float]:
    """The values that are numbers; a warning names the others, which the service does not take."""
    found = {name: value for name, value in logs.items() if isinstance(value, (int, float))}
    others = {name: type(logs[name]).__name__ for name in logs.keys() - found.keys()}
    if others:
        warnings.warn(f"logs: {service} takes numbers only, so these are left out: {others}", UserWarning, stacklevel=2)
    return found


def as_dict(config: Any) -> dict[str, Any]:
    """A model's configuration as a dict."""
    return dict(config) if isinstance(config, Mapping) else dict(config.to_dict())


def run_config(args: Any, model: Any) -> dict[str, Any]:
    """The arguments of a run, with the model's (and adapters') configuration below them; arguments win.

    Secrets are hidden.

    Args:
        args: with ``to_dict()``.
        model: its ``config`` is a mapping or has ``to_dict()``; or there is none.
    """
    config, adapters = getattr(model, "config", None), getattr(model, "peft_config", None)
    content = {
        **({} if adapters is None else {"peft_config": adapters}),
        **({} if config is None else as_dict(config)),
        **args.to_dict(),
    }
    return dict(without_secrets(content))


def save_model(moment: Moment, folder: Path) -> None:
    """Write weights, and the processing class where there is one, into a new folder."""
    save = getattr(moment.model, "save_pretrained", None)
    if save is not None:
        save(folder)
    else:
        from trainkit.io.checkpoint import export_model

        export_model(moment.model, folder)
    write_processing(moment.processing_class, folder)
