"""The state of the global random generators, for code of users that draws from them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainkit.io.checkpoint.interop import read_torch_file


def file_name(rank: int, world: int) -> str:
    """Of the file of a process.

    Example:
        >>> file_name(0, 1), file_name(1, 2)
        ('rng_state.pth', 'rng_state_1.pth')
    """
    return "rng_state.pth" if world <= 1 else f"rng_state_{rank}.pth"


def write_random_state(folder: str | Path, rank: int, world: int) -> None:
    """The generators of Python, NumPy, torch and, of devices, that of the current one."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    state: dict[str, Any] = {
        "python": random.getstate(),
        # A list: an array would be a pickled object.
        "numpy": (name, [int(key) for key in keys], *rest),
        "cpu": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.random.get_rng_state()
    torch.save(state, Path(folder, file_name(rank, world)))


def load_random_state(folder: str | Path, rank: int, world: int) -> None:
    """Put the generators back, if their states were saved."""
    path = Path(folder, file_name(rank, world))
    if not path.exists():
        return
    state = read_torch_file(path, numpy_state=True)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.random.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and isinstance(state.get("cuda"), torch.Tensor):
        torch.cuda.random.set_rng_state(state["cuda"])
