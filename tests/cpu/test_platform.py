"""The platform's answers, and the defaults that it gives the server."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest


@pytest.fixture
def platform(linear_module):
    from sglang.srt.platforms import _load_platform_class

    from mixedprec_plugin.cpu.activate import PLATFORM_CLASS

    return _load_platform_class(PLATFORM_CLASS)()


@pytest.fixture
def server_args():
    """The fields as they are when SGLang calls the platform for a command without flags."""
    return SimpleNamespace(
        attention_backend="intel_amx",
        sampling_backend=None,
        max_total_tokens=None,
        disable_overlap_schedule=False,
        tp_size=1,
        pp_size=1,
        dp_size=1,
    )


def test_platform_is_an_out_of_tree_cpu(platform):
    assert platform.is_out_of_tree()
    assert platform.device_type == "cpu"
    assert platform.get_device(None) == "cpu"
    assert platform.get_dispatch_key_name() == "native"
    assert platform.get_default_attention_backend() == "torch_native"
    assert platform.get_torch_distributed_backend_str() == "gloo"


def test_defaults_run_on_torch_alone(platform, server_args):
    platform.apply_server_args_defaults(server_args)
    assert server_args.attention_backend == "torch_native"
    assert server_args.sampling_backend == "pytorch"
    assert server_args.max_total_tokens == 16384
    assert server_args.disable_overlap_schedule


def test_what_the_user_gave_stays(platform, server_args):
    server_args.max_total_tokens = 512
    server_args.attention_backend = "triton"
    platform.apply_server_args_defaults(server_args)
    assert server_args.max_total_tokens == 512
    assert server_args.attention_backend == "triton"


def test_one_rank_binds_no_threads(platform, server_args, monkeypatch):
    monkeypatch.delenv("SGLANG_CPU_OMP_THREADS_BIND", raising=False)
    platform.apply_server_args_defaults(server_args)
    assert "SGLANG_CPU_OMP_THREADS_BIND" not in os.environ


def test_ranks_share_the_cores(platform, server_args, monkeypatch):
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    server_args.tp_size = 2
    platform.apply_server_args_defaults(server_args)
    assert os.environ["SGLANG_CPU_OMP_THREADS_BIND"] == "0,1|2,3"


def test_a_binding_of_the_user_stays(platform, server_args, monkeypatch):
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|0")
    server_args.tp_size = 2
    platform.apply_server_args_defaults(server_args)
    assert os.environ["SGLANG_CPU_OMP_THREADS_BIND"] == "0|0"
