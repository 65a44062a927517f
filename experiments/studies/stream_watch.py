"""Looks at every refocus step of a session that reads a long stream."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from lensjax.context import working as contexts
from lensjax.context.working import MISSING
from lensjax.plots.maps import StreamMap
from lensjax.session import Refocus, Session, SessionState

# Refocus steps that are drawn, at most.
FIRST_STEPS = 150
Row = dict[str, Any]


class Watch:
    """Checks every context; remembers what each was worth and how long it was, and what the first ones showed."""

    def __init__(self, session: Session, *, steps: int = 0) -> None:
        """Of a session that has made so many refocus steps before."""
        self.session = session
        self._check = jax.jit(self._checked)
        self._tally = _no_tally()
        self._steps = steps
        self._new_entries: list[Any] = []
        self._entries: list[int] = []
        self._frames: list[Any] = []
        self._losses: list[np.ndarray] = []

    def look(self, state: SessionState, report: Refocus) -> None:
        """Called after every refocus step; fetches nothing, so that the device is not waited for."""
        self._steps += 1
        view = state.view
        seen = {"context": view.context, "held": view.held, "cached": view.cache.length}
        self._tally = self._check(self._tally, seen, report, self._steps)
        self._new_entries.append(view.cache.length)
        if self._steps <= FIRST_STEPS:
            self._frames.append(seen | {"first": view.forgotten, "swap_rate": report.swap_rate})

    def collect(self, losses: np.ndarray) -> Row:
        """What was seen since the last call; `losses` are those of the tokens read since then."""
        tally, self._tally = jax.device_get(self._tally), _no_tally()
        entries, self._frames = jax.device_get((self._new_entries, self._frames))
        self._entries += map(int, entries)
        self._new_entries = []
        steps, interval = int(tally["refocus_steps"]), self.session.config.interval
        self._losses.append(losses[: steps * interval].reshape(steps, interval))
        swap_rate = float(tally.pop("swap_rate")) / steps
        return {name: int(value) for name, value in tally.items()} | {"swap_rate": swap_rate}

    @property
    def entries(self) -> np.ndarray:
        """int32[refocus steps]: entries of the context of each."""
        return np.array(self._entries, np.int32)

    @property
    def token_losses(self) -> np.ndarray:
        """float32[refocus steps, interval]: nats of each token of the interval that ends at each."""
        return np.concatenate(self._losses)

    @property
    def losses(self) -> np.ndarray:
        """float32[refocus steps]: nats per token on the interval that ends at each."""
        return self.token_losses.mean(axis=1)

    def map_of_first_steps(self, title: str) -> StreamMap:
        """What the first refocus steps showed."""
        geometry, steps = self.session.config.geometry, len(self._frames)
        return StreamMap(
            title=title,
            cursors=self.session.config.interval * np.arange(1, steps + 1),
            first=np.array([frame["first"] for frame in self._frames]),
            cuts=np.stack([self._cut(frame) for frame in self._frames]),
            swap_rate=np.array([frame["swap_rate"] for frame in self._frames]),
            nll=self.losses[:steps],
            max_lod=geometry.max_lod,
            block_size=geometry.block_size,
        )

    def _cut(self, frame: Row) -> np.ndarray:
        """int8[C]."""
        geometry, lods = self.session.config.geometry, frame["context"].lod[frame["context"].valid]
        cut = np.repeat(lods, geometry.block_size**lods)
        most = min(geometry.history, FIRST_STEPS * self.session.config.interval)
        return np.pad(cut, (0, most - len(cut)), constant_values=MISSING).astype(np.int8)

    def _checked(self, tally: dict[str, Array], seen: Row, report: Refocus, step: Array) -> dict[str, Array]:
        geometry, held = self.session.config.geometry, seen["held"]
        over, saved = held - self.session.config.budget, geometry.saving
        # The longest within the budget that a cut can be.
        length = held - jnp.maximum(-(-over // saved), 0) * saved
        holds = contexts.invariants(seen["context"], geometry, length=length, tokens=held)
        holds["cache"] = seen["cached"] == length
        is_legal = functools.reduce(jnp.logical_and, holds.values())
        counts: dict[str, ArrayLike] = {f"broke_{name}": ~ok for name, ok in holds.items()}
        counts |= {"refocus_steps": 1, "swaps": report.swaps, "swap_rate": report.swap_rate, "illegal_steps": ~is_legal}
        counts["first_illegal_step"] = jnp.where(is_legal | (tally["first_illegal_step"] > 0), 0, step)
        return {name: total + jnp.asarray(counts[name], total.dtype) for name, total in tally.items()}


def _no_tally() -> dict[str, Array]:
    broke = [f"broke_{name}" for name in ("alignment", "contiguity", "budget", "tail", "cache")]
    names = ["refocus_steps", "illegal_steps", "first_illegal_step", *broke, "swaps"]
    return {name: jnp.zeros((), jnp.int32) for name in names} | {"swap_rate": jnp.zeros(())}
