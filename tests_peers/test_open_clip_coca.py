"""CoCa's features, logits, losses and gradients equal those of the installed open_clip 3.3.0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from open_clip.coca_model import CoCa
from open_clip.loss import CoCaLoss

from imgtune_jax import interop, models, objectives
from imgtune_jax.interop import open_clip_map, weight_map
from imgtune_jax.types import Batch

# The sums of a few layers in float32, in another order.
TOLERANCE = dict(rtol=1e-4, atol=1e-5)
VOCAB, LENGTH, PAD = 40, 7, 0
VISION = dict(layers=2, width=16, head_width=8, patch_size=4, image_size=8, output_tokens=True)
VISION |= dict(attentional_pool=True, attn_pooler_queries=5, attn_pooler_heads=2)
TEXT = dict(context_length=LENGTH, vocab_size=VOCAB, width=12, heads=3, layers=2, embed_cls=True)
TEXT |= dict(output_tokens=True)
DECODER = dict(context_length=LENGTH, vocab_size=VOCAB, width=12, heads=2, layers=2)
CASES = {
    "default": {},
    "corrected class mask": {},
    "wide, quick_gelu": dict(
        embed_dim=24,
        quick_gelu=True,
        vision_cfg=dict(layers=3, width=24, patch_size=2, attn_pooler_queries=9, no_ln_pre=True),
        text_cfg=dict(width=24, heads=4, layers=3),
        multimodal_cfg=dict(width=24, layers=3, heads=4),
    ),
    "cascade": dict(
        embed_dim=16,
        vision_cfg=dict(attentional_pool="cascade"),
        text_cfg=dict(width=16, heads=4),
        multimodal_cfg=dict(width=16),
    ),
    "parallel": dict(
        embed_dim=16,
        vision_cfg=dict(attentional_pool="parallel"),
        text_cfg=dict(width=16, heads=4),
        multimodal_cfg=dict(width=16),
    ),
}


def open_clip_config(name):
    """Return the base config with the changes of a case."""
    base = dict(embed_dim=12, vision_cfg=VISION, text_cfg=TEXT, multimodal_cfg=DECODER)
    changes = {
        key: {**base[key], **value} if isinstance(value, dict) else value
        for key, value in CASES[name].items()
    }
    return base | changes


@pytest.fixture(scope="module", params=CASES)
def pair(request):
    """Return (open_clip's model with random parameters, ours, its parameters converted)."""
    cfg = open_clip_config(request.param)
    theirs = CoCa(**cfg).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if not key.startswith("logit"):
                noise = rng.normal(0, 0.2, tuple(parameter.shape)).astype(np.float32)
                is_norm_scale = key.endswith("weight") and ".ln_" in key
                parameter.copy_(torch.from_numpy(noise + is_norm_scale))
    our_config = interop.config_from_open_clip(cfg)
    if request.param == "corrected class mask":  # open_clip's config has no key for this mask
        theirs.text.correct_cls_mask = True
        our_config["text"]["shifted_class_mask"] = False
    model = models.build_model(our_config)
    state = {name: x.detach().numpy() for name, x in theirs.state_dict().items()}
    return theirs, model, interop.load_open_clip(state, model)


def inputs(seed=0, n=4):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (n, 8, 8, 3)).astype(np.uint8)
    length = np.array([LENGTH, 3, 5, 4])[:n]
    mask = np.arange(LENGTH) < length[:, None]
    return image, np.where(mask, rng.integers(1, VOCAB, (n, LENGTH)), PAD), mask


def run_theirs(theirs, model, image, text):
    pixels = (image - np.array(model.image_mean)) / np.array(model.image_std)
    pixels = torch.from_numpy(pixels.astype(np.float32).transpose(0, 3, 1, 2))
    out = theirs(pixels, torch.from_numpy(text))
    # open_clip's cascade and parallel poolers return an extra query axis of length 1.
    out["image_features"] = out["image_features"].reshape(len(image), -1)
    return out


def as_batch(image, text, mask):
    return Batch(
        example_mask=jnp.ones(len(image), bool),
        image=jnp.asarray(image),
        text=jnp.asarray(text, jnp.int32),
        text_mask=jnp.asarray(mask),
    )


def test_features_and_logits_equal_open_clip(pair):
    theirs, model, params = pair
    image, text, mask = inputs()
    with torch.no_grad():
        expected = run_theirs(theirs, model, image, text)
    actual = model.apply(params, as_batch(image, text, mask))
    np.testing.assert_allclose(actual.image_emb, expected["image_features"].numpy(), **TOLERANCE)
    np.testing.assert_allclose(actual.text_emb, expected["text_features"].numpy(), **TOLERANCE)
    np.testing.assert_allclose(actual.logit_scale, expected["logit_scale"].numpy(), rtol=1e-6)
    tokens = model.image_tokens(params, jnp.asarray(image))
    logits = model.caption_logits(params, tokens, jnp.asarray(text), jnp.asarray(mask))[:, :-1]
    valid = mask[:, :-1]  # no loss includes the logits at padding
    np.testing.assert_allclose(
        np.asarray(logits)[valid], expected["logits"].numpy()[valid], **TOLERANCE
    )


@pytest.mark.parametrize("weights", [dict(captioning=2.0), dict(softmax=1.0, captioning=2.0)])
def test_losses_and_all_their_gradients_equal_open_clip(pair, weights):
    theirs, model, params = pair
    image, text, mask = inputs(seed=1)
    theirs.zero_grad()
    out = run_theirs(theirs, model, image, text)
    loss = CoCaLoss(weights["captioning"], weights.get("softmax", 0.0), pad_id=PAD)
    arguments = ("image_features", "text_features", "logits", "labels", "logit_scale")
    clip_loss, caption_loss = loss(*(out[k] for k in arguments))
    (clip_loss + caption_loss).backward()

    objective = objectives.build_objective({k: dict(weight=w) for k, w in weights.items()})
    batch = as_batch(image, text, mask)
    (total, metrics), grads = jax.value_and_grad(
        lambda p: objective(model.apply(p, batch), batch), has_aux=True
    )(params)
    np.testing.assert_allclose(total, (clip_loss + caption_loss).detach(), rtol=1e-5)
    total, count = metrics["captioning"]
    np.testing.assert_allclose(2.0 * total / count, caption_loss.detach(), rtol=1e-5)
    torch_grads = {
        name: np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy()
        for name, p in theirs.named_parameters()
    }
    rules = open_clip_map.open_clip_rules(model)
    expected = weight_map.to_params(
        open_clip_map.plain_names(torch_grads), rules, model.abstract_params(), what="the gradients"
    )
    actual = weight_map.flatten(grads)
    for path, gradient in weight_map.flatten(expected).items():
        if path in ("image/pos_embed", "image/class_token"):
            # The conversion adds the class token's position embedding to the class token. This sum
            # is right for parameters, but not for gradients.
            continue
        np.testing.assert_allclose(actual[path], gradient, **TOLERANCE, err_msg=path)


def test_exported_weights_have_the_same_outputs_in_open_clip(pair):
    theirs, model, params = pair
    if not model.text.shifted_class_mask:
        with pytest.raises(ValueError, match="shifted_class_mask=True"):
            interop.config_to_open_clip(model)
        return
    exported = CoCa(**interop.config_to_open_clip(model)).eval()
    state = interop.save_open_clip(params, model)
    exported.load_state_dict({k: torch.from_numpy(x.copy()) for k, x in state.items()})
    image, text, _ = inputs(seed=2)
    with torch.no_grad():
        expected, actual = (run_theirs(m, model, image, text) for m in (theirs, exported))
    for key in ("image_features", "text_features", "logits"):
        np.testing.assert_allclose(actual[key], expected[key], rtol=1e-5, atol=1e-6, err_msg=key)
