
from trainkit.execution.compile import CompiledStep as CompiledStep
from trainkit.execution.compile import Explanation as Explanation
from trainkit.execution.compile import FallbackWarning as FallbackWarning
from trainkit.execution.compile import compile_step as compile_step
