import itertools
import math

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding, apply_rotary_pos_emb

from recipes.gpt import GPT, rotate, sample


@pytest.fixture
def module() -> GPT:
    torch.manual_seed(0)
    made = GPT(256, 32, 2, 2)
    # Blocks start as the identity; give them something to do.
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return made


def test_rotary_positions_are_those_of_llama() -> None:
    config = LlamaConfig(hidden_size=32, num_attention_heads=2, head_dim=16, rope_theta=10000.0)
    q, k = torch.randn(2, 3, 2, 7, 16)
    cos, sin = LlamaRotaryEmbedding(config)(q, torch.arange(7).unsqueeze(0))
    expected_q, expected_k = apply_rotary_pos_emb(q, k, cos, sin)
    torch.testing.assert_close(rotate(q), expected_q)
    torch.testing.assert_close(rotate(k), expected_k)


def test_a_logit_depends_on_no_later_token(module: GPT) -> None:
    tokens = torch.randint(256, (2, 9))
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 256
    before, after = module(tokens), module(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(-1).all()


def test_attention_sees_the_order_of_tokens(module: GPT) -> None:
    a, b = module(torch.tensor([[1, 2, 3], [2, 1, 3]]))[:, -1]
    assert not torch.allclose(a, b, atol=1e-3)


def test_the_first_loss_is_that_of_a_uniform_guess() -> None:
    torch.manual_seed(0)
    logits = GPT(256, 128, 4, 4)(torch.randint(256, (2, 50))).detach()
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(256, (100,)))
    assert abs(float(nats) - math.log(256)) < 0.1


def test_tied_weights_are_one_tensor() -> None:
    module = GPT(256, 32, 1, 2, tie_weights=True)
    assert module.head.weight is module.embedding.weight
    untied = GPT(256, 32, 1, 2)
    spared = sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in module.parameters())
    assert spared == 256 * 32


def test_heads_of_odd_width_are_refused() -> None:
    with pytest.raises(ValueError, match="width: got 36 for 4 heads, expected a multiple of 8"):
        GPT(256, 36, 1, 4)


def test_samples_follow_the_distribution_of_the_module(module: GPT) -> None:
    prompt = torch.tensor([5, 6])
    draws = [next(sample(module, prompt, context=8, temperature=2.0, seed=seed)) for seed in range(4000)]
    found = torch.bincount(torch.tensor(draws), minlength=256) / 4000
    expected = torch.softmax(module(prompt.unsqueeze(0))[0, -1].detach() / 2, -1)
    # Total variation of 4000 draws from at most 256 values is about sqrt(256 / (2 pi 4000)) = 0.1.
    assert 0.5 * (found - expected).abs().sum() < 0.13


class Witness(nn.Module):
    """Any token is as likely as another; keeps what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[int]] = []

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.seen.append(tokens[0].tolist())
        return torch.zeros(*tokens.shape, 256)


def test_a_sample_goes_on_from_its_last_tokens() -> None:
    witness = Witness()
    written = sample(witness, torch.tensor([1, 2, 3]), context=4, temperature=1.0, seed=0)
    tokens = [1, 2, 3, *itertools.islice(written, 5)]
    assert witness.seen == [tokens[max(0, end - 4) : end] for end in range(3, 8)]


def test_a_sample_is_decided_by_its_seed() -> None:
    draws = [
        list(itertools.islice(sample(Witness(), torch.tensor([0]), context=4, temperature=1.0, seed=seed), 20))
        for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]
