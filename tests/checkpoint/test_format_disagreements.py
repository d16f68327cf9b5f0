"""Where config.json and a layer's tensors say different things of how it is stored."""

from __future__ import annotations

from typing import Any

import pytest

from mixedprec_plugin.errors import CheckpointError
from tests.checkpoint.peers import quantization_config
from tests.checkpoint.test_formats import NAME, K, detect, stored_layer


class TestAgainstTheConfig:
    @pytest.mark.parametrize(
        ("folder", "changes", "text"),
        [
            ("autoawq-g64", {"group_size": 128},
             "is stored with group_size 64, config.json says 128"),
            ("autoawq-g64", {"quant_method": "gptq"},
             "is stored as awq 4-bit group 64, config.json says gptq"),
            ("gptqmodel-gptq-g64", {"bits": 8}, "is stored with bits 4, config.json says 8"),
            ("gptqmodel-gptq-g64", {"dynamic": {r"-:.*k_proj": {}}},
             "is stored as gptq 4-bit group 64, config.json leaves it unquantized"),
            ("gptqmodel-gptq-g64", {"dynamic": {r"+:.*k_proj": {"group_size": 32}}},
             "is stored with group_size 64, config.json says 32"),
            ("autoround-native-g64", {"packing_format": "auto_round:auto_awq"},
             "is stored as gptq 4-bit packed as auto_round:auto_awq, config.json says auto_round:"),
            ("autoround-native-g64", {"extra_config": {NAME: {"bits": 16}}},
             "config.json leaves it unquantized"),
            ("autoround-sym-awqpack-g64", {"block_name_to_quantize": "model.language.layers"},
             "config.json leaves it unquantized"),
            ("gptqmodel-fp8-row", {"weight_scale_method": "tensor"},
             "is stored with strategy channel, config.json says tensor"),
            ("llmcompressor-w8a8-int8", {"ignore": ["lm_head", NAME]},
             "is stored as int8 per channel (int-quantized), config.json leaves it unquantized"),
            ("llmcompressor-w8a8-int8", {"ignore": ["re:.*k_proj"]}, "leaves it unquantized"),
            ("bf16", quantization_config("autoawq-g64"),
             "is stored as bfloat16, config.json says awq"),
            ("bf16", quantization_config("llmcompressor-fp8-block"),
             "is stored as bfloat16, config.json says float-quantized"),
        ],
    )  # fmt: skip
    def test_contradiction_is_told(self, folder: str, changes: dict[str, Any], text: str) -> None:
        config = {**quantization_config(folder), **changes}
        (found,) = detect(stored_layer(folder), config).disagreements
        assert text in found

    def test_compressed_group_size_symmetry_and_strategy_are_compared(self) -> None:
        folder = "llmcompressor-w4a16-asym-g64"
        config = quantization_config(folder)
        weights = config["config_groups"]["group_0"]["weights"]
        weights |= {"group_size": 128, "symmetric": True}
        assert detect(stored_layer(folder), config).disagreements == (
            "is stored with group_size 64, config.json says 128",
            "is stored with symmetric False, config.json says True",
        )

    def test_what_config_json_says_of_another_encoding_describes_no_layer(self) -> None:
        config = quantization_config("llmcompressor-w4a16-g64")
        assert detect(stored_layer("llmcompressor-w8a8-int8"), config).disagreements == (
            "is stored as int8 per channel, config.json says pack-quantized",
        )

    def test_layer_on_an_ignore_list_agrees_with_its_floats(self) -> None:
        config = {**quantization_config("autoawq-g64"), "modules_to_not_convert": ["self_attn"]}
        assert detect(stored_layer("bf16"), config).disagreements == ()

    def test_entry_that_tools_read_differently_is_held_against_nothing(self) -> None:
        config = {**quantization_config("autoawq-g64"), "modules_to_not_convert": ["k_pro"]}
        assert detect(stored_layer("bf16"), config).disagreements == ()
        assert detect(stored_layer("autoawq-g64"), config).disagreements == ()

    @pytest.mark.parametrize(
        "name", ["lm_head", "model.embed_tokens", "model.layers.0.mlp.gate", "model.mm_projector"]
    )
    def test_layers_that_tools_pass_over_are_promised_nothing(self, name: str) -> None:
        config = quantization_config("autoawq-g64")
        assert detect(stored_layer("bf16"), config, name).disagreements == ()

    def test_no_config_promises_nothing(self) -> None:
        assert detect(stored_layer("gptqmodel-gptq-g64"), {}).disagreements == ()

    def test_group_that_names_a_layer_goes_before_its_class(self) -> None:
        config = quantization_config("llmcompressor-fp8-dynamic")
        other = quantization_config("llmcompressor-w8a8-int8")["config_groups"]["group_0"]
        config["config_groups"]["group_1"] = {**other, "targets": ["re:.*k_proj$"]}
        assert detect(stored_layer("llmcompressor-w8a8-int8"), config).disagreements == ()

    def test_groups_are_asked_by_name_then_pattern_then_class(self) -> None:
        # compressed-tensors' `match_targets`: exact names, patterns by the alphabet, classes
        config = quantization_config("llmcompressor-w4a16-g64")
        own = config["config_groups"]["group_0"]
        orders = [
            (["Linear"], 8), (["re:.*proj$"], 8), (["re:.*k_proj$"], 8), ([NAME], 4)
        ]  # fmt: skip
        for targets in (orders, orders[::-1], orders[1:] + orders[:1]):
            config["config_groups"] = {
                f"group_{number}": {
                    **own, "targets": names, "weights": {**own["weights"], "num_bits": bits}
                }
                for number, (names, bits) in enumerate(targets)
            }  # fmt: skip
            found = detect(stored_layer("llmcompressor-w4a16-g64"), config)
            assert (found.description, found.K) == ("pack-quantized 4-bit group 64", K)

    def test_container_on_a_compressed_ignore_list_says_nothing_of_its_layers(self) -> None:
        # SGLang's compressed_tensors/utils.py:91
        config = quantization_config("llmcompressor-w4a16-g64")
        for ignored in ("model.layers.0", "model.layers.0.self_attn", "self_attn"):
            config["ignore"] = ["lm_head", ignored]
            found = detect(stored_layer("llmcompressor-w4a16-g64"), config)
            assert (found.description, found.disagreements) == ("pack-quantized 4-bit group 64", ())
        config["ignore"] = ["self_attn.k_proj"]
        found = detect(stored_layer("llmcompressor-w4a16-g64"), config)
        assert found.description == "pack-quantized 4-bit group 64"
        assert found.disagreements == (
            "is stored as pack-quantized 4-bit group 64, config.json leaves it unquantized",
        )

    @pytest.mark.parametrize(
        "entry", ["model.layers.*.self_attn.k_proj*", "model.layers.0.*", "*k_proj", "re:.*k_proj"]
    )
    def test_globs_of_an_ignore_list_leave_layers_out(self, entry: str) -> None:
        config = {"quant_method": "fp8", "exclude_modules": [entry]}
        assert detect(stored_layer("bf16"), config).disagreements == ()
        other = {"quant_method": "fp8", "exclude_modules": [entry.replace("k_", "q_")]}
        if "k_" in entry:
            assert detect(stored_layer("bf16"), other).disagreements

    def test_fused_module_on_an_ignore_list_leaves_its_shards_out(self) -> None:
        config = quantization_config("llmcompressor-fp8-dynamic")
        config["ignore"] = ["model.layers.0.self_attn.qkv_proj"]
        assert detect(stored_layer("bf16"), config).disagreements == ()

    def test_broken_pattern_is_an_error(self) -> None:
        config = {**quantization_config("llmcompressor-w8a8-int8"), "ignore": ["re:("]}
        with pytest.raises(CheckpointError, match=r"quantization_config: '\(' is not a regular"):
            detect(stored_layer("llmcompressor-w8a8-int8"), config)
