"""What can be wrong with a checkpoint."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is not what was asked for. The text names the file and the cause."""


class DamageError(CheckpointError):
    """A checkpoint is not what was once written: :func:`trainkit.io.checkpoint.latest` passes over such a one."""


class CheckpointWarning(UserWarning):
    """Something about checkpoints that a run survives and its owner should know."""
