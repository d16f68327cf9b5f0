"""The model that SGLang builds, without weights, held against the plan before any are read.

SGLang's own class is built on torch's meta device, every layer unquantized: which modules there
are, and what they are called, depends neither on methods nor on kernels. Then the plan's tensors
are placed in it as they will be, each layer as the floats that it stands for and without its
values. What finds no parameter, and which parameter finds no tensor, is known at once; and of a
module that the plan does not know, which layers end in it. Where the methods run on this machine,
the same is done again with them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.quantization.base_config import QuantizeMethodBase
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.rotary_embedding import factory
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead

from mixedprec_plugin.checkpoint.reader import TORCH_DTYPES
from mixedprec_plugin.errors import LoadError, PlanError, Problem
from mixedprec_plugin.families.config import architecture
from mixedprec_plugin.families.names import last_component
from mixedprec_plugin.methods.stored import TensorSpec
from mixedprec_plugin.plan.folding import fold_problems
from mixedprec_plugin.plan.model import Plan, PlannedLayer
from mixedprec_plugin.serving.building import build_model
from mixedprec_plugin.serving.config import MixedPrecisionConfig, Others
from mixedprec_plugin.serving.filling import Filling
from mixedprec_plugin.serving.late import check_built, shape_problems
from mixedprec_plugin.serving.recorder import storage_id
from mixedprec_plugin.serving.source_configs import REFUSALS, words_of
from mixedprec_plugin.serving.stages import Stage

Build = Callable[[MixedPrecisionConfig], tuple[torch.nn.Module, Stage]]
_META = torch.device("meta")
# what is said where a value, or a device, was asked for that is not there
_WITHOUT_VALUES = re.compile(r"meta|cuda|nvidia|device|triton", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Outline:
    """What a model without weights showed.

    Attributes:
        others: names that the plan does not know, see `MixedPrecisionConfig`.
        problems: what keeps the plan from being loaded.
        unchecked: what could not be found out, and why; empty if nothing.
    """

    others: Others = dataclasses.field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    unchecked: str = ""

    def check(self) -> Outline:
        """Return the outline itself if the plan can be loaded."""
        if self.problems:
            raise PlanError(self.problems)
        return self


def outline_of(
    plan: Plan, model_config: ModelConfig, load_config: LoadConfig, *, has_methods: bool = True
) -> Outline:
    """Build a plan's model without weights, and hold it against the plan.

    Args:
        plan: without errors.
        has_methods: whether the plan's methods run on this machine: then the model is built in them
            as well.
    Raises:
        LoadError: a method has no class here that takes its layer, or SGLang's model is not split
            into pipeline stages as asked.
    """

    def build(config: MixedPrecisionConfig) -> tuple[torch.nn.Module, Stage]:
        return build_model(model_config, load_config, config, _META)

    outline = _of_floats(plan, build)
    if not has_methods or outline.problems or outline.unchecked:
        return outline
    return _of_methods(plan, outline, build)


def _of_floats(plan: Plan, build: Build) -> Outline:
    """Every layer as floats: which modules there are, and which tensors they take."""
    plain = dataclasses.replace(plan, layers=tuple(_as_floats(x, plan) for x in plan.layers))
    config, tensors = _Asked(plain), _Tensors(plain)
    try:
        with _nowhere():
            model, tensors.stage = build(config)
            others = config.resolve(model)
            if problems := shape_problems(plain, config.built, tensors.stage):
                return Outline(problems=tuple(fold_problems(problems)))
            tensors.left_out = _whole_experts(plain, config).keys()
            filling = Filling(model, config, tensors)
    except REFUSALS as error:
        return _refused(plan, tensors, error)
    left_out = [*_of_unknown_sizes(plain, config), *(config.built[x] for x in tensors.left_out)]
    found = [
        *_apart(plan, model, config, filling.recorder.arrived),
        *(filling.problems or filling.unfilled(left_out)),
    ]
    return Outline(others, tuple(fold_problems(found)))


def _of_methods(plan: Plan, outline: Outline, build: Build) -> Outline:
    """Every layer in its method: whether the method's parameters take what the plan has for it."""
    config, tensors = MixedPrecisionConfig(plan, outline.others), _Tensors(plan)
    try:
        with _nowhere():
            model, tensors.stage = build(config)
            check_built(plan, config.built, tensors.stage)
            # one layer of experts stands for all that are like it
            experts = _whole_experts(plan, config)
            tensors.left_out = experts.keys() - {alike: n for n, alike in experts.items()}.values()
            filling = Filling(model, config, tensors)
    except REFUSALS as error:
        refused = _refused(plan, tensors, error)
        return dataclasses.replace(refused, others=outline.others)
    left_out = [config.built[name] for name in tensors.left_out]
    problems = filling.problems or filling.unfilled(left_out)
    return dataclasses.replace(outline, problems=tuple(fold_problems(problems)))


def _refused(plan: Plan, tensors: _Tensors, error: Exception) -> Outline:
    """What SGLang's own code raised: at config.json, at a tensor, or for want of a value."""
    words = f"{type(error).__name__}: {words_of(error)}"
    if _WITHOUT_VALUES.search(words):
        how = f"loaded without values, at {tensors.last}" if tensors.last else "built on no device"
        return Outline({}, (), f"SGLang's model cannot be {how} ({words})")
    name = architecture(plan.source.config)
    where, does, remedy = tensors.last, "load it", "spell its name as that class does"
    if not where:
        where, does, remedy = "config.json", "build from it", "say there what the class asks for"
    what = f"SGLang's class of {name} does not {does} ({words})"
    remedy += ", or take a release of SGLang that knows the checkpoint"
    return Outline(problems=(Problem(where, what, remedy, "model-refused"),))


class _Asked(MixedPrecisionConfig):
    """Leaves every layer unquantized, and keeps those whose names the plan does not know."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.asked: set[int] = set()
        self._found: dict[str, list[torch.nn.Module]] = {}

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, ParallelLMHead):
            self.asked.add(id(layer))
            return None
        if not isinstance(layer, LinearBase | FusedMoE):
            return None
        self.asked.add(id(layer))
        module = self._module_or_none(prefix)
        if module is None:
            self._found.setdefault(prefix, []).append(layer)
        else:
            self.built[module] = layer
        return None if isinstance(layer, FusedMoE) else UnquantizedLinearMethod()

    def resolve(self, model: torch.nn.Module) -> Others:
        """Tell by their places in the model what layers are that are built under other names.

        Some of SGLang's classes build all layers under one name (models/hunyuan.py:506), or under
        one that is not their attribute's (`mixer` for `mamba`, models/granitemoehybrid.py).
        """
        paths = {id(module): path for path, module in model.named_modules()}
        others = {}
        for prefix, layers in self._found.items():
            names = [self._module_or_none(paths.get(id(layer), "")) for layer in layers]
            free = [None if name in self.built else name for name in names]
            self.built |= {n: layer for n, layer in zip(free, layers, strict=True) if n is not None}
            others[prefix] = tuple(free)
        return others

    def _module_or_none(self, name: str) -> str | None:
        try:
            return self.module_of(name)
        except LoadError:
            return None


class _Tensors:
    """The tensors of a plan without their values, as `compose.stream` names and orders them.

    Attributes:
        stage: of the pipeline, whose layers come.
        left_out: modules whose tensors do not come.
        last: name of the one that came last.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.stage: Stage | None = None
        self.left_out: Collection[str] = ()
        self.last = ""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for layer in self._plan.layers:
            is_elsewhere = self.stage is not None and not self.stage.runs(layer)
            if layer.kind == "draft" or is_elsewhere or layer.module in self.left_out:
                continue
            for suffix, spec in layer.outputs.items():
                self.last = layer.tensor_name(suffix)
                dtype = TORCH_DTYPES[spec.dtype]
                yield self.last, torch.empty(spec.shape, dtype=dtype, device=_META)


def _as_floats(layer: PlannedLayer, plan: Plan) -> PlannedLayer:
    """A quantized layer as the floats that it stands for; as nothing where they are not known."""
    if layer.is_unquantized or layer.stored is None:
        return layer
    known = layer.stored.N and layer.stored.K
    weight = {"weight": TensorSpec(plan.target.dtype, (layer.stored.N, layer.stored.K))}
    kept = {
        suffix: spec
        for suffix, spec in layer.outputs.items()
        if suffix in layer.inputs and suffix not in layer.stored.suffixes
    }
    return dataclasses.replace(layer, scheme=None, outputs=kept | weight if known else kept)


def _whole_experts(plan: Plan, config: MixedPrecisionConfig) -> dict[str, object]:
    """Layers of experts of which the plan has every projection, and what makes them alike.

    There are tens of thousands of projections, and their shapes are checked.
    """
    found: dict[str, object] = {}
    for name, module in config.built.items():
        layers = plan.modules[name]
        if isinstance(module, FusedMoE):
            each = 3 if module.moe_runner_config.is_gated else 2
            if len({layer.shard for layer in layers}) == each * module.num_experts:
                found[name] = tuple((x.shard, x.method, *x.outputs.items()) for x in layers)
    return found


def _of_unknown_sizes(plain: Plan, config: _Asked) -> list[torch.nn.Module]:
    """The modules that a layer would fill whose sizes its format does not tell."""
    return [
        module
        for name, module in config.built.items()
        if any("weight" not in layer.outputs for layer in plain.modules[name])
    ]


def _apart(
    plan: Plan, model: torch.nn.Module, config: _Asked, arrived: Mapping[str, set[int]]
) -> Iterator[Problem]:
    """Quantized layers that SGLang runs in a module that the plan does not know."""
    parameters = {storage_id(p.data): name for name, p in model.named_parameters()}
    together: dict[int, list[str]] = {}
    for name in arrived:
        for memory in arrived[name]:
            together.setdefault(memory, []).append(name.rpartition(".")[0])
    for layer in plan.layers:
        if layer.is_unquantized or layer.module in config.built:
            continue
        for memory in arrived.get(f"{layer.name}.weight", ()):
            path, _, parameter = parameters.get(memory, "").rpartition(".")
            module = model.get_submodule(path)
            kind = f"{last_component(path)} ({type(module).__name__})"
            others = [last_component(name) for name in together[memory] if name != layer.name]
            what = f"SGLang runs it as {kind}, a name that the plan does not know"
            if isinstance(module, ParallelLMHead) and id(module) in config.asked:
                continue
            if not isinstance(module, LinearBase | FusedMoE | ParallelLMHead):
                what = f"SGLang runs it as {parameter} of {kind}, which is never quantized"
            elif id(module) not in config.asked:
                what = f"SGLang builds it as {kind}, and asks no one what it runs in: unquantized"
            elif others:
                beside = " and ".join(dict.fromkeys(others))
                what = f"SGLang runs it and {beside} as one module that the plan does not know, "
                what += kind
            yield Problem(layer.name, what, "give them the method bf16", "built-otherwise")


@contextlib.contextmanager
def _nowhere() -> Iterator[None]:
    """Keep what has no memory from what the process shares, and from the device.

    Source: `_compute_local_structural_signature` (model_loader/loader.py:1878), which builds a
    model without weights, too, and forgets the rotary embeddings that it made; models that ask for
    the device by its number (models/qwen3_next.py:235).
    """
    shared = dict(factory._ROPE_DICT)
    current_device = torch.cuda.current_device
    torch.cuda.current_device = lambda: _META  # type: ignore[assignment, return-value]
    try:
        yield
    finally:
        torch.cuda.current_device = current_device
        factory._ROPE_DICT.clear()
        factory._ROPE_DICT.update(shared)
