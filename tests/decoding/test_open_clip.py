"""What open_clip's CoCa writes, replayed from a golden (tests/golden/decoding_open_clip.py).

Its beam search is compared with its two faults mended; that script names them.
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
THEIRS = json.loads(str(GOLDEN["settings"]))


def generated(name, **settings):
    """Our tokens [b l] of the golden's images, and their mask."""
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
        GenerationConfig(**settings, pad_id=THEIRS["pad"]),
        max_positions=model.decoder.max_length,
    )
    prompts = pad_prompts([[THEIRS["begin"]]] * len(tokens))
    out = generator(params, tokens, *prompts)
    return np.asarray(out.tokens[:, 0]), np.asarray(out.mask[:, 0])


@pytest.mark.parametrize("name", CASES)
def test_greedy_equals_theirs_token_for_token(name):
    """They end at the pad token too, and put the end token at the longest, whatever is likely."""
    want = GOLDEN[f"{name}/greedy"][:, 1:]
    chosen = want.shape[1] - (THEIRS["longest"] - 1 == want.shape[1])
    stop = (THEIRS["end"], THEIRS["pad"])
    got, mask = generated(name, method=Greedy(), max_new_tokens=chosen, stop_ids=stop)
    np.testing.assert_array_equal(got, want[:, :chosen])
    assert len(set(mask.sum(1).tolist())) > 2


@pytest.mark.parametrize("name", CASES)
def test_beam_search_equals_theirs_token_for_token(name):
    """They count the begin token into the lengths."""
    want = GOLDEN[f"{name}/beam"][:, 1:]
    got, mask = generated(
        name,
        method=BeamSearch(width=THEIRS["beams"]),
        max_new_tokens=THEIRS["longest"] - 1,
        min_new_tokens=THEIRS["shortest"] - 1,
        stop_ids=(THEIRS["end"],),
    )
    np.testing.assert_array_equal(got[:, : want.shape[1]], want)
    assert not mask[:, want.shape[1] :].any()
    assert len(set(mask.sum(1).tolist())) > 1
