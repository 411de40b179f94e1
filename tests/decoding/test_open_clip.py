"""Generation equals that of open_clip's CoCa, stored in tests/golden/decoding_open_clip.npz.

open_clip's beam search has two bugs. `tests/golden/decoding_open_clip.py`, which makes the golden
file, describes and fixes them.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from imgtune_jax import interop, models
from imgtune_jax.decoding import BeamSearch, GenerationConfig, Generator, Greedy, pad_prompts

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "decoding_open_clip.npz")
CASES = sorted({name.partition("/")[0] for name in GOLDEN.files if "/" in name})
SETTINGS = json.loads(str(GOLDEN["settings"]))


def generate(name, **settings):
    """Generate for the golden file's images; return (tokens [b l], mask)."""
    prefix = f"{name}/state/"
    state = {n.removeprefix(prefix): GOLDEN[n] for n in GOLDEN.files if n.startswith(prefix)}
    state = {n: x.astype(np.float32) for n, x in state.items()} | {"logit_scale": np.zeros(())}
    model = models.build_model(
        interop.config_from_open_clip(json.loads(str(GOLDEN[f"{name}/cfg"])))
    )
    params = interop.load_open_clip(state, model)
    tokens = model.image_tokens(params, jnp.asarray(GOLDEN["image"]))
    generator = Generator(
        model.decoder_cache,
        model.decode_step,
        GenerationConfig(**settings, pad_id=SETTINGS["pad"]),
        max_positions=model.decoder.max_length,
    )
    prompts = pad_prompts([[SETTINGS["begin"]]] * len(tokens))
    out = generator(params, tokens, *prompts)
    return np.asarray(out.tokens[:, 0]), np.asarray(out.mask[:, 0])


@pytest.mark.parametrize("name", CASES)
def test_greedy_equals_open_clip_token_for_token(name):
    """open_clip also stops at the pad token, and forces an end token at the maximum length."""
    expected = GOLDEN[f"{name}/greedy"][:, 1:]
    has_forced_end = expected.shape[1] == SETTINGS["longest"] - 1
    length = expected.shape[1] - has_forced_end
    stop = (SETTINGS["end"], SETTINGS["pad"])
    actual, mask = generate(name, method=Greedy(), max_new_tokens=length, stop_ids=stop)
    np.testing.assert_array_equal(actual, expected[:, :length])
    assert len(set(mask.sum(1).tolist())) > 2


@pytest.mark.parametrize("name", CASES)
def test_beam_search_equals_open_clip_token_for_token(name):
    """open_clip's lengths include the begin token."""
    expected = GOLDEN[f"{name}/beam"][:, 1:]
    actual, mask = generate(
        name,
        method=BeamSearch(width=SETTINGS["beams"]),
        max_new_tokens=SETTINGS["longest"] - 1,
        min_new_tokens=SETTINGS["shortest"] - 1,
        stop_ids=(SETTINGS["end"],),
    )
    np.testing.assert_array_equal(actual[:, : expected.shape[1]], expected)
    assert not mask[:, expected.shape[1] :].any()
    assert len(set(mask.sum(1).tolist())) > 1
