"""A method's arguments -> the config object of the installed SGLang."""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.metadata
import inspect
import logging
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mixedprec_plugin.errors import MethodError, Problem
from mixedprec_plugin.methods.interface import Arguments, Method
from mixedprec_plugin.methods.registry import METHODS

if TYPE_CHECKING:
    from sglang.srt.layers.quantization.base_config import QuantizationConfig


def build_config(
    method: str, arguments: Arguments, platform: str, capability: int | None = None
) -> QuantizationConfig:
    """Construct the config object that serves a method.

    Args:
        method: canonical name of a method that has a config class on the platform.
        arguments: all its arguments, as `registry.bind` returns them.
        platform: `cuda` or `cpu`; `cuda_fallback` asks for that class whatever the GPU.
        capability: CUDA compute capability as major * 10 + minor; None asks torch.
    Raises:
        MethodError: the method has no class on the platform; the installed SGLang has not got the
            class, takes other arguments, or refuses their values.
    """
    spec = METHODS[method]
    key = config_key(spec, platform, cuda_capability() if capability is None else capability)
    config_class = load_class(spec, key)
    keywords = spec.config_arguments(arguments, key)
    check_signature(config_class, keywords, method)
    try:
        # its configs take their arguments for a checkpoint's own, and tell of it: `Detected fp8
        # checkpoint.` (layers/quantization/fp8.py:284)
        with quieted("sglang.srt.layers.quantization", logging.WARNING):
            config: QuantizationConfig = config_class(**keywords)
    except ValueError as error:
        what = f"{config_class.__name__} of SGLang {sglang_version()} refuses it: {error}"
        raise MethodError(Problem(method, what, rule="config-refused")) from error
    return config


@contextlib.contextmanager
def quieted(name: str, level: int) -> Iterator[None]:
    """Keep what a logger says below a level, or below one that holds already, out of the log."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(max(level, logger.getEffectiveLevel()))
    try:
        yield
    finally:
        logger.setLevel(before)


def config_key(spec: Method, platform: str, capability: int | None) -> str:
    """Return the key of `config_classes` for a platform, or for a key itself.

    Raises:
        MethodError: the method has no class there.
    """
    key = spec.config_key(platform, capability)
    if key in spec.config_classes:
        return key
    what = f"has no SGLang config class on {platform!r} (expected {', '.join(spec.config_classes)})"
    if not spec.config_classes:
        what = "has no SGLang config class: SGLang's unquantized methods serve it"
    raise MethodError(Problem(spec.name, what, rule="no-config-class"))


def cuda_capability() -> int | None:
    """Return the compute capability of the current GPU, major * 10 + minor; None without one."""
    import torch

    if not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability()
    return major * 10 + minor


def load_class(spec: Method, key: str) -> type[QuantizationConfig]:
    """Import the config class of a method; a MethodError if the installed SGLang lacks it."""
    config_class: type[QuantizationConfig] = _imported(spec, spec.config_classes[key])
    return config_class


def repaired(config: QuantizationConfig, methods: Iterable[str]) -> QuantizationConfig:
    """The config whose layers compute rightly, where one of some methods knows a cure."""
    for method in methods:
        cure = offered(method, "repaired")
        config = config if cure is None else cure(config)
    return config


def recast(
    config: QuantizationConfig, classes: Mapping[type, type[QuantizationConfig]]
) -> QuantizationConfig:
    """A config of SGLang's as one of the class that cures it; all others as they are."""
    own = classes.get(type(config))
    if own is None:
        return config
    made = copy.copy(config)
    made.__class__ = own
    return made


def offered(method: str, name: str, default: Any = None) -> Any:
    """What a method offers SGLang under one of the names that `Method.sglang` lists.

    Raises:
        MethodError: its module cannot be imported with the installed SGLang.
    """
    spec = METHODS[method]
    return getattr(_imported(spec, spec.sglang), name, default) if spec.sglang else default


def _imported(spec: Method, lazy: str) -> Any:
    """The class, or the module, that a method names."""
    try:
        return pkgutil.resolve_name(lazy)
    except (ImportError, AttributeError) as error:
        what = f"{lazy} cannot be imported with SGLang {sglang_version()}: {error}"
        remedy = "install a release that mixedprec-plugin supports"
        raise MethodError(Problem(spec.name, what, remedy, "no-config-class")) from error


def check_signature(config_class: type, keywords: Mapping[str, Any], method: str = "") -> None:
    """Check that a constructor takes exactly the arguments that a builder made.

    Raises:
        MethodError: for every argument that it does not take, and every one that it needs and is
            not given; each says what it does take.
    """
    parameters = inspect.signature(config_class).parameters.values()
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    texts = [
        f"does not take the argument {name!r}"
        for name in keywords
        if name not in named and not takes_any
    ]
    texts += [
        f"needs the argument {name!r}, which the method does not make"
        for name, p in named.items()
        if p.default is p.empty and name not in keywords
    ]
    class_name = f"{config_class.__name__} of SGLang {sglang_version()}"
    accepted = f"(expected {', '.join(named)})"
    remedy = "install a release that mixedprec-plugin supports, and run 'mixedprec doctor'"
    problems = [
        Problem(method, f"{class_name} {text} {accepted}", remedy, "constructor-argument")
        for text in texts
    ]
    if problems:
        raise MethodError(problems)


def sglang_version() -> str:
    """Return the version of the installed SGLang without importing it."""
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
