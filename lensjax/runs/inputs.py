"""The data of a run: batches to train each phase on, and held-out ones."""

import functools
from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from lensjax.runs.config import Config
from lensjax.runs.data import batches as data
from lensjax.runs.engine import devices


class Inputs:
    """All data of a run, checked and in memory before the run's folder is made.

    Args:
      config: the run's.
      mesh: the devices that share each batch.
      seeds: of the training data, by phase.
      held_out_seed: of the batches that are measured on.

    Raises:
      ValueError: there is too little of it; see `lensjax.runs.data.batches`.
    """

    def __init__(self, config: Config, mesh: Mesh, *, seeds: Mapping[str, int], held_out_seed: int) -> None:
        share = (jax.process_index(), jax.process_count())
        batches = functools.partial(
            data.fixed_batches,
            config,
            batch_size=config.batch_size,
            count=config.eval_batches,
            seed=held_out_seed,
            share=share,
        )
        self.validation, self.test = (
            jax.tree.map(lambda rows: devices.share_out(rows, mesh), batches(split)) for split in ("validation", "test")
        )
        self.training = {
            phase: data.make_iterator(
                config,
                "train",
                seed=seed,
                batch_size=config.pretrain.batch_size
                if phase == "pretrain" and config.pretrains
                else config.batch_size,
                pretraining=phase == "pretrain",
                share=share,
            )
            for phase, seed in seeds.items()
        }
