"""Greedy generation by the installed open_clip 3.3.0's CoCa equals the golden file.

Transformers 5 has no BeamSearchScorer. Without this class, open_clip imports none of the classes
that `generate` needs. Greedy generation needs only the others, so this test sets them. Beam search
cannot run here. The golden file has its outputs, made with an older version of Transformers.
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
def test_golden_file_equals_installed_open_clip(name, monkeypatch):
    for cls in TRANSFORMERS_CLASSES:
        monkeypatch.setattr(coca_model, cls, getattr(transformers, cls), raising=False)
    warper = {"top_k": transformers.TopKLogitsWarper}
    monkeypatch.setattr(coca_model, "GENERATION_TYPES", coca_model.GENERATION_TYPES | warper)
    monkeypatch.setattr(coca_model, "_has_transformers", True)
    golden = np.load(Path(script.__file__).with_suffix(".npz"))
    np.testing.assert_array_equal(script.greedy(script.build(name)), golden[f"{name}/greedy"])
