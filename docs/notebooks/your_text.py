# %% [markdown]
# # A LensNet on your text
#
# A folder of text, a small base model pretrained on it, a LensNet that decides what the model reads, and a table that
# says whether the choice was any good. Two to three minutes on two cores.

# %%
import json
import sysconfig
import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

import lensjax as lx
from lensjax.context.allocator import FocusConfig
from lensjax.runs.data.task import DataConfig
from lensjax.training.hyperparameters import Hyperparameters
from lensjax.training.optim.optimizer import OptimizerConfig
from lensjax.training.steps.pretrain import PretrainConfig
from lensjax.training.teachers import DistillConfig

# %% [markdown]
# ## The text
#
# Put a folder or a glob of your own here: `~/notes/**/*.md`. Every machine that runs this has the source of Python, so
# that is the example. Files, not windows, are split into train, validation and test, by a hash of their names.

# %%
TEXT = str(Path(sysconfig.get_path("stdlib")) / "*.py")
FOLDER = Path(tempfile.mkdtemp()) / "run"

# %% [markdown]
# ## The run
#
# Windows of 256 bytes: 224 before the cursor, 32 behind it, which are predicted from 56 entries. Each window quotes
# itself: its last 8 bytes before the cursor begin an earlier passage again, so that something old is always needed.
# Leave `quote` out for your text as it is. Ordinary text seldom needs what is old, and 150 steps will not show it.

# %%
config = lx.Config(
    output_dir=str(FOLDER),
    steps=0,
    batch_size=16,
    eval_steps=50,
    eval_batches=4,
    save_steps=500,
    base=lx.BaseConfig(dim=96, layers=2, heads=4, kv_heads=2, mlp_dim=256, copy_heads=1, conv_width=4),
    lens=lx.LensConfig(reads="attention", recency=True),
    context=lx.ContextConfig(
        window=256, block_size=8, max_lod=1, omit=True, horizon=32, recent_tokens=16, rollouts=4, local_edits=2
    ),
    focus=FocusConfig(start="recency", steps=2, cooldown=4),
    hyper=Hyperparameters(context_start=0.25, context_end=0.25),
    data=DataConfig(task="text", path=TEXT, quote=8),
    optimizer=OptimizerConfig(name="muon"),
    pretrain=PretrainConfig(steps=400, learning_rate=4e-3, batch_size=16, rollout_weight=1.0),
    distill=DistillConfig(steps=150, learning_rate=2e-3),
)
run = lx.fit(config)

# %% [markdown]
# ## What came out
#
# `nll_policy` is the loss with LensNet's choice, `nll_baseline` with the last 56 bytes, `nll_full_tail` with the whole
# history, `nll_oracle` with the passage that is quoted. All on held-out files, in nats a byte.

# %%
summary = json.loads((FOLDER / "summary.json").read_text())
names = ("nll_baseline", "nll_policy", "nll_oracle", "nll_full_tail")
for name in names:
    print(f"{name:<16}{summary[name]:.3f}")


# %%
def picture(name):
    _, axes = plt.subplots(figsize=(12, 9), layout="constrained")
    axes.imshow(plt.imread(FOLDER / name))
    axes.axis("off")
    plt.show()


picture("training.png")

# %% [markdown]
# The map shows four held-out windows. What is dark is read in full, what is light is left out; `answer` is the passage
# that the last bytes quote.

# %%
picture("maps.png")

# %% [markdown]
# ## Using it
#
# A session reads a stream of any length through a context of fixed size, and looks anew every 32 bytes.

# %%
session = run.session()
text = Path(json.__file__).read_bytes()[:2000]
state, nats = session.append(session.init(), list(text))
print(f"read {len(text)} bytes at {np.mean(nats[500:]):.2f} nats each")
state, tokens = session.generate(state, 40, jax.random.key(0), temperature=0.5)
print(bytes(np.asarray(tokens, np.uint8)).decode(errors="replace"))

# %% [markdown]
# The same from the command line, with all policies of the literature beside it and intervals:
#
#     python -m experiments.train notes --data.path '~/notes/**/*.md'
#     python -m experiments.evaluate runs/notes --budgets 2 4
