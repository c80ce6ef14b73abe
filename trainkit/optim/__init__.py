"""Optimizers as gradient transformations: one algorithm per file, joined with ``chain``."""

from trainkit.optim.adamw import adamw as adamw
from trainkit.optim.clip import clip_by_global_norm as clip_by_global_norm
from trainkit.optim.sgd import sgd as sgd
from trainkit.optim.transform import Transform as Transform
from trainkit.optim.transform import chain as chain
from trainkit.optim.transform import identity as identity
