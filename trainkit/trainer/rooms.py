"""Which module has which of the Trainer's names."""

from __future__ import annotations

_ROOMS: dict[str, tuple[str, ...]] = {
    "accelerator_config": ("AcceleratorConfig",),
    "argument_parser": ("HfArg", "HfArgumentParser"),
    "arguments": ("TrainingArguments",),
    "build": ("set_seed",),
    "callbacks": ("CallbackHandler", "DefaultFlowCallback", "EarlyStoppingCallback", "TrainerCallback"),
    "collators": ("DataCollatorWithPadding", "default_data_collator"),
    "compat": ("patch_transformers",),
    "enums": (
        "DebugOption",
        "EvaluationStrategy",
        "FSDPOption",
        "HPSearchBackend",
        "HubStrategy",
        "IntervalStrategy",
        "OptimizerNames",
        "ParallelMode",
        "SaveStrategy",
        "SchedulerType",
    ),
    "label_smoothing": ("LabelSmoother",),
    "lr_schedules": ("make_lr_scheduler",),
    "outputs": ("BestRun", "EvalLoopOutput", "EvalPrediction", "PredictionOutput", "TrainOutput"),
    "progress": ("NotebookProgressCallback", "PrinterCallback", "ProgressCallback"),
    "reporting": ("speed_metrics",),
    "samplers": ("DistributedLengthGroupedSampler", "LengthGroupedSampler"),
    "seq2seq": ("Seq2SeqTrainer",),
    "seq2seq_arguments": ("Seq2SeqTrainingArguments",),
    "sharding": ("IterableDatasetShard",),
    "state": ("ExportableState", "TrainerControl", "TrainerState"),
    "trainer": ("Trainer",),
}
ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}
"""The module under ``trainkit.trainer`` that has a name."""
