"""What a GPU has left for weights, against SGLang's own arithmetic and published sizes."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest

from mixedprec_plugin.errors import UsageError
from mixedprec_plugin.methods.cards import Gpu, find_gpu
from mixedprec_plugin.plan.budget import Load, gpu_budget, nearest_that_fits
from tests.checkpoints import llama_config
from tests.published import deepseek_v3, qwen3_30b_a3b

# meta-llama/Llama-3.1-8B-Instruct
LLAMA_8B = llama_config(
    hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    num_hidden_layers=32,
)  # fmt: skip
QWEN3_NEXT = llama_config(
    num_hidden_layers=48, num_key_value_heads=2, head_dim=256, full_attention_interval=4,
    linear_num_key_heads=16, linear_num_value_heads=32, linear_key_head_dim=128,
    linear_value_head_dim=128, linear_conv_kernel_dim=4,
)  # fmt: skip


def fraction_of_sglang(
    monkeypatch: pytest.MonkeyPatch,
    memory_bytes: int,
    tp_size: int,
    *,
    is_mla: bool,
    **options: Any,
) -> float:
    """What SGLang's own code sets --mem-fraction-static to, by options of its server."""
    from sglang.srt.arg_groups import memory_hook

    phase = functools.partial(SimpleNamespace, max_bs=None, bs=None, backend="full")
    values: dict[str, Any] = {
        "cuda_graph_config": SimpleNamespace(decode=phase(), prefill=phase()),
        "device": "cuda", "tp_size": tp_size, "pp_size": 1, "chunked_prefill_size": None,
        "max_running_requests": None, "max_total_tokens": None, "model_path": "",
        "mem_fraction_static": None, "disaggregation_mode": "null", "moe_a2a_backend": "none",
        "disable_cuda_graph_padding": False, "speculative_algorithm": None,
        "enable_symm_mem": False, "language_only": False, "language_model_only": False,
        **options,
    }  # fmt: skip
    args = SimpleNamespace(**values)
    patched = {
        "resolving_view": lambda _: args, "resolved_view": lambda _: args,
        "declare_resolution": lambda _args, _name, **found: args.__dict__.update(found),
        "get_device_memory_capacity": lambda _: memory_bytes / 2**20,
        "use_mla_backend": lambda _: is_mla, "attn_dp_enabled_of": lambda _: False,
        "post_capture_kv_sizing_planned": lambda _: False,
        "model_config_of": lambda _: SimpleNamespace(is_multimodal=False),
        "get_platform": lambda: SimpleNamespace(is_xpu=False),
    }  # fmt: skip
    for name, value in patched.items():
        monkeypatch.setattr(memory_hook, name, value)
    monkeypatch.setattr(
        "sglang.srt.arg_groups.model_overrides.qwen3_vl."
        "expand_multimodal_decode_graph_to_running_limit",
        lambda *_: None,
    )
    monkeypatch.setattr(
        "sglang.srt.arg_groups.cuda_graph_hook.generate_decode_cuda_graph_batch_sizes",
        lambda _args, most: [most],
    )
    memory_hook.handle_gpu_memory_settings(args)
    return float(args.mem_fraction_static)


@pytest.mark.sglang
@pytest.mark.parametrize("gpu", ["T4", "RTX 4090", "A100-40GB", "H100", "H200", "B200"])
@pytest.mark.parametrize("tp_size", [1, 4])
@pytest.mark.parametrize("config", [LLAMA_8B, deepseek_v3().config], ids=["llama", "mla"])
def test_reserve_is_what_sglang_keeps_by_default(
    monkeypatch: pytest.MonkeyPatch, gpu: str, tp_size: int, config: dict[str, Any]
) -> None:
    found = find_gpu(gpu)
    expected = fraction_of_sglang(
        monkeypatch, found.memory_bytes, tp_size, is_mla="kv_lora_rank" in config
    )
    reserve = gpu_budget(found, tp_size, config, Load(1, 1)).taken[0]
    assert 1 - reserve.num_bytes / found.memory_bytes == pytest.approx(expected, abs=1e-9)
    assert f"--mem-fraction-static {expected:g})" in reserve.title


@pytest.mark.sglang
@pytest.mark.parametrize(
    ("chunk", "most"), [(16384, None), (1024, None), (None, 16), (4096, 1000), (2048, 1)]
)
@pytest.mark.parametrize("gpu", ["RTX 4090", "B200"])
def test_reserve_follows_the_servers_options(
    monkeypatch: pytest.MonkeyPatch, gpu: str, chunk: int | None, most: int | None
) -> None:
    found = find_gpu(gpu)
    options = {"chunked_prefill_size": chunk, "max_running_requests": most}
    expected = fraction_of_sglang(monkeypatch, found.memory_bytes, 2, is_mla=False, **options)
    load = Load(1, 1, chunk=chunk, most_requests=most)
    reserve = gpu_budget(found, 2, LLAMA_8B, load).taken[0]
    assert 1 - reserve.num_bytes / found.memory_bytes == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("config", "tp_size", "kv_bytes", "expected"),
    [
        # 128 KiB a token, as Llama 3's paper and every calculator of KV caches have it
        (LLAMA_8B, 1, 2, 131072),
        (LLAMA_8B, 2, 2, 65536),
        # ranks share 8 heads; with 16 of them each has one
        (LLAMA_8B, 16, 2, 16384),
        (LLAMA_8B, 1, 1, 65536),
        # (512 + 64) x 61 layers x 2 bytes, on every rank: DeepSeek-V3's 70 KB a token
        (deepseek_v3().config, 8, 2, 70272),
        # 48 layers x 4 heads x 128 x 2 x 2 bytes
        (qwen3_30b_a3b().config, 1, 2, 98304),
    ],
)
def test_kv_cache_is_the_models(
    config: dict[str, Any], tp_size: int, kv_bytes: int, expected: int
) -> None:
    budget = gpu_budget(find_gpu("H100"), tp_size, config, Load(1000, 3, kv_bytes))
    assert budget.taken[1].num_bytes == 3000 * expected


def test_layers_of_linear_attention_keep_states_and_no_keys() -> None:
    budget = gpu_budget(find_gpu("H100"), 1, QWEN3_NEXT, Load(1000, 2))
    _, cache, states = budget.taken
    assert cache.num_bytes == 2000 * 12 * 2 * 512 * 2
    assert states.num_bytes == 2 * 36 * (32 * 128 * 128 * 4 + 8192 * 3 * 2)


def test_lines_add_up_to_the_gpu() -> None:
    budget = gpu_budget(find_gpu("RTX 4090"), 2, LLAMA_8B, Load(32768, 4))
    memory, *rest = budget.lines
    assert memory.num_bytes == 24 * 10**9 == sum(line.num_bytes for line in rest)
    assert rest[-1].num_bytes == budget.weights > 0


def test_nearest_load_that_fits_is_named() -> None:
    gpu, load = find_gpu("RTX 4090"), Load(32768, 64)
    assert gpu_budget(gpu, 1, LLAMA_8B, load).weights < 0
    remedy = nearest_that_fits(gpu, 1, LLAMA_8B, load, lambda size: 5 * 10**9 // size)
    # eight ranks and more have one head each, of which the cache alone is 34 GB
    assert remedy == "it fits with --concurrency 2, or --context 1355"
    for fits, loads in {True: [(32768, 2), (1355, 64)], False: [(32768, 3), (1356, 64)]}.items():
        for one in loads:
            left = gpu_budget(gpu, 1, LLAMA_8B, Load(*one)).weights
            assert (left >= 5 * 10**9) is fits
    remedy = nearest_that_fits(gpu, 1, LLAMA_8B, Load(32768, 8), lambda size: 15 * 10**9 // size)
    # one request of 4.3 GB does not fit beside 15 GB and 7.6 GB of reserve
    assert remedy == "it fits with --context 1304, or --tp 4"


def test_what_is_not_known_is_an_error() -> None:
    with pytest.raises(UsageError, match="is not known"):
        gpu_budget(Gpu("compute capability 9.0", 90), 1, LLAMA_8B, Load(1, 1))
    mamba = llama_config(layer_types=["mamba", "attention", "mamba"])
    with pytest.raises(UsageError, match="layers of mamba is not known"):
        gpu_budget(find_gpu("H100"), 1, mamba, Load(1, 1))
