"""`experiments.studies.judge`: what each old block is worth when it is tried, and what the teachers say of it."""

import functools
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from experiments.studies import judge as script
from lensjax import _settings
from lensjax.context import working as contexts
from lensjax.evaluation import baselines
from lensjax.evaluation.statistics import estimate
from lensjax.models.decision import split
from lensjax.runs.data import batches as data
from lensjax.runs.fit import EVALUATION_SEED
from lensjax.runs.store import checkpoint, run_folder
from lensjax.training import key_tokens, nll, teachers
from tests.runs import TINY, contents
from tests.small import jit

# Seven blocks of four before two tokens of a query; the base model reads ten of the 30 tokens, so five blocks are old.
CONFIG = _settings.replace(
    TINY,
    **{
        "context.omit": True,
        "context.window": 34,
        "context.horizon": 4,
        "context.recent_tokens": 2,
        "hyper.context_start": 10 / 30,
        "hyper.context_end": 10 / 30,
    },
)
OLD, HISTORY = 5, 30
TEACHERS = (
    *("gradient", "attention, mean head", "attention", "attention by need", "snapkv (causal)", "lookup (causal)"),
    *("age (causal)", "judge, other tokens", "judge"),
)


@functools.cache
def models_and_params():
    models, random = CONFIG.build_models(), np.random.default_rng(1)
    shapes = {part: jax.eval_shape(getattr(models, part).init, jax.random.key(0)) for part in ("base", "gist")}
    return models, jax.tree.map(
        lambda leaf: 0.4 * random.normal(size=leaf.shape).astype("f") + (leaf.ndim == 1), shapes
    )


@functools.cache
def windows():
    """Few tokens, so that the end of a history comes more than once."""
    return np.random.default_rng(0).integers(0, 6, (3, 34)).astype(np.int32)


@functools.cache
def measured():
    models, params = models_and_params()
    measure = jit(jax.vmap(functools.partial(script.measured, models, params, CONFIG)))
    return jax.device_get(measure(windows()))


@functools.cache
def gains(row):
    """What each old block lowers the loss of each token of the horizon by, tried one after the other, [OLD, H]."""
    models, params = models_and_params()
    tokens = windows()[row]

    @jit
    def loss(places):
        embeddings = models.base.embed(params["base"], tokens[:HISTORY])[places]
        return nll.token_nll(models.base, params["base"], contexts.in_full(embeddings, places), tokens[HISTORY:])

    recency = list(range(20, 30))
    swapped = [[*range(4 * block, 4 * block + 4), *recency[4:]] for block in range(OLD)]
    return np.stack([np.asarray(loss(np.asarray(recency)) - loss(np.asarray(places))) for places in swapped])


def test_a_block_is_worth_what_it_changes_in_the_place_of_the_oldest_of_recency():
    for row in range(3):
        worth, even, odd = (gains(row)[:, part].mean(axis=1) for part in (slice(None), slice(0, 4, 2), slice(1, 4, 2)))
        assert np.diff(np.sort(worth)).min() > 1e-4
        found = {name: values[row] for name, values in measured().items()}
        assert found["judge/first"] == pytest.approx(worth.max(), rel=1e-3) and found["judge/rank"] == 1
        # Of all old blocks the newest.
        assert found["age (causal)/first"] == pytest.approx(worth[-1], rel=1e-3)
        assert found["age (causal)/rank"] == pytest.approx(scipy.stats.spearmanr(np.arange(OLD), worth).statistic)
        assert found["judge, other tokens/rank"] == pytest.approx(scipy.stats.spearmanr(even, odd).statistic)
        assert found["judge, other tokens/first"] == pytest.approx(odd[even.argmax()], rel=1e-3)


def test_teachers_are_held_against_the_worth_by_the_mean_over_the_tokens_of_a_block():
    models, params = models_and_params()
    base, own, geometry = models.base, params["base"], CONFIG.geometry

    @jit
    @jax.vmap
    def said(tokens):
        window = split(tokens, horizon=4)
        need = jax.nn.relu(key_tokens.token_gain(base, own, window, short=5).gain)
        snapkv, _ = baselines.attention(base, own, window.history, slice(28, 30), geometry)
        return {
            "gradient": teachers.gate_gradients(base, own, window, geometry),
            "attention, mean head": teachers.future_attention(base, own, window, heads="mean"),
            "attention": teachers.future_attention(base, own, window),
            "attention by need": teachers.future_attention(base, own, window, weights=need),
            "snapkv (causal)": snapkv,
            "lookup (causal)": baselines.lookup(window.history, geometry),
        }

    assert set(measured()) == {f"{name}/{what}" for name in TEACHERS for what in ("rank", "first")}
    firsts = set()
    for name, values in jax.device_get(said(windows())).items():
        for row in range(3):
            of_blocks, worth = values[row, : 4 * OLD].reshape(OLD, 4).mean(axis=1), gains(row).mean(axis=1)
            firsts.add((row, int(of_blocks.argmax())))
            assert measured()[f"{name}/first"][row] == pytest.approx(worth[of_blocks.argmax()], rel=1e-3), name
            # Of equal ones the older has the lower rank.
            ranks = np.argsort(np.argsort(of_blocks, stable=True))
            expected = scipy.stats.spearmanr(ranks, worth).statistic
            assert measured()[f"{name}/rank"][row] == pytest.approx(expected, abs=1e-5), name
    assert len(firsts) > 3


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1.0, 2.0, 30.0], [-3.0, -2.0, 0.0], 1.0),
        ([1.0, 2.0, 30.0], [0.0, -2.0, -3.0], -1.0),
        # Ranks 1 2 3 and 1 3 2, whose differences squared sum to 2: 1 - 6 * 2 / (3 * 8).
        ([1.0, 2.0, 3.0], [5.0, 9.0, 7.0], 0.5),
        # The first of equal ones has the lower rank: 1 2 3 and 2 1 3.
        ([0.0, 0.0, 1.0], [2.0, 1.0, 3.0], 0.5),
        ([0.0, 0.0, 0.0], [3.0, 2.0, 1.0], -1.0),
    ],
)
def test_rank_correlation_by_hand(first, second, expected):
    assert float(script.spearman(jnp.asarray(first), jnp.asarray(second))) == pytest.approx(expected)


# The command, with measuring that costs nothing.


def save_run(folder, config):
    run_folder.create_run(folder, replace(config, output_dir=str(folder)))
    checkpoint.save(run_folder.checkpoint_dir(folder, "pretrain"), 4, {"params": models_and_params()[1]})
    return folder


@pytest.fixture
def cheap(monkeypatch):
    """Windows that are asked for; each says of a teacher what its first tokens are."""
    asked = []

    def fixed_batches(config, split, *, batch_size, count, seed):
        asked.append((split, batch_size, count, seed))
        return [{"tokens": rows} for rows in np.random.default_rng(0).integers(0, 99, (count, batch_size, 34))]

    def measured(models, params, config, tokens):
        jax.tree.map(np.testing.assert_array_equal, params, models_and_params()[1])
        names = [f"{name}/{what}" for name in ("attention", "judge") for what in ("rank", "first")]
        return {name: tokens[place].astype(jnp.float32) for place, name in enumerate(names)}

    monkeypatch.setattr(data, "fixed_batches", fixed_batches)
    monkeypatch.setattr(script, "measured", measured)
    return asked


def test_what_is_written_and_printed(tmp_path, cheap, capsys):
    run = save_run(tmp_path / "run", CONFIG)
    script.main(["--run", str(run), "--output-dir", str(tmp_path / "out"), "--windows", "7", "--split", "test"])
    assert cheap == [("test", 2, 3, EVALUATION_SEED)]
    written = json.loads((tmp_path / "out" / "judge.json").read_text())
    drawn = np.random.default_rng(0).integers(0, 99, (3, 2, 34)).reshape(6, 34).astype(float)
    every = [[one.mean, *one.interval] for one in (estimate(drawn[:, place]) for place in range(4))]
    places = [(teacher, what) for teacher in ("attention", "judge") for what in ("rank", "first")]
    assert {(teacher, what) for teacher in written for what in written[teacher]} == set(places)
    for (teacher, what), expected in zip(places, every, strict=True):
        assert written[teacher][what] == pytest.approx(expected, rel=1e-6)
    title, attention, judge = capsys.readouterr().out.splitlines()
    cells = [f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]" for mean, low, high in every]
    assert " ".join(title.split()) == "rank correlation worth of its first block, nats a token"
    assert attention.split() == ["attention", *" ".join(cells[:2]).split()]
    assert judge.split() == ["judge", *" ".join(cells[2:]).split()]


def test_what_cannot_be_judged_is_refused_before_anything_is_written(tmp_path, cheap):
    words = ["--output-dir", str(tmp_path / "out"), "--run"]
    with pytest.raises(SystemExit, match=r"error: .*nowhere holds no run"):
        script.main([*words, str(tmp_path / "nowhere")])
    gists = save_run(tmp_path / "gists", _settings.replace(CONFIG, **{"context.omit": False, "hyper.context_end": 0.7}))
    with pytest.raises(SystemExit, match=r"error: .*gists has context.omit False: only with omission one block can"):
        script.main([*words, str(gists)])
    before, run = contents(gists), save_run(tmp_path / "run", CONFIG)
    with pytest.raises(SystemExit, match=r"error: .*gists is not empty: choose another --output-dir"):
        script.main(["--run", str(run), "--output-dir", str(gists)])
    assert contents(gists) == before and not cheap and not (tmp_path / "out").exists()
