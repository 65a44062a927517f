"""What the model passes of a training step cost on paper: floating-point operations, a multiply-add counted as two."""

from dataclasses import dataclass

from lensjax.config import BaseConfig, Config, LensConfig


@dataclass(frozen=True)
class StepCost:
    """FLOPs of one training step with a frozen base model, by part."""

    base: float
    """Forward passes over the entries of all variants, logits at the horizon."""
    lens: float
    """LensNet forward and backward on the same entries; the backward pass takes twice the forward one."""
    anchor: float
    """The anchor's forward pass; 0 where its weight is 0."""
    gist: float
    """Gists of all levels, once a sequence."""

    @property
    def total(self) -> float:
        """All of them."""
        return self.base + self.lens + self.anchor + self.gist


def step_cost(config: Config) -> StepCost:
    """Matrix products and attention of the model passes; norms, softmax and rotations are left out.

    With n entries, width D, hidden width M and a share g of D in keys and values, a layer takes

        n (4 + 4 g) D^2 + 6 n D M    products with weights
        4 n m D                      attention to m entries on average: n, or (n + 1) / 2 where it is causal

    The base model's last layer computes queries, attention and MLP at the H scored rows alone.

    Args:
      config: the run; GistNet must have no layers of its own.

    Returns:
      `StepCost`.

    Raises:
      ValueError: GistNet has layers.
    """
    if config.gist.layers or config.gist.pooling == "cls":
        raise ValueError(f"the cost of a GistNet with layers is not modelled, got {config.gist}")
    shape, entries = config.context, config.context_capacity
    variants = config.batch_size * (shape.rollouts + 1)
    blocks = sum(shape.geometry.blocks(lod) for lod in range(1, shape.max_lod + 1))
    lens = variants * _lens_forward(config.lens, config.base.dim, entries)
    return StepCost(
        base=variants * _base_forward(config.base, entries, shape.horizon),
        lens=3.0 * lens,
        anchor=lens if config.hyper.kl_weight > 0 else 0.0,
        gist=float(config.batch_size * blocks * 2 * config.base.dim**2),
    )


def _base_forward(base: BaseConfig, entries: int, horizon: int) -> float:
    share = base.kv_heads / base.heads
    keys = 4 * share * entries * base.dim**2

    def rest(rows: int, seen: float) -> float:
        return rows * (4 * base.dim**2 + 6 * base.dim * base.mlp_dim + 4 * seen * base.dim)

    full = keys + rest(entries, (entries + 1) / 2)
    last = keys + rest(horizon, entries - horizon / 2)
    return (base.layers - 1) * full + last + 2 * horizon * base.dim * base.vocab_size


def _lens_forward(lens: LensConfig, dim: int, entries: int) -> float:
    layer = entries * (8 * lens.dim**2 + 6 * lens.dim * lens.mlp_dim + 4 * entries * lens.dim)
    return float(2 * entries * dim * lens.dim + lens.layers * layer)
