"""Hugging Face models train through the same functions, eager and compiled whole, like the loop that users know."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from tests.tiny import transformers_config
from trainkit import init_state, make_train_step, run
from trainkit.execution import compile_step
from trainkit.losses import huggingface_loss
from trainkit.optim import adamw, chain, clip_by_global_norm

VOCABULARY, STEPS = 31, 4
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48}


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers_config("LlamaConfig", **SIZES, num_hidden_layers=2))


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers_config("BertConfig", **SIZES))


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers_config("GPT2Config", **SIZES))


MODELS = {"llama": llama, "bert": bert, "gpt2": gpt2}


def make_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def make_batch() -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[0, :5] = -100
    return {"input_ids": tokens, "labels": labels}


def make_optimizer() -> Any:
    return chain(clip_by_global_norm(1.0), adamw(1e-2))


def usual_loop(name: str) -> list[float]:
    module, losses = make_model(name), []
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=1e-2)
    for _ in range(STEPS):
        loss = module(**make_batch()).loss
        losses.append(loss.item())
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("strategy", ["eager", "whole"])
@pytest.mark.parametrize("name", MODELS)
def test_trains_like_the_usual_loop(name: str, strategy: str) -> None:
    module = make_model(name)
    step = compile_step(make_train_step(huggingface_loss(module), make_optimizer()), strategy=strategy)
    records = run(step, init_state(module, make_optimizer()), [make_batch()] * STEPS)
    losses = [float(record.metrics["loss"].compute()) for record in records]
    assert step.explain().strategy == strategy
    # float32, other orders of summation, four steps of Adam that divide by the root of what they sum.
    assert losses == pytest.approx(usual_loop(name), rel=2e-4)
    assert losses[-1] < losses[0]
