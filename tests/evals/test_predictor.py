"""The predictor encodes texts as training does."""

import jax
import numpy as np
import pytest

from imgtune_jax import data, models
from imgtune_jax.config import MeshConfig
from imgtune_jax.evals.predictor import ModelPredictor
from imgtune_jax.partition import Partitioner, make_mesh

SIZES = dict(width=16, depth=1, mlp_dim=24, num_heads=2)
PREFIX, TEXTS = "<de>", ["a red fox", "a wolf", "a red fox"]


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    tokenizer = data.train_tokenizer(
        TEXTS, tmp_path_factory.mktemp("tokenizer"), vocab_size=300, length=12, prompts=[PREFIX]
    )
    text = dict(name="text_transformer", vocab_size=300, max_length=12, pool="class", **SIZES)
    model = models.build_model(
        dict(
            image=dict(name="vit", patch_size=4, **SIZES),
            text=text,
            decoder=dict(
                name="transformer", vocab_size=300, max_length=12, input_from="text_tower",
                cross="block", **SIZES,
            ),
            image_size=8,
            embed_dim=8,
        )
    )  # fmt: skip
    return ModelPredictor.build(
        model,
        model.init(jax.random.key(0)),
        preprocess=data.build_transform([dict(name="resize", size=8)]),
        tokenizer=tokenizer,
        partitioner=Partitioner(make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1))),
        image_side_is_frozen=False,
        use_memo=False,
    )


def test_texts_after_a_prefix_are_embedded_with_the_ids_of_training(predictor):
    ids, mask, _ = predictor.tokenizer.encode_with_prefix([PREFIX] * 3, TEXTS)
    want = predictor.model.encode_text(predictor.params, ids, mask)
    np.testing.assert_allclose(predictor.embed_texts(TEXTS, PREFIX), want, rtol=1e-5, atol=1e-6)
    as_one_text = predictor.embed_texts([PREFIX + text for text in TEXTS])
    assert np.abs(as_one_text - want).max() > 1e-3  # in a text, the prefix is plain text
