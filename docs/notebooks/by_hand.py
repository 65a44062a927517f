# %% [markdown]
# # Rollouts and a preference loss, by hand
#
# A history of 32 tokens, five random ways to show it in 20 entries, a loss for each, and a policy that learns from the
# differences. No model is trained and no file is read: every number can be followed with a pencil.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import lensjax as lx

# %% [markdown]
# ## A history, and what shows it
#
# The history is a tree: tokens at the leaves, a **gist** above every 2 tokens, another above every 2 gists. A **working
# context** is a cut through that tree. The last 4 tokens, the query, are shown in full by every cut.


# %%
def row_of(contexts, row):
    return jax.tree.map(lambda leaf: leaf[row], contexts)


geometry = lx.Geometry(history=32, block_size=2, max_lod=2, recent_tokens=4)
length = geometry.length(20)
contexts, distinct = lx.sample_rollouts(jax.random.key(3), length, 0.3, rollouts=5, geometry=geometry, capacity=length)
cuts = np.stack([lx.to_cut(row_of(contexts, row), geometry) for row in range(5)])
print("entries of each:", contexts.length.tolist(), " different cuts:", distinct.tolist())


# %%
def show(rows, title, labels=None, *, colours="YlGnBu", across="token of the history", **limits):
    figure, axes = plt.subplots(figsize=(9, 0.35 * len(rows) + 0.9), layout="constrained")
    image = axes.imshow(rows, cmap=colours, aspect="auto", **limits)
    axes.set_yticks(range(len(rows)), labels or [f"rollout {row}" for row in range(len(rows))])
    axes.set_xlabel(across)
    axes.set_title(title, loc="left")
    figure.colorbar(image, ax=axes)
    plt.show()


show(cuts, "level at which each token is shown: 0 in full, 1 and 2 gists")

# %% [markdown]
# All five have exactly 20 entries, so that what one shows in full another must show as gists. That is what makes their
# losses comparable.
#
# ## A loss for each
#
# In training a language model reads each context and then the tokens behind the cursor; its mean loss on these is the
# **reward**, with a minus sign. Here the answer shall stand in tokens 8 to 11, and the loss is 1 nat where they are in
# full, and half a nat more for each level above.

# %%
ANSWER = slice(8, 12)
nll = 1 + 0.5 * cuts[:, ANSWER].mean(axis=1)
print("nats a token:", nll)

# %% [markdown]
# ## Pairs, and what each entry should ask for
#
# The best rollout is compared with every other one, then the largest differences that are left. Where the better one of
# a pair shows a span finer, every entry inside of that span, **of both**, gets the target +1, "this deserves detail";
# where coarser, -1. Elsewhere the pair says nothing.

# %%
pairs = lx.select_pairs(nll, distinct, hard_negative_ratio=1.0, max_pairs=6)
targets = lx.span_targets(contexts, pairs, geometry)
for row in range(3):
    better, worse = int(pairs.better[row]), int(pairs.worse[row])
    print(f"{better} (nll {nll[better]:.3f}) is better than {worse} (nll {nll[worse]:.3f})")


# %%
def over_tokens(values, context):
    """A value of each entry, at the tokens that it covers."""
    ends = np.append(np.asarray(context.start)[1:], geometry.history)
    return np.repeat(values, ends - np.asarray(context.start))


better, worse = int(pairs.better[0]), int(pairs.worse[0])
sides = [row_of(contexts, row) for row in (better, worse)]
asked = [over_tokens(targets.target[0, side], context) for side, context in enumerate(sides)]
signs = {"colours": "RdBu", "vmin": -1, "vmax": 1}
show([cuts[better], cuts[worse]], "levels of one pair", ["better", "worse"])
show(asked, "targets: 1 asks for detail, -1 to be collapsed", ["on the better", "on the worse"], **signs)

# %% [markdown]
# ## The loss, with a pencil
#
# With normalised advantages z, a = tanh(|z_w - z_b|) and g = max(1, |z_w - z_b|) / temperature, an entry j with target
# t_j and score s_j costs a softplus(-t_j s_j g). Entries weigh by the tokens that they cover.

# %%
delta = nll - nll.mean()
z = delta / delta.std()
gap = abs(z[worse] - z[better])
spans = np.concatenate([2.0 ** np.asarray(context.lod) for context in sides])
target, where = np.asarray(targets.target[0]).reshape(-1), np.asarray(targets.target[0]).reshape(-1) != 0
scores = np.zeros(len(target))

entry = np.tanh(gap) * np.log1p(np.exp(-target * scores * max(1, gap)))
by_hand = np.sum((entry * spans)[where]) / np.sum(spans[where])
options = {"gap": gap, "temperature": 1.0, "collapse_weight": 1.0, "weights": jnp.asarray(spans, jnp.float32)}
ours = lx.losses.preference_loss(jnp.asarray(scores, jnp.float32), target, where, **options)
print(f"by hand {by_hand:.6f}, lx.losses.preference_loss {ours:.6f}")
assert abs(by_hand - ours) < 1e-5

# %% [markdown]
# ## A policy that learns from many histories
#
# LensNet scores entries by what they hold. Here the policy is a score for each block of 4 tokens, the same in every
# context, and it goes down the gradient of that loss over fresh rollouts. The only thing it is told is which of two
# rollouts had the lower loss.


# %%
def loss(blocks, key):
    variants, valid = lx.sample_rollouts(key, length, 0.3, rollouts=5, geometry=geometry, capacity=length)
    shown = jax.vmap(lambda one: lx.to_cut(one, geometry))(variants)
    nats = 1 + 0.5 * shown[:, ANSWER].mean(axis=1, dtype=jnp.float32)
    chosen = lx.select_pairs(nats, valid, hard_negative_ratio=1.0, max_pairs=6)
    wanted = lx.span_targets(variants, chosen, geometry)
    scored = jnp.tanh(blocks)[variants.start // 4]

    def one(row):
        of = jnp.stack([chosen.better[row], chosen.worse[row]])
        pair = {"targets": wanted.target[row].reshape(-1), "where": wanted.target[row].reshape(-1) != 0}
        difference = 4 * (nats[of[1]] - nats[of[0]])
        weights = 2.0 ** variants.lod[of].reshape(-1)
        each = lx.losses.preference_loss(
            scored[of].reshape(-1), **pair, gap=difference, temperature=1.0, collapse_weight=1.0, weights=weights
        )
        return jnp.where(chosen.valid[row], each, 0.0)

    return jax.vmap(one)(jnp.arange(6)).mean()


step = jax.jit(lambda blocks, key: blocks - 0.5 * jax.grad(loss)(blocks, key))
blocks, history = jnp.zeros(8), []
for key in jax.random.split(jax.random.key(0), 200):
    blocks = step(blocks, key)
    history.append(np.tanh(blocks))
names = [f"tokens {4 * n} to {4 * n + 3}" for n in range(8)]
show(np.array(history).T, "score of each block of 4 tokens", names, across="step", **signs)

# %% [markdown]
# Tokens 8 to 11 hold the answer. Nobody said so: rollouts that show them in full had the lower loss. The last block is
# the query, of which no pair says anything.
#
# ## Acting on scores
#
# The **allocator** turns scores into edits at a constant number of entries: what has a high score is expanded, what has
# a low one is collapsed to pay for it.

# %%
score_fn = lambda context: jnp.tanh(blocks)[jnp.minimum(context.start // 4, 7)]
walk = lx.cold_start(score_fn, length, geometry, capacity=length, settings=lx.FocusConfig(steps=3))
steps = [lx.to_cut(row_of(walk, row), geometry) for row in range(4)]
show(steps, "from a context that knows nothing, in three looks", ["start", "1st look", "2nd", "3rd"])
final = np.asarray(steps[-1])
print("the answer is shown in full:", bool((final[ANSWER] == 0).all()))
assert (final[ANSWER] == 0).all()
