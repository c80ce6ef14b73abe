"""trainkit: training steps for PyTorch, composed out of pure functions."""

from trainkit.accumulate import accumulate as accumulate
from trainkit.evaluate import evaluate as evaluate
from trainkit.evaluate import make_eval_step as make_eval_step
from trainkit.evaluate import make_predict_step as make_predict_step
from trainkit.functional import functional as functional
from trainkit.gradients import live_value_and_grad as live_value_and_grad
from trainkit.gradients import per_example_grads as per_example_grads
from trainkit.gradients import value_and_grad as value_and_grad
from trainkit.loop import Record as Record
from trainkit.loop import run as run
from trainkit.state import SpentStateError as SpentStateError
from trainkit.state import TrainState as TrainState
from trainkit.state import init_state as init_state
from trainkit.step import apply_updates as apply_updates
from trainkit.step import make_train_step as make_train_step
from trainkit.types import Gradients as Gradients
from trainkit.types import LossOutput as LossOutput
