"""The enumerations have the members of transformers 4.57, and say what they know."""

from typing import Any

import pytest
import transformers
from transformers import trainer_utils, training_args

from tests.trainer.both_arguments import ours
from trainkit.trainer import enums
from trainkit.trainer.enums import IntervalStrategy


class TestEnums:
    @pytest.mark.parametrize(
        ("mine", "peer"),
        [
            (enums.IntervalStrategy, trainer_utils.IntervalStrategy),
            (enums.EvaluationStrategy, trainer_utils.EvaluationStrategy),
            (enums.SaveStrategy, trainer_utils.SaveStrategy),
            (enums.HubStrategy, trainer_utils.HubStrategy),
            (enums.HPSearchBackend, trainer_utils.HPSearchBackend),
            (enums.FSDPOption, trainer_utils.FSDPOption),
            (enums.DebugOption, transformers.debug_utils.DebugOption),
            (enums.ParallelMode, training_args.ParallelMode),
            (enums.SchedulerType, trainer_utils.SchedulerType),
            (enums.OptimizerNames, training_args.OptimizerNames),
        ],
    )
    def test_members_are_those_of_transformers(self, mine: Any, peer: Any) -> None:
        assert {m.name: m.value for m in mine} == {m.name: m.value for m in peer}

    def test_a_member_of_transformers_is_understood(self) -> None:
        member = trainer_utils.IntervalStrategy.EPOCH
        assert IntervalStrategy(member) is IntervalStrategy.EPOCH and member == IntervalStrategy.EPOCH

    @pytest.mark.parametrize(
        ("field_name", "names"),
        [
            ("eval_strategy", "IntervalStrategy: got 'x', expected one of: no, steps, epoch"),
            ("save_strategy", "no, steps, epoch, best"),
            ("hub_strategy", "HubStrategy: .*all_checkpoints"),
            ("lr_scheduler_type", "SchedulerType: .*warmup_stable_decay"),
            ("optim", "OptimizerNames: .*stable_adamw"),
            ("fsdp", "FSDPOption: .*auto_wrap"),
            ("debug", "DebugOption: .*underflow_overflow"),
        ],
    )
    def test_unknown_values_are_refused_with_the_known_ones(self, field_name: str, names: str) -> None:
        with pytest.raises(ValueError, match=names):
            ours(**{field_name: "x"})
