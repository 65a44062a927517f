"""Batches measured by all devices, those of several processes too: each measures whole batches by itself."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from lensjax._numerics import may_be_nan
from lensjax.models import Params
from lensjax.runs.engine import devices
from lensjax.runs.engine.progress import StepBar, has_bars

Tree = TypeVar("Tree")


@functools.cache
def on_each(program: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """A program of parameters and rows, on rows that each device has of its own; compiled once for equal arguments."""
    return may_be_nan(jax.jit(devices.on_each(lambda rows, params: program(params, *rows), mesh)))


def over_batches(
    measure: Callable[[Any, dict[str, Params]], Any],
    batches: Sequence[Any],
    params: dict[str, Params],
    *,
    mesh: Mesh,
    console: Console,
    title: str,
) -> Any:
    """Measures all batches, as many at a time as there are devices.

    Args:
      measure: of a batch for each device, as `devices.deal` makes it, and of parameters; on devices.
      batches: pytrees of one shape.
      params: parameters by part.
      mesh: the devices.
      console: shows a bar; where there is no terminal, a line at the beginning and one a minute.
      title: of these.

    Returns:
      What was measured in the order of the batches, as one tree of host arrays, the same in all processes.
    """
    placed, measured = devices.place(params, mesh, split=False), list[Any]()
    starts = range(0, len(batches), mesh.size)
    if not has_bars(console):
        console.out(f"{title}: {len(starts)} steps, of which the first compiles, too", highlight=False)
    with StepBar(console, title, len(starts), done=0) as bar:
        for first in starts:
            own = range(first, min(first + mesh.size, len(batches)))
            places = [*own, *[own[-1]] * (mesh.size - len(own))]  # one program: the last ones measure what another does
            whole = devices.to_host(measure(devices.deal([batches[place] for place in places], mesh), placed))
            measured += [jax.tree.map(lambda leaf, place=place: leaf[place], whole) for place in range(len(own))]
            bar.advance()
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *measured)
