"""Trees, and who may overwrite them."""

import gc
import weakref

import pytest
import torch

from trainkit import tree


def test_frozen_refuses_writes_and_takes_trees():
    inner = tree.frozen({"w": torch.zeros(2)})
    outer = tree.frozen({"a": inner, "b": {"w": torch.ones(2)}})
    for part in (inner, outer, outer["a"]):
        with pytest.raises(RuntimeError, match="lock"):
            part["w"] = torch.zeros(2)
    assert tree.frozen(inner)["w"] is inner["w"]
    assert list(tree.frozen().keys()) == []


def test_freezing_again_and_again_leaves_no_memories():
    inner = tree.frozen({"w": torch.zeros(2)})
    for _ in range(10):
        tree.frozen({"a": inner})
    assert not inner.__dict__.get("__lock_parents_weakrefs")


def test_like_gives_the_tree_itself_for_its_own_tensors():
    own = tree.frozen({"a": torch.zeros(1), "b": torch.ones(1)})
    assert tree.like(own, tree.leaves(own)) is own
    assert tree.like(own, [own["a"], torch.ones(1)]) is not own


def test_copies_unless_donated():
    mine, other = torch.zeros(2), torch.zeros(2)
    assert tree.writable([mine])[0] is not mine
    with tree.donate({"x": mine}):
        first, second = tree.writable([mine, other])
        assert first is mine
        assert second is not other
        # A copy made in the scope belongs to it.
        assert tree.writable([second])[0] is second
        with tree.keep():
            assert tree.writable([mine])[0] is not mine
        assert tree.writable([mine])[0] is mine
    assert tree.writable([mine])[0] is not mine


def test_released_temporaries_are_not_kept_alive_and_ids_are_not_trusted():
    with tree.donate():
        temporary = torch.zeros(2)
        tree.release([temporary])
        assert tree.writable([temporary])[0] is temporary
        reference = weakref.ref(temporary)
        del temporary
        gc.collect()
        assert reference() is None
    # Outside of any scope there is nothing to release into.
    left = torch.zeros(2)
    tree.release([left])
    assert tree.writable([left])[0] is not left


def test_a_donation_ends_with_an_error_too():
    mine = torch.zeros(2)
    with pytest.raises(RuntimeError, match="inside"), tree.donate(mine):
        raise RuntimeError("inside")
    assert tree.writable([mine])[0] is not mine


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_all_finite(bad):
    # The sum of these overflows; they are finite all the same.
    large = torch.full((4,), torch.finfo(torch.float32).max)
    assert bool(tree.all_finite([large, torch.arange(3), torch.zeros(0)]))
    assert not bool(tree.all_finite([large, torch.tensor([0.0, bad])]))


def test_global_norm():
    tensors = [torch.randn(3, 4), torch.randn(5).bfloat16(), torch.randn(2).double()]
    expected = torch.cat([t.double().flatten() for t in tensors]).norm()
    torch.testing.assert_close(tree.global_norm(tensors).double(), expected, rtol=1e-6, atol=0)
    assert float(tree.global_norm([])) == 0
