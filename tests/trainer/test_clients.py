"""Libraries that subclass the Trainer of transformers, with trainkit's in its place and without: the same numbers.

They are the extra ``interop``. One that is not installed is skipped.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.client_programs import CLIENTS, NEEDS
from tests.trainer.tiny import distance, without_times

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
CHILDREN = ("sentence_transformers", "setfit", "span_marker", "trl_sft", "trl_sft_peft", "trl_dpo", "peft")
# 4.57 divides by all labels, trainkit by those that count after the shift: 6 and 5 of a sentence of this length.
SHIFTED = {"trl_sft": 6 / 5}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def result(client: str, whose: str) -> dict[str, Any]:
        missing = [name for name in NEEDS[client] if importlib.util.find_spec(name) is None]
        if missing:
            pytest.skip(f"not installed: {', '.join(missing)}")
        folder = tmp_path_factory.mktemp(f"{client}-{whose}")
        command = [sys.executable, "-m", "tests.trainer.client_programs", client, whose, str(folder)]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        found: dict[str, Any] = json.loads((folder / "result.json").read_text())
        return found

    return result


def assert_same_log(ours: dict[str, Any], theirs: dict[str, Any], factor: float = 1.0) -> None:
    ours, theirs = without_times(ours), without_times(theirs)
    assert sorted(ours) == sorted(theirs)
    for key, value in theirs.items():
        scale = factor if key.endswith("loss") or key == "grad_norm" else 1.0
        # They round what they log to four decimals.
        assert math.isclose(ours[key], value * scale, rel_tol=1e-4, abs_tol=7e-5), (key, ours, theirs)


@pytest.mark.parametrize("client", sorted(CLIENTS))
def test_they_build_on_ours_inside_of_the_scope(client: str, ran: Any) -> None:
    ours, theirs = ran(client, "ours")["class"], ran(client, "theirs")["class"]
    assert "trainkit.trainer.trainer.Trainer" in ours and "transformers.trainer.Trainer" not in ours
    assert "transformers.trainer.Trainer" in theirs
    position = theirs.index("transformers.trainer.Trainer")
    assert ours[:position] == theirs[:position]


@pytest.mark.parametrize("client", CHILDREN)
def test_logs_and_metrics(client: str, ran: Any) -> None:
    ours, theirs = ran(client, "ours"), ran(client, "theirs")
    assert ours["step"] == theirs["step"] == 6
    for one, other in zip(ours["log"], theirs["log"], strict=True):
        assert_same_log(one, other, SHIFTED.get(client, 1.0))
    # With disable_tqdm, 4.57 loses total_flos from what train() returns.
    assert_same_log(
        ours["train"], {"total_flos": ours["train"]["total_flos"], **theirs["train"]}, SHIFTED.get(client, 1.0)
    )
    evaluated = {k: v for k, v in theirs["evaluated"].items() if k in ours["evaluated"]}
    assert_same_log(ours["evaluated"], evaluated, SHIFTED.get(client, 1.0))


@pytest.mark.parametrize("client", CHILDREN)
def test_weights(client: str, ran: Any) -> None:
    assert distance(ran(client, "ours")["weights"], ran(client, "theirs")["weights"]) < 1e-6


@pytest.mark.parametrize("client", CHILDREN)
def test_resumed_from_the_middle_is_the_whole_run(client: str, ran: Any) -> None:
    ours = ran(client, "ours")
    assert ours["resumed"]["step"] == 6
    assert distance(ours["resumed"]["weights"], ours["weights"]) == 0
    # The library's own counters begin anew.
    names = ("loss", "embedding_loss", "grad_norm", "learning_rate", "epoch", "step")
    straight, resumed = (
        [{k: log[k] for k in names if k in log} for log in run["log"]] for run in (ours, ours["resumed"])
    )
    for one, other in zip(resumed[:8], straight[:8], strict=True):
        assert_same_log(one, other)


@pytest.mark.parametrize("client", sorted(CLIENTS))
def test_files(client: str, ran: Any) -> None:
    ours, theirs = ran(client, "ours"), ran(client, "theirs")
    renamed = {"training_args.bin": "training_args.json"} if "training_args.json" in ours["saved"] else {}
    assert set(ours["saved"]) == {renamed.get(name, name) for name in theirs["saved"]}
    assert set(ours["files"]) == {renamed.get(name, name) for name in theirs["files"]} | {"manifest.json"}


def test_a_loss_with_parameters_of_its_own_is_trained(ran: Any) -> None:
    # From the third step on 4.57 adds the gradients of all steps up, for parameters that are not the model's.
    ours, theirs = ran("sentence_transformers_softmax", "ours"), ran("sentence_transformers_softmax", "theirs")
    for one, other in zip(ours["log"][:2], theirs["log"][:2], strict=True):
        assert_same_log(one, other)


def test_setfit_trains_both_phases(ran: Any) -> None:
    assert ran("setfit", "ours")["predicted"] == ran("setfit", "theirs")["predicted"]
