"""What of JAX's settings changes numbers: a run sets it, whatever the environment asks for."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import jax

from lensjax._settings import require

_SET: dict[str, tuple[Any, Callable[[Any], AbstractContextManager[Any]]]] = {
    "jax_enable_x64": (False, jax.enable_x64),
    "jax_default_prng_impl": ("threefry2x32", jax.default_prng_impl),
    "jax_threefry_partitionable": (True, jax.threefry_partitionable),
    "jax_default_matmul_precision": (None, jax.default_matmul_precision),
}
_OFFSET = "jax_random_seed_offset"


@contextmanager
def fixed() -> Iterator[None]:
    """Inside it, equal seeds give equal numbers on equal devices; also a decorator, as `@fixed()`.

    Raises:
      ValueError: `jax_random_seed_offset` is set, which cannot be set back.

    Example:
      >>> import jax
      >>> from lensjax.runs.engine.numerics import fixed
      >>> with jax.enable_x64(True), fixed():
      ...     jax.numpy.zeros(2).dtype
      dtype('float32')
    """
    offset = getattr(jax.config, _OFFSET)
    require(offset == 0, f"{_OFFSET} is {offset}, which makes other runs of all seeds: unset {_OFFSET.upper()}")
    with ExitStack() as stack:
        for name, (value, context) in _SET.items():
            if getattr(jax.config, name) != value:
                stack.enter_context(context(value))
        yield


def set_aside() -> list[str]:
    """A sentence for each variable of the environment that `fixed` overrules."""
    names = [name.upper() for name in _SET]
    return [
        f"{name}={os.environ[name]} is set aside: the numbers of a run do not depend on it"
        for name in names
        if name in os.environ
    ]
