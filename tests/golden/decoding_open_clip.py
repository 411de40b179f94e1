"""Make decoding_open_clip.npz: captions of random images by small random open_clip CoCa models.

    pip install -r tests_peers/requirements.txt transformers==4.55.4 "huggingface-hub<1"
    python -m tests.golden.decoding_open_clip

The file was made with open-clip-torch 3.3.0 and torch 2.13.0. open_clip's beam search needs
transformers 4: version 5 has no BeamSearchScorer. `tests_peers/test_coca_generation.py` compares
the greedy captions with those of the installed open_clip.

Greedy generation is that of open_clip (`top_k` with k = 1). open_clip's beam search has two bugs,
which are fixed here: it sums logits instead of log probabilities, and it counts the begin token in
the length that divides a sequence's score. open_clip's text tower masks generated tokens whose id
is `pad_id`. Here, no id is masked.
"""

import json
from functools import partialmethod
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from benchmarks import peers

open_clip = peers.open_clip()
coca_model, constants = open_clip.coca_model, open_clip.constants

GOLDEN = Path(__file__).with_name("decoding_open_clip.npz")
VOCAB, LENGTH, PAD, BEGIN, END = 16, 14, 0, 1, 3
NO_PAD = -1  # the id of no token
IMAGES, BEAMS, SHORTEST, LONGEST = 8, 4, 5, 12

SMALL = dict(
    embed_dim=12,
    vision_cfg=dict(
        layers=1,
        width=16,
        head_width=8,
        patch_size=4,
        image_size=8,
        output_tokens=True,
        attentional_pool=True,
        attn_pooler_queries=5,
        attn_pooler_heads=2,
    ),
    text_cfg=dict(
        context_length=LENGTH,
        vocab_size=VOCAB,
        width=12,
        heads=3,
        layers=1,
        embed_cls=True,
        output_tokens=True,
    ),
    multimodal_cfg=dict(context_length=LENGTH, vocab_size=VOCAB, width=12, heads=2, layers=2),
)
WIDE = SMALL | dict(
    embed_dim=16,
    quick_gelu=True,
    text_cfg={**SMALL["text_cfg"], "width": 16, "heads": 4},
    multimodal_cfg={**SMALL["multimodal_cfg"], "width": 16, "heads": 4, "layers": 1},
)
CASES = {"small": SMALL, "wide": WIDE}
SEEDS = {"small": 2, "wide": 39}  # chosen so that the captions have many lengths


def build(name):
    """Return a model with random parameters, large enough that captions differ and reach their end.

    The values are float16 numbers, so that the golden file is small.
    """
    cfg = CASES[name] | {"text_cfg": CASES[name]["text_cfg"] | {"pad_id": NO_PAD}}
    model = coca_model.CoCa(**cfg).eval()
    rng = np.random.default_rng(SEEDS[name])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if not key.startswith("logit"):
                noise = rng.normal(0, 0.5, tuple(parameter.shape)).astype(np.float16)
                is_norm_scale = key.endswith("weight") and ".ln_" in key
                parameter.copy_(torch.from_numpy((noise + is_norm_scale).astype(np.float16)))
    return model


def images():
    """Return random uint8 RGB images."""
    return np.random.default_rng(9).integers(0, 256, (IMAGES, 8, 8, 3), np.uint8)


def generate(model, **options):
    """Return token ids [b l], which start with the begin token."""
    pixels = (images() / 255 - constants.OPENAI_DATASET_MEAN) / constants.OPENAI_DATASET_STD
    pixels = torch.from_numpy(pixels.astype(np.float32).transpose(0, 3, 1, 2))
    common = dict(seq_len=LONGEST, pad_token_id=PAD, eos_token_id=END, sot_token_id=BEGIN)
    return model.generate(pixels, **common, **options).numpy()


def greedy(model):
    """Generate greedily. open_clip also stops at the pad token, and forces an end at LONGEST."""
    return generate(model, generation_type="top_k", top_k=1, min_seq_len=1)


def beam(model):
    """Generate by beam search with both bugs fixed; one group is standard beam search."""
    scorer, forward = coca_model.BeamSearchScorer, coca_model.CoCa.forward

    def forward_log_probs(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        return out | {"logits": out["logits"].log_softmax(-1)}

    with (
        mock.patch.object(coca_model.CoCa, "forward", forward_log_probs),
        mock.patch.object(scorer, "process", partialmethod(scorer.process, decoder_prompt_len=1)),
        mock.patch.object(scorer, "finalize", partialmethod(scorer.finalize, decoder_prompt_len=1)),
    ):
        return generate(model, num_beams=BEAMS, num_beam_groups=1, min_seq_len=SHORTEST)


def main():
    """Write the golden file."""
    settings = dict(pad=PAD, begin=BEGIN, end=END, beams=BEAMS, shortest=SHORTEST, longest=LONGEST)
    arrays = {"image": images(), "settings": np.array(json.dumps(settings))}
    for name, cfg in CASES.items():
        model = build(name)
        arrays[f"{name}/cfg"] = np.array(json.dumps(cfg))
        state = {k: x.numpy() for k, x in model.state_dict().items() if "logit" not in k}
        arrays |= {f"{name}/state/{k}": x.astype(np.float16) for k, x in state.items()}
        arrays[f"{name}/greedy"] = greedy(model)
        arrays[f"{name}/beam"] = beam(model)
    np.savez_compressed(GOLDEN, **arrays)


if __name__ == "__main__":
    main()
