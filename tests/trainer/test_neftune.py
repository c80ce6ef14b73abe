"""Noise on embeddings beside that of transformers 4.57, and that nothing of it stays."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Uniform
from transformers import Trainer, TrainingArguments

import trainkit
from tests.trainer.tiny import SETTINGS
from trainkit.trainer.neftune import activate_neftune, deactivate_neftune


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 16)

    def get_input_embeddings(self) -> nn.Module:
        return self.tokens

    def forward(self, input_ids: Tensor) -> Tensor:
        found: Tensor = self.tokens(input_ids)
        return found


IDS = torch.arange(48).reshape(3, 16)


@contextmanager
def noise_on(model: Model, alpha: float) -> Iterator[None]:
    handle = activate_neftune(model, alpha)
    yield
    deactivate_neftune(model, handle)


def test_noise_is_uniform_within_its_bound_and_only_in_training() -> None:
    model = Model()
    plain = model(IDS)
    with noise_on(model, 5.0):
        draws = torch.stack([model(IDS) - plain for _ in range(50)]).flatten()
        bound = 5.0 / math.sqrt(16 * 16)
        assert draws.abs().max() <= bound * (1 + 1e-5)
        # Kolmogorov's distance to the uniform distribution, far below its 99.9 percent point 1.95 / sqrt(n) if equal.
        ranks = torch.arange(1, len(draws) + 1) / len(draws)
        reached = Uniform(-bound * 1.001, bound * 1.001).cdf(draws.detach().sort().values)
        assert (reached - ranks).abs().max() < 1.95 / math.sqrt(len(draws)) + 1e-3
        model.eval()
        assert torch.equal(model(IDS), plain)


def test_the_noise_is_that_of_transformers(tmp_path: object) -> None:
    own, other = Model(), Model()
    other.load_state_dict(own.state_dict())
    args = TrainingArguments(str(tmp_path), neftune_noise_alpha=5.0, use_cpu=True, report_to=[])
    Trainer(other, args)._activate_neftune(other)
    with noise_on(own, 5.0):
        torch.manual_seed(3)
        found = own(IDS)
        torch.manual_seed(3)
        torch.testing.assert_close(found, other(IDS))


def test_gradients_pass_the_noise_unchanged() -> None:
    model = Model()
    with noise_on(model, 5.0):
        model(IDS).sum().backward()
    assert model.tokens.weight.grad is not None
    assert torch.equal(model.tokens.weight.grad, torch.cat([torch.ones(48, 16), torch.zeros(2, 16)]))


def test_the_size_can_be_changed_on_the_module() -> None:
    model = Model()
    plain = model(IDS)
    with noise_on(model, 5.0):
        model.tokens.neftune_noise_alpha = 0.0  # type: ignore[assignment]
        assert torch.equal(model(IDS), plain)


def test_nothing_stays() -> None:
    model = Model()
    with noise_on(model, 5.0):
        assert model.tokens.neftune_noise_alpha == 5.0 and len(model.tokens._forward_hooks) == 1
    assert not hasattr(model.tokens, "neftune_noise_alpha")
    assert not model.tokens._forward_hooks


def test_nothing_stays_after_a_training_that_fails(tmp_path: Path) -> None:
    class Failing(Model):
        def forward(self, input_ids: Tensor) -> Tensor:
            super().forward(input_ids)
            assert self.tokens._forward_hooks
            raise KeyError("step")

    model = Failing()
    args = trainkit.TrainingArguments(tmp_path, **{**SETTINGS, "neftune_noise_alpha": 5.0})
    with pytest.raises(KeyError, match="step"):
        trainkit.Trainer(model, args, train_dataset=[{"input_ids": row} for row in IDS]).train()
    assert not hasattr(model.tokens, "neftune_noise_alpha") and not model.tokens._forward_hooks


def test_a_handle_takes_its_hook_away_even_if_the_model_was_replaced() -> None:
    old, new = Model(), Model()
    handle = activate_neftune(old, 5.0)
    assert old.tokens.neftune_noise_alpha == 5.0
    deactivate_neftune(new, handle)
    assert torch.equal(old(IDS), old(IDS))


def test_wrappers_are_looked_through() -> None:
    model = Model()
    handle = activate_neftune(nn.DataParallel(model), 5.0)
    assert not torch.equal(model(IDS), model(IDS))
    deactivate_neftune(nn.DataParallel(model), handle)
    assert torch.equal(model(IDS), model(IDS))


def test_what_makes_no_sense_is_refused() -> None:
    model = Model()
    with pytest.raises(ValueError, match="neftune_noise_alpha: got -1, expected a finite number >= 0"):
        activate_neftune(model, -1)
    with pytest.raises(ValueError, match="Linear has no get_input_embeddings"):
        activate_neftune(nn.Linear(2, 2), 5.0)
    with pytest.raises(ValueError, match="NEFTune was not activated"):
        deactivate_neftune(model, None)
    with noise_on(model, 5.0), pytest.raises(ValueError, match=r"have noise already \(alpha 5.0\)"):
        activate_neftune(model, 5.0)
    assert torch.equal(model(IDS), model(IDS))
