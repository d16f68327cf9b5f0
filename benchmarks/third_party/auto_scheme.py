"""A model whose bits auto-round's AutoScheme chose, in auto-round's environment.

python -m benchmarks.third_party.auto_scheme MODEL BITS OUT: 4 or 8 bits in groups of 64, each fused
module alike, rounded to nearest, written with plain weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from auto_round import AutoRound, AutoScheme  # type: ignore[import-not-found]
from auto_round.schemes import QuantizationScheme  # type: ignore[import-not-found]
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.third_party.calibration import calibration_windows


def main() -> None:
    """Choose, round and write."""
    model, bits, out = sys.argv[1], float(sys.argv[2]), sys.argv[3]
    tokenizer = AutoTokenizer.from_pretrained(model)
    windows = calibration_windows(tokenizer, 16, 512)
    options = [
        QuantizationScheme(bits=number, group_size=64, sym=sym, data_type="int", act_bits=16)
        for number, sym in ((4, False), (8, True))
    ]
    shared = [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]
    # a dataset goes by its name alone, by which scores are kept for other bits
    text = Path(out).with_name("auto-scheme.json")
    text.write_text(json.dumps([tokenizer.decode(window) for window in windows]), encoding="utf-8")
    rounding = AutoRound(
        AutoModelForCausalLM.from_pretrained(model, dtype="auto"),
        tokenizer,
        scheme=AutoScheme(avg_bits=bits, options=options, shared_layers=shared),
        iters=0,
        dataset=str(text),
        seqlen=256,
        nsamples=len(windows),
        batch_size=4,
        device_map="cpu",
        enable_torch_compile=False,
    )
    rounding.quantize_and_save(f"{out}.work", format="fake")
    # it names a folder inside after the scheme of most layers
    (made,) = Path(f"{out}.work").glob("**/config.json")
    made.parent.rename(out)


if __name__ == "__main__":
    main()
