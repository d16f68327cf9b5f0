"""The load format `mixedprec`: plan, build, check, place, check."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig, LoadFormat
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.model_loader.loader import DefaultModelLoader
from sglang.srt.model_loader.utils import set_default_torch_dtype
from sglang.srt.model_loader.weight_utils import _prefetch_all_checkpoints
from sglang.srt.runtime_context import get_model, get_parallel

from mixedprec_plugin.checkpoint.converted import is_converted
from mixedprec_plugin.checkpoint.reader import Reading
from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.compose.cache import LayerCache, cache_folder
from mixedprec_plugin.compose.on_device import DeviceRounding
from mixedprec_plugin.compose.parts import compose_parts
from mixedprec_plugin.compose.stream import (
    Compose,
    Quantize,
    VirtualCheckpoint,
    Weights,
    compose_layer,
    round_to_nearest,
)
from mixedprec_plugin.cpu.heap import returning_memory, storage_bytes
from mixedprec_plugin.errors import LoadError, Problem
from mixedprec_plugin.experts.deepep import settle_deepep
from mixedprec_plugin.plan.drafts import as_stored, own_draft
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.plan.render import format_bytes, plan_as_dict, summary_lines
from mixedprec_plugin.preset.load import load_preset, preset_for
from mixedprec_plugin.preset.model import Preset
from mixedprec_plugin.serving.building import build_model
from mixedprec_plugin.serving.config import MixedPrecisionConfig
from mixedprec_plugin.serving.filling import close_to_unquantized, load_weights
from mixedprec_plugin.serving.late import check_built, check_reloadable
from mixedprec_plugin.serving.outline import outline_of
from mixedprec_plugin.serving.planner import make_draft_plan, planner_of, serving_device
from mixedprec_plugin.serving.progress import reported
from mixedprec_plugin.serving.settings import Settings, split_extra_config
from mixedprec_plugin.serving.stages import Stage
from mixedprec_plugin.verify.stream import verified
from mixedprec_plugin.verify.verifier import reference_of

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Loaded:
    """What the process serves: `update_weights_from_disk` brings no settings of its own."""

    settings: Settings
    config: MixedPrecisionConfig
    stage: Stage
    model: torch.nn.Module


_loaded: Loaded | None = None
# the draft model of speculative decoding, where a preset says how it runs
_loaded_draft: Loaded | None = None


def served_model() -> torch.nn.Module:
    """The model that this process serves; not a draft model."""
    assert _loaded is not None
    return _loaded.model


# where a served model keeps the config that it was built with
_CONFIG_ATTRIBUTE = "mixedprec_config"


def is_mixed_precision(model: torch.nn.Module) -> bool:
    """Whether a model was loaded by this load format."""
    return hasattr(model, _CONFIG_ATTRIBUTE)


def served_config(model: torch.nn.Module) -> MixedPrecisionConfig:
    """The config that a model of this load format was built with."""
    config = getattr(model, _CONFIG_ATTRIBUTE)
    assert isinstance(config, MixedPrecisionConfig)
    return config


class MixedPrecisionLoader(DefaultModelLoader):
    """Loads a model with the method that a preset names for each layer."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(without_settings(load_config))
        settings, _ = split_extra_config(load_config.model_loader_extra_config)
        if settings is None and _loaded is not None:
            settings = _loaded.settings
        self.settings = settings or Settings()
        self._has_opened_new_path = False
        self._cache: LayerCache | None = None

    def load_model(
        self, *, model_config: ModelConfig, device_config: DeviceConfig
    ) -> torch.nn.Module:
        """Load a model as its plan says.

        Raises:
            PresetError, CheckpointError, PlanError: before a weight is read.
            LoadError: the model and the plan do not fit each other, or a parameter stayed empty.
        """
        global _loaded, _loaded_draft
        folder = self.folder(model_config.model_path, model_config.revision)
        is_draft = model_config.is_draft_model
        section = self._draft_preset(folder) if is_draft else None
        if is_draft and section is None:
            # not super(): what it calls is ours
            draft: torch.nn.Module = DefaultModelLoader(self.load_config).load_model(
                model_config=model_config, device_config=device_config
            )
            return draft
        model_config.quantization = None
        start = time.perf_counter()
        plan = self._plan(folder, model_config, section).check()
        self._report_plan(plan, is_draft=is_draft)
        outline = outline_of(plan, model_config, self.load_config).check()
        if outline.unchecked:
            logger.warning("mixedprec: not checked before the load: %s", outline.unchecked)
        config = MixedPrecisionConfig(plan, outline.others)
        device = torch.device(device_config.device)
        returning = returning_memory() if device.type == "cpu" else contextlib.nullcontext()
        with set_default_torch_dtype(model_config.dtype), returning:
            model, stage = build_model(model_config, self.load_config, config, device)
            check_built(plan, config.built, stage)
            settle_deepep(model)
            setattr(model, _CONFIG_ATTRIBUTE, config)
            weights = self._open(plan, stage)
            if not is_draft:
                weights = self._verified(plan, weights)
            self.load_weights_and_postprocess(model, weights, device)
        close_to_unquantized(model)
        loaded = Loaded(self.settings, config, stage, model)
        if is_draft:
            _loaded_draft = loaded
        else:
            _loaded = loaded
        self._report(plan, stage, model, time.perf_counter() - start)
        return model.eval()

    def _get_weights_iterator(self, source: DefaultModelLoader.Source, **options: Any) -> Weights:
        """Open the virtual checkpoint for `update_weights_from_disk`.

        SGLang rolls a failed update back by asking the same loader again, with the new path still
        in place (weight_updater.py:236); the second time we open what was served before.
        """
        assert source.model_config is not None
        loaded = _loaded_draft if source.model_config.is_draft_model else _loaded
        assert loaded is not None
        served = loaded.config.plan
        if self._has_opened_new_path:
            folder = str(served.source.path)
        else:
            if served.target.device == "cuda":
                check_reloadable(loaded.config.built)
            folder = self.folder(source.model_or_path, source.revision)
        self._has_opened_new_path = True
        plan = self._plan(folder, source.model_config, served.preset).check()
        _check_same_schemes(served, plan)
        return self._open(plan, loaded.stage)

    def _open(self, plan: Plan, stage: Stage) -> Weights:
        compose: Compose = compose_layer
        if not self.settings.verify:  # to be verified, a tensor must be there whole, on the CPU
            quantize = rounding_for(plan, self.settings)
            compose = functools.partial(compose_layer, quantize=quantize)
            self._cache = _open_cache(plan, self.settings)
            if self._cache is not None or get_parallel().tp_size > 1:
                compose = functools.partial(compose_parts, cache=self._cache, quantize=quantize)
        said, how = get_model(), _how_to_read()
        stream = VirtualCheckpoint(plan, stage.runs, how, compose)
        if said.weight_loader_prefetch_checkpoints and how.may_map:
            inputs = (tensor for layer in stream.layers for tensor in layer.inputs.values())
            paths = sorted({str(tensor.path) for tensor in inputs})
            # a thread of SGLang's, which ends by itself
            _prefetch_all_checkpoints(paths, said.weight_loader_prefetch_num_threads)
        is_told = get_parallel().tp_rank == 0 and get_parallel().pp_rank == 0
        return reported(stream, logger.info) if is_told else iter(stream)

    def load_weights_and_postprocess(
        self, model: torch.nn.Module, weights: Weights, target_device: torch.device
    ) -> None:
        """Place every tensor, prove that every parameter was filled, and let methods repack."""
        if self._has_opened_new_path:
            _restore(model)
        load_weights(model, served_config(model), weights)
        if self._cache is not None:
            _close_cache(self._cache)
        self.postprocess_weights(model, target_device)

    def _verified(self, plan: Plan, weights: Weights) -> Weights:
        if not self.settings.verify or get_parallel().tp_rank != 0:
            return weights
        return verified(weights, plan, reference_of(self.settings.verify, plan))

    def folder(self, model_path: str, revision: str | None) -> str:
        """Where a model lies, downloaded if it is named by an id."""
        return str(self._prepare_weights(model_path, revision, fall_back_to_pt=False)[0])

    def _plan(self, folder: str, model_config: ModelConfig, served: Preset | None = None) -> Plan:
        dtype = str(model_config.dtype).removeprefix("torch.")
        tp_size, device = get_parallel().tp_size, serving_device()
        if model_config.is_draft_model:
            assert served is not None
            return make_draft_plan(folder, served, dtype, tp_size, device)
        planner = planner_of(model_config)
        return planner.plan(folder, self.settings, dtype, tp_size, device, served)

    def _draft_preset(self, folder: str) -> Preset | None:
        """The section `draft` of the preset that the model itself is served with.

        Without one a folder that `mixedprec convert` wrote is loaded as it is stored, because
        SGLang alone does not read it; None for any other.
        """
        preset = None if _loaded is None else _loaded.config.plan.preset
        if preset is None and self.settings.config:
            preset = load_preset(self.settings.config, self.settings.overrides)
        if preset is not None and preset.draft is not None:
            return preset.draft
        source = open_source(folder)
        if own_draft(source) is None or not is_converted(source.quantization_config):
            return None
        preset = preset or preset_for("", source, self.settings.overrides, "--mixedprec-config")
        return preset.draft or as_stored(preset)

    def _report_plan(self, plan: Plan, *, is_draft: bool) -> None:
        """Say what is going to run, before anything of it is read."""
        if get_parallel().tp_rank != 0 or get_parallel().pp_rank != 0:
            return
        if is_draft:
            logger.info("mixedprec: the draft model, by the preset's section draft:")
        for line in summary_lines(plan):
            logger.info(line)
        if self.settings.plan_path and not is_draft:
            text = json.dumps(plan_as_dict(plan), indent=1)
            Path(self.settings.plan_path).write_text(text + "\n", encoding="utf-8")

    def _report(self, plan: Plan, stage: Stage, model: torch.nn.Module, seconds: float) -> None:
        if get_parallel().tp_rank != 0:
            return
        if not stage.is_whole:
            logger.info("mixedprec: %s", stage.describe(plan.layers))
        if get_parallel().pp_rank == 0:
            size = format_bytes(storage_bytes(model.parameters()))
            logger.info("mixedprec: loaded in %.1f s, %s of parameters", seconds, size)


def rounding_for(plan: Plan, settings: Settings) -> Quantize:
    """What quantizes weights while they are loaded: where the settings say."""
    if plan.target.device == "cpu" or settings.quantize_on != "device":
        return round_to_nearest
    return DeviceRounding(torch.device(plan.target.device))


def _open_cache(plan: Plan, settings: Settings) -> LayerCache | None:
    if not settings.cache_bytes:
        return None
    facts = {path: f for source in plan.sources.values() for path, f in source.facts.items()}
    return LayerCache(cache_folder(), settings.cache_bytes, facts)


def _close_cache(cache: LayerCache) -> None:
    if cache.num_found or cache.num_kept:
        logger.info(
            "mixedprec: of what was quantized before, %d parts were read, and %d are kept for the "
            "next start, in %s (--mixedprec-cache 0 keeps none)",
            cache.num_found,
            cache.num_kept,
            cache.folder,
        )
    if cache.stopped:
        logger.warning("mixedprec: layers are not kept for the next start: %s", cache.stopped)
    if cache.num_kept:
        cache.trim()


def without_settings(load_config: LoadConfig) -> LoadConfig:
    """The same config for SGLang's own loader, as a copy."""
    own = copy.copy(load_config)
    own.load_format = LoadFormat.AUTO
    own.model_loader_extra_config = split_extra_config(load_config.model_loader_extra_config)[1]
    return own


def _how_to_read() -> Reading:
    """What the options --weight-loader-* say."""
    said = get_model()
    return Reading(
        may_map=not said.weight_loader_disable_mmap,
        drops_cache=bool(said.weight_loader_drop_cache_after_load),
    )


def _restore(model: torch.nn.Module) -> None:
    """Have methods that repacked their weights give them the checkpoint's layout again.

    SGLang does so before an update from 0.5.23 on; its methods and ours do nothing the second time.
    """
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        restore = getattr(method, "restore_weights_before_loading", None)
        if restore is not None:
            restore(module)


def _check_same_schemes(served: Plan, new: Plan) -> None:
    """New weights must fit the methods that the running model was built with."""
    problems = []
    for name in served.by_name.keys() | new.by_name.keys():
        before, after = served.by_name.get(name), new.by_name.get(name)
        if before is None or after is None:
            problems.append(Problem(name, "is in only one of the two checkpoints"))
        elif (before.method, dict(before.outputs)) != (after.method, dict(after.outputs)):
            what = f"runs in {before.method}, the new weights would need {after.method}"
            problems.append(Problem(name, what))
    if problems:
        raise LoadError(problems)
