"""Learning from pairs of a better and a worse answer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from trainkit.losses.checks import at_least_float32, check_floating, check_same_shape
from trainkit.metrics import Mean
from trainkit.types import LossOutput


def dpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """Direct preference optimisation.

    sum over pairs of -(1 - s) log sigmoid(h) - s log sigmoid(-h), with h = r_chosen - r_rejected and the implicit
    reward r = beta (log p_policy - log p_ref). The weight is the number of pairs.

    Reports the means ``reward_chosen``, ``reward_rejected``, ``reward_margin`` (h) and ``reward_accuracy`` (h > 0).

    Args:
        policy_chosen_logps: [pairs], floating: log-probabilities of the chosen answers, as :func:`sequence_log_probs`
            gives them.
        policy_rejected_logps: of the rejected answers, in the same shape.
        ref_chosen_logps: of the chosen answers under the reference model; no gradient flows to it.
        ref_rejected_logps: of the rejected answers under the reference model; no gradient flows to it.
        beta: positive; how much leaving the reference costs.
        label_smoothing: s, the share of pairs assumed to be labelled the wrong way round, in [0, 0.5).

    Raises: TypeError for tensors that are not floating; ValueError for shapes that disagree, no pair, or arguments out
        of range.

    Example:
        >>> import torch
        >>> zero = torch.zeros(2)
        >>> dpo(zero, zero, zero, zero).loss_sum / 2
        tensor(0.6931)

    Source: Rafailov et al. 2023, eq. 7; label smoothing from Mitchell 2023, "A note on DPO with noisy preferences",
    eq. 3. Matches ``loss_type="sigmoid"`` of trl.
    """
    given = {
        "policy_chosen_logps": policy_chosen_logps,
        "policy_rejected_logps": policy_rejected_logps,
        "ref_chosen_logps": ref_chosen_logps,
        "ref_rejected_logps": ref_rejected_logps,
    }
    for name, tensor in given.items():
        check_floating(name, tensor)
        check_same_shape(name, tensor, "policy_chosen_logps", policy_chosen_logps)
    if not beta > 0:
        raise ValueError(f"beta: got {beta}, expected a positive number")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing: got {label_smoothing}, expected a number in [0, 0.5)")
    chosen, rejected, ref_chosen, ref_rejected = (at_least_float32(tensor) for tensor in given.values())
    reward_chosen = beta * (chosen - ref_chosen.detach())
    reward_rejected = beta * (rejected - ref_rejected.detach())
    margin = reward_chosen - reward_rejected
    losses = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    pairs = margin.detach().new_full((), margin.numel())
    means = {
        "reward_chosen": reward_chosen,
        "reward_rejected": reward_rejected,
        "reward_margin": margin,
        "reward_accuracy": (margin > 0).to(margin.dtype),
    }
    reported = {name: Mean(values.detach().sum(), pairs) for name, values in means.items()}
    return LossOutput(losses.sum(), pairs, reported)
