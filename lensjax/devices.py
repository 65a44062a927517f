"""Several devices as one: a mesh over all of them, which shares each batch out and, where asked, the parameters.

The step itself is written for a global batch; XLA adds what has to pass between devices. Means, pairs and advantage
statistics are therefore those of the whole batch on any number of devices.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Tree = TypeVar("Tree")

AXIS = "devices"


def make_mesh(batch_sizes: Mapping[str, int]) -> Mesh:
    """All devices there are, in one axis.

    Args:
      batch_sizes: by the name of the setting, sequences in a global batch; each is to be shared out.

    Returns:
      The mesh.

    Raises:
      ValueError: a batch cannot be shared out equally.
    """
    devices = jax.devices()
    for name, size in batch_sizes.items():
        if size % len(devices):
            raise ValueError(
                f"{name} must be a multiple of the {len(devices)} devices that share a batch, got {size}: "
                "change it, or let JAX see fewer devices (such as by CUDA_VISIBLE_DEVICES)"
            )
    return Mesh(devices, (AXIS,))


def place(state: Tree, mesh: Mesh, *, split: bool) -> Tree:
    """Puts a state on all devices: whole on each, or (`split`) in parts where that goes (FSDP).

    An array is split along its longest axis that the number of devices divides.

    Args:
      state: pytree of arrays.
      mesh: the devices.
      split: whether to split.

    Returns:
      The same values; each leaf has its sharding.

    References:
      Rajbhandari et al., ZeRO, arXiv:1910.02054, section 5 (stage 3).
    """
    return jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, _parts(leaf, mesh, split))), state)


def batch_spec(shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """What `share_out` makes of a batch, for compiling ahead of time."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(AXIS)))


def share_out(batch: np.ndarray, mesh: Mesh) -> Array:
    """Gives each device its rows of a global batch [B, ...]."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec(AXIS)))


def _parts(leaf: Array, mesh: Mesh, split: bool) -> PartitionSpec:
    axes = [axis for axis, size in enumerate(leaf.shape) if size % mesh.size == 0 and size > 0]
    if not split or not axes:
        return PartitionSpec()
    longest = max(axes, key=lambda axis: leaf.shape[axis])
    return PartitionSpec(*(AXIS if axis == longest else None for axis in range(leaf.ndim)))
