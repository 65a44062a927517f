"""What makes XLA compile quickly, for the environment: it is read when jax is imported.

The tests compile thousands of small programs that run a few times: compiling them well would take most of the time.
With what is here, a training step takes a fifth of it, and an array of normal numbers less than half.
"""

from importlib import metadata

FLAGS = "--xla_cpu_parallel_codegen_split_count=1"
if tuple(map(int, metadata.version("jaxlib").split(".")[:2])) < (0, 11):  # the option is gone after it
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
ENVIRONMENT = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    # A program would say from which lines it comes, and nobody asks.
    "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
    "XLA_FLAGS": FLAGS,
}
