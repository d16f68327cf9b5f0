"""Recorders on the doors through which SGLang reaches kernels.

Installed before any other module of SGLang is imported: modules bind these names at import.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.dryrun.fake_device import BODIES
from tests.dryrun.journal import JOURNAL
from tests.dryrun.marlin_checks import CHECKS


class _JitModule:
    """Stands for a CUDA module that would be compiled at its first use."""

    def __init__(self, name: str, kind: str = "jit") -> None:
        self._name = name
        self._kind = kind

    def __getattr__(self, function: str) -> Callable[..., None]:
        def launch(*args: Any) -> None:
            JOURNAL.launch(self._kind, function)
            check: Callable[..., None] | None = CHECKS.get(function)
            if check is not None:
                check(*args)

        return launch


def _load_jit(*args: Any, **_keywords: Any) -> _JitModule:
    return _JitModule(str(args[0]))


def install() -> None:
    """Put the recorders in place, for the whole process."""
    _record_custom_operators()
    _record_jit_modules()
    _record_flashinfers_modules()


def _record_custom_operators() -> None:
    import sglang.srt.utils as package
    from sglang.srt.utils import common

    stock = common.direct_register_custom_op

    def register(op_name: str, op_func: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        BODIES[op_name] = op_func
        return stock(op_name, op_func, *args, **keywords)

    for module in (common, package):
        module.direct_register_custom_op = register


def _record_jit_modules() -> None:
    from sglang.kernels.jit import utils
    from sglang.kernels.jit.utils import compile as compile_package
    from sglang.kernels.jit.utils.compile import loader

    for module in (utils, compile_package, loader):
        module.load_jit = _load_jit


def _record_flashinfers_modules() -> None:
    from flashinfer.jit import core

    def load(spec: Any, *_args: Any, **_keywords: Any) -> _JitModule:
        return _JitModule(spec.name, "flashinfer")

    for name in ("JitSpec", "CudaJitSpec", "JitSpecBase"):
        if hasattr(core, name):
            getattr(core, name).build_and_load = load
