"""SGLang's engine on a plain CPU: no accelerator, no AVX-512, no sgl-kernel."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

from mixedprec_plugin.cpu.affinity import format_binding, split_cores

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)

THREADS_BIND = "SGLANG_CPU_OMP_THREADS_BIND"
# A bound on the KV cache: SGLang by itself would give it most of the machine's memory, and with
# cores bound to ranks it does not know how much there is.
DEFAULT_MAX_TOTAL_TOKENS = 16384
_ATTENTION = "torch_native"


class CpuPlatform(CpuDeviceMixin, SRTPlatform):
    """A platform for machines that have nothing but a CPU.

    `is_out_of_tree()` is true: SGLang's own CPU platform needs the AMX build of sgl-kernel, an
    out-of-tree one runs the torch-native forwards.
    """

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def get_device(self, device_id: int = 0) -> str:
        """The device's name. SGLang splits it as a string; `CpuDeviceMixin` returns an object."""
        return "cpu"

    def get_default_attention_backend(self) -> str:
        return _ATTENTION

    def get_dispatch_key_name(self) -> str:
        """Run the `forward_native` of every layer."""
        return "native"

    def get_compile_backend(self, mode: str | None = None) -> str:
        """No compiling: a machine may have no C++ compiler."""
        return "eager"

    def apply_server_args_defaults(self, server_args: ServerArgs) -> None:
        """Fill in what a plain CPU needs; what the user gave stays.

        Also sets `SGLANG_CPU_OMP_THREADS_BIND` for several ranks. Called by SGLang in the
        launching process, before it spawns the ranks.
        """
        # By now SGLang has put "intel_amx" where the user said nothing; it needs the AMX build of
        # sgl-kernel, without which SGLang falls back to torch_native as well.
        if server_args.attention_backend in (None, "intel_amx"):
            server_args.attention_backend = _ATTENTION
        if server_args.sampling_backend is None:
            server_args.sampling_backend = "pytorch"
        if server_args.max_total_tokens is None:
            server_args.max_total_tokens = DEFAULT_MAX_TOTAL_TOKENS
        server_args.disable_overlap_schedule = True
        # its keys of sliding windows lie where that attention does not look for them
        server_args.disable_hybrid_swa_memory = True
        # the scheduler polls without rest otherwise, on a core that the model could use
        server_args.sleep_on_idle = True
        num_ranks = server_args.tp_size * server_args.pp_size * server_args.dp_size
        if num_ranks > 1:
            _bind_threads(num_ranks)


def _bind_threads(num_ranks: int) -> None:
    """Split the cores among the ranks unless the user has done so."""
    if os.environ.get(THREADS_BIND):
        return
    split = split_cores(sorted(os.sched_getaffinity(0)), num_ranks)
    binding = format_binding(split)
    os.environ[THREADS_BIND] = binding
    # without the AMX build of sgl-kernel SGLang binds nothing: ranks whose threads wait for each
    # other on the same cores load and run ten times slower
    os.environ.setdefault("OMP_NUM_THREADS", str(min(len(cores) for cores in split)))
    logger.info("%s=%s", THREADS_BIND, binding)
