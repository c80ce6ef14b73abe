"""How a step runs: compiled, in which dtype, with which activations kept. Knows functions and tensors, no losses."""

from trainkit.execution.activation import remat as remat
from trainkit.execution.compile import CompiledStep as CompiledStep
from trainkit.execution.compile import Explanation as Explanation
from trainkit.execution.compile import FallbackWarning as FallbackWarning
from trainkit.execution.compile import compile_step as compile_step
from trainkit.execution.population import member_value_and_grad as member_value_and_grad
from trainkit.execution.population import over_population as over_population
from trainkit.execution.population import stack_states as stack_states
from trainkit.execution.population import unstack_states as unstack_states
from trainkit.execution.precision import Precision as Precision
from trainkit.execution.precision import autocast as autocast
from trainkit.execution.precision import bf16_mixed as bf16_mixed
from trainkit.execution.precision import bf16_pure as bf16_pure
from trainkit.execution.precision import fp16_mixed as fp16_mixed
from trainkit.execution.precision import full as full
from trainkit.execution.regions import repeated as repeated
