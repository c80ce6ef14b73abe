"""The surface of the Trainer as data: every method, the room its work is done in, and what calls it.

``docs/trainer.md`` is generated from this table, and the tests compare it with the class and with transformers 4.57.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """One method.

    Args:
        name: of the method.
        room: the module of trainkit whose functions do its work.
        calls: through which entry of a run an override is reached; "users" call it themselves.
    """

    name: str
    room: str
    calls: str


_TABLE = """
__init__                           trainer.build                 users
create_accelerator_and_postprocess trainer.devices               __init__
tokenizer                          trainer.trainer               users
get_train_dataloader               trainer.dataloaders           train
get_eval_dataloader                trainer.dataloaders           evaluate
get_test_dataloader                trainer.dataloaders           predict
_get_dataloader                    trainer.dataloaders           train
_remove_unused_columns             trainer.data                  train, with a datasets.Dataset
_get_collator_with_removed_columns trainer.data                  train
_set_signature_columns_if_needed   trainer.data                  train
_align_special_tokens              trainer.data                  train, with a tokenizer
num_examples                       trainer.run_length            train
num_tokens                         trainer.run_length            train, with include_tokens_per_second
create_optimizer                   trainer.optimizers            train
create_scheduler                   trainer.lr_schedules          train
create_optimizer_and_scheduler     trainer.optimizers            train
get_optimizer_cls_and_kwargs       trainer.optimizers            train
get_decay_parameter_names          trainer.optimizers            train
get_num_trainable_parameters       trainer.optimizers            users
get_learning_rates                 trainer.optimizers            users
get_optimizer_group                trainer.optimizers            users
train                              trainer.run                   users
training_step                      trainer.steps                 train
compute_loss                       trainer.prediction            train, evaluate
_inner_training_loop               trainer.loop                  train
get_total_train_batch_size         trainer.trainer               train
get_tp_size                        trainer.trainer               train
set_initial_training_values        trainer.run_length            train
get_batch_samples                  trainer.run_length            train
evaluate                           trainer.evaluation            train, with an eval_strategy
predict                            trainer.evaluation            users
evaluation_loop                    trainer.evaluation            evaluate
prediction_loop                    trainer.evaluation            evaluate, with use_legacy_prediction_loop
prediction_step                    trainer.prediction            evaluate
_gather_and_numpify                trainer.evaluation            users
_nested_gather                     trainer.evaluation            train, at a log
save_model                         trainer.checkpoints           train, at a save
_save_checkpoint                   trainer.checkpoints           train, at a save
_load_from_checkpoint              trainer.checkpoints           train, resuming
_save_optimizer_and_scheduler      trainer.checkpoints           train, at a save
_load_optimizer_and_scheduler      trainer.checkpoints           train
_save_rng_state                    trainer.random_state          train, at a save
_load_rng_state                    trainer.random_state          train, resuming
_load_best_model                   trainer.checkpoints           train, with load_best_model_at_end
_sorted_checkpoints                trainer.checkpoints           train, at a save
_rotate_checkpoints                trainer.checkpoints           train, at a save
_save_scaler                       trainer.checkpoints           train, at a save
_load_scaler                       trainer.checkpoints           train
add_callback                       trainer.callbacks             __init__
remove_callback                    trainer.callbacks             users
pop_callback                       trainer.callbacks             users
hyperparameter_search              trainer.search                users
_hp_search_setup                   trainer.search                train
_report_to_hp_search               trainer.search                train, at an evaluation
_move_model_to_device              trainer.trainer               __init__
_wrap_model                        trainer.devices               train
is_local_process_zero              trainer.trainer               __init__
is_world_process_zero              trainer.trainer               __init__
log                                trainer.callbacks             train, at a log
_prepare_input                     trainer.dataloaders           train
_prepare_inputs                    trainer.dataloaders           train
floating_point_ops                 trainer.flops                 train
store_flos                         trainer.trainer               train, at a log
_activate_neftune                  trainer.neftune               train, with neftune_noise_alpha
_deactivate_neftune                trainer.neftune               train, with neftune_noise_alpha
torch_jit_model_eval               trainer.devices               evaluate, with jit_mode_eval
autocast_smart_context_manager     trainer.trainer               train
compute_loss_context_manager       trainer.trainer               train
_prepare_context_parallel_inputs   trainer.trainer               train
create_model_card                  trainer.model_card            push_to_hub
push_to_hub                        trainer.hub                   save_model, with push_to_hub
init_hf_repo                       trainer.hub                   __init__, with push_to_hub
_push_from_checkpoint              trainer.hub                   train, at a save, with push_to_hub
_finish_current_push               trainer.hub                   train
"""

METHODS = [Method(*(part.strip() for part in line.split(None, 2))) for line in _TABLE.strip().splitlines()]

COMPANIONS = (
    "call_model_init",
    "_get_train_sampler",
    "_get_eval_sampler",
    "_maybe_log_save_evaluate",
    "_evaluate",
    "_determine_best_metric",
    "_get_output_dir",
    "_get_num_items_in_batch",
    "_get_learning_rate",
    "_load_callback_state",
    "compare_trainer_and_checkpoint_args",
    "_issue_warnings_after_load",
    "_save",
    "save_state",
    "save_metrics",
    "log_metrics",
    "metrics_format",
)
"""Methods outside of the table that client code overrides or calls."""
