"""trainkit: training steps for PyTorch, composed out of pure functions.

``trainkit`` itself holds the words of a loop; losses, optimizers, schedules and metrics are in ``trainkit.losses``,
``trainkit.optim``, ``trainkit.schedules`` and ``trainkit.metrics``; compiling and precision in ``trainkit.execution``.
``Trainer`` and what belongs to it are loaded when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from trainkit.accumulate import accumulate as accumulate
from trainkit.accumulate import merge_metrics as merge_metrics
from trainkit.evaluate import evaluate as evaluate
from trainkit.evaluate import make_eval_step as make_eval_step
from trainkit.evaluate import make_predict_step as make_predict_step
from trainkit.functional import functional as functional
from trainkit.gradients import live_value_and_grad as live_value_and_grad
from trainkit.gradients import per_example_grads as per_example_grads
from trainkit.gradients import value_and_grad as value_and_grad
from trainkit.loop import Record as Record
from trainkit.loop import run as run
from trainkit.sharpness import sharpness_aware as sharpness_aware
from trainkit.state import SpentStateError as SpentStateError
from trainkit.state import TrainState as TrainState
from trainkit.state import init_state as init_state
from trainkit.state import write_to as write_to
from trainkit.step import apply_updates as apply_updates
from trainkit.step import make_train_step as make_train_step
from trainkit.transforms import alternate as alternate
from trainkit.transforms import ema_params as ema_params
from trainkit.transforms import init_ema as init_ema
from trainkit.transforms import raise_nonfinite as raise_nonfinite
from trainkit.transforms import scan as scan
from trainkit.transforms import skip_nonfinite as skip_nonfinite
from trainkit.transforms import train_only as train_only
from trainkit.transforms import with_ema as with_ema
from trainkit.types import Gradients as Gradients
from trainkit.types import LossOutput as LossOutput

if TYPE_CHECKING:
    from trainkit.trainer import EarlyStoppingCallback as EarlyStoppingCallback
    from trainkit.trainer import EvalPrediction as EvalPrediction
    from trainkit.trainer import HfArgumentParser as HfArgumentParser
    from trainkit.trainer import Seq2SeqTrainer as Seq2SeqTrainer
    from trainkit.trainer import Seq2SeqTrainingArguments as Seq2SeqTrainingArguments
    from trainkit.trainer import Trainer as Trainer
    from trainkit.trainer import TrainerCallback as TrainerCallback
    from trainkit.trainer import TrainerControl as TrainerControl
    from trainkit.trainer import TrainerState as TrainerState
    from trainkit.trainer import TrainingArguments as TrainingArguments


def __getattr__(name: str) -> Any:
    # Every name of the Trainer's room is also one of the package, as it is in transformers.
    if not name.startswith("_"):
        trainer = importlib.import_module("trainkit.trainer")
        if name in trainer.ROOM_OF:
            return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
