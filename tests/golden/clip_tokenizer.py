"""Write the token ids and the canonicalized texts that open_clip 3.3.0 returns for hard texts.

    pip download open-clip-torch==3.3.0 --no-deps && unzip open_clip_torch-3.3.0-*.whl
    python tests/golden/clip_tokenizer.py open_clip/tokenizer.py

Of open_clip, only tokenizer.py is loaded. If torch is not installed, NumPy replaces it.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np

TEXTS = [
    "a photo of a cat",
    "It's  CLIP's DON'T we'LL 'Re",
    "&amp;lt;b&gt; café naïve ‘quotes’ 123 4567",
    "schÃ¶n mojibake",
    "日本語のテスト 🦊🦊 👨‍👩‍👧 keycap: 5️⃣",
    "!!!???...--- a_b (c) [d] {e}",
    "",
    "   \t\n ",
    "word " * 100,
    "antidisestablishmentarianism " * 20,
    "مرحبا بالعالم हिन्दी नमस्ते",
    "<end_of_text> inside <START_OF_TEXT>",
    "x\u00a0y\u3000z \u212a \u0130stanbul ß ﬁ",
    "½ ² Ⅷ ١٢٣ 1,000.50",
    "Résumé\u0301 e\u0301 \u200b zero\u200dwidth",
]


def load_module(path):
    """Load the module at a path."""
    if importlib.util.find_spec("torch") is None:
        torch_stub = types.ModuleType("torch")
        torch_stub.zeros = lambda *shape, dtype: np.zeros(shape, np.int64)
        torch_stub.tensor, torch_stub.long = np.array, None
        torch_stub.LongTensor = torch_stub.Tensor = np.ndarray
        sys.modules["torch"] = torch_stub
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main():
    """Write clip_tokenizer.json next to this file."""
    module = load_module(sys.argv[1])
    golden = [
        {
            "text": text,
            "ids": np.asarray(module.tokenize([text]))[0].tolist(),
            "ids_8": np.asarray(module.tokenize([text], context_length=8))[0].tolist(),
            "canonical": module.canonicalize_text(text),
        }
        for text in TEXTS
    ]
    out = Path(__file__).with_suffix(".json")
    out.write_text(json.dumps(golden, ensure_ascii=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
