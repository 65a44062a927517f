"""Is a checkpoint read right? Compares its logits with those of a reference implementation.

    python -m experiments.parity models/Qwen3-0.6B --reference logits.npz

The reference is yours: one text's token ids, and the logits that another implementation gives for them in float32,

    numpy.savez("logits.npz", tokens=ids, logits=logits)        # int [S], float [S, vocabulary]

Prints the largest difference, in how many places the likeliest token is the same, and the loss of both, and fails
where a difference is above the tolerance.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro

from experiments import command
from lensjax._settings import NonNegative, settings
from lensjax.context.working import in_full
from lensjax.models.checkpoints import load_language_model


@settings()
class Arguments:
    """What to compare."""

    checkpoint: tyro.conf.Positional[Path]
    """A Hugging Face folder, or a GGUF file."""
    reference: Path
    """An npz file with `tokens` int[S] and `logits` float[S, vocabulary]."""
    tolerance: NonNegative = 1e-3
    """Largest difference of a logit that still passes."""
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class Parity:
    """How far logits are from those of a reference."""

    difference: float
    """Largest of any logit."""
    agreement: float
    """Share of places where the likeliest token is the same."""
    loss: float
    """Nats per token, of the model."""
    reference_loss: float
    """Nats per token, of the reference."""


def main(words: list[str] | None = None) -> None:
    """Command line."""
    command.program(_judge, Arguments, words, description=__doc__)


def _judge(arguments: Arguments) -> None:
    if not compare(arguments).difference <= arguments.tolerance:
        raise ValueError(f"the largest difference is above --tolerance {arguments.tolerance}")


def compare(arguments: Arguments) -> Parity:
    """Compares and prints.

    Raises:
      ValueError: there is no checkpoint, it is not covered, or the reference does not fit it.
    """
    tokens, expected = _reference(arguments.reference)
    model, params = load_language_model(arguments.checkpoint, arguments.dtype)
    if expected.shape != (len(tokens), model.vocab_size) or tokens.min() < 0 or tokens.max() >= model.vocab_size:
        raise ValueError(
            f"{arguments.reference} must have tokens [S] below {model.vocab_size} and logits [S, {model.vocab_size}], "
            f"got tokens {list(tokens.shape)} up to {tokens.max()} and logits {list(expected.shape)}"
        )
    rows = np.arange(len(tokens))
    logits = np.asarray(jax.jit(model.logits)(params, in_full(model.embed(params, tokens), rows), rows))
    parity = Parity(
        difference=float(np.abs(logits - expected).max()),
        agreement=float((logits.argmax(axis=1) == expected.argmax(axis=1)).mean()),
        loss=_loss(logits, tokens),
        reference_loss=_loss(expected, tokens),
    )
    print(f"largest difference {parity.difference:.2e} (standard deviation of the reference {expected.std():.2f})")
    print(f"likeliest token equal in {round(parity.agreement * len(tokens))} of {len(tokens)} places")
    print(f"loss {parity.loss:.6f}, of the reference {parity.reference_loss:.6f} nats per token")
    return parity


def _reference(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist: write it with numpy.savez(path, tokens=ids, logits=logits)")
    with np.load(path) as file:
        if not {"tokens", "logits"} <= set(file.files):
            raise ValueError(f"{path} must hold tokens and logits, got {', '.join(file.files)}")
        tokens, logits = file["tokens"], file["logits"]
    if tokens.ndim != 1 or len(tokens) < 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"{path}: tokens must be two or more whole numbers, got {tokens.dtype}{list(tokens.shape)}")
    return tokens.astype(np.int32), logits.astype(np.float32)


def _loss(logits: np.ndarray, tokens: np.ndarray) -> float:
    """Mean of -log p(token_t | those before it), in nats."""
    log_probs = jax.nn.log_softmax(logits[:-1], axis=-1)
    return -float(np.take_along_axis(np.asarray(log_probs), tokens[1:, None], axis=1).mean())


if __name__ == "__main__":
    main()
