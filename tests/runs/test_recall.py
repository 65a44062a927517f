"""Single-span recall."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lensjax.runs.data import batches as data
from lensjax.runs.data import recall
from lensjax.runs.data.splits import SPLITS
from lensjax.training.scoring import ContextConfig
from tests.corpora import RECALL, recall_config


@settings(max_examples=60)
@given(
    size=st.integers(2, 8),
    blocks=st.integers(3, 12),
    recent_blocks=st.floats(0.0, 1.0),
    vocab=st.sampled_from([16, 300]),
    index=st.integers(0, 2**40),
    split=st.sampled_from(SPLITS),
    draw=st.data(),
)
def test_recall_invariants(size, blocks, recent_blocks, vocab, index, split, draw):
    query, window = draw.draw(st.integers(1, size - 1)), size * blocks
    recent = max(query, int(size * recent_blocks))
    context = ContextConfig(window=window, block_size=size, horizon=size - query, recent_tokens=recent)
    example = recall.RecallSource(context, vocab, split, seed=1, query=query)[index]
    tokens, (answer,) = example["tokens"], example["answers"]
    assert tokens.shape == (window,) and tokens.dtype == np.int32
    assert answer.shape == () and answer.dtype == np.int32
    assert tokens.min() >= 0 and tokens.max() < vocab
    np.testing.assert_array_equal(tokens[answer : answer + size], tokens[-size:])
    assert answer % size == 0 and answer + size <= context.history - recent
    earlier = tokens[:-size].reshape(-1, size)
    # The query, which is what stands of the tail block before the cursor, names one block.
    shown = tokens[: context.history][-query:]
    assert [size * i for i, block in enumerate(earlier) if (block[:query] == shown).all()] == [answer]
    if vocab >= window - size:
        assert len(np.unique(earlier)) == earlier.size


def test_answers_are_uniform_over_the_candidates():
    context = ContextConfig(window=64, block_size=8, horizon=6, recent_tokens=17)
    candidates, count = context.geometry.blocks(1), 3000
    assert candidates == 5  # the cursor is at 58: blocks 0 to 4 end at or before token 58 - 17 = 41
    source = recall.RecallSource(context, 256, "train", seed=0, query=2)
    found = Counter(int(source[i]["answers"][0]) for i in range(count))
    assert sorted(found) == [0, 8, 16, 24, 32]
    assert all(abs(n - count / 5) < 5 * (count * 0.2 * 0.8) ** 0.5 for n in found.values())


def test_every_block_before_the_tail_is_a_candidate_when_only_the_query_stays_in_full():
    source = recall.RecallSource(RECALL, 256, "train", seed=0, query=2)
    assert {int(source[i]["answers"][0]) for i in range(200)} == set(range(0, 56, 8))


def test_recall_example_depends_on_seed_split_and_index_alone():
    def tokens(*, seed=0, split="train", index=0, pool=None):
        return recall.RecallSource(RECALL, 256, split, seed, 2, pool)[index]["tokens"]

    source = recall.RecallSource(RECALL, 256, "train", seed=0, query=2)
    backwards = [source[i]["tokens"] for i in (2, 1, 0)]
    np.testing.assert_array_equal(backwards[::-1], [tokens(index=i) for i in range(3)])
    batch = next(data.make_iterator(recall_config(), "train", seed=0, batch_size=3))
    np.testing.assert_array_equal(batch["tokens"], backwards[::-1])
    variants = [tokens(), tokens(seed=1), tokens(split="validation"), tokens(split="test"), tokens(index=1)]
    assert len({row.tobytes() for row in variants}) == 5
    # numpy may change what a generator draws; whoever compares runs across versions should know.
    assert tokens()[:4].tolist() == [89, 91, 245, 54]


def test_recall_pretraining_repeats_a_small_pool():
    config = recall_config(recall_pool=3)
    batch = next(data.make_iterator(config, "train", seed=0, batch_size=50, pretraining=True))
    assert set(batch) == {"tokens"}
    pools = [np.unique(row.reshape(-1, 8), axis=0) for row in batch["tokens"]]
    assert max(map(len, pools)) == 3  # 8 blocks from 3: some sequence shows them all
    assert all(len(np.unique(pool)) == pool.size for pool in pools)
    assert len({pool.tobytes() for pool in pools}) == 50
    orders = {tuple(np.unique(row.reshape(-1, 8), axis=0, return_inverse=True)[1].flat) for row in batch["tokens"]}
    assert len(orders) > 40


def test_blocks_differ_in_their_first_tokens_even_where_tokens_must_come_twice():
    blocks = recall._distinct_blocks(np.random.default_rng(0), 16, 3, 2, 4)  # all of the 4**2 prefixes there are
    assert len(np.unique(blocks[:, :2], axis=0)) == 16
