"""The plans of a start, each made once a process."""

from __future__ import annotations

from typing import Any

from mixedprec_plugin.checkpoint.converted import embedded_preset
from mixedprec_plugin.checkpoint.source import Source, open_source
from mixedprec_plugin.errors import PlanError, Problem
from mixedprec_plugin.families.config import model_dtype
from mixedprec_plugin.methods.cards import Gpu, served_dtype, version
from mixedprec_plugin.methods.interface import Device, Target
from mixedprec_plugin.plan.drafts import resolve_draft_plan
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.plan.sources import open_other_sources
from mixedprec_plugin.preset.load import preset_for
from mixedprec_plugin.preset.model import Preset
from mixedprec_plugin.serving.settings import Settings, read_settings

_ATTRIBUTE = "_mixedprec_planner"


class Planner:
    """Makes plans for a running server, and keeps the last one, and the headers it was made of.

    A start asks several times: the command line, SGLang's model configs, the loader; and coupled
    layers of several sources may need weights to be read each time. The planner goes from one to
    the next on the records that SGLang hands on, see `planner_of`; to other processes without its
    plan, which they make by themselves.

    Attributes:
        last: the last plan, whatever has become of its files; None before the first.
    """

    def __init__(self) -> None:
        self.last: Plan | None = None
        self._model: Source | None = None

    def __reduce__(self) -> tuple[type[Planner], tuple[()]]:
        return Planner, ()

    def plan(
        self,
        model_path: str,
        settings: Settings,
        dtype: str,
        tp_size: int,
        device: Device,
        served: Preset | None = None,
    ) -> Plan:
        """Plan a preset over a local checkpoint; the last plan where nothing changed since.

        Args:
            served: what already runs, for new weights where none is named and they carry none.
        Raises:
            UsageError: no preset was named, and the checkpoint carries none.
            PresetError, CheckpointError: as the pipeline finds them; plan errors are in the plan.
        """
        if self._model is None or not self._model.is_as_opened(model_path):
            self._model = open_source(model_path)
        model = self._model
        flag = "--mixedprec-config (mixedprec_config in model_loader_extra_config)"
        if settings.config or served is None or embedded_preset(model.quantization_config):
            preset = preset_for(settings.config, model, settings.overrides, flag)
        else:
            preset = served
        target, others = _target(model, dtype, tp_size, device), open_other_sources(preset)
        last, asked = self.last, (preset, target, {model.name: model, **others})
        # sources that are equal have the same files, see `Source.facts`
        if last is None or (last.preset, last.target, dict(last.sources)) != asked:
            last = self.last = resolve_plan(preset, model, target, others).servable()
        return last


def planner_of(record: Any) -> Planner:
    """The planner that a record of SGLang's carries; it gets one at the first question.

    Args:
        record: ServerArgs, the namespace that they are made from, or a ModelConfig. SGLang keeps
            its own model config on ServerArgs the same way (arg_groups/model_override_base.py:202).
    """
    planner = getattr(record, _ATTRIBUTE, None)
    if planner is None:
        planner = Planner()
        setattr(record, _ATTRIBUTE, planner)
    assert isinstance(planner, Planner)
    return planner


def plan_of(args: Any, folder: str = "", served: Preset | None = None) -> Plan:
    """The plan of a server over a local checkpoint.

    Args:
        args: ServerArgs, or the namespace that they are made from.
        folder: the checkpoint's, where it is not --model-path.
        served: as for `Planner.plan`.
    Raises:
        UsageError, PresetError, CheckpointError: as for `Planner.plan`.
    """
    settings, dtype, tp_size = read_settings(args), str(args.dtype), int(args.tp_size)
    path, device = folder or args.model_path, serving_device()
    return planner_of(args).plan(path, settings, dtype, tp_size, device, served)


def hand_over(record: Any, to: Any) -> None:
    """Have another record carry the planner of a record."""
    setattr(to, _ATTRIBUTE, planner_of(record))


def make_draft_plan(
    model_path: str, preset: Preset, dtype: str, tp_size: int, device: Device
) -> Plan:
    """Plan the section `draft` of a preset over a draft model's local checkpoint.

    Args:
        model_path: the draft model's, or the model's own where its layers are the draft model.
        preset: `Preset.draft`.
    Raises:
        CheckpointError: as the pipeline finds them; plan errors are in the plan.
    """
    source = open_source(model_path)
    target = _target(source, dtype, tp_size, device)
    return resolve_draft_plan(preset, source, target).servable()


def _target(source: Source, dtype: str, tp_size: int, device: Device) -> Target:
    gpu = serving_gpu() if device == "cuda" else None
    running = model_dtype(source.config, dtype)
    if gpu is not None:
        running = served_dtype(running, gpu.capability)
    return Target(device, tp_size, running, gpu)


def serving_gpu() -> Gpu | None:
    """The GPU of this process, by its compute capability alone; None where there is none.

    SGLang's own question, which asks NVML and leaves CUDA uninitialized in a server's parent
    process (utils/common.py:756). Memory is SGLang's to watch over, as it may offload weights.
    """
    from sglang.srt.utils import get_device_sm

    capability = int(get_device_sm())
    return Gpu(f"compute capability {version(capability)}", capability) if capability else None


def serving_device() -> Device:
    """The device that SGLang's platform of this process runs on, as the plan names it.

    Raises:
        PlanError: the platform is one that no method of ours runs on.
    """
    import torch
    from sglang.srt.platforms import current_platform

    if current_platform.device_type == "cpu":
        return "cpu"
    if current_platform.device_type == "cuda" and torch.version.hip is None:
        return "cuda"
    where = f"platform {current_platform.device_name!r}"
    what = "mixed precision runs on NVIDIA GPUs and on plain CPUs"
    remedy = "set SGLANG_PLATFORM=mixedprec_cpu to try the preset on the CPU"
    raise PlanError(Problem(where, what, remedy, "platform"))
