"""Which `quantization_config` a class of SGLang reads on CUDA, beside the installed SGLang."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest

from mixedprec_plugin.methods.auto import CLASSES, why_no_class
from tests.checkpoint.peers import FOLDERS, quantization_config

pytestmark = pytest.mark.sglang

# they have loaders of their own, store nothing, or are for AMD and Ascend
OTHERS = {
    "bitsandbytes", "gguf", "modelslim", "moe_wna16", "mxfp_w4a8", "nvfp4_online", "petit_nvfp4",
    "quark_int4fp8_moe", "quark_mxfp4",
}  # fmt: skip
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
SAID = [
    *(quantization_config(peer) for peer in FOLDERS if peer != "bf16"),
    {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    {"quant_method": "fp8"},
    {"quant_method": "exl2"},
    {"quant_method": "fbgemm_fp8"},
    {"quant_method": "hqq"},
    GPTQ,
    GPTQ | {"quant_method": "GPTQ", "bits": 8, "group_size": -1},
    *(GPTQ | x for x in ({"bits": 3}, {"sym": False}, {"group_size": 256}, {"desc_act": None})),
    GPTQ | {"checkpoint_format": "marlin"},
    GPTQ | {"is_marlin_format": True},
    AWQ,
    {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": True},
    AWQ | {"bits": 8, "group_size": 48},
    {"quant_method": "awq", "bits": 4, "group_size": 128},
    {"quant_method": "auto-round", "bits": 4, "group_size": 128},
    {"quant_method": "quark", "global_quant_config": {}, "layer_quant_config": {}},
    {
        "quant_method": "quark", "global_quant_config": {}, "layer_quant_config": {},
        "export": {"kv_cache_group": []},
    },
    *(
        {"quant_method": name, "quant_algo": algorithm, "group_size": 16, "ignore": ["lm_head"]}
        for name in ("modelopt", "modelopt_fp8", "modelopt_fp4", "modelopt_mixed")
        for algorithm in (
            "FP8", "NVFP4", "NVFP4_AWQ", "W4A16_NVFP4", "W4A8_AWQ", "W4A8_NVFP4_FP8", "FP8_PB_WO",
            "FP8_PER_CHANNEL_PER_TOKEN", "MXFP8", "MXFP4", "MIXED_PRECISION", None,
        )
        if (name, algorithm) not in {
            ("modelopt_fp4", "FP8"),  # it reads it, and runs FP4
            ("modelopt_mixed", "MIXED_PRECISION"),
        }
    ),
    {
        "quant_method": "modelopt_mixed", "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {"lm_head": {"quant_algo": "NVFP4", "group_size": 16}},
    },
    {
        "quant_method": "modelopt_fp4",
        "quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": []},
    },
]  # fmt: skip


@pytest.fixture(scope="module")
def classes() -> dict[str, Any]:
    """SGLang's, by name, imported with the warnings that it gives where there is no GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sglang.srt.layers.quantization import QUANTIZATION_METHODS
    return dict(QUANTIZATION_METHODS)


def reads(said: dict[str, Any], classes: dict[str, Any]) -> bool:
    """Whether SGLang makes a config of it, as `ModelConfig` and `get_quantization_config` do."""
    # on CUDA only Marlin's class answers to it
    classes = {name: x for name, x in classes.items() if name != "gptq"}
    asked = "modelopt" if said["quant_method"] == "modelopt" else None
    taken = (x.override_quantization_method(said, asked) for x in classes.values())
    name = next(filter(None, taken), str(said["quant_method"]).lower())
    try:
        classes[name].from_config({**copy.deepcopy(said), "packed_modules_mapping": {}})
    except (KeyError, TypeError, ValueError):
        return False
    return True


@pytest.mark.parametrize("said", SAID, ids=str)
def test_a_config_is_refused_where_sglang_makes_none_of_it(
    said: dict[str, Any], classes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.layers.quantization import marlin_utils

    monkeypatch.setattr(marlin_utils, "get_device_capability", lambda: (9, 0))
    said = {key: value for key, value in said.items() if value is not None}
    assert (why_no_class(said) == "") == reads(said, classes), why_no_class(said)


def test_every_class_of_sglang_is_taken_or_left_out_for_a_reason(classes: dict[str, Any]) -> None:
    # registered where SGLang sees a device: MXFP4; GPTQ, which has no class on CUDA but Marlin's
    assert set(classes) | {"gptq", "mxfp4"} == set(CLASSES) | OTHERS
