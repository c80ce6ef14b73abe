"""trainkit: training steps for PyTorch, composed out of pure functions.

``trainkit`` itself holds the words of a loop; losses, optimizers, schedules and metrics are in ``trainkit.losses``,
``trainkit.optim``, ``trainkit.schedules`` and ``trainkit.metrics``; compiling and precision in ``trainkit.execution``.
"""

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
