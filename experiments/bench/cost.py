"""What the model passes of a training step cost on paper: arithmetic, and traffic between processor and memory."""

from dataclasses import dataclass

from lensjax.models.base_lm import BaseConfig
from lensjax.models.lensnet import LensConfig
from lensjax.runs.config import Config


@dataclass(frozen=True)
class Cost:
    """Of one part of a step."""

    flops: float
    """Floating-point operations, a multiply-add counted as two."""
    traffic: float
    """Bytes read from memory and written to it."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.traffic + other.traffic)

    def __rmul__(self, times: float) -> "Cost":
        return Cost(times * self.flops, times * self.traffic)

    def seconds(self, *, flops_per_second: float, bytes_per_second: float) -> float:
        """The least time on a device that computes while it reads and writes (the roofline).

        References:
          Williams et al., Roofline, doi:10.1145/1498765.1498785.
        """
        return max(self.flops / flops_per_second, self.traffic / bytes_per_second)


@dataclass(frozen=True)
class StepCost:
    """One training step with a frozen base model, by part."""

    base: Cost
    """Forward passes over the entries of all variants and the horizon behind each, logits at the horizon."""
    lens: Cost
    """LensNet forward and backward on the same entries; the backward pass takes twice the forward one."""
    anchor: Cost
    """The anchor's forward pass; nothing where its weight is 0."""
    gist: Cost
    """Gists of all levels, once a sequence."""

    @property
    def total(self) -> Cost:
        """All of them."""
        return self.base + self.lens + self.anchor + self.gist


def step_cost(config: Config, *, fused_attention: bool = False) -> StepCost:
    """Matrix products and attention of the model passes.

    With n entries, width D, hidden width M, h heads and a share g of D in keys and values, a layer takes

        n (4 + 4 g) D^2 + 6 n D M         operations in products with weights
        4 n m D                           in attention to m entries on average: n, or (n + 1) / 2 where it is causal
        n s ((18 + 2 g) D + 6 M)          bytes of activations of s bytes: each product, norm, gate and sum reads its
                                          inputs and writes its result once
        16 h n m                          bytes of float32 attention weights, written, read and written by the softmax,
                                          and read again; none in a fused kernel
        4 ((2 + 2 g) D^2 + 3 D M)         bytes of float32 weights, read once a step and not once a variant

    LensNet projects embeddings, and blocks if it sees them, to its width, blocks once more beside them; a pointer takes
    a query and a key of each entry and a weight for each head. Norms, softmax, rotations and the sums of single numbers
    are no operations here. The base model's last layer computes queries, attention and
    MLP at the H scored rows alone.

    Args:
      config: the run; GistNet must have no layers of its own.
      fused_attention: whether attention weights never reach memory.

    Returns:
      `StepCost`.

    Raises:
      ValueError: GistNet has layers.
    """
    if config.gist.layers or config.gist.pooling == "cls":
        raise ValueError(f"the cost of a GistNet with layers is not modelled, got {config.gist}")
    shape, entries = config.context, config.capacity
    variants = config.batch_size * (shape.rollouts + 1)
    blocks = sum(shape.geometry.blocks(lod) for lod in range(1, shape.max_lod + 1))
    size, weights = (4 if config.dtype == "float32" else 2), (0 if fused_attention else 16)
    dim = config.base.dim
    lens = _lens_forward(config.lens, dim, entries, variants, size, weights)
    return StepCost(
        # The last token of the horizon is not read: nothing is predicted from it.
        base=_base_forward(config.base, entries + shape.horizon - 1, variants, shape.horizon, size, weights),
        lens=3.0 * lens,
        anchor=lens if config.hyper.kl_weight > 0 else Cost(0.0, 0.0),
        gist=Cost(
            float(config.batch_size * blocks * 2 * dim**2),
            float(config.batch_size * (shape.history + blocks) * dim * size + 4 * dim**2),
        ),
    )


def _base_forward(base: BaseConfig, entries: int, variants: int, horizon: int, size: int, weights: int) -> Cost:
    dim, hidden, share = base.dim, base.mlp_dim, base.kv_heads / base.heads

    def layer(rows: int, seen: float) -> Cost:
        """Keys and values of all entries, the rest at some rows that see so many entries."""
        flops = 4 * share * entries * dim**2 + rows * (4 * dim**2 + 6 * dim * hidden + 4 * seen * dim)
        activations = entries * (2 + 2 * share) * dim + rows * (16 * dim + 6 * hidden)
        once = 4 * ((2 + 2 * share) * dim**2 + 3 * dim * hidden)
        return Cost(variants * flops, variants * (size * activations + weights * base.heads * rows * seen) + once)

    head = Cost(
        float(variants * 2 * horizon * dim * base.vocab_size),
        # The logits are written once, and read for their maximum and for the sum.
        float(variants * 12 * horizon * base.vocab_size + 4 * dim * base.vocab_size),
    )
    return (base.layers - 1) * layer(entries, (entries + 1) / 2) + layer(horizon, entries - horizon / 2) + head


def _lens_forward(lens: LensConfig, width: int, entries: int, variants: int, size: int, weights: int) -> Cost:
    dim, hidden = lens.dim, lens.mlp_dim
    layer = Cost(
        float(variants * entries * (8 * dim**2 + 6 * dim * hidden + 4 * entries * dim)),
        float(
            variants * entries * (size * (20 * dim + 6 * hidden) + weights * lens.heads * entries)
            + 4 * (4 * dim**2 + 3 * dim * hidden)
        ),
    )

    def product(inputs: int, outputs: int) -> Cost:
        """Every entry times one matrix of weights."""
        once = 4.0 * inputs * outputs
        each = variants * entries
        return Cost(2.0 * each * inputs * outputs, float(each * (inputs + outputs) * size) + once)

    content = (1 + lens.blocks) * product(width, dim) + lens.blocks * product(dim, dim)
    pointer = lens.pointer * (2 * product(dim, dim) + product(dim, lens.heads))
    return content + lens.layers * layer + pointer
