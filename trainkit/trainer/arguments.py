"""``TrainingArguments``: everything that the Trainer can be told, as a dataclass."""

# ruff: noqa: RUF009 -- _arg makes a dataclasses.field

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from trainkit.trainer import arguments_checks as checks
from trainkit.trainer import processes
from trainkit.trainer.accelerator_config import AcceleratorConfig
from trainkit.trainer.arguments_aliases import apply_aliases
from trainkit.trainer.arguments_json import as_json, as_json_text
from trainkit.trainer.arguments_setters import ArgumentSetters
from trainkit.trainer.deepspeed_options import deepspeed_config, settle_deepspeed
from trainkit.trainer.enums import (
    DebugOption,
    FSDPOption,
    HubStrategy,
    IntervalStrategy,
    OptimizerNames,
    ParallelMode,
    SaveStrategy,
    SchedulerType,
)
from trainkit.trainer.fsdp_options import check_fsdp, settle_fsdp
from trainkit.trainer.secrets import hidden, without_secrets

_LEVELS = tuple(checks.LOG_LEVELS)
_BACKENDS = ("auto", "apex", "cpu_amp")


def _arg(default: Any, help: str, **metadata: Any) -> Any:
    """A field with the sentence that the command line shows."""
    metadata["help"] = help
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrainingArguments(ArgumentSetters):
    """What to train, how long, how fast, and what to write down.

    A mutable dataclass: names, order, defaults and meaning of the fields are those of transformers 4.57; each field
    carries its sentence as ``metadata["help"]``. Values are checked and completed once, when the object is made; later
    assignments are not. Making one writes no environment variable and no global flag, and starts no process group:
    facts about devices and processes are found out when they are first asked for.

    Args:
        output_dir: where checkpoints, the final model and metrics go.

    Raises: ValueError, TypeError, each naming the field, what came and what is expected.

    Example:
        >>> args = TrainingArguments("out", learning_rate=1e-3, report_to="none")
        >>> args.get_warmup_steps(100), args.train_batch_size, args.to_dict()["eval_strategy"]
        (0, 8, 'no')
        >>> TrainingArguments("out", eval_strategy="step")
        Traceback (most recent call last):
        ...
        ValueError: IntervalStrategy: got 'step', expected one of: no, steps, epoch

    Source: transformers 4.57: ``TrainingArguments``.
    """

    framework: ClassVar[str] = "pt"
    # Fields that may be given as a JSON object in text; subclasses add theirs.
    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        "accelerator_config",
        "fsdp_config",
        "deepspeed",
        "gradient_checkpointing_kwargs",
        "lr_scheduler_kwargs",
    ]

    output_dir: str | None = _arg(None, "Folder of checkpoints, final model and metrics; default trainer_output.")
    overwrite_output_dir: bool = _arg(False, "For scripts: whether an existing output_dir may be written into.")
    do_train: bool = _arg(False, "For scripts: whether to train.")
    do_eval: bool = _arg(False, "For scripts: whether to evaluate; set by eval_strategy.")
    do_predict: bool = _arg(False, "For scripts: whether to predict.")
    eval_strategy: IntervalStrategy | str = _arg("no", "When to evaluate during training.")
    prediction_loss_only: bool = _arg(False, "Evaluate the loss only; keep no predictions.")
    per_device_train_batch_size: int = _arg(8, "Rows per device and microbatch in training.")
    per_device_eval_batch_size: int = _arg(8, "Rows per device and batch in evaluation.")
    per_gpu_train_batch_size: int | None = _arg(None, "Old name of per_device_train_batch_size.")
    per_gpu_eval_batch_size: int | None = _arg(None, "Old name of per_device_eval_batch_size.")
    gradient_accumulation_steps: int = _arg(1, "Microbatches per update.")
    eval_accumulation_steps: int | None = _arg(None, "Evaluation batches after which predictions move to the host.")
    eval_delay: float = _arg(0, "No evaluation before this epoch or update, by eval_strategy.")
    torch_empty_cache_steps: int | None = _arg(None, "Updates after which the device's cache is emptied.")
    learning_rate: float = _arg(5e-5, "Peak learning rate.")
    weight_decay: float = _arg(0.0, "Weight decay of matrices; biases and norms have none.")
    adam_beta1: float = _arg(0.9, "Decay rate of the first moment.")
    adam_beta2: float = _arg(0.999, "Decay rate of the second moment.")
    adam_epsilon: float = _arg(1e-8, "Added to the denominator.")
    max_grad_norm: float = _arg(1.0, "Global norm to which gradients are clipped; 0 or less: no clipping.")
    num_train_epochs: float = _arg(3.0, "Epochs, also in fractions.")
    max_steps: int = _arg(-1, "Updates in total, if 0 or more; then num_train_epochs does not count.")
    lr_scheduler_type: SchedulerType | str = _arg("linear", "Learning-rate schedule.")
    lr_scheduler_kwargs: dict[str, Any] | str = _arg(dict, "Further arguments of the schedule, as a JSON object.")
    warmup_ratio: float = _arg(0.0, "Share of the run that warms up, in [0, 1].")
    warmup_steps: int = _arg(0, "Updates that warm up; wins over warmup_ratio.")
    log_level: str = _arg("passive", "Log level of the main process; passive: as it is.", choices=_LEVELS)
    log_level_replica: str = _arg("warning", "Log level of the other processes.", choices=_LEVELS)
    log_on_each_node: bool = _arg(True, "Log on the main process of each machine, not on one only.")
    logging_dir: str | None = _arg(None, "Folder of TensorBoard; default runs/DATE_HOST in output_dir.")
    logging_strategy: IntervalStrategy | str = _arg("steps", "When to log.")
    logging_first_step: bool = _arg(False, "Log the first update too.")
    logging_steps: float = _arg(500, "Updates between logs; below 1: a share of the run.")
    logging_nan_inf_filter: bool = _arg(True, "Keep losses that are not finite out of the logged mean.")
    save_strategy: SaveStrategy | str = _arg("steps", "When to save a checkpoint.")
    save_steps: float = _arg(500, "Updates between checkpoints; below 1: a share of the run.")
    save_total_limit: int | None = _arg(None, "Checkpoints to keep; 0 or less: all.")
    save_safetensors: bool = _arg(True, "Save weights as safetensors.")
    save_on_each_node: bool = _arg(False, "Save on each machine; not with shared disks.")
    save_only_model: bool = _arg(False, "Save weights only, without what resuming exactly needs.")
    restore_callback_states_from_checkpoint: bool = _arg(False, "Give callbacks back their state on resuming.")
    no_cuda: bool = _arg(False, "Old name of use_cpu.")
    use_cpu: bool = _arg(False, "Train on the CPU even if there is an accelerator.")
    use_mps_device: bool = _arg(False, "Old: insist on an MPS device.")
    seed: int = _arg(42, "Seed of everything.")
    data_seed: int | None = _arg(None, "Seed of the samplers; default seed.")
    jit_mode_eval: bool = _arg(False, "Trace the model with torch.jit for evaluation.")
    bf16: bool = _arg(False, "Compute in bfloat16.")
    fp16: bool = _arg(False, "Compute in float16, with loss scaling.")
    fp16_opt_level: str = _arg("O1", "For apex, which is not served.")
    half_precision_backend: str = _arg("auto", "Who computes in reduced precision.", choices=_BACKENDS)
    bf16_full_eval: bool = _arg(False, "Evaluate with the weights in bfloat16.")
    fp16_full_eval: bool = _arg(False, "Evaluate with the weights in float16.")
    tf32: bool | None = _arg(None, "Switch TF32 on or off; default: as it is.")
    local_rank: int = field(default=-1, compare=False, metadata={"help": "Set by the launcher."})
    ddp_backend: str | None = _arg(
        None,
        "Backend of the process group.",
        choices=("nccl", "gloo", "mpi", "ccl", "hccl", "cncl", "mccl"),
    )
    tpu_num_cores: int | None = _arg(None, "For TPUs, which are not served.")
    tpu_metrics_debug: bool = _arg(False, "For TPUs, which are not served.")
    debug: str | list[DebugOption] = _arg("", "Debugging: underflow_overflow.")
    dataloader_drop_last: bool = _arg(False, "Drop an incomplete last batch.")
    eval_steps: float | None = _arg(None, "Updates between evaluations; below 1: a share; default logging_steps.")
    dataloader_num_workers: int = _arg(0, "Worker processes of each loader.")
    dataloader_prefetch_factor: int | None = _arg(None, "Batches that each worker loads ahead.")
    past_index: int = _arg(-1, "Output that is fed back as mems; below 0: none.")
    run_name: str | None = _arg(None, "Name of the run for trackers.")
    disable_tqdm: bool | None = _arg(None, "Print logs in place of a progress bar; default: by the log level.")
    remove_unused_columns: bool = _arg(True, "Drop columns that the model does not take.")
    label_names: list[str] | None = _arg(None, "Inputs that are labels; default: found from the model.")
    load_best_model_at_end: bool = _arg(False, "Load the best checkpoint after training.")
    metric_for_best_model: str | None = _arg(None, "Metric that says which is best, with or without eval_.")
    greater_is_better: bool | None = _arg(None, "Direction of that metric; default: by its name.")
    ignore_data_skip: bool = _arg(False, "On resuming start the epoch from its beginning.")
    fsdp: list[FSDPOption] | str | None = _arg(None, "Fully sharded data parallelism: words such as full_shard.")
    fsdp_min_num_params: int = _arg(0, "Old name of the key min_num_params of fsdp_config.")
    fsdp_config: dict[str, Any] | str | None = _arg(None, "Options of FSDP: a JSON object or the path of one.")
    fsdp_transformer_layer_cls_to_wrap: str | None = _arg(None, "Old name of a key of fsdp_config.")
    accelerator_config: dict[str, Any] | str | AcceleratorConfig | None = _arg(
        None, "Options of accelerate: a JSON object or the path of one."
    )
    parallelism_config: Any = _arg(None, "accelerate.ParallelismConfig, or its fields as a JSON object.")
    deepspeed: dict[str, Any] | str | None = _arg(None, "DeepSpeed: a JSON object or the path of one.")
    label_smoothing_factor: float = _arg(0.0, "Label smoothing, in [0, 1].")
    optim: OptimizerNames | str = _arg("adamw_torch_fused", "Optimizer.")
    optim_args: str | None = _arg(None, "Further arguments of the optimizer: name=value,name=value.")
    adafactor: bool = _arg(False, "Old name of optim=adafactor.")
    group_by_length: bool = _arg(False, "Batches of samples of similar length.")
    length_column_name: str = _arg("length", "Column of precomputed lengths.")
    report_to: list[str] | str | None = _arg(None, "Trackers: names, all or none; default all that are installed.")
    project: str = _arg("huggingface", "Project of Trackio.")
    trackio_space_id: str | None = _arg("trackio", "Space of Trackio.")
    ddp_find_unused_parameters: bool | None = _arg(None, "Option of DistributedDataParallel.")
    ddp_bucket_cap_mb: int | None = _arg(None, "Option of DistributedDataParallel.")
    ddp_broadcast_buffers: bool | None = _arg(None, "Option of DistributedDataParallel.")
    dataloader_pin_memory: bool = _arg(True, "Pin the memory of batches; off with use_cpu.")
    dataloader_persistent_workers: bool = _arg(False, "Keep workers between epochs.")
    skip_memory_metrics: bool = _arg(True, "Measure no memory.")
    use_legacy_prediction_loop: bool = _arg(False, "Evaluate with prediction_loop.")
    push_to_hub: bool = _arg(False, "Upload the model at each save.")
    resume_from_checkpoint: str | None = _arg(None, "For scripts: checkpoint to resume from.")
    hub_model_id: str | None = _arg(None, "Repository; default the name of output_dir.")
    hub_strategy: HubStrategy | str = _arg("every_save", "What is uploaded when.")
    hub_token: str | None = field(default=None, repr=False, metadata={"help": "Token of the hub; never written down."})
    hub_private_repo: bool | None = _arg(None, "Make the repository private; default: as the owner has it.")
    hub_always_push: bool = _arg(False, "Upload even while an upload runs.")
    hub_revision: str | None = _arg(None, "Branch of the repository.")
    gradient_checkpointing: bool = _arg(False, "Compute activations again in the backward pass, to save memory.")
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = _arg(None, "Its options, as a JSON object.")
    include_inputs_for_metrics: bool = _arg(False, "Old name of include_for_metrics=inputs.")
    include_for_metrics: list[str] = _arg(list, "What compute_metrics gets too: inputs, loss.")
    eval_do_concat_batches: bool = _arg(True, "Concatenate predictions; else a list per batch.")
    fp16_backend: str = _arg("auto", "Old name of half_precision_backend.", choices=_BACKENDS)
    push_to_hub_model_id: str | None = _arg(None, "Old name of hub_model_id.")
    push_to_hub_organization: str | None = _arg(None, "Old: owner in hub_model_id.")
    push_to_hub_token: str | None = field(default=None, repr=False, metadata={"help": "Old name of hub_token."})
    _n_gpu: int = field(init=False, repr=False, compare=False, default=-1)
    mp_parameters: str = _arg("", "For SageMaker, which is not served.")
    auto_find_batch_size: bool = _arg(False, "When memory runs out, start again with a smaller batch.")
    full_determinism: bool = _arg(False, "Deterministic algorithms only; slower.")
    torchdynamo: str | None = _arg(None, "Old name of torch_compile_backend.")
    ray_scope: str | None = _arg("last", "Which result of a trial Ray compares.")
    ddp_timeout: int = _arg(1800, "Seconds after which waiting for other processes fails.")
    torch_compile: bool = _arg(False, "Compile with torch.compile.")
    torch_compile_backend: str | None = _arg(None, "Backend of torch.compile; default inductor.")
    torch_compile_mode: str | None = _arg(None, "Mode of torch.compile.")
    include_tokens_per_second: bool = _arg(False, "Report tokens per second at the end.")
    include_num_input_tokens_seen: str | bool = _arg(False, "Count input tokens: all, non_padding or no.")
    neftune_noise_alpha: float | None = _arg(None, "Scale of the noise on embeddings (NEFTune).")
    optim_target_modules: list[str] | str | None = _arg(None, "Modules of low-rank optimizers.")
    batch_eval_metrics: bool = _arg(False, "Call compute_metrics for each batch.")
    eval_on_start: bool = _arg(False, "Evaluate before the first update.")
    use_liger_kernel: bool = _arg(False, "Use the kernels of Liger.")
    liger_kernel_config: dict[str, bool] | None = _arg(None, "Which of them, as a JSON object.")
    eval_use_gather_object: bool = _arg(False, "Gather objects that are not tensors.")
    average_tokens_across_devices: bool = _arg(True, "Count the tokens of all processes for the mean loss.")

    def __post_init__(self) -> None:
        checks.read_text_forms(self)
        checks.settle_paths(self)
        apply_aliases(self, settle_fsdp(self))
        checks.refuse_unserved(self)
        checks.check_values(self)
        checks.settle_enums(self)
        checks.check_intervals(self)
        checks.check_best_model(self)
        checks.check_precision(self)
        checks.settle_compile(self)
        checks.check_data(self)
        check_fsdp(self)
        checks.settle_parallelism(self)
        if self.disable_tqdm is None:
            self.disable_tqdm = checks.library_log_level() > logging.WARNING
        self.local_rank = processes.local_rank_of_launcher()
        settle_deepspeed(self)

    def __str__(self) -> str:
        """One ``name=value`` per line, sorted; secrets hidden."""
        shown = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        shown |= {name: hidden(name) for name in shown if name.endswith("_token")}
        if isinstance(self.accelerator_config, AcceleratorConfig):
            shown["accelerator_config"] = self.accelerator_config.to_dict()
        shown = without_secrets(shown)
        lines = [f"{name}={value},\n" for name, value in sorted(shown.items()) if not name.startswith("per_gpu_")]
        return f"{type(self).__name__}(\n{''.join(lines)})"

    __repr__ = __str__

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__repr__" not in vars(cls):
            # The one that `dataclass` writes where there is none shows secrets.
            type.__setattr__(cls, "__repr__", cls.__repr__)

    @property
    def train_batch_size(self) -> int:
        """Rows of a microbatch of this process in training."""
        return self.per_device_train_batch_size * max(1, self._n_gpu)

    @property
    def eval_batch_size(self) -> int:
        """Rows of a batch of this process in evaluation."""
        return self.per_device_eval_batch_size * max(1, self._n_gpu)

    @property
    def distributed_state(self) -> Any:
        """accelerate's ``PartialState``, made the first time; see :func:`trainkit.trainer.processes.process_state`."""
        return processes.process_state(self)

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return processes.device_of(self)

    @property
    def _setup_devices(self) -> torch.device:
        return self.device

    @property
    def n_gpu(self) -> int:
        """Accelerators of this process: 0 on a CPU, else 1."""
        if self._n_gpu < 0:
            self._n_gpu = 0 if self.device.type == "cpu" else 1
        return self._n_gpu

    @property
    def world_size(self) -> int:
        """Processes of the run."""
        return int(self.distributed_state.num_processes)

    @property
    def process_index(self) -> int:
        """The index of this process in the run."""
        return int(self.distributed_state.process_index)

    @property
    def local_process_index(self) -> int:
        """The index of this process on its machine."""
        return int(self.distributed_state.local_process_index)

    @property
    def parallel_mode(self) -> ParallelMode:
        """``DISTRIBUTED`` under a launcher of several processes, else ``NOT_PARALLEL``."""
        from accelerate.utils import DistributedType

        alone = self.distributed_state.distributed_type == DistributedType.NO
        return ParallelMode.NOT_PARALLEL if alone else ParallelMode.DISTRIBUTED

    @property
    def should_log(self) -> bool:
        """Whether this process logs: the main one, or that of each machine with ``log_on_each_node``."""
        return (self.local_process_index if self.log_on_each_node else self.process_index) == 0

    @property
    def should_save(self) -> bool:
        """Whether this process writes: the main one, or that of each machine with ``save_on_each_node``."""
        return (self.local_process_index if self.save_on_each_node else self.process_index) == 0

    @property
    def place_model_on_device(self) -> bool:
        """Whether the Trainer moves the model to the device; for subclasses to override."""
        return True

    @property
    def ddp_timeout_delta(self) -> datetime.timedelta:
        """``ddp_timeout`` as a ``timedelta``."""
        return datetime.timedelta(seconds=self.ddp_timeout)

    @property
    def deepspeed_plugin(self) -> Any:
        """accelerate's plugin for the completed configuration of DeepSpeed, a new one each time; None without."""
        if not self.deepspeed:
            return None
        from accelerate.utils import DeepSpeedPlugin

        return DeepSpeedPlugin(hf_ds_config=deepspeed_config(self))

    @property
    def _no_sync_in_gradient_accumulation(self) -> bool:
        return not self.deepspeed

    def get_process_log_level(self) -> int:
        """The numeric log level of this process; of ``passive`` that which the library has."""
        level = checks.LOG_LEVELS[self.log_level if self.should_log else self.log_level_replica]
        return checks.library_log_level() if level < 0 else level

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """The updates that warm up: ``warmup_steps`` if above 0, else the ratio of the run, rounded up."""
        return self.warmup_steps if self.warmup_steps > 0 else math.ceil(num_training_steps * self.warmup_ratio)

    @contextlib.contextmanager
    def main_process_first(self, local: bool = True, desc: str = "work") -> Iterator[None]:
        """The main process runs the block first, the others wait and run it then.

        Args:
            local: the main process of each machine, for disks that are not shared.
            desc: what is done, for the debug log.
        """
        logging.getLogger(__name__).debug("main process first: %s", desc)
        with processes.main_process_first(self, local):
            yield

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, for JSON: enumerations by their values, dtypes by their short names, tokens hidden.

        ``TrainingArguments(**args.to_dict())`` equals ``args``, but for the tokens.
        """
        return as_json(self)

    def to_json_string(self) -> str:
        """:meth:`to_dict` as JSON text without NaN or infinities, and without the secrets in its entries: see
        :func:`trainkit.trainer.secrets.without_secrets`.

        Raises: TypeError naming a field of a subclass that JSON cannot hold.
        """
        return as_json_text(without_secrets(self.to_dict()))

    def to_sanitized_dict(self) -> dict[str, Any]:
        """:meth:`to_dict` and the two batch sizes, with everything but booleans, numbers and tensors as text, and
        without the secrets in its entries."""
        plain = (bool, int, float, str, torch.Tensor)
        sizes = {"train_batch_size": self.train_batch_size, "eval_batch_size": self.eval_batch_size}
        content = {**without_secrets(self.to_dict()), **sizes}
        return {name: value if type(value) in plain else str(value) for name, value in content.items()}
