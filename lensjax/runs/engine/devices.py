"""Several devices as one: a mesh over all of them, which shares each batch out and, where asked, the parameters.

The step itself is written for a global batch; XLA adds what has to pass between devices. Means, pairs and advantage
statistics are therefore those of the whole batch on any number of devices.

The devices may belong to several processes, one a host or one a GPU. Each runs the same program on the same state and
reads its own rows of every batch; the first one alone writes files, in a folder that all can read.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

Tree = TypeVar("Tree")

AXIS = "devices"


def is_asked_to_join() -> bool:
    """Whether this process was started as one of several."""
    return "JAX_COORDINATOR_ADDRESS" in os.environ


def join() -> None:
    """Makes this process one of several that train together, where the environment asks for it.

    `JAX_COORDINATOR_ADDRESS`, host and port of the first process, does so. Slurm, Open MPI, Kubernetes and TPU pods
    tell JAX the rest; elsewhere `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` (from 0) do. Call it before anything else of
    JAX.

    Raises:
      ValueError: the variables are not numbers, or do not fit each other.
    """
    if not is_asked_to_join():
        return
    given = [os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")]
    if any(value is not None and not value.isdecimal() for value in given):
        raise ValueError(f"JAX_NUM_PROCESSES and JAX_PROCESS_ID must be numbers, got {given[0]} and {given[1]}")
    processes, process = (None if value is None else int(value) for value in given)
    jax.distributed.initialize(num_processes=processes, process_id=process)


def find() -> None:
    """Looks for devices, once; several processes wait for each other.

    Raises:
      ValueError: JAX has none of the kind that it was asked for.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where JAX was installed without that kind
        reason = str(error).partition("\n")[0] or "this JAX was installed without it"
        raise ValueError(
            f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')} asks for a kind of device that is not there "
            f"({reason}): unset it, or set it to cpu"
        ) from error
    meet()


def is_first() -> bool:
    """Whether this is the process that writes files."""
    return jax.process_index() == 0


def in_first(act: Callable[[], object]) -> None:
    """Lets the first process act while the others wait for it.

    Raises:
      Exception: what `act` raised, in the first process.
      ValueError: the same, in the others.
    """
    error: Exception | None = None
    if is_first():
        try:
            act()
        except Exception as raised:
            error = raised
    has_failed = largest(int(error is not None))
    if error is not None:
        raise error
    if has_failed:
        raise ValueError("the first process failed; see its message")


def largest(number: int) -> int:
    """The largest of the numbers that the processes bring."""
    if jax.process_count() == 1:
        return number
    return int(np.max(multihost_utils.process_allgather(np.asarray(number, np.int32))))


def meet() -> None:
    """Waits until all processes have come here."""
    largest(0)


def make_mesh(batch_sizes: Mapping[str, int]) -> Mesh:
    """All devices there are, in one axis.

    Args:
      batch_sizes: by the name of the setting, sequences in a global batch; each is to be shared out.

    Returns:
      The mesh.

    Raises:
      ValueError: a batch cannot be shared out equally, or JAX compiles nothing.
    """
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        raise ValueError("steps are compiled ahead of time, which JAX_DISABLE_JIT forbids: unset it, or set it to 0")
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
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
    return jax.tree.map(lambda leaf: put(leaf, NamedSharding(mesh, _parts(leaf, mesh, split))), state)


def put(leaf: Array | np.ndarray, sharding: Sharding) -> Array:
    """Puts an array where a sharding says; where that is in several processes, all hold the same values before."""
    is_shared = isinstance(leaf, Array) and not leaf.is_fully_addressable
    if sharding.is_fully_addressable or is_shared:
        return jax.device_put(leaf, sharding)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(put(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
    values = np.asarray(leaf)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def deal(parts: Sequence[Tree], mesh: Mesh) -> Tree:
    """One tree for each device, on that device; before, every process has all of them.

    Args:
      parts: as many as devices, of equal shapes.
      mesh: the devices.

    Returns:
      The trees as one; the leading axis of every leaf is the device.
    """
    stacked: Tree = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    return jax.tree.map(lambda leaf: put(leaf, NamedSharding(mesh, PartitionSpec(AXIS))), stacked)


def on_each(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """A function on every device by itself: of its tree of those that `deal` gave out, and of all else as a whole.

    Args:
      function: of a tree and of whatever follows it.
      mesh: the devices.

    Returns:
      The function of what `deal` returns and of the rest; what it returns has a leading axis for the device too.
    """

    def local(own: Any, rest: tuple[Any, ...]) -> Any:
        returned = function(jax.tree.map(lambda leaf: leaf[0], own), *rest)
        return jax.tree.map(lambda leaf: leaf[None], returned)

    specs = (PartitionSpec(AXIS), PartitionSpec())
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(AXIS), check_vma=False)

    def on_devices(own: Any, *rest: Any) -> Any:
        return mapped(own, rest)

    return on_devices


def batch_spec(shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """What `share_out` makes of a batch, for compiling ahead of time."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(AXIS)))


def share_out(rows: np.ndarray, mesh: Mesh) -> Array:
    """Gives each device its rows of a global batch [B, ...].

    Args:
      rows: those of this process, [B / processes, ...].
      mesh: the devices.

    Returns:
      The global batch.
    """
    return jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec(AXIS)), rows)


def to_host(tree: Tree) -> Tree:
    """Arrays of a state or a batch as whole numpy arrays in every process."""
    whole: Tree = jax.device_get(jax.tree.map(_gathered, tree))
    return whole


def _gathered(leaf: Any) -> Any:
    is_here = not isinstance(leaf, Array) or leaf.is_fully_addressable or leaf.is_fully_replicated
    return leaf if is_here else multihost_utils.process_allgather(leaf, tiled=True)


def _parts(leaf: Array, mesh: Mesh, split: bool) -> PartitionSpec:
    axes = [axis for axis, size in enumerate(leaf.shape) if size % mesh.size == 0 and size > 0]
    if not split or not axes:
        return PartitionSpec()
    longest = max(axes, key=lambda axis: leaf.shape[axis])
    return PartitionSpec(*(AXIS if axis == longest else None for axis in range(leaf.ndim)))
