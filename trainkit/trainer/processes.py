"""Where this process runs and which of how many it is: asked of accelerate when somebody wants to know."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from trainkit.trainer.arguments import TrainingArguments

_PARTING_SECONDS = 0.05
_CLOSED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
_SILENT = ("Timed out waiting", "Application timeout")
_LOCAL_RANKS = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")


def local_rank_of_launcher() -> int:
    """The index of this process on its machine as the launcher wrote it into the environment, 0 without a launcher."""
    return next((int(os.environ[name]) for name in _LOCAL_RANKS if int(os.environ.get(name, -1)) >= 0), 0)


def wants_cpu(args: TrainingArguments) -> bool:
    """Whether accelerators are left alone: ``use_cpu``, or ``accelerate launch --cpu``."""
    from accelerate.utils import parse_flag_from_env

    return args.use_cpu or bool(parse_flag_from_env("ACCELERATE_USE_CPU"))


def process_state(args: TrainingArguments) -> Any:
    """accelerate's ``PartialState`` for these arguments: one for the whole process, made the first time.

    Under a launcher that joins the process group, with ``ddp_backend`` and ``ddp_timeout``; all processes of the run
    have to get here. A state made for another kind of device is replaced, unless ``use_configured_state`` is on.

    Raises: ValueError if ``ddp_backend`` cannot be used here.

    Source: transformers 4.57: ``TrainingArguments._setup_devices``.
    """
    from accelerate.state import AcceleratorState, PartialState

    keep = getattr(args.accelerator_config, "use_configured_state", False)
    if PartialState._shared_state and not keep and _made_for_another_device(PartialState(), wants_cpu(args)):
        AcceleratorState._reset_state(reset_partial_state=True)
    if PartialState._shared_state:
        state = PartialState()
    else:
        from accelerate.utils import patch_environment

        # accelerate looks there for DeepSpeed while the state is made; afterwards it is as it was.
        flags = {"ACCELERATE_USE_DEEPSPEED": "true"} if args.deepspeed else {}
        with patch_environment(**flags):
            state = PartialState(
                cpu=wants_cpu(args),
                backend=args.ddp_backend,
                timeout=datetime.timedelta(seconds=args.ddp_timeout),
            )
        if state.num_processes > 1:
            # A thread of gloo that is not done with the last collective would need the interpreter, and abort without.
            atexit.register(time.sleep, _PARTING_SECONDS)
    args.local_rank = state.local_process_index
    return state


def _made_for_another_device(state: Any, cpu: bool) -> bool:
    if cpu:
        return bool(state.device.type != "cpu")
    return bool(state._cpu) and torch.accelerator.is_available()


def device_of(args: TrainingArguments) -> torch.device:
    """The device of this process, with its index where there may be several."""
    device: torch.device = process_state(args).device
    if device.index is None and device.type not in ("cpu", "mps"):
        device = torch.device(device.type, torch.accelerator.current_device_index())
    return device


@contextlib.contextmanager
def main_process_first(args: TrainingArguments, local: bool = True) -> Iterator[None]:
    """The main process runs the block first, the others wait and run it then; also when it fails.

    Args:
        args: arguments, which know the processes.
        local: one main process on each machine, for disks that the machines do not share.

    Source: transformers 4.57: ``TrainingArguments.main_process_first``.
    """
    state = process_state(args)
    first = state.is_local_main_process if local else state.is_main_process
    if not first:
        state.wait_for_everyone()
    try:
        yield
    finally:
        if first:
            state.wait_for_everyone()


@contextlib.contextmanager
def naming_lost_processes(args: TrainingArguments) -> Iterator[None]:
    """A scope in which an error of a connection between processes says which one is lost, as far as that is known.

    Raises: RuntimeError from that error.
    """
    try:
        yield
    except RuntimeError as error:
        text = lost_process(error, args.process_index, args.world_size, args.ddp_timeout)
        if text is None:
            raise
        raise RuntimeError(text) from error


def lost_process(error: RuntimeError, rank: int, world: int, timeout: float) -> str | None:
    """What an error of gloo, or of the store that process 0 keeps, says about the others; None for any other error.

    Args:
        error: as torch raises it.
        rank: of this process.
        world: how many there are.
        timeout: for which one waits for another, in seconds.

    Example:
        >>> closed = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.1]:15")
        >>> lost_process(closed, 0, 2, 60)[:51]
        'process 0 of 2: process 1 has closed its connection'
        >>> lost_process(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 0, 2, 60) is None
        True
    """
    in_store = isinstance(error, torch.distributed.DistNetworkError)
    if world == 1 or not (in_store or "gloo" in str(error)):
        return None
    other = f"process {1 - rank}" if world == 2 else "process 0" if in_store else "another process"
    again = "look into its log, then start all processes again with resume_from_checkpoint=True"
    if any(sign in str(error) for sign in _SILENT):
        return f"process {rank} of {world}: {other} gave no sign for ddp_timeout={timeout} seconds; {again}"
    if in_store or any(sign in str(error) for sign in _CLOSED):
        return f"process {rank} of {world}: {other} has closed its connection: it failed or was ended; {again}"
    return None
