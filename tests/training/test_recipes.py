"""The optimizer of every config equals that of the source that the config cites."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imgtune_jax import config, param_tree
from imgtune_jax.training import checkpoint, optim
from imgtune_jax.training.experiment import StepCounts
from imgtune_jax.training.step import make_train_step
from imgtune_jax.types import Batch, Outputs, TrainState
from tests import test_config
from tests.training import transcriptions

NUM_EXAMPLES = 51_200
SHAPES = {
    "image/patch_embed/kernel": (2, 2, 3, 33),
    "image/blocks_0/mlp/fc1/kernel": (33, 40),
    "image/blocks_0/mlp/fc1/bias": (40,),
    "image/final_norm/scale": (33,),
    "image_head/kernel": (33, 36),
    "text/token_embed/embedding": (50, 33),
    "text/blocks_0/attn/q/kernel": (33, 33),
    "decoder/vocabulary/kernel": (33, 50),
    "logit_scale": (),
}


def tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return param_tree.unflatten(
        {p: jnp.asarray(scale * rng.normal(size=s), jnp.float32) for p, s in SHAPES.items()}
    )


PARAMS, GRADS = tree(0, 0.02), (tree(1), tree(2))


def siglip_adam():
    """2303.15343: rate 1e-3, weight decay 1e-4, b2 0.95; the optimizer is big_vision's AdamW."""
    return transcriptions.big_vision_optimizer(
        PARAMS,
        optax.scale_by_adam(b1=0.9, b2=0.95),
        lr=1e-3,
        wd=1e-4,
        grad_clip_norm=1.0,
        decay_type="cosine",
        total_steps=200,  # one epoch
    )


def cappa():
    """The numbers of big_vision/configs/proj/cappa/pretrain.py."""
    return transcriptions.big_vision_optimizer(
        PARAMS,
        transcriptions.big_vision_adafactor(beta2_cap=0.999),
        lr=0.001,
        wd=0.0001,
        grad_clip_norm=1.0,
        decay_type="cosine",
        total_steps=366_500,
        warmup_steps=10_000,
    )


def coca():
    """The numbers of 2205.01917, section 4.1, with Praxis' optimizer and linear schedule."""
    schedule = transcriptions.big_vision_schedule(
        base=8e-4, decay_type="linear", total_steps=500_000, warmup_steps=10_000
    )
    adafactor = transcriptions.praxis_adafactor(
        PARAMS, schedule=schedule, weight_decay=0.01, beta1=0.9, decay_adam=0.999
    )
    return optax.chain(optax.clip_by_global_norm(1.0), adafactor)


def adamw(**changes):
    fields = dict(multipliers=(), lr=1e-3, warmup_steps=0, weight_decay=0.05, b1=0.9, b2=0.98)
    return lambda: transcriptions.optax_adamw(PARAMS, **{**fields, **changes})


TOWERS = (("(image|text)/.*", 0.1),)
SOURCES = {
    "base": siglip_adam,
    "cap_b16": cappa,
    "cappa_b16": cappa,
    "coca_l14": coca,
    "lit_emoji": adamw(multipliers=TOWERS, warmup_steps=150, total_steps=1500),
    "locking_emoji": adamw(multipliers=TOWERS, warmup_steps=300, total_steps=600),
    "caption_emoji": adamw(lr=3e-3, weight_decay=0.01, warmup_steps=2400, total_steps=32_000),
    "coca_emoji": adamw(lr=3e-3, weight_decay=0.01, warmup_steps=800, total_steps=4800),
    "debug": adamw(weight_decay=0.1, b2=0.95, total_steps=30),
}
every_config = pytest.mark.parametrize("path", test_config.CONFIGS, ids=lambda p: p.stem)


@functools.cache
def build(path):
    """Return (optimizer of a config, its lengths in steps, optimizer of its source)."""
    cfg = config.parse_config(test_config.load(path))
    steps = StepCounts.from_config(cfg, NUM_EXAMPLES)
    ours = optim.build_optimizer(
        cfg.optim,
        param_tree.param_paths(PARAMS),
        total=steps.total,
        warmup=steps.warmup,
        cooldown=steps.cooldown,
        timescale=steps.timescale,
    )
    return ours, steps, SOURCES[path.stem]()


def at_step(opt_state, step):
    """Return an optimizer state with `step` as the number of updates so far."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.full_like(x, step) if getattr(path[-1], "name", "") == "count" else x,
        opt_state,
    )


def assert_equal(ours, theirs, rtol=1e-6):
    """Compare two trees, with an absolute tolerance for updates whose terms cancel.

    1 in 1000 may differ more: momenta near the middle of two bfloat16 numbers, which can be rounded
    to either.
    """
    ours, theirs = (np.concatenate([x.ravel() for x in jax.tree.leaves(t)]) for t in (ours, theirs))
    assert np.isfinite(theirs).all() and np.any(theirs)
    atol = rtol * np.sqrt(np.mean(np.square(theirs)))
    close = np.isclose(ours, theirs, rtol=rtol, atol=atol)
    assert close.mean() >= 0.999, np.abs(ours / theirs - 1).max()
    np.testing.assert_allclose(ours, theirs, rtol=2**-7, atol=atol)


@every_config
def test_updates_in_warmup_at_the_peak_and_near_the_end_equal_those_of_the_cited_optimizer(path):
    ours, steps, theirs = build(path)

    def second_update(tx, step):
        state = at_step(tx.init(PARAMS), jnp.maximum(step - 1, 0))
        _, state = tx.update(GRADS[0], state, PARAMS)
        return tx.update(GRADS[1], state, PARAMS)[0]

    updates = [jax.jit(functools.partial(second_update, tx)) for tx in (ours.tx, theirs)]
    end = steps.warmup + (steps.total - steps.warmup) * 9 // 10
    for step in (steps.warmup // 2, steps.warmup):
        assert_equal(*(update(step) for update in updates))
    # Near the end of a cosine, 1 + cos(x) cancels, which increases rounding errors.
    assert_equal(*(update(end) for update in updates), rtol=5e-6)


def linear_loss(params, batch, rng):
    """Return outputs whose mean has the gradient c = GRADS[0] times the mean of the batch.

    So the gradient is exact in any order of the sums.
    """
    products = jax.tree.map(lambda p, c: (p * c).sum(), params, GRADS[0])
    return Outputs(image_emb=batch.image_features * sum(jax.tree.leaves(products)))


@every_config
def test_accumulated_steps_around_a_resume_equal_those_of_the_cited_optimizer(path, tmp_path):
    ours, steps, theirs = build(path)
    start = max(steps.warmup - 1, 0)
    step = jax.jit(
        make_train_step(
            linear_loss,
            lambda outputs, batch: (outputs.image_emb.mean(), {}),
            ours,
            key=jax.random.key(0),
            accumulation=2,
        )
    )
    batches = [Batch(jnp.ones(4, bool), image_features=jnp.full((4, 1), x)) for x in (1.0, -2.0)]

    state = TrainState(jnp.int32(start), PARAMS, at_step(ours.tx.init(PARAMS), start))
    state, _ = step(state, {}, batches[0])
    checkpointer = checkpoint.Checkpointer(
        tmp_path, config.parse_config(test_config.load(path)).checkpoint
    )
    checkpointer.save(start + 1, state, {})
    checkpointer.wait()
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    checkpointer.close()
    restored = checkpoint.restore_newest(tmp_path, target).state
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    state, _ = step(restored, {}, batches[1])

    @jax.jit
    def reference():
        params, opt_state = PARAMS, at_step(theirs.init(PARAMS), start)
        for scale in (1.0, -2.0):
            grads = jax.tree.map(lambda g, scale=scale: scale * g, GRADS[0])
            updates, opt_state = theirs.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
        return params

    assert int(state.step) == start + 2
    assert_equal(state.params, reference())
