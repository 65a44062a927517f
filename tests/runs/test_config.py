import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import pytest

from lensjax.context.geometry import CutGeometry
from lensjax.runs import config as configs
from lensjax.runs.config import Config, ContextConfig, DataConfig, Hyperparameters, LensConfig, ObjectiveConfig

CHANGED = Config(
    output_dir="runs/other",
    seed=7,
    trainable=("gist", "lens"),
    base_run="runs/base",
    lens=LensConfig(dim=32, head="mlp"),
    context=ContextConfig(window=128, block_size=4, max_lod=3, horizon=16, recent_tokens=20),
    hyper=Hyperparameters(learning_rate=3e-4, kl_weight=0.25, context_start=0.9),
    data=DataConfig(task="text", path="texts/*.txt", max_files=10),
)


@pytest.mark.parametrize("config", [Config(), CHANGED], ids=["default", "changed"])
def test_json_round_trip(config):
    text = configs.to_json(config)
    assert configs.from_json(text) == config
    assert hash(configs.from_json(text)) == hash(config)


def test_json_lists_every_field():
    written = json.loads(configs.to_json(CHANGED))
    assert set(written) == {field.name for field in dataclasses.fields(Config)}
    assert set(written["hyper"]) == {field.name for field in dataclasses.fields(Hyperparameters)}


def test_missing_keys_take_their_defaults_and_whole_floats_stay_floats():
    config = configs.from_json('{"seed": 3, "hyper": {"temperature": 2}, "context": {"rollouts": 2}}')
    assert config == configs.replace(Config(), **{"seed": 3, "hyper.temperature": 2.0, "context.rollouts": 2})
    assert type(config.hyper.temperature) is float


def test_load_names_the_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(configs.to_json(CHANGED))
    assert configs.load(path) == CHANGED
    path.write_text('{"seeds": 1}')
    with pytest.raises(ValueError, match=re.escape(f"{path}: unknown key seeds")):
        configs.load(path)


# Every row: a dotted name, a bad value, and what the error must say.
BAD_VALUES = [
    ("seed", -1, "seed must be in [0, 2**31), got -1"),
    ("seed", 2**31, "seed must be in [0, 2**31), got 2147483648"),
    ("steps", -1, "steps must be 0 (no preference training) or more, got -1"),
    ("steps", 20, "steps must be above optimizer.warmup_steps 20, got 20"),
    ("pretrain.steps", 5, "pretrain.steps must be above optimizer.warmup_steps 20, got 5"),
    ("batch_size", 0, "batch_size must be at least 1, got 0"),
    ("logging_steps", 0, "logging_steps must be at least 1, got 0"),
    ("eval_steps", -5, "eval_steps must be at least 1, got -5"),
    ("save_steps", 0, "save_steps must be at least 1, got 0"),
    ("output_dir", "", "output_dir must name a folder"),
    ("dtype", "float16", "dtype must be one of float32, bfloat16, got 'float16'"),
    ("trainable", (), "trainable must name one or more of base, gist, lens, hyper, got ()"),
    ("trainable", ("lens", "head"), "trainable must name one or more of base, gist, lens, hyper"),
    ("trainable", ("lens", "lens"), "trainable names a part twice"),
    ("base.dim", 60, "base.dim must be a multiple of 2 * heads = 8"),
    ("base.kv_heads", 3, "base.heads must be a multiple of kv_heads, got 4 and 3"),
    ("base.layers", 0, "layers must be at least 1, got 0"),
    ("base.copy_heads", -1, "base.copy_heads must be between 0 and kv_heads 2, got -1"),
    ("base.copy_heads", 3, "base.copy_heads must be between 0 and kv_heads 2, got 3"),
    ("focus.steps", 0, "steps must be at least 1, got 0"),
    ("focus.max_edits", 0, "max_edits must be at least 1, got 0"),
    ("focus.cooldown", -1, "focus.cooldown must be finite and at least 0, got -1"),
    ("focus.top_k", -1, "focus.top_k must be finite and at least 0, got -1"),
    ("focus.temperature", float("inf"), "focus.temperature must be finite and at least 0, got inf"),
    ("focus.expand_threshold", float("nan"), "focus.expand_threshold must be a number, got nan"),
    ("focus.collapse_threshold", float("nan"), "focus.collapse_threshold must be a number, got nan"),
    ("base.conv_width", -1, "base.conv_width must be 0 (none) or more, got -1"),
    ("base.rope_theta", 1.0, "base.rope_theta must be above 1, got 1.0"),
    ("base.vocab_size", 255, "base.vocab_size must be at least 256, got 255"),
    ("gist.pooling", "max", "pooling must be one of mean, query, cls, got 'max'"),
    ("gist.head", "none", "head must be one of linear, mlp, got 'none'"),
    ("gist.layers", -1, "gist.layers must be 0 or more, got -1"),
    ("gist.heads", 5, "base.dim must be a multiple of gist.heads, got 64 and 5"),
    ("lens.dim", 65, "lens.dim must be a multiple of heads, got 65 and 2"),
    ("context.block_size", 1, "context.block_size must be at least 2, got 1"),
    ("context.max_lod", 0, "max_lod must be at least 1, got 0"),
    ("context.rollouts", 0, "rollouts must be at least 1, got 0"),
    ("context.local_edits", -1, "context.local_edits must be 0 (none) or more, got -1"),
    ("context.recent_tokens", 0, "recent_tokens must be at least 1, got 0"),
    ("context.horizon", 0, "horizon must be at least 1, got 0"),
    (
        "context.window",
        47,
        "context.window must hold at least one block, the recent tokens and the horizon: expected at",
    ),
    ("objective.targets", "better", "targets must be one of both, worse_only, got 'better'"),
    ("objective.granularity", "token", "granularity must be one of entry, pair, got 'token'"),
    ("objective.anchor", "cache", "anchor must be one of previous, ema, fixed, got 'cache'"),
    ("objective.group", "all", "group must be one of sequence, batch, got 'all'"),
    ("objective.group", "batch", "objective.group batch cannot go with objective.name spans: set objective.group seq"),
    ("objective.pair_weights", "all", "pair_weights must be one of none, importance, got 'all'"),
    ("objective.keep", 1, "objective.keep must be at least 2 (there is nothing to compare with one), or None, got 1"),
    ("objective.keep", 6, "objective.keep must be at most the 5 variants that are compared"),
    ("objective.rankings", 1, "objective.rankings must be at least 2, got 1"),
    ("objective.max_pairs", 0, "max_pairs must be at least 1, got 0"),
    ("hyper.learning_rate", 0.0, "learning_rate must be finite and above 0, got 0.0"),
    ("hyper.learning_rate", float("inf"), "learning_rate must be finite and above 0, got inf"),
    ("hyper.learning_rate", float("nan"), "learning_rate must be finite and above 0, got nan"),
    ("hyper.temperature", 0.0, "temperature must be finite and above 0, got 0.0"),
    ("hyper.temperature_end", -1.0, "temperature_end must be finite and above 0, got -1.0"),
    ("hyper.adv_norm_beta", 1.0, "adv_norm_beta must be in [0, 1), got 1.0"),
    ("hyper.anchor_beta", -0.1, "anchor_beta must be in [0, 1), got -0.1"),
    ("hyper.hard_negative_ratio", 1.5, "hard_negative_ratio must be in [0, 1], got 1.5"),
    ("hyper.lod2_share", -0.5, "lod2_share must be in [0, 1], got -0.5"),
    ("hyper.kl_weight", -1.0, "kl_weight must be finite and at least 0, got -1.0"),
    ("hyper.rpo_weight", -0.1, "rpo_weight must be finite and at least 0, got -0.1"),
    ("hyper.margin", float("inf"), "margin must be finite and at least 0, got inf"),
    ("hyper.context_end", 0.0, "context_end is a fraction of the history in (0, 1], got 0.0"),
    ("hyper.context_start", 1.1, "context_start is a fraction of the history in (0, 1], got 1.1"),
    ("hyper.context_end", 0.05, "context_end asks for 11 entries"),
    ("optimizer.schedule", "step", "schedule must be one of constant, linear, cosine, got 'step'"),
    ("optimizer.warmup_steps", -1, "optimizer.warmup_steps must be 0 or more, got -1"),
    ("optimizer.curriculum_steps", -1, "optimizer.curriculum_steps must be 0 or more, or None, got -1"),
    ("optimizer.b2", 1.0, "b1 and b2 must be in [0, 1), got 0.9 and 1.0"),
    ("optimizer.name", "sgd", "name must be one of adamw, muon, got 'sgd'"),
    ("optimizer.grokfast", -1.0, "optimizer.grokfast must be finite and at least 0, got -1.0"),
    ("optimizer.grokfast", float("inf"), "optimizer.grokfast must be finite and at least 0, got inf"),
    ("optimizer.grokfast_decay", 1.0, "optimizer.grokfast_decay must be in [0, 1), got 1.0"),
    ("optimizer.clip_norm", 0.0, "optimizer.clip_norm must be above 0, got 0.0"),
    ("stopping.patience", 0, "stopping.patience must be 1 evaluation or more, or None, got 0"),
    ("stopping.min_improvement", -0.1, "stopping.min_improvement must be finite and at least 0, got -0.1"),
    ("stopping.min_improvement", float("nan"), "stopping.min_improvement must be finite and at least 0, got nan"),
    ("stopping.min_improvement", 0.1, "min_improvement is read only with stopping.patience: set it, got 0.1 alone"),
    ("data.task", "web", "task must be one of stdlib, text, recall, tracking, got 'web'"),
    ("data.task", "text", "data.path must name a folder or a glob when data.task is text"),
    ("data.path", "texts", "data.path is read only when data.task is text"),
    ("data.max_files", 0, "max_files must be 1 or more, got 0"),
    ("data.recall_pool", 0, "recall_pool must be at least 1, got 0"),
    ("data.query", 0, "query must be at least 1, got 0"),
    ("data.hops", 0, "hops must be at least 1, got 0"),
    ("pretrain.steps", 0, "steps must be at least 1, got 0"),
    ("pretrain.learning_rate", -1e-3, "pretrain.learning_rate must be finite and above 0, got -0.001"),
    ("pretrain.rollout_weight", -1.0, "pretrain.rollout_weight must be 0 or more, got -1.0"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_VALUES)
def test_bad_values_are_refused_by_replace_and_by_json(name, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        configs.replace(Config(), **{name: value})
    section, _, field = name.rpartition(".")
    raw = {section: {field: value}} if section else {field: value}
    with pytest.raises(ValueError, match=re.escape(message)):
        configs.from_json(json.dumps(raw))


def test_values_of_variants_are_relative_to_an_anchor_that_does_not_move_with_the_policy():
    relative = {"hyper.kl_weight": 0.5, "objective.anchor": "previous"}
    message = (
        "objective.name ipo with hyper.kl_weight 0.5 compares values with the anchor's, and objective.anchor previous "
        "moves along with the policy, so that nothing is there to converge to: set objective.anchor to fixed or ema, "
        "or hyper.kl_weight to 0"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        configs.replace(Config(), **relative, **{"objective.name": "ipo"})
    for name, others in (("spans", {}), ("ipo", {"objective.anchor": "ema"}), ("ipo", {"objective.anchor": "fixed"})):
        assert configs.replace(Config(), **(relative | {"objective.name": name} | others)).hyper.kl_weight == 0.5
    assert configs.replace(Config(), **(relative | {"objective.name": "ipo", "hyper.kl_weight": 0.0}))


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (
            {"name": "mse", "granularity": "pair"},
            "mse is an error of entries: set objective.granularity entry, got pair",
        ),
        ({"name": "mse", "group": "batch"}, "objective.group batch cannot go with objective.name mse"),
        ({"name": "span_advantages", "group": "batch"}, "objective.group batch cannot go with objective.name span_adv"),
        (
            {"name": "copg", "pair_weights": "importance"},
            "pair_weights importance needs a preference term over pairs: set objective.name spans or mse, got copg",
        ),
        (
            {"name": "span_advantages", "pair_weights": "importance"},
            "set objective.name spans or mse, got span_advantages",
        ),
    ],
)
def test_objectives_that_cannot_go_together_are_refused(objective, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ObjectiveConfig(**objective)


def test_a_run_with_nothing_to_do_is_refused():
    assert configs.replace(Config(), steps=0).steps == 0
    with pytest.raises(ValueError, match=re.escape("steps is 0 and base_run is 'runs/base'")):
        Config(steps=0, base_run="runs/base")


def test_patience_that_cannot_run_out_is_refused():
    shape = {"steps": 400, "eval_steps": 100, "pretrain.steps": 100, "stopping.patience": 3}
    assert configs.replace(Config(), **shape).stopping.patience == 3
    # The first evaluation is the best so far; three more are the last one.
    for changes in ({"stopping.patience": 4}, {"steps": 300}, {"eval_steps": 134}):
        with pytest.raises(ValueError, match=r"stopping\.patience \d cannot run out: .* than \d evaluations \(steps"):
            configs.replace(Config(), **shape | changes)
    for name in ("pretrain.steps", "online.steps"):
        assert configs.replace(Config(), **shape | {"steps": 300, name: 301}).stopping.patience == 3
    with pytest.raises(ValueError, match="no phase has more than 3 evaluations"):
        configs.replace(Config(), **shape | {"steps": 300, "pretrain.steps": 400, "base_run": "runs/base"})


def test_local_edits_need_rollouts_to_compare():
    with pytest.raises(ValueError, match="compares rollouts with each other: expected 2 or more of them, got 1"):
        ContextConfig(rollouts=1, local_edits=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config is not JSON"),
        ("[1]", "config: expected an object with keys of Config, got [1]"),
        ('{"sede": 1}', "config: unknown key sede; known keys: adaptation, base, base_run"),
        ('{"sede": 1, "stepps": 2}', "config: unknown keys sede, stepps"),
        ('{"hyper": {"temprature": 1}}', "config.hyper: unknown key temprature"),
        ('{"hyper": 3}', "config.hyper: expected an object with keys of Hyperparameters, got 3"),
        ('{"steps": "10"}', "config.steps: expected int, got '10'"),
        ('{"steps": 1.5}', "config.steps: expected int, got 1.5"),
        ('{"steps": true}', "config.steps: expected int, got True"),
        ('{"base": {"tied": 1}}', "config.base.tied: expected bool, got 1"),
        ('{"hyper": {"temperature": "hot"}}', "config.hyper.temperature: expected float, got 'hot'"),
        ('{"hyper": {"temperature": null}}', "config.hyper.temperature: expected float, got None"),
        ('{"data": {"max_files": "all"}}', "config.data.max_files: expected int | None, got 'all'"),
        ('{"trainable": "lens"}', "config.trainable: expected a list of names, got 'lens'"),
    ],
)
def test_bad_json_is_refused_with_the_place(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        configs.from_json(text)


def test_replace_takes_dotted_names():
    config = configs.replace(CHANGED, **{"seed": 1, "hyper.temperature": 2.0, "hyper.margin": 0.3, "lens.layers": 3})
    assert (config.seed, config.hyper.temperature, config.hyper.margin, config.lens.layers) == (1, 2.0, 0.3, 3)
    assert config.hyper.kl_weight == CHANGED.hyper.kl_weight
    assert CHANGED.seed == 7
    section = configs.replace(CHANGED, **{"lens": LensConfig(), "lens.layers": 3})
    assert section.lens == LensConfig(layers=3)


@pytest.mark.parametrize("name", ["sede", "hyper.temprature", "heiper.temperature", "hyper.temperature.end"])
def test_replace_refuses_unknown_names(name):
    with pytest.raises(ValueError, match=f"unknown config key {re.escape(name)}"):
        configs.replace(Config(), **{name: 1})


def test_what_is_cut_is_the_history_before_the_cursor():
    shape = ContextConfig(window=100, horizon=30, block_size=8, max_lod=2, recent_tokens=5)
    assert shape.history == 70
    assert shape.geometry == CutGeometry(window=70, block_size=8, max_lod=2, recent_tokens=5)
    # One block, the query and the horizon are the least that there can be.
    assert ContextConfig(window=48, horizon=32, block_size=8, recent_tokens=8).geometry.blocks(1) == 1


def test_context_capacity_is_the_longest_length_of_the_curriculum():
    assert Config().context_capacity == 224 - 7 * 7 == 175  # 0.8 * 224 = 179.2, rounded down
    growing = configs.replace(Config(), **{"hyper.context_start": 0.7, "hyper.context_end": 0.9})
    assert growing.context_capacity == growing.context.geometry.length_of_fraction(0.9)


def test_hyperparameters_are_a_pytree_of_scalars():
    hyper = Hyperparameters()
    assert len(jax.tree.leaves(hyper)) == len(dataclasses.fields(hyper))
    batch = jax.tree.map(lambda x: jnp.full(3, x), hyper)
    doubled = jax.jit(jax.vmap(lambda h: dataclasses.replace(h, temperature=2 * h.temperature)))(batch)
    assert doubled.temperature.tolist() == [2.0] * 3
