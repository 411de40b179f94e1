"""Greedy generation by open_clip 3.3.0's CoCa, run live, equals the golden file.

Transformers 5 has no BeamSearchScorer, and without it open_clip imports none of the classes that
`generate` needs. Greedy generation does not use BeamSearchScorer, so this test sets the others.
Beam search is only in the golden file, which a script makes with an older Transformers.
"""

from pathlib import Path

import numpy as np
import pytest
import transformers
from open_clip import coca_model

from tests.golden import decoding_open_clip as script

TRANSFORMERS_CLASSES = (
    *("LogitsProcessorList", "MinLengthLogitsProcessor", "RepetitionPenaltyLogitsProcessor"),
    *("MaxLengthCriteria", "StoppingCriteriaList"),
)


@pytest.mark.parametrize("name", ["small", "wide"])
def test_golden_file_equals_live_open_clip(name, monkeypatch):
    for cls in TRANSFORMERS_CLASSES:
        monkeypatch.setattr(coca_model, cls, getattr(transformers, cls), raising=False)
    warper = {"top_k": transformers.TopKLogitsWarper}
    monkeypatch.setattr(coca_model, "GENERATION_TYPES", coca_model.GENERATION_TYPES | warper)
    monkeypatch.setattr(coca_model, "_has_transformers", True)
    golden = np.load(Path(script.__file__).with_suffix(".npz"))
    np.testing.assert_array_equal(script.greedy(script.build(name)), golden[f"{name}/greedy"])
