"""The Trainer: the surface of Hugging Face's Trainer 4.57 over the functions of trainkit.

Names are loaded when they are first used, so that a loop of one's own does not pay for them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trainkit.trainer.rooms import ROOM_OF as ROOM_OF

if TYPE_CHECKING:
    from trainkit.trainer.accelerator_config import AcceleratorConfig as AcceleratorConfig
    from trainkit.trainer.argument_parser import HfArg as HfArg
    from trainkit.trainer.argument_parser import HfArgumentParser as HfArgumentParser
    from trainkit.trainer.arguments import TrainingArguments as TrainingArguments
    from trainkit.trainer.build import set_seed as set_seed
    from trainkit.trainer.callbacks import CallbackHandler as CallbackHandler
    from trainkit.trainer.callbacks import DefaultFlowCallback as DefaultFlowCallback
    from trainkit.trainer.callbacks import EarlyStoppingCallback as EarlyStoppingCallback
    from trainkit.trainer.callbacks import TrainerCallback as TrainerCallback
    from trainkit.trainer.collators import DataCollatorWithPadding as DataCollatorWithPadding
    from trainkit.trainer.collators import default_data_collator as default_data_collator
    from trainkit.trainer.compat import patch_transformers as patch_transformers
    from trainkit.trainer.enums import DebugOption as DebugOption
    from trainkit.trainer.enums import EvaluationStrategy as EvaluationStrategy
    from trainkit.trainer.enums import FSDPOption as FSDPOption
    from trainkit.trainer.enums import HPSearchBackend as HPSearchBackend
    from trainkit.trainer.enums import HubStrategy as HubStrategy
    from trainkit.trainer.enums import IntervalStrategy as IntervalStrategy
    from trainkit.trainer.enums import OptimizerNames as OptimizerNames
    from trainkit.trainer.enums import ParallelMode as ParallelMode
    from trainkit.trainer.enums import SaveStrategy as SaveStrategy
    from trainkit.trainer.enums import SchedulerType as SchedulerType
    from trainkit.trainer.label_smoothing import LabelSmoother as LabelSmoother
    from trainkit.trainer.lr_schedules import make_lr_scheduler as make_lr_scheduler
    from trainkit.trainer.outputs import BestRun as BestRun
    from trainkit.trainer.outputs import EvalLoopOutput as EvalLoopOutput
    from trainkit.trainer.outputs import EvalPrediction as EvalPrediction
    from trainkit.trainer.outputs import PredictionOutput as PredictionOutput
    from trainkit.trainer.outputs import TrainOutput as TrainOutput
    from trainkit.trainer.progress import NotebookProgressCallback as NotebookProgressCallback
    from trainkit.trainer.progress import PrinterCallback as PrinterCallback
    from trainkit.trainer.progress import ProgressCallback as ProgressCallback
    from trainkit.trainer.reporting import speed_metrics as speed_metrics
    from trainkit.trainer.samplers import DistributedLengthGroupedSampler as DistributedLengthGroupedSampler
    from trainkit.trainer.samplers import LengthGroupedSampler as LengthGroupedSampler
    from trainkit.trainer.seq2seq import Seq2SeqTrainer as Seq2SeqTrainer
    from trainkit.trainer.seq2seq_arguments import Seq2SeqTrainingArguments as Seq2SeqTrainingArguments
    from trainkit.trainer.sharding import IterableDatasetShard as IterableDatasetShard
    from trainkit.trainer.state import ExportableState as ExportableState
    from trainkit.trainer.state import TrainerControl as TrainerControl
    from trainkit.trainer.state import TrainerState as TrainerState
    from trainkit.trainer.trainer import Trainer as Trainer


def __getattr__(name: str) -> Any:
    if name not in ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{ROOM_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *ROOM_OF})
