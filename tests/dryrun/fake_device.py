"""CUDA tensors without memory: torch's FakeTensorMode, as SGLang's layers need it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.dryrun.journal import JOURNAL
from tests.dryrun.stand_ins import STAND_INS

# operators of SGLang -> their Python bodies, which the recorder enters
BODIES: dict[str, Callable[..., Any]] = {}
# their bodies compile with CuTe DSL, and would launch on the fake tensors' null pointers
_CUTE = "cutedsl_"
_MATMULS = {"mm", "addmm", "bmm", "_scaled_mm", "_int_mm"}
_TORCHS_OWN = {"aten", "prim", "prims", "profiler"}


class _NoDevice(FakeTensorMode):
    """Fake tensors that never ask the driver for the device they claim to be on."""

    @property
    def avoid_device_init(self) -> bool:
        return True


class _Recorder(TorchDispatchMode):
    """Writes kernels and copies into the journal; whatever raises goes through."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        keywords = kwargs or {}
        namespace, name = func._schema.name.split("::")
        if func is torch.ops.aten.copy_.default:
            JOURNAL.write(args[0], args[1])
        if name in ("allclose", "equal", "_local_scalar_dense", "_unique2") and _any_fake(args):
            JOURNAL.made_up.append(name)
            return _made_up(name, args[0])
        if name == "any" and _any_fake(args):
            # nothing is found wrong
            found = func(*args, **keywords)
            found.is_any = True
            return found
        if namespace in _TORCHS_OWN and name not in _MATMULS:
            return func(*args, **keywords)
        if namespace == "sglang" and name in BODIES and not name.startswith(_CUTE):
            with self:
                return BODIES[name](*args, **keywords)
        JOURNAL.launch(namespace, name)
        stand_in = STAND_INS.get(func._schema.name)
        if stand_in is not None:
            return stand_in(*args, **keywords)
        if namespace not in _TORCHS_OWN and not func._schema.returns:
            return None
        return func(*args, **keywords)


def _any_fake(args: tuple[Any, ...]) -> bool:
    return any(isinstance(argument, FakeTensor) for argument in args)


def _made_up(name: str, tensor: torch.Tensor) -> Any:
    """Equal tensors, elements that are alike, scales of one, indices of one."""
    if name == "_unique2":
        return tensor.flatten()[:1], tensor.new_empty(0), tensor.new_empty(0)
    if name != "_local_scalar_dense":
        return True
    if getattr(tensor, "is_any", False):
        return False
    return 1.0 if tensor.is_floating_point() else 1


@contextlib.contextmanager
def fake_card() -> Iterator[None]:
    """New tensors are fake, on the card; tensors of a checkpoint stay real, and may be copied."""
    with _NoDevice(allow_non_fake_inputs=True), torch.device("cuda"), torch.no_grad(), _Recorder():
        yield


def _no_memory(*_args: Any, **_keywords: Any) -> None:
    raise RuntimeError("a fake tensor has no memory: a kernel past the recorders wants it")


def install() -> None:
    """Let parameters over fake tensors keep their class, which weight loaders hang on.

    To hand a fake tensor's memory to another library is refused: it would launch a kernel on it.
    """
    FakeTensor.__dlpack__ = _no_memory  # type: ignore[method-assign]
    fake_tensor.init_gpu_context = lambda *_args, **_keywords: None
    stock = torch.nn.Parameter.__new__
    classes: dict[type, type] = {}

    def new(cls: type, data: Any = None, requires_grad: bool = True) -> Any:
        if not isinstance(data, FakeTensor):
            return stock(cls, data, requires_grad)  # type: ignore[arg-type]
        parameter: Any = data.detach()
        parameter.requires_grad_(requires_grad and data.is_floating_point())
        parameter._is_param = True
        if cls not in classes:
            classes[cls] = type(cls)(cls.__name__, (cls, FakeTensor), {})
        parameter.__class__ = classes[cls]
        return parameter

    torch.nn.Parameter.__new__ = staticmethod(new)  # type: ignore[assignment]
