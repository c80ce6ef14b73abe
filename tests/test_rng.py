"""Keys: folding on tensors and on integers, and generators that are put back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainkit.rng import fold_in, fold_in_host, make_key, seeded

words = st.integers(-(2**63), 2**63 - 1)


@given(words, st.lists(words, max_size=3))
def test_tensors_and_integers_fold_alike(key, data):
    assert int(fold_in(torch.tensor(key), *data)) == fold_in_host(key, *data)


@given(words, words, words)
def test_folding_a_tensor_is_folding_its_elements(key, a, b):
    folded = fold_in(torch.tensor(key), torch.tensor([a, b]))
    assert folded.tolist() == [fold_in_host(key, a), fold_in_host(key, b)]


def test_known_values_of_splitmix():
    # The first outputs of the published generator seeded with 0, which the finaliser of 0 + golden and 2 golden gives.
    golden = 0x9E3779B97F4A7C15
    from trainkit.rng import _finalise_host

    assert [_finalise_host(golden * i) for i in (1, 2)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_steps_and_ranks_do_not_collide():
    keys = fold_in(make_key(0), torch.arange(1000)[:, None], torch.arange(8)[None, :])
    assert keys.unique().numel() == 8000
    # Every bit is a fair coin: 8000 draws have a standard error of 0.0056.
    shares = torch.stack([((keys >> bit) & 1).double().mean() for bit in range(64)])
    assert (shares - 0.5).abs().max() < 0.025


def test_seeding_is_undone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeded(1, torch.device("cpu")):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(inside, torch.rand(3, generator=torch.Generator().manual_seed(1)))


def test_seeding_is_undone_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), seeded(1, torch.device("cpu")):
        torch.rand(1).tolist()[0] / 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 0.5, True, None])
def test_seeds_that_are_none(seed):
    with pytest.raises(ValueError, match=r"seed: got .*, expected an integer that fits 64 bits"):
        make_key(seed)
