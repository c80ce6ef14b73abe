"""Keys and seeded scopes."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainkit.rng import fold_in, fold_in_host, make_key, seeded

words = st.integers(-(2**63), 2**63 - 1)
CPU = torch.device("cpu")


def splitmix64(value: int) -> int:
    """The finaliser of Steele, Lea and Flood, fig. 16, on NumPy's unsigned words."""
    with np.errstate(over="ignore"):
        z = np.uint64(value % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return int(z ^ (z >> np.uint64(31)))


def test_the_oracle_gives_the_published_numbers() -> None:
    # The first two outputs of the generator that starts from 0.
    golden = 0x9E3779B97F4A7C15
    assert [splitmix64(golden * i % 2**64) for i in (1, 2)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


@given(words, st.lists(words, max_size=4))
def test_fold_in_is_its_formula_on_tensors_and_on_the_host(key: int, data: list[int]) -> None:
    expected = key % 2**64
    for item in data:
        expected = splitmix64(expected ^ splitmix64((item + 0x9E3779B97F4A7C15) % 2**64))
    expected = expected - 2**64 if expected >= 2**63 else expected
    assert fold_in_host(key, *data) == expected
    assert int(fold_in(torch.tensor(key), *data)) == expected
    assert int(fold_in(torch.tensor(key), *map(torch.tensor, data))) == expected


def test_a_population_of_keys_folds_elementwise() -> None:
    keys = torch.tensor([[1, 2], [3, -4]])
    folded = fold_in(keys, 5, torch.tensor(6))
    assert folded.tolist() == [[fold_in_host(key, 5, 6) for key in row] for row in keys.tolist()]


def test_neighbouring_places_get_different_keys() -> None:
    keys = [fold_in_host(seed, step, rank) for seed in range(10) for step in range(100) for rank in range(10)]
    assert len(set(keys)) == len(keys)
    # Half of the bits differ between neighbours, as between independent words: 32 with a deviation of 4 for each pair.
    flips = [(a ^ b) % 2**64 for a, b in itertools.pairwise(keys)]
    assert 31.5 < sum(flip.bit_count() for flip in flips) / len(flips) < 32.5


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)])
def test_every_seed_of_64_bits_makes_a_key(seed: int) -> None:
    assert int(make_key(seed)) % 2**64 == seed % 2**64


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 1.0, "1", True, None])
def test_other_seeds_are_refused(seed: object) -> None:
    with pytest.raises(ValueError, match=r"seed: got .*, expected an integer that fits 64 bits"):
        make_key(seed)  # type: ignore[arg-type]


@given(words)
def test_seeded_draws_what_manual_seed_draws_and_leaves_no_trace(seed: int) -> None:
    before = torch.get_rng_state()
    with seeded(seed, CPU):
        found = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found, torch.rand(3, generator=torch.Generator().manual_seed(seed)))


def test_seeded_puts_the_state_back_after_an_error() -> None:
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="never"), seeded(1, CPU):
        _draw_and_fail()
    assert torch.equal(torch.get_rng_state(), before)


def _draw_and_fail() -> None:
    torch.rand(1)
    raise ValueError("never mind")
