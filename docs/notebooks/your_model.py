# %% [markdown]
# # Your own base model
#
# lensjax asks five things of a language model: two sizes, and three pure functions. This notebook writes one from
# nothing, trains it, and trains a LensNet on its losses. Nothing has to be inherited.

# %%
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import lensjax as lx
from lensjax.evaluation import compare
from lensjax.training.hyperparameters import Hyperparameters
from lensjax.training.nll import sequence_nll
from lensjax.training.steps import distill
from lensjax.training.teachers import DistillConfig

# %% [markdown]
# ## The task
#
# A text of 16 blocks of 4 letters. The last 2 letters before the cursor begin one of the blocks again; the 2 behind it
# go on as that block did. Who keeps the right block in full can know them.

# %%
LETTERS, BLOCK, BLOCKS = 64, 4, 16
context = lx.ContextConfig(window=68, block_size=BLOCK, max_lod=1, omit=True, horizon=2, recent_tokens=2, rollouts=8)


def example(key):
    letters, which = jax.random.split(key)
    text = jax.random.permutation(letters, LETTERS)[: BLOCK * BLOCKS]
    place = jax.random.randint(which, (), 0, BLOCKS - 1) * BLOCK
    return jnp.concatenate([text, jax.lax.dynamic_slice(text, (place,), (BLOCK,))])


def batch(key, size):
    return {"tokens": jax.vmap(example)(jax.random.split(key, size))}


# %% [markdown]
# ## The model
#
# It looks for entries whose letter is the one that is read now, and predicts what followed them: attention with one
# head, whose keys are the letters one place earlier. `entries` holds whatever a context shows, with true positions, and
# rows in padding come last.


# %%
@dataclass(frozen=True)
class Copier:
    """Predicts what came after earlier occurrences of the last letter."""

    vocab_size: int = LETTERS
    dim: int = 32

    def init(self, key):
        table, keys, head = jax.random.split(key, 3)
        scale = self.dim**-0.5
        return {
            "table": jax.random.normal(table, (self.vocab_size, self.dim)) * scale,
            "keys": jax.random.normal(keys, (self.dim, self.dim)) * scale,
            "head": jax.random.normal(head, (self.dim, self.vocab_size)) * scale,
            "sharpness": jnp.ones(()),
        }

    def embed(self, params, tokens):
        return params["table"][tokens]

    def logits(self, params, entries, rows):
        seen, count = entries.embeddings, entries.embeddings.shape[0]
        # What stood before each entry; a gap of the context is not before anything.
        is_next = jnp.diff(entries.positions, prepend=-9.0) == 1
        before = jnp.where(is_next[:, None], jnp.roll(seen, 1, axis=0), 0.0) @ params["keys"]
        scores = params["sharpness"] * self.dim * (seen[rows] @ before.T)
        may_look = (jnp.arange(count)[None, :] <= rows[:, None]) & entries.valid[None, :]
        weights = jax.nn.softmax(jnp.where(may_look, scores, -1e9), axis=1)
        return (weights @ seen) @ params["head"]


# %% [markdown]
# Beside it stand the library's own GistNet and LensNet. The object is a static argument of `jax.jit`, so that it must
# hash and compare by its settings: a frozen dataclass does.

# %%
base = Copier()
recipe = lx.Recipe(
    context=context,
    focus=lx.FocusConfig(start="recency", steps=2),
    hyper=Hyperparameters(context_start=0.25, context_end=0.25),
)
lens = lx.LensConfig(dim=32, layers=2, heads=4, mlp_dim=64, recency=True)
sizes = {"block_size": context.block_size, "max_lod": context.max_lod}
ours = lx.build_models(lx.BaseConfig(dim=base.dim, heads=2), lx.GistConfig(), lens, **sizes)
models = lx.Models(base=base, gist=ours.gist, lens=ours.lens)

# %% [markdown]
# ## Pretraining it
#
# It is your model: train it as you do. Here with optax, on whole texts, in which some block always comes twice.


# %%
def whole_loss(params, tokens):
    return jax.vmap(lambda row: sequence_nll(base, params, row)[-2:].mean())(tokens).mean()


optimizer = optax.adam(1e-2)


@jax.jit
def pretrain(params, memory, key):
    loss, grads = jax.value_and_grad(whole_loss)(params, batch(key, 64)["tokens"])
    updates, memory = optimizer.update(grads, memory)
    return optax.apply_updates(params, updates), memory, loss


params = base.init(jax.random.key(0))
memory = optimizer.init(params)
for number, key in enumerate(jax.random.split(jax.random.key(1), 400)):
    params, memory, loss = pretrain(params, memory, key)
    if number % 80 == 79:
        print(f"{number + 1} steps: {loss:.3f} nats a letter, uniform {np.log(LETTERS):.3f}")

# %% [markdown]
# ## A LensNet for it
#
# Stage one: a teacher that has read on says which blocks the next letters need. A model that shows no attention is
# asked through the **gradient** of its loss. The base model is frozen: it is handed over beside the state.

# %%
everything, frozen = lx.init_train_state(jax.random.key(2), recipe=recipe, models=models, params={"base": params})
fresh = {**frozen, **everything.params}
teacher = DistillConfig(steps=200, teacher="gradient", learning_rate=2e-3, sharpness=2.0)
state, frozen = distill.init_distill_state(jax.random.key(3), recipe=recipe, params=fresh)
teach = jax.jit(functools.partial(distill.distill_step, recipe=recipe, settings=teacher, models=models))
curve = []
for key in jax.random.split(jax.random.key(4), 200):
    state, metrics = teach(state, batch(key, 16), frozen)
    curve.append(float(metrics["distill/top_agreement"]))

# %% [markdown]
# Stage two: preferences. Eight random contexts of one length, the model's loss on the next letters under each, and a
# step towards what the better ones show.

# %%
learner, frozen = lx.init_train_state(jax.random.key(5), recipe=recipe, models=models, params={**fresh, **state.params})
step = jax.jit(functools.partial(lx.train_step, recipe=recipe, models=models), donate_argnums=0)
for key in jax.random.split(jax.random.key(6), 50):
    learner, metrics = step(learner, batch(key, 16), frozen)
print({name: round(float(metrics[name]), 3) for name in ("nll_baseline", "mc/preference_agreement")})

# %%
_, axes = plt.subplots(figsize=(7, 3), layout="constrained")
axes.plot(curve, color="#0072b2")
axes.set_xlabel("step of stage one")
axes.set_title("share of the teacher's blocks that LensNet would show", loc="left")
plt.show()

# %% [markdown]
# ## Is it any good?
#
# On texts that nobody was trained on, at a quarter of the entries: the loss with LensNet's choice and with the last
# tokens. `hit` is how often the block that is needed was shown. An untrained LensNet is no blank: it is built to point
# at what resembles the query, so it is measured too.


# %%
@jax.jit
def measure(params, key):
    tokens = batch(key, 256)["tokens"]
    # The block that the last four letters repeat.
    where = jnp.argmax(tokens[:, :64] == tokens[:, 64:65], axis=1)
    one = functools.partial(compare.measure_pick, models, params, recipe=recipe)
    found = jax.vmap(one)(tokens, where[:, None], jax.random.split(key, 256))
    return jax.tree.map(jnp.mean, found)


trained = {**frozen, **learner.params}
for name, which in (("untrained", fresh), ("trained", trained)):
    found = measure(which, jax.random.key(99))
    print(f"{name:<10}" + "  ".join(f"{key} {value:.3f}" for key, value in sorted(found.items())))
assert found["lensnet"] < found["recency"]

# %% [markdown]
# Methods that are left out cost nothing but what needs them: without `attention` the rivals that score by it are not in
# the table, and without a cache (`init_cache`, `extend`, `truncate`) there is no session.
