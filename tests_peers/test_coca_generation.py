"""Generation by open_clip 3.3.0's CoCa, live: the golden of the greedy one is what it gives.

open_clip's `generate` asks for a BeamSearchScorer, which Transformers 5 lacks, and without it for
nothing else either. The greedy one never touches it, so its other needs are handed to it here. Beam
search is in the golden alone, which a script makes with an older Transformers.
"""

from pathlib import Path

import numpy as np
import pytest
import transformers
from open_clip import coca_model

from tests.golden import decoding_open_clip as script

NEEDS = (
    *("LogitsProcessorList", "MinLengthLogitsProcessor", "RepetitionPenaltyLogitsProcessor"),
    *("MaxLengthCriteria", "StoppingCriteriaList"),
)


@pytest.mark.parametrize("name", ["small", "wide"])
def test_the_golden_is_what_open_clip_writes(name, monkeypatch):
    for need in NEEDS:
        monkeypatch.setattr(coca_model, need, getattr(transformers, need), raising=False)
    warper = {"top_k": transformers.TopKLogitsWarper}
    monkeypatch.setattr(coca_model, "GENERATION_TYPES", coca_model.GENERATION_TYPES | warper)
    monkeypatch.setattr(coca_model, "_has_transformers", True)
    golden = np.load(Path(script.__file__).with_suffix(".npz"))
    np.testing.assert_array_equal(script.greedy(script.build(name)), golden[f"{name}/greedy"])
