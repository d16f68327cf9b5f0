"""The specs beside the installed SGLang: constructors, parameters, and its own refusals."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixedprec_plugin.errors import MethodError
from mixedprec_plugin.methods import awq, gptq
from mixedprec_plugin.methods.construct import build_config, check_signature, load_class
from mixedprec_plugin.methods.interface import LayerShape, Target
from mixedprec_plugin.methods.registry import METHODS, bind
from mixedprec_plugin.methods.shapes import (
    block_faults,
    inputs_per_rank,
    marlin_faults,
    outputs_per_rank,
    split_faults,
)
from tests.methods.shapes import SCHEMES, grid

pytestmark = pytest.mark.sglang


@pytest.fixture(scope="module", autouse=True)
def sglang() -> None:
    """SGLang's quantization, imported with the warnings that it gives where there is no GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sglang.srt.layers.quantization  # noqa: F401


QUANTIZED = [scheme for scheme in SCHEMES if scheme[0] != "unquantized"]
KEYS = [(name, given, key) for name, given in QUANTIZED for key in ("cuda", "cpu")]
DTYPES = {"F16": torch.float16, "F32": torch.float32, "I32": torch.int32, "I8": torch.int8}
DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8}


@pytest.mark.parametrize(("name", "given", "key"), KEYS)
def test_builder_fits_the_installed_constructor(name: str, given: dict[str, Any], key: str) -> None:
    method, arguments = bind(name, given)
    spec = METHODS[method]
    check_signature(load_class(spec, key), spec.config_arguments(arguments, key), method)


@pytest.mark.parametrize(("name", "given"), QUANTIZED)
def test_config_constructs_on_the_cpu(name: str, given: dict[str, Any]) -> None:
    method, arguments = bind(name, given)
    config = build_config(method, arguments, "cpu")
    names = {"gptq": "gptq_marlin", "int8_channel": "w8a8_int8", "nvfp4": "modelopt_fp4"}
    assert config.get_name() == names.get(method, method)


def test_constructed_configs_say_what_was_asked() -> None:
    fp8 = build_config(*bind("fp8_block", {}), "cuda")
    assert (fp8.is_checkpoint_fp8_serialized, fp8.weight_block_size) == (True, [128, 128])
    int8 = build_config(*bind("int8", {}), "cuda")
    assert (int8.is_checkpoint_int8_serialized, int8.weight_block_size) == (True, [128, 128])
    marlin = build_config(*bind("gptq_int8", {"group_size": 64, "desc_act": True}), "cuda")
    assert (marlin.weight_bits, marlin.group_size, marlin.desc_act) == (8, 64, True)
    plain = build_config(*bind("awq", {"group_size": 32}), "cuda", capability=75)
    assert (type(plain).__name__, plain.weight_bits, plain.group_size) == ("AWQConfig", 4, 32)


def test_build_config_leaves_the_arguments_alone() -> None:
    method, arguments = bind("fp8_block", {})
    build_config(method, arguments, "cpu")
    assert (method, arguments) == bind("fp8_block", {})


@pytest.mark.skipif(torch.cuda.is_available(), reason="Marlin is there")
def test_marlin_for_awq_is_refused_without_a_gpu() -> None:
    with pytest.raises(MethodError, match=r"awq: AWQMarlinConfig of SGLang .* refuses it: Marlin"):
        build_config(*bind("awq", {}), "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_marlin_for_awq_constructs_on_a_gpu() -> None:
    config = build_config(*bind("awq", {"group_size": 64}), "cuda", capability=80)
    assert (config.get_name(), config.group_size) == ("awq_marlin", 64)


def test_capabilities_are_the_classes_own() -> None:
    for name in ("fp8", "fp8_channel", "blockwise_int8", "int8_channel", "gptq", "humming",
                 "nvfp4", "mxfp4"):  # fmt: skip
        config = build_config(*bind(name, {}), "cuda")
        assert config.get_min_capability() == METHODS[name].min_capability
    spec = METHODS["awq"]
    assert load_class(spec, "cuda").get_min_capability() == spec.fallback_below
    assert load_class(spec, "cuda_fallback").get_min_capability() == spec.min_capability


def public(config: object) -> dict[str, Any]:
    return {key: value for key, value in vars(config).items() if key != "packed_modules_mapping"}


@pytest.mark.parametrize("name", ["gptq", "gptq_int8"])
def test_full_config_reads_back_as_the_same_gptq_config(name: str) -> None:
    config = build_config(*bind(name, {"group_size": 64, "desc_act": True}), "cuda")
    assert public(type(config).from_config(config.full_config)) == public(config)


def test_full_config_of_awq_serves_the_fallbacks_of_awq_marlin() -> None:
    from sglang.srt.layers.quantization.moe_wna16 import MoeWNA16Config

    arguments = bind("awq", {"group_size": 64})[1]
    full_config = METHODS["awq"].config_arguments(arguments, "cuda")["full_config"]
    plain = build_config("awq", arguments, "cuda_fallback")
    assert public(type(plain).from_config(full_config)) == public(plain)
    method = MoeWNA16Config.get_from_keys(full_config, ["quant_method"])
    assert (method, full_config["bits"], full_config["zero_point"]) == ("awq", 4, True)


def test_marlin_rules_are_sglangs() -> None:
    from sglang.srt.layers.quantization.marlin_utils import check_marlin_supports_shape

    refused = 0
    for shape, group_size in itertools.product(whole(grid()), (32, 64, 128, -1)):
        supported, _ = check_marlin_supports_shape(
            sum(outputs_per_rank(shape)), inputs_per_rank(shape), shape.K, group_size
        )
        assert supported == (not marlin_faults(group_size, shape)), (shape, group_size)
        refused += not supported
    assert refused


def test_group_sizes_in_the_schemas_are_marlins() -> None:
    from sglang.srt.layers.quantization.marlin_utils import MARLIN_SUPPORTED_GROUP_SIZES

    assert sorted(MARLIN_SUPPORTED_GROUP_SIZES) == [-1, 32, 64, 128]


def whole(shapes: list[LayerShape]) -> Iterator[LayerShape]:
    """The shapes that their ranks divide; SGLang's checks come after its own division."""
    return (shape for shape in shapes if not split_faults(shape))


def create_weights(
    method: Any, shape: LayerShape, scheme: Any = None, params_dtype: Any = torch.float16
) -> torch.nn.Module:
    """What SGLang's linear layer asks of its method, on one of the shape's ranks."""
    layer = torch.nn.Module()
    layer.tp_group = SimpleNamespace(world_size=shape.tp_size)
    layer.scheme = scheme
    N, K = sum(shape.shard_sizes), shape.K
    with torch.device("meta"):
        method.create_weights(
            layer=layer,
            input_size_per_partition=inputs_per_rank(shape),
            output_partition_sizes=list(outputs_per_rank(shape)),
            input_size=K,
            output_size=N,
            params_dtype=params_dtype,
            weight_loader=lambda *_: None,
        )
    return layer


def refuses(method: Any, shape: LayerShape, scheme: Any = None) -> bool:
    """Whether SGLang will not make the layer's parameters."""
    try:
        create_weights(method, shape, scheme)
    except (ValueError, RuntimeError):
        return True
    return False


def linear_method(name: str, given: dict[str, Any], key: str = "cpu") -> tuple[Any, Any]:
    """SGLang's linear method and scheme of a config, as far as they can be made without a GPU."""
    from sglang.srt.layers.quantization.awq import AWQConfig
    from sglang.srt.layers.quantization.awq.awq import AWQLinearMethod
    from sglang.srt.layers.quantization.awq.schemes import AWQLinearScheme
    from sglang.srt.layers.quantization.blockwise_int8 import BlockInt8LinearMethod
    from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod
    from sglang.srt.layers.quantization.gptq.gptq import GPTQLinearMethod
    from sglang.srt.layers.quantization.humming import HummingLinearMethod
    from sglang.srt.layers.quantization.modelopt_quant import ModelOptNvFp4A16LinearMethod
    from sglang.srt.layers.quantization.w8a8_fp8 import W8A8Fp8LinearMethod
    from sglang.srt.layers.quantization.w8a8_int8 import W8A8Int8LinearMethod

    config = build_config(*bind(name, given), key)
    if name == "fp8_channel":
        return W8A8Fp8LinearMethod(config), None
    if name == "int8_channel":
        return W8A8Int8LinearMethod(config), None
    if name.startswith("humming"):
        return HummingLinearMethod(config.get_quant_config_for_layer("layer", "linear")), None
    if name == "nvfp4":
        # of SGLang's parameters all but "input_scale", which it makes and never reads
        return ModelOptNvFp4A16LinearMethod(config), None
    if name.startswith("fp8"):
        return Fp8LinearMethod(config), None
    if name.startswith("int8"):
        return BlockInt8LinearMethod(config), None
    if isinstance(config, AWQConfig):
        return AWQLinearMethod(config), AWQLinearScheme(config)
    return GPTQLinearMethod(config), config.get_linear_scheme(None)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        (name, given)
        for name, given in QUANTIZED
        # mxfp4 is for experts
        if name != "mxfp4" and not (name == "awq" and given["group_size"] == -1)
    ],
)
def test_stored_tensors_are_sglangs_parameters(name: str, given: dict[str, Any]) -> None:
    method, arguments = bind(name, given)
    shape = LayerShape(576, 1536, (576,), "replicated")
    layer = create_weights(*reorder(linear_method(name, given), shape))
    expected = METHODS[method].stored(arguments, shape.N, shape.K, "F16")
    parameters = dict(layer.named_parameters())
    if name == "nvfp4":
        del parameters["input_scale"]
    assert set(parameters) == set(expected)
    for suffix, tensor in expected.items():
        assert tuple(parameters[suffix].shape) == (tensor.shape or (1,)), suffix
        assert parameters[suffix].dtype == DTYPES[tensor.dtype], suffix


def reorder(made: tuple[Any, Any], shape: LayerShape) -> tuple[Any, LayerShape, Any]:
    return made[0], shape, made[1]


@pytest.mark.parametrize(
    ("name", "given"),
    [("fp8_block", {}), ("int8", {}), ("int8", {"weight_block_size": [64, 64]})],
)
def test_block_rules_are_sglangs(name: str, given: dict[str, Any]) -> None:
    arguments = bind(name, given)[1]
    block_size = arguments["weight_block_size"]
    method, scheme = linear_method(name, given)
    refused = 0
    for shape in whole(grid()):
        expected = refuses(method, shape, scheme) or activations_refuse(name, shape, block_size[1])
        assert expected == bool(block_faults(block_size, shape)), shape
        refused += expected
    assert refused


def activations_refuse(name: str, shape: LayerShape, group_size: int) -> bool:
    """Whether SGLang asserts that the activations' groups are whole, before it starts a kernel."""
    from sglang.kernels.ops.quantization.fp8_kernel import per_token_group_quant_fp8
    from sglang.kernels.ops.quantization.int8_kernel import per_token_group_quant_int8

    K = inputs_per_rank(shape)
    # Two dimensions, of which the second is no stride: what follows the first assertion must not
    # run on a machine without a GPU, and fails on its own one, contiguity.
    activation = torch.zeros(1, 1).expand(2, K)
    quantize = per_token_group_quant_fp8 if name.startswith("fp8") else per_token_group_quant_int8
    with pytest.raises(AssertionError) as caught:
        quantize(activation, group_size)
    return "cannot be divisible" in str(caught.value)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_plain_awq_rules_are_sglangs(group_size: int) -> None:
    """SGLang asks for whole words of the module; a shard needs them too, to be loaded into it."""
    arguments = bind("awq", {"group_size": group_size})[1]
    method, scheme = linear_method("awq", {"group_size": group_size}, "cuda_fallback")
    for shape in whole(grid()):
        cut_shards = any(N % 8 for N in outputs_per_rank(shape))
        expected = refuses(method, shape, scheme) or cut_shards
        assert expected == bool(awq.faults(arguments, shape, Target("cpu"))), shape
        # On CUDA a layer that Marlin takes as a whole is Marlin's, and the others plain AWQ's.
        if not awq.fits_marlin(arguments, shape):
            assert expected == bool(awq.faults(arguments, shape, Target())), shape


def test_plain_awq_cannot_make_one_group_of_a_column() -> None:
    method, scheme = linear_method("awq", {"group_size": -1}, "cuda_fallback")
    assert refuses(method, LayerShape(768, 768, (768,), "replicated"), scheme)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_gptq_refuses_the_groups_that_sglang_rounds_away(group_size: int) -> None:
    arguments = bind("gptq", {"group_size": group_size})[1]
    method, scheme = linear_method("gptq", {"group_size": group_size})
    for shape in whole(grid()):
        layer = create_weights(method, shape, scheme)
        packed, K = layer.qweight.shape[0] * 8, inputs_per_rank(shape)
        words = layer.qzeros.shape[1] * 8
        is_whole = packed == K and layer.scales.shape[0] * group_size == K
        is_whole &= words == sum(outputs_per_rank(shape))
        if not is_whole:
            assert gptq.faults(arguments, shape, Target("cpu")), shape
