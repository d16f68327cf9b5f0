"""The entry point that SGLang calls in every process (`sglang.srt.plugins`)."""

from __future__ import annotations


def register() -> None:
    """Register the load format `mixedprec`, its flags and hooks.

    Changes nothing for a server that is not started with --load-format mixedprec.
    """
    from mixedprec_plugin.serving import hooks

    hooks.register()
