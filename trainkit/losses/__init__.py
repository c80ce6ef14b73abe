"""Losses: criteria on outputs and targets, and losses on parameters and batches made of them."""

from trainkit.losses.auxiliary import add_loss as add_loss
from trainkit.losses.auxiliary import add_penalty as add_penalty
from trainkit.losses.auxiliary import l2_penalty as l2_penalty
from trainkit.losses.auxiliary import label_smoothing as label_smoothing
from trainkit.losses.auxiliary import neftune as neftune
from trainkit.losses.classification import classification as classification
from trainkit.losses.classification import multi_label as multi_label
from trainkit.losses.classification import soft_classification as soft_classification
from trainkit.losses.distillation import distillation as distillation
from trainkit.losses.huggingface import huggingface_loss as huggingface_loss
from trainkit.losses.language import causal_lm as causal_lm
from trainkit.losses.language import causal_lm_head as causal_lm_head
from trainkit.losses.language import linear_cross_entropy as linear_cross_entropy
from trainkit.losses.language import masked_lm as masked_lm
from trainkit.losses.language import next_tokens as next_tokens
from trainkit.losses.language import sequence_log_probs as sequence_log_probs
from trainkit.losses.model import frozen_outputs as frozen_outputs
from trainkit.losses.model import module_loss as module_loss
from trainkit.losses.preference import dpo as dpo
from trainkit.losses.regression import huber as huber
from trainkit.losses.regression import mean_absolute_error as mean_absolute_error
from trainkit.losses.regression import mean_squared_error as mean_squared_error
