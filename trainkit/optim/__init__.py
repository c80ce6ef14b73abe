"""Optimizers as gradient transformations: one algorithm per file, joined with ``chain``."""

from trainkit.optim.adafactor import adafactor as adafactor
from trainkit.optim.adagrad import adagrad as adagrad
from trainkit.optim.adam import adam as adam
from trainkit.optim.adamax import adamax as adamax
from trainkit.optim.adamw import adamw as adamw
from trainkit.optim.clip import clip_by_global_norm as clip_by_global_norm
from trainkit.optim.lion import lion as lion
from trainkit.optim.muon import muon as muon
from trainkit.optim.nadam import nadam as nadam
from trainkit.optim.radam import radam as radam
from trainkit.optim.rmsprop import rmsprop as rmsprop
from trainkit.optim.schedule_free import schedule_free_adamw as schedule_free_adamw
from trainkit.optim.schedule_free import schedule_free_eval as schedule_free_eval
from trainkit.optim.sgd import sgd as sgd
from trainkit.optim.torch_bridge import as_torch as as_torch
from trainkit.optim.torch_bridge import from_torch as from_torch
from trainkit.optim.transform import Transform as Transform
from trainkit.optim.transform import chain as chain
from trainkit.optim.transform import identity as identity
