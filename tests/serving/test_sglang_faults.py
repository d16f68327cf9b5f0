"""SGLang's own faults, shown on SGLang alone: a test that fails here says a workaround may go.

docs/faults.md tells what the package does about each. Line numbers are 0.5.23's.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.checkpoints import write_llama
from tests.presets import open_virtual_checkpoint, write_preset
from tests.serving.stock import gptq_marlin, parsed

pytestmark = pytest.mark.usefixtures("sglang_context")
BLOCKS = (True, "dynamic", None, [128, 128])


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "model")


def stock_llama(model_path: Path, quant_config: Any) -> Any:
    """SGLang's Llama with one of SGLang's own configs, not loaded."""
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader.loader import _initialize_model
    from sglang.srt.model_loader.utils import set_default_torch_dtype

    model_config = ModelConfig(str(model_path), dtype="bfloat16")
    with set_default_torch_dtype(torch.bfloat16), torch.device("cpu"):
        return _initialize_model(model_config, LoadConfig(), quant_config)


def channel_fp8() -> Any:
    from sglang.srt.layers.quantization.w8a8_fp8 import W8A8Fp8Config

    return W8A8Fp8Config(is_checkpoint_fp8_serialized=True)


def block_int8() -> Any:
    from sglang.srt.layers.quantization.blockwise_int8 import BlockInt8Config

    return BlockInt8Config(*BLOCKS)


def layer(kind: str, config: Any, *sizes: int) -> Any:
    """One of SGLang's linear layers; sizes are K and N, or what the kind takes instead."""
    from sglang.srt.layers import linear

    K, *outputs = sizes
    options = {"bias": False, "params_dtype": torch.bfloat16, "quant_config": config, "prefix": "x"}
    if kind == "merged":
        return linear.MergedColumnParallelLinear(K, outputs, **options)
    return getattr(linear, kind)(K, *outputs, **options)


def test_llama_loses_block_scales(model_path: Path, tmp_path: Path) -> None:
    """models/llama.py:723 renames weight_scale_inv; the parameter keeps its own name."""
    model = stock_llama(model_path, block_int8())
    preset = write_preset(tmp_path, 'match: "*", method: int8')
    model.load_weights(iter(open_virtual_checkpoint(model_path, preset)))
    scales = {n: p for n, p in model.named_parameters() if n.endswith("weight_scale_inv")}
    assert len(scales) == 3 * 4
    initial = torch.finfo(torch.float32).min
    assert all(bool((scale == initial).all()) for scale in scales.values())


def test_llama_drops_tensors_that_it_does_not_know(model_path: Path) -> None:
    """models/llama.py:779 warns."""
    model = stock_llama(model_path, None)
    model.load_weights([("model.layers.0.self_attn.sinks", torch.ones(4))])


def test_llama_is_content_with_no_tensors_at_all(model_path: Path) -> None:
    stock_llama(model_path, None).load_weights([])


def test_llama_casts_floats_into_codes(model_path: Path) -> None:
    """layers/parameter.py:191; what update_weights_from_tensor hands over ends here."""
    model = stock_llama(model_path, block_int8())
    weight = torch.full((512, 256), 0.7, dtype=torch.bfloat16)
    model.load_weights([("model.layers.0.mlp.gate_proj.weight", weight)])
    assert bool((model.model.layers[0].mlp.gate_up_proj.weight[:512] == 0).all())


@pytest.mark.parametrize(
    ("kind", "sizes", "shard", "shape"),
    [
        ("ColumnParallelLinear", (256, 128), (), (200, 256)),
        ("merged", (256, 128, 128), (0,), (200, 256)),
        ("RowParallelLinear", (256, 128), (), (128, 300)),
        ("QKVParallelLinear", (256, 128, 2, 1), ("k",), (200, 256)),
    ],
)
def test_loader_cuts_what_is_too_long(
    kind: str, sizes: tuple[int, ...], shard: tuple[Any, ...], shape: tuple[int, int]
) -> None:
    """layers/parameter.py:171, 220, 262, 329: `narrow` without a look at the whole."""
    weight = layer(kind, block_int8(), *sizes).weight
    weight.weight_loader(weight, torch.ones(shape, dtype=torch.int8), *shard)


@pytest.mark.parametrize(
    ("kind", "sizes", "shard", "shape"),
    [
        ("merged", (256, 128, 128), (0,), (100, 256)),
        ("RowParallelLinear", (256, 128), (), (128, 200)),
    ],
)
def test_loader_pads_what_is_too_short(
    kind: str, sizes: tuple[int, ...], shard: tuple[Any, ...], shape: tuple[int, int]
) -> None:
    """layers/parameter.py:215, 325: zeros where the checkpoint has nothing."""
    weight = layer(kind, block_int8(), *sizes).weight
    weight.data.fill_(7)
    weight.weight_loader(weight, torch.ones(shape, dtype=torch.int8), *shard)
    assert int((weight[:128] == 0).sum()) == 128 * 256 - shape[0] * shape[1]


@pytest.mark.parametrize(("kind", "sizes", "shard"), [
    ("merged", (256, 128, 128), (0,)),
    ("RowParallelLinear", (256, 128), ()),
])  # fmt: skip
def test_loader_casts_any_dtype(kind: str, sizes: tuple[int, ...], shard: tuple[Any, ...]) -> None:
    """layers/parameter.py:225, 337: `copy_` without a look at the dtype."""
    weight = layer(kind, block_int8(), *sizes).weight
    weight.weight_loader(weight, torch.full((128, 256), 0.7), *shard)
    assert bool((weight[:128] == 0).all())


def test_loader_is_chosen_by_the_name_of_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """layers/linear.py:140, 505: a subclass by another name gets the loader of old."""
    from sglang.srt.layers.quantization.blockwise_int8 import BlockInt8LinearMethod

    class Renamed(BlockInt8LinearMethod):  # type: ignore[misc]
        pass

    config = block_int8()
    usual = layer("ColumnParallelLinear", config, 256, 128).weight.weight_loader.__name__
    monkeypatch.setattr(config, "get_quant_method", lambda *_args, **_keywords: Renamed(config))
    renamed = layer("ColumnParallelLinear", config, 256, 128).weight.weight_loader.__name__
    assert (usual, renamed) == ("weight_loader_v2", "weight_loader")


def test_per_channel_fp8_loses_its_loader_and_turns_the_weight_around() -> None:
    """w8a8_fp8.py:135; fp8.py:1256 is the same."""
    made = layer("ColumnParallelLinear", channel_fp8(), 256, 256)
    codes = torch.arange(256).repeat(256, 1).float().to(torch.float8_e4m3fn)
    made.weight.weight_loader(made.weight, codes)
    made.quant_method.process_weights_after_loading(made)
    assert torch.equal(made.weight.data.view(torch.uint8), codes.t().view(torch.uint8))
    assert not hasattr(made.weight, "weight_loader")
    assert "restore_weights_before_loading" not in vars(type(made.quant_method))


def test_deepseek_asks_fp8_shared_experts_for_what_per_channel_fp8_has_not() -> None:
    """models/deepseek_v2.py:968, models/glm4_moe.py:519: quant_method.quant_config."""
    import sglang.srt

    question = "shared_experts.gate_up_proj.quant_method.quant_config.weight_block_size"
    for module in ("deepseek_v2", "glm4_moe"):
        # their modules warn of themselves when they are imported
        source = Path(sglang.srt.__path__[0]) / "models" / f"{module}.py"
        assert question in source.read_text(encoding="utf-8")
    method = layer("ColumnParallelLinear", channel_fp8(), 256, 128).quant_method
    assert not hasattr(method, "quant_config")


@pytest.mark.usefixtures("played_gpu")
def test_act_orders_of_shards_overwrite_each_other() -> None:
    """gptq/schemes/gptq_marlin.py:101: a fused module has one g_idx, and the last shard's wins."""
    g_idx = layer("QKVParallelLinear", gptq_marlin(desc_act=True), 256, 64, 4, 2).g_idx
    orders = {shard: torch.full((256,), place) for place, shard in enumerate("qkv")}
    for shard, order in orders.items():
        g_idx.weight_loader(g_idx, order.to(torch.int32), shard)
    assert torch.equal(g_idx.data.long(), orders["v"])


@pytest.mark.usefixtures("played_gpu")
def test_gptq_rounds_sizes_down() -> None:
    """gptq/schemes/gptq_marlin.py:86: the last, partial group has no scales."""
    assert layer("ColumnParallelLinear", gptq_marlin(), 1000, 1024).scales.shape == (7, 1024)


def test_gptq_asks_whether_marlin_fits_and_does_not_listen() -> None:
    """hardware_backend/gpu/quantization/gptq_kernels.py:89."""
    from sglang.srt.hardware_backend.gpu.quantization.gptq_kernels import GPTQMarlinLinearKernel

    tree = parsed(GPTQMarlinLinearKernel.process_weights_after_loading)
    unheard = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ]
    assert "check_marlin_supports_shape" in [ast.unparse(call.func) for call in unheard]


def test_direct_tensors_pass_by_load_weights() -> None:
    """model_executor/model_runner_components/weight_updater.py:438."""
    from sglang.srt.model_executor.model_runner_components import weight_updater

    direct = inspect.unwrap(weight_updater._model_load_weights_direct)
    assert "load_weights" not in [
        node.attr for node in ast.walk(parsed(direct)) if isinstance(node, ast.Attribute)
    ]
    model = torch.nn.Linear(2, 2, bias=False)
    direct(model, [("weight", torch.ones(2, 2))])
    assert torch.equal(model.weight, torch.ones(2, 2))


def test_update_from_disk_forgets_the_loaders_settings() -> None:
    """model_executor/model_runner_components/weight_updater.py:195."""
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

    tree = parsed(inspect.unwrap(WeightUpdater.update_weights_from_disk))
    (call,) = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "LoadConfig"
    ]
    assert "model_loader_extra_config" not in [keyword.arg for keyword in call.keywords]


def test_finished_batch_keeps_the_cache_from_being_flushed() -> None:
    """managers/scheduler.py:5348 and :5520."""
    from sglang.srt.managers.scheduler import Scheduler

    asked = ast.unparse(parsed(Scheduler.is_fully_idle))
    assert "self.last_batch is None or self.last_batch.is_empty()" in asked
    assert "self.is_fully_idle(" in ast.unparse(parsed(Scheduler.flush_cache))


def test_hook_that_cannot_be_applied_is_only_logged() -> None:
    """plugins/hook_registry.py:166."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    target = "sglang.srt.server_args.no_such_function"
    HookRegistry.register(target, lambda result: result)
    try:
        HookRegistry.apply_hooks()
    finally:
        del HookRegistry._hooks[target]


def test_plugin_that_cannot_be_loaded_is_only_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    """plugins/__init__.py:84."""
    from sglang.srt import plugins

    def fail() -> None:
        raise ImportError("half installed")

    point = SimpleNamespace(name="broken", value="broken:register", dist=None, load=fail)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point])
    assert plugins.load_plugins_by_group(plugins.GENERAL_PLUGINS_GROUP) == {}


def test_mixtral_asks_for_neither_ties_nor_the_width_of_heads() -> None:
    """models/mixtral.py:151: heads are hidden_size / num_attention_heads wide, lm_head untied."""
    import sglang.srt

    source = (Path(sglang.srt.__path__[0]) / "models" / "mixtral.py").read_text(encoding="utf-8")
    assert "tie_word_embeddings" not in source
    assert "config.head_dim" not in source
