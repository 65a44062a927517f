"""What a run will hold at once, beside the memory there is: all from shapes, before anything is allocated."""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

_PRODUCTS = ("dot_general", "conv_general_dilated")
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def size(tree: Any) -> int:
    """Bytes of arrays, or of what has their shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def largest_product(function: Callable[..., Any], *shapes: Any) -> int:
    """Bytes of the largest matrix product of a function: what its activations take at the least.

    Example:
      >>> import jax
      >>> from lensjax.runs.engine.memory import largest_product
      >>> row = jax.ShapeDtypeStruct((1000, 1), "float32")
      >>> largest_product(lambda a: (a @ a.T).sum(), row)
      4000000
    """
    return max((size(value.aval) for value in _products(jax.make_jaxpr(function)(*shapes).jaxpr)), default=0)


def _products(jaxpr: Jaxpr) -> Iterator[Any]:
    """Results of all matrix products, those of inner functions too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in _PRODUCTS:
            yield from equation.outvars
        for inner in jax.tree.leaves(list(equation.params.values())):
            if isinstance(inner, ClosedJaxpr):
                yield from _products(inner.jaxpr)
            elif isinstance(inner, Jaxpr):
                yield from _products(inner)


def there() -> int:
    """Bytes of memory for each device of this process; those of a CPU share the computer's, or the container's."""
    device = jax.local_devices()[0]
    if limit := (device.memory_stats() or {}).get("bytes_limit"):
        return int(limit)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in map(Path, _LIMITS):
        if path.is_file() and (text := path.read_text().strip()).isdecimal():
            limits.append(int(text))
    return min(limits) // jax.local_device_count()


def require_room(
    state: Any,
    batch: Any,
    frozen: Any,
    *,
    phase: str,
    activations: Callable[[], int],
    held_out: int = 0,
    devices: int = 1,
    split: bool = False,
    advice: str,
) -> None:
    """Checks that a phase of training has room for its state, its batches and the activations of a step.

    What is counted is the least that it can take.

    Args:
      state: shapes of the state.
      batch: shapes of a batch.
      frozen: shapes of what the step reads beside them.
      phase: its name.
      activations: gives the bytes of those of a step, such as its `largest_product`; asked last.
      held_out: bytes of the batches that are held while it lasts.
      devices: how many share a batch.
      split: whether they share state and parameters too.
      advice: what to lower.

    Raises:
      ValueError: a device has less memory than that; says what takes how much.
    """
    arrays = size((state, frozen)) // (devices if split else 1)
    needs = {"parameters and optimizer state": arrays, "held-out batches": held_out // devices}
    needs["a batch"] = size(batch) // devices
    _require(needs, phase, advice)
    needs["activations"] = activations() // devices
    _require(needs, phase, advice)


def _require(needs: Mapping[str, int], phase: str, advice: str) -> None:
    total, room = sum(needs.values()), there()
    if total > room:
        most = sorted((item for item in needs.items() if item[1] > total / 100), key=lambda item: -item[1])
        parts = ", ".join(f"{what} {_shown(size)}" for what, size in most)
        raise ValueError(
            f"phase {phase} takes at least {_shown(total)} of memory on a device, which has {_shown(room)} ({parts}): "
            f"lower {advice}"
        )


def _shown(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
