"""Several streams side by side: dealt over the devices, and on a processor a few at a time."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AT_ONCE = 8
"""Streams of which a processor computes a step at once, so that their scores stay in its cache."""
AXIS = "streams"


class Beside:
    """Where each of so many streams is computed.

    The local devices share them out, or as many of these as can have equally many. A processor is one device, and uses
    one core for most of a step: `jax_num_cpu_devices` makes more of it.

    Example:
      >>> import jax.numpy as jnp
      >>> from lensjax.session.beside import Beside
      >>> add = Beside(4).each(lambda params, one, other: params + one + other)
      >>> add(jnp.float32(1), jnp.arange(4.0), jnp.ones(4)).tolist()
      [2.0, 3.0, 4.0, 5.0]
    """

    def __init__(self, streams: int) -> None:
        devices = jax.local_devices()
        self.mesh = Mesh(np.asarray(devices[: math.gcd(streams, len(devices))]), (AXIS,))
        self.streams = streams

    def on_all(self, params: Any) -> Any:
        """Parameters, on every device."""
        return jax.device_put(params, self._shardings[0])

    @property
    def _shardings(self) -> tuple[NamedSharding, NamedSharding]:
        return NamedSharding(self.mesh, PartitionSpec()), NamedSharding(self.mesh, PartitionSpec(AXIS))

    def each(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """A compiled step of all streams with the same parameters: everything else has a leading axis of streams."""
        own = self.streams // self.mesh.size
        at_once = min(own, AT_ONCE) if self.mesh.devices.flat[0].platform == "cpu" else own

        def local(params: Any, of_streams: Any) -> Any:
            return jax.lax.map(lambda of_one: step(params, *of_one), of_streams, batch_size=at_once)

        specs = (PartitionSpec(), PartitionSpec(AXIS))
        dealt = jax.shard_map(local, mesh=self.mesh, in_specs=specs, out_specs=specs[1], check_vma=False)
        compiled = jax.jit(dealt, in_shardings=self._shardings)
        return lambda params, *of_streams: compiled(params, of_streams)
