"""Optimizers equal Optax's and those of papers; multipliers and weight decay by parameter path."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imgtune_jax import config, config_history, models, param_tree
from imgtune_jax.training import optim
from tests.training import transcriptions

NEVER = config.Duration(None, None, None)


def optim_config(**changes):
    fields = dict(
        name="adamw", args={}, lr=0.1, schedule="constant", warmup=NEVER, warmup_from_zero=False,
        cooldown=NEVER, timescale=NEVER, weight_decay=0.0, weight_decay_scaled_by="learning_rate",
        clip_norm=None, layer_decay=1.0, lr_multipliers=((".*", 1.0),),
        weight_decay_multipliers=((".*/kernel", 1.0), (".*", 0.0)), ema_decay=None,
    )  # fmt: skip
    return config.OptimConfig(**{**fields, **changes})


def init_params():
    key = jax.random.key(0)
    blocks = {
        f"blocks_{i}": {"fc1": {"kernel": jax.random.normal(key, (64, 64)), "bias": jnp.ones(64)}}
        for i in range(2)
    }
    return {
        "image": {"patch_embed": {"kernel": jnp.ones((4, 4))}, **blocks, "final_norm": jnp.ones(4)}
    }


def build(cfg, total=10, warmup=0, cooldown=0):
    paths = param_tree.param_paths(init_params())
    return optim.build_optimizer(cfg, paths, total=total, warmup=warmup, cooldown=cooldown)


def train(optimizer, steps=3, grad=0.01):
    """Return the parameters after a few steps with fixed gradients."""
    params = init_params()
    state = optimizer.tx.init(params)
    grads = jax.tree.map(lambda x: grad * jnp.sin(3 * x + 1), params)
    for _ in range(steps):
        updates, state = optimizer.tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_adamw_equals_optax_adamw():
    ours = train(build(optim_config(weight_decay=0.05, args=dict(b2=0.95))))
    mask = lambda p: jax.tree_util.tree_map_with_path(lambda path, x: path[-1].key == "kernel", p)
    tx = optax.adamw(0.1, b2=0.95, weight_decay=0.05, mask=mask)
    theirs = train(optim.Optimizer(tx, lambda s: 0.1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


def test_lion_equals_optax_lion():
    ours = train(build(optim_config(name="lion")))
    theirs = train(optim.Optimizer(optax.lion(0.1, weight_decay=0.0), lambda s: 0.1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_every_optimizer_decreases_a_quadratic_loss(name):
    optimizer = build(optim_config(name=name, lr=0.02, args={}), total=60)
    loss = lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(p)) / 1000

    @jax.jit
    def step(params, state):
        updates, state = optimizer.tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = init_params()
    state, before = optimizer.tx.init(params), loss(params)
    for _ in range(40):
        params, state = step(params, state)
    assert loss(params) < 0.8 * before


def test_adafactor_state_is_sublinear():
    state = build(optim_config(name="adafactor", args=dict(b1=None))).tx.init(init_params())
    state_size = sum(x.size for x in jax.tree.leaves(state))
    assert state_size < 0.2 * sum(x.size for x in jax.tree.leaves(init_params()))


def test_multipliers_scale_rate_and_decay_by_path():
    rules = ((r"image/blocks_0/.*", 0.0), (".*", 1.0))
    after, before = train(build(optim_config(lr_multipliers=rules))), init_params()
    assert np.array_equal(
        after["image"]["blocks_0"]["fc1"]["kernel"], before["image"]["blocks_0"]["fc1"]["kernel"]
    )
    assert not np.array_equal(
        after["image"]["blocks_1"]["fc1"]["kernel"], before["image"]["blocks_1"]["fc1"]["kernel"]
    )
    decayed = train(build(optim_config(weight_decay=0.5)), grad=0.0)
    np.testing.assert_allclose(decayed["image"]["final_norm"], before["image"]["final_norm"])
    kernel = before["image"]["blocks_0"]["fc1"]["kernel"]
    np.testing.assert_allclose(
        decayed["image"]["blocks_0"]["fc1"]["kernel"], kernel * 0.95**3, rtol=1e-5
    )


def test_weight_decay_scaled_by_the_schedule_ignores_rate_and_multipliers():
    """Step t decays weights by weight_decay times the schedule, here (t + 1) / 5 (big_vision)."""
    cfg = optim_config(
        weight_decay=0.01,
        weight_decay_scaled_by="schedule",
        lr_multipliers=(("image/blocks_0/.*", 0.5), (".*", 1.0)),
        layer_decay=0.5,
    )
    decayed, before = train(build(cfg, warmup=4), grad=0.0), init_params()
    for block in ("blocks_0", "blocks_1"):
        np.testing.assert_allclose(
            decayed["image"][block]["fc1"]["kernel"],
            before["image"][block]["fc1"]["kernel"] * (0.998 * 0.996 * 0.994),
            rtol=1e-6,
        )
        np.testing.assert_array_equal(decayed["image"][block]["fc1"]["bias"], 1.0)


def test_weights_that_decay_but_do_not_learn_are_an_error():
    rules = dict(lr_multipliers=(("image/blocks_0/.*", 0.0), (".*", 1.0)), weight_decay=0.1)
    build(optim_config(**rules))  # scaled by the learning rate, the decay is zero too
    with pytest.raises(ValueError, match=r"lr_multipliers has 0 for \['image/blocks_0/fc1/kernel'"):
        build(optim_config(**rules, weight_decay_scaled_by="schedule"))


def updates_of(tx, grads, params, state=None):
    """Return (last update, state) after one update for each gradient."""
    state, updates = tx.init(params) if state is None else state, None
    for g in grads:
        updates, state = tx.update(g, state, params)
    return updates, state


def test_adafactor_equals_that_of_big_vision_and_clips_no_update():
    params = init_params()
    small = jax.tree.map(lambda x: 0.01 * jnp.sin(3 * x + 1), params)
    large = jax.tree.map(lambda x: 5 * jnp.cos(2 * x), params)  # updates of an RMS above 1
    ours, _ = updates_of(optim.adafactor(b1=None), [small, small, large], params)
    theirs, _ = updates_of(transcriptions.big_vision_adafactor(), [small, small, large], params)
    momentum, _ = updates_of(optim.adafactor(), [small, small, large], params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), momentum, theirs)
    assert np.sqrt(np.mean(np.square(ours["image"]["blocks_0"]["fc1"]["kernel"]))) > 1.2
    clipped, _ = updates_of(
        optim.adafactor(b1=None, clipping_threshold=1.0), [small, small, large], params
    )
    rms = np.sqrt(np.mean(np.square(clipped["image"]["blocks_0"]["fc1"]["kernel"])))
    np.testing.assert_allclose(rms, 1.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("args", "step", "decay"),
    [
        ({}, 1, 0.0),
        ({}, 100, 1 - 100**-0.8),
        ({}, 10**5, 0.999),
        (dict(beta2_cap=0.95), 10**5, 0.95),
        (dict(beta2_cap=None), 10**5, 1 - 10**-4),
        (dict(b2=0.99), 1, 0.0),
        (dict(b2=0.99), 2, 0.99 * 0.01 / (1 - 0.99**2)),
        (dict(b2=0.99), 10**5, 0.99),
    ],
)
def test_decay_of_adafactors_second_moment(args, step, decay):
    params = {"bias": jnp.ones(3)}
    tx = optim.adafactor(b1=None, **args)
    state = jax.tree.map(lambda x: jnp.full_like(x, step - 1) if x.ndim == 0 else x * 0 + 1,
                         tx.init(params))  # fmt: skip
    _, state = tx.update({"bias": jnp.zeros(3)}, state, params)
    np.testing.assert_allclose(state[0].v["bias"], decay, rtol=1e-5, atol=1e-7)


MATRICES = {
    name: (8, 12)
    for name in (
        *(f"image/blocks_0/attn/{name}/kernel" for name in "qkv"),
        "image/blocks_0/attn/out/kernel",
        "image/blocks_0/mlp/fc1/kernel",
        "decoder/blocks_0/mlp/fc2/kernel",
        "decoder/vocabulary/kernel",
        "image/classifier/kernel",
        "image_head/kernel",
        "text_head/fc1/kernel",
        "text/token_embed/embedding",
    )
}


def matrices(seed):
    rng = np.random.default_rng(seed)
    return param_tree.unflatten(
        {p: jnp.asarray(rng.normal(size=s), jnp.float32) for p, s in MATRICES.items()}
    )


def muon_update(g, steps=5):
    """Return Moonlight's first update (examples/toy_train.py), in float64; g is [m n], m < n."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g / (np.linalg.norm(g) + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return 0.2 * np.sqrt(max(g.shape)) * x


def test_muon_leaves_kernels_into_vocabulary_and_embedding_space_to_adam():
    params, grads = matrices(0), matrices(1)
    ours = param_tree.flatten(updates_of(optim.muon(), [grads], params)[0])
    adam = param_tree.flatten(updates_of(optax.scale_by_adam(), [grads], params)[0])
    is_adam = {p for p in MATRICES if np.allclose(ours[p], adam[p])}
    assert is_adam == {
        "decoder/vocabulary/kernel",
        "image/classifier/kernel",
        "image_head/kernel",
        "text_head/fc1/kernel",
        "text/token_embed/embedding",
    }
    for path in MATRICES.keys() - is_adam:
        expected = muon_update(np.asarray(param_tree.flatten(grads)[path], np.float64))
        # The iterations amplify rounding errors of float32.
        np.testing.assert_allclose(ours[path], expected, rtol=1e-3, atol=1e-4)


SIZES = dict(width=8, depth=2, mlp_dim=16, num_heads=2)
TEXT = dict(vocab_size=10, max_length=6, **SIZES)
VIT = dict(name="vit", image_size=8, patch_size=4, **SIZES)
TWO_LAYERS = {"blocks_0": 2, "blocks_1": 1}
# Tower, and the expected exponent of the factor by module.
TOWERS = {
    "vit": (
        dict(VIT, pre_norm=True, num_registers=2, pool="attention"),
        dict.fromkeys(["patch_embed", "pos_embed", "class_token", "registers", "pre_norm"], 3)
        | TWO_LAYERS
        | dict(final_norm=0, pool=0),
    ),
    "text_transformer": (
        dict(TEXT, name="text_transformer", pool="class"),
        dict(token_embed=3, pos_embed=3, class_token=3, final_norm=0) | TWO_LAYERS,
    ),
    "bert": (
        dict(TEXT, name="bert"),
        dict(token_embed=3, pos_embed=3, embed_norm=3) | TWO_LAYERS,
    ),
    "efficientnet_lite": (
        dict(name="efficientnet_lite", variant="lite0", num_classes=5),
        {f"blocks_{i}": 16 - i for i in range(16)} | dict(stem=17, head=0, classifier=0),
    ),
    "resnet": (
        dict(name="resnet", stage_sizes=(1, 12), num_classes=5),
        {f"stage2_{i}": 12 - i for i in range(12)} | dict(stem=14, stage1_0=13, classifier=0),
    ),
}


def exponents(component, paths):
    """Return {module: exponent of the layer decay} of a component."""
    paths = [f"{component}/{path}" for path in paths]
    multipliers = optim.layer_decay(0.5, [*paths, "image_head/kernel", "logit_scale"])
    assert multipliers.pop("image_head/kernel") == multipliers.pop("logit_scale") == 1.0
    assert set(multipliers) == set(paths)
    return {path.split("/")[1]: -np.log2(x) for path, x in multipliers.items()}


@pytest.mark.parametrize("name", TOWERS)
def test_layer_decay_is_a_power_of_the_distance_from_the_towers_output(name):
    tower, expected = TOWERS[name]
    params = models.abstract_tower_params(models.build_tower(tower))
    assert exponents("image", param_tree.param_paths(params)) == expected


def test_layer_decay_of_the_decoder_is_a_power_of_the_distance_from_its_output():
    decoder = dict(TEXT, name="transformer", context_norm=True, parallel_fraction=0.5)
    model = models.build_model(dict(image=VIT, decoder=decoder, image_size=8))
    paths = param_tree.param_paths(model.abstract_params()["decoder"])
    assert exponents("decoder", paths) == (
        dict(token_embed=3, pos_embed=3, mask_embed=3, context_norm=3, final_norm=0, vocabulary=0)
        | TWO_LAYERS
    )


def old_optimizer(tx, schedule=lambda step: 0.1):
    """Return the chain that versions without `weight_decay_scaled_by` built, without decay."""
    none = optax.identity()
    return optax.chain(none, tx, none, none, optax.scale_by_learning_rate(schedule))


def old_adafactor():
    return optax.chain(
        optax.scale_by_factored_rms(decay_rate=0.8, min_dim_size_to_factor=32),
        optax.clip_by_block_rms(1.0),
        optax.ema(0.9, debias=False, accumulator_dtype=jnp.bfloat16),
    )


def upgraded(**fields):
    """Return the config of a run that an older version saved."""
    saved = json.loads(json.dumps(dataclasses.asdict(optim_config(**fields))))
    for group, key, _ in config_history.ADDED_KEYS:
        if group == "optim":
            del saved[key]
    config_history.upgrade({"optim": saved})
    durations = {k: config.Duration(**saved[k]) for k in ("warmup", "cooldown", "timescale")}
    return config.OptimConfig(**{**saved, **durations})


def test_adafactor_of_an_older_run_is_bit_identical():
    """It clipped updates at RMS 1 and had no cap."""
    params = init_params()
    grads = [jax.tree.map(lambda x, k=k: k * jnp.sin(k * x + 1), params) for k in (1, 2, 30)]
    rules = dict(lr_multipliers=((".*", 1.0),), weight_decay_multipliers=((".*", 1.0),))
    ours = build(upgraded(name="adafactor", **rules)).tx
    results = [updates_of(tx, grads, params) for tx in (ours, old_optimizer(old_adafactor()))]
    assert jax.tree.structure(results[0]) == jax.tree.structure(results[1])
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_older_runs_retain_their_schedule_and_muons_kernels():
    assert upgraded(name="muon").args["adam_paths"] == ()
    five = config.Duration(5, None, None)
    assert upgraded(schedule="cosine", cooldown=five).cooldown == config.Duration(0, None, None)
    assert upgraded(schedule="constant", cooldown=five).cooldown == five
    assert upgraded(schedule="rsqrt").timescale == config.Duration(1, None, None)
    assert upgraded(schedule="rsqrt", warmup=five).timescale == NEVER
    assert upgraded().weight_decay_scaled_by == "learning_rate"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(name="adma"), "expected one of adamw"),
        (dict(args=dict(beta=1)), "adamw takes b1"),
        (dict(schedule="cosin"), "expected one of cosine"),
        (dict(weight_decay_scaled_by="rate"), "expected 'learning_rate' or 'schedule'"),
        (dict(lr_multipliers=(("image/.*", 1.0), ("txet/.*", 0.0))), "txet"),
    ],
)
def test_unknown_setting_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        build(optim_config(**changes))
