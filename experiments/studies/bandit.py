"""Which objectives find a known optimum from data that another policy drew?

    python -m experiments.studies.bandit                          ten bandits, into runs/bandit, 50 seconds on 2 cores

A policy over ten arms starts at a reference policy and is to maximise the expected reward minus beta times its KL
divergence from the reference. The optimum is known: pi ~ pi_ref exp(r / beta). All it sees is a fixed set of groups of
actions that a third policy drew, and their rewards. How far it comes is the share of the way from the reference to the
optimum, in the objective itself and exactly, over all arms. Seeds differ in rewards, policies and data. Leaves
`bandit.csv`, a row a policy, and `bandit.png`, the way there.

References:
  Flet-Berliac et al., Contrastive Policy Gradient, arXiv:2406.19185 (a bandit for the same question).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from rich.console import Console

from experiments import command
from experiments.tables import write_csv, write_json
from lensjax import losses
from lensjax._settings import BatchSize, Bound, Positive, PositiveInt, settings
from lensjax.evaluation.statistics import estimate
from lensjax.losses import advantages
from lensjax.plots import style


@settings()
class Arguments:
    """The bandits and how long to train."""

    arms: Annotated[int, Bound(2, 2**20)] = 10
    beta: Positive = 0.25
    """Strength of the KL term; rewards are uniform in [0, 1]."""
    groups: BatchSize = 512
    group_size: Annotated[int, Bound(2, 1024)] = 8
    steps: PositiveInt = 2000
    learning_rate: Positive = 0.02
    seeds: Annotated[int, Bound(2, 1024)] = 10
    output_dir: Path = Path("runs/bandit")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bandit:
    """One problem and the data of it."""

    rewards: Array
    """float32[A]: of the arms."""
    reference: Array
    """float32[A]: log-probabilities of the reference policy."""
    behaviour: Array
    """float32[A]: of the policy that drew the data."""
    actions: Array
    """int32[G, N]: groups of drawn arms."""
    value: Array
    """float32[]: V*, estimated from samples of the reference policy."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Group:
    """What an objective sees: N drawn actions."""

    log_probs: Array
    """float32[N]: under the policy that learns."""
    relative: Array
    """float32[N]: minus those under the reference."""
    behaviour: Array
    """float32[N]: under the policy that drew them."""
    rewards: Array
    """float32[N]."""
    value: Array
    """float32[]: V*."""


Objective = Callable[[Group, float], Array]


def _of_scores(loss: Callable[..., Array], **hyper: float) -> Objective:
    """An objective of `lensjax.losses`; without hyperparameters of its own its scale is beta."""

    def objective(group: Group, beta: float) -> Array:
        scales = hyper or {"beta": beta}
        return loss(group.relative, group.rewards, jnp.ones(group.rewards.shape, bool), **scales)

    return objective


def _a_star_po(group: Group, beta: float) -> Array:
    where = jnp.ones(group.rewards.shape, bool)
    return losses.a_star_po(group.relative, group.rewards, where, beta=beta, value=group.value)


def _info_nca(group: Group, beta: float) -> Array:
    return losses.info_nca(group.relative, group.rewards, jnp.ones(group.rewards.shape, bool), alpha=beta, beta=1.0)


def _policy_gradient(group: Group, beta: float, *, has_baseline: bool = False, is_weighted: bool = False) -> Array:
    """The KL term is part of the reward, as is usual; the baseline is the mean of the group's others."""
    where = jnp.ones(group.rewards.shape, bool)
    rewards = group.rewards - beta * jax.lax.stop_gradient(group.relative)
    advantage = advantages.group_advantages(rewards, where, baseline="leave_one_out") if has_baseline else rewards
    weights = advantages.importance_weights(group.log_probs, group.behaviour, most=100.0) if is_weighted else 1.0
    return losses.policy_gradient(group.log_probs, weights * advantage, where)


def _grpo(group: Group, beta: float) -> Array:
    where = jnp.ones(group.rewards.shape, bool)
    rewards = group.rewards - beta * jax.lax.stop_gradient(group.relative)
    advantage = advantages.group_advantages(rewards, where, baseline="standardised")
    return losses.clipped_surrogate(group.log_probs, advantage, where, old_log_probs=group.behaviour, clip=0.2)


OBJECTIVES: dict[str, Objective] = {
    "copg": _of_scores(losses.copg),
    "a_star_po": _a_star_po,
    "info_nca": _info_nca,
    "ipo": _of_scores(losses.ipo),
    "logistic": _of_scores(losses.logistic),
    "plackett_luce": _of_scores(losses.plackett_luce),
    "disco": _of_scores(losses.disco, tau=1.0),
    "policy_gradient": _policy_gradient,
    "policy_gradient, baseline": functools.partial(_policy_gradient, has_baseline=True),
    "policy_gradient, weights": functools.partial(_policy_gradient, is_weighted=True),
    "grpo": _grpo,
}


def main(words: list[str] | None = None) -> None:
    """Command line."""
    command.program(bandit, Arguments, words, description=__doc__)


def bandit(arguments: Arguments) -> dict[str, np.ndarray]:
    """Trains with every objective; returns the share of the way, float32[seeds, steps + 1], by objective."""
    folder, console = arguments.output_dir, Console()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty: choose another --output-dir")
    folder.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    write_json(settings, folder / "config.json")
    keys = jax.random.split(jax.random.key(0), arguments.seeds)
    problems = jax.vmap(functools.partial(draw, arguments=arguments))(keys)
    shares = {}
    for name, objective in OBJECTIVES.items():
        run = functools.partial(train, objective=objective, arguments=arguments)
        shares[name] = np.asarray(jax.jit(jax.vmap(run))(problems))
        low, high = estimate(shares[name][:, -1]).interval
        console.out(f"  {name:<36}{shares[name][:, -1].mean():8.3f}  {low:.3f} to {high:.3f}", highlight=False)
    last = ((name, seed, share) for name, all_ in shares.items() for seed, share in enumerate(all_[:, -1]))
    write_csv([{"objective": name, "seed": seed, "share": share} for name, seed, share in last], folder / "bandit.csv")
    with style.attempt(folder / "bandit.png") as path:
        picture(shares, path)
    console.out(f"share of the way to the optimum, mean and 95 % interval; {folder / 'bandit.png'}", highlight=False)
    return shares


def draw(key: Array, *, arguments: Arguments) -> Bandit:
    """A bandit, and what another policy drew of it."""
    reward_key, reference_key, behaviour_key, data_key, value_key = jax.random.split(key, 5)
    rewards = jax.random.uniform(reward_key, (arguments.arms,))
    reference, behaviour = (
        jax.nn.log_softmax(jax.random.normal(policy, (arguments.arms,))) for policy in (reference_key, behaviour_key)
    )
    shape = (arguments.groups, arguments.group_size)
    sampled = rewards[jax.random.categorical(value_key, reference, shape=shape)].ravel()
    value = arguments.beta * (jax.nn.logsumexp(sampled / arguments.beta) - jnp.log(jnp.float32(sampled.size)))
    actions = jax.random.categorical(data_key, behaviour, shape=shape)
    return Bandit(rewards, reference, behaviour, actions.astype(jnp.int32), value)


def train(problem: Bandit, *, objective: Objective, arguments: Arguments) -> Array:
    """The share of the way to the optimum before every step and after the last, float32[steps + 1]."""
    optimizer = optax.adam(optax.cosine_decay_schedule(arguments.learning_rate, arguments.steps))
    beta = arguments.beta

    def loss(logits: Array) -> Array:
        log_probs = jax.nn.log_softmax(logits)

        def of_group(actions: Array) -> Array:
            drawn = log_probs[actions]
            group = Group(
                log_probs=drawn,
                relative=drawn - problem.reference[actions],
                behaviour=problem.behaviour[actions],
                rewards=problem.rewards[actions],
                value=problem.value,
            )
            return objective(group, beta)

        return jnp.mean(jax.vmap(of_group)(problem.actions))

    def worth(logits: Array) -> Array:
        log_probs = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(log_probs) * (problem.rewards - beta * (log_probs - problem.reference)))

    def step(carry: Any, _: None) -> tuple[Any, Array]:
        logits, state = carry
        gradient = jax.grad(loss)(logits)
        with jax.numpy_dtype_promotion("standard"):  # optax counts steps in integers
            updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(logits, updates), state), worth(logits)

    start = problem.reference
    (logits, _), path = jax.lax.scan(step, (start, optimizer.init(start)), length=arguments.steps)
    best = beta * jax.nn.logsumexp(problem.reference + problem.rewards / beta)
    return (jnp.append(path, worth(logits)) - worth(start)) / (best - worth(start))


@style.own_look()
def picture(shares: dict[str, np.ndarray], path: Path) -> None:
    """The way of every objective, its mean and 95 % interval over the seeds."""
    columns = 4
    lines = -(-len(shares) // columns)
    figure = style.new_figure(2.4 * columns, 2.3 * lines)
    axes = np.atleast_1d(figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)).ravel()
    for ax, (name, all_) in zip(axes, shares.items(), strict=False):
        steps = np.unique(np.linspace(0, all_.shape[1] - 1, 60).astype(int))
        low, high = np.transpose([estimate(all_[:, step]).interval for step in steps])
        ax.axhline(1, color=style.MUTED, linewidth=0.8, linestyle="--")
        ax.fill_between(steps, low, high, color=style.COLORS[0], alpha=0.25, linewidth=0)
        ax.plot(steps, all_[:, steps].mean(axis=0), color=style.COLORS[0], linewidth=1.4)
        ax.set_ylim(-1, 1.15)
        style.dress(ax, name.replace(", ", ",\n"), "step", "share of the way" if ax in axes[::columns] else "")
    for ax in axes[len(shares) :]:
        ax.set_axis_off()
    style.write(figure, path)


if __name__ == "__main__":
    main()
