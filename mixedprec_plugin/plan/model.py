"""The plan's data: frozen, complete, the same for serving, printing and converting."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

from mixedprec_plugin.checkpoint.headers import StoredTensor
from mixedprec_plugin.checkpoint.source import Source
from mixedprec_plugin.errors import PlanError, Problem
from mixedprec_plugin.families.names import ExpertShard, Kind, Shard, shard_order
from mixedprec_plugin.methods.interface import Fault, Target
from mixedprec_plugin.methods.registry import UNQUANTIZED
from mixedprec_plugin.methods.stored import StoredFormat, TensorSpec
from mixedprec_plugin.plan.conversion import Action
from mixedprec_plugin.plan.folding import fold_problems
from mixedprec_plugin.plan.matching import Matches
from mixedprec_plugin.preset.model import Preset, Rule, Scheme


@dataclasses.dataclass(frozen=True)
class Rescale:
    """How the columns of a layer are made right behind a norm that is not its own source's.

    Column k is multiplied by (own[k] + offset) / (served[k] + offset), exact but for float32.

    Attributes:
        own, served: the norm's weight in the layer's source, and the one that is served, before it
            is rounded to the model's dtype.
        offset: 1 where the norm scales by 1 + w.
        source: name of the source of `served`.
    """

    own: StoredTensor
    served: StoredTensor
    offset: float
    source: str


@dataclasses.dataclass(frozen=True)
class PlannedLayer:
    """What happens to one layer of the checkpoint.

    Attributes:
        module: name of the module that runs it; differs from `name` for a shard of a fused module.
        shard: the shard id that the fused module's weight loader takes; None if not fused.
        scheme: None where the layer is never quantized.
        rule: the rule that decided; None where none matched.
        stored: the format that it is stored in; None where it holds no weight matrix.
        inputs: parameter suffix -> stored tensor.
        outputs: parameter suffix -> what is served.
        rescale: how its columns change before it is quantized; None where they do not.
        note: what else the plan decided of it, such as `without its zero bias`; mostly empty.
        reasons: why the action is impossible; else empty.
    """

    name: str
    module: str
    shard: Shard
    kind: Kind
    scheme: Scheme | None
    rule: Rule | None
    source: str
    stored: StoredFormat | None
    action: Action
    inputs: Mapping[str, StoredTensor]
    outputs: Mapping[str, TensorSpec]
    bytes_before: int
    bytes_after: int
    rescale: Rescale | None = None
    note: str = ""
    reasons: tuple[Fault, ...] = ()

    def tensor_name(self, suffix: str) -> str:
        """Name of one of its tensors; the layer without a name is the model itself."""
        return f"{self.name}.{suffix}" if self.name else suffix

    @property
    def num_weights(self) -> int:
        """Elements of the weight matrix; 0 where there is none."""
        return self.stored.N * self.stored.K if self.stored else 0

    @property
    def method(self) -> str:
        """Canonical key of the method that the layer runs in."""
        return self.scheme.method if self.scheme else UNQUANTIZED

    @property
    def notes(self) -> str:
        """What else is done with it, in words."""
        rescaled = f"rescaled to the norm of {self.rescale.source}" if self.rescale else ""
        return ", ".join(filter(None, (rescaled, self.note)))

    @property
    def is_unquantized(self) -> bool:
        """Whether it runs in floats."""
        return self.method == UNQUANTIZED

    @property
    def asks_for_calibration(self) -> bool:
        """Whether it is to be made as only a conversion can."""
        if self.action == "calibrate":
            return True
        asked = self.scheme is not None and self.scheme.arguments.get("rounding")
        return asked == "calibrated" and self.action in ("quantize", "requantize")

    @property
    def bits_per_weight(self) -> float:
        """Served bits a weight, scales and zero points counted; 0 without a weight matrix."""
        return 8 * self.bytes_after / self.num_weights if self.num_weights else 0.0


@dataclasses.dataclass(frozen=True)
class ExpertGroup:
    """Experts of one layer, by ascending ids, that run in one scheme."""

    scheme: Scheme
    experts: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What every layer of a model runs as.

    Attributes:
        sources: name -> checkpoint, of every source that the preset names; `model` is the server's.
        layers: in natural order of their names.
        tied: tied layer name -> the layer whose weight it shares (`lm_head` -> the embedding).
        matches: which rules match which layers, shadowed ones too.
    """

    preset: Preset
    sources: Mapping[str, Source]
    target: Target
    layers: tuple[PlannedLayer, ...]
    problems: tuple[Problem, ...]
    tied: Mapping[str, str]
    matches: Matches

    @property
    def source(self) -> Source:
        """The checkpoint of --model-path, whose config.json builds the model."""
        return self.sources["model"]

    @functools.cached_property
    def modules(self) -> Mapping[str, tuple[PlannedLayer, ...]]:
        """Module name -> the layers that it runs, in the order that SGLang lays them out."""
        modules: dict[str, list[PlannedLayer]] = {}
        for layer in self.layers:
            modules.setdefault(layer.module, []).append(layer)
        return {
            name: tuple(sorted(layers, key=lambda layer: shard_order(layer.shard)))
            for name, layers in modules.items()
        }

    @functools.cached_property
    def expert_groups(self) -> Mapping[str, tuple[ExpertGroup, ...]]:
        """Module of experts -> its groups, in the order of their first experts."""
        found: dict[str, dict[object, tuple[Scheme, set[int]]]] = {}
        for layer in self.layers:
            if isinstance(layer.shard, ExpertShard) and layer.scheme is not None:
                groups = found.setdefault(layer.module, {})
                _, experts = groups.setdefault(layer.scheme.identity, (layer.scheme, set()))
                experts.add(layer.shard.expert)
        return {
            module: tuple(
                ExpertGroup(scheme, tuple(sorted(experts)))
                for scheme, experts in sorted(groups.values(), key=lambda group: min(group[1]))
            )
            for module, groups in found.items()
        }

    @functools.cached_property
    def by_name(self) -> Mapping[str, PlannedLayer]:
        """Layer name -> layer."""
        return {layer.name: layer for layer in self.layers}

    @property
    def calibrated_attentions(self) -> tuple[str, ...]:
        """The layers that hold scales of the KV cache which a conversion computes from text."""
        return tuple(layer.name for layer in self.layers if layer.action == "calibrate")

    @property
    def errors(self) -> tuple[Problem, ...]:
        """The problems that stop the work."""
        return tuple(p for p in self.problems if p.severity == "error")

    @property
    def bytes_before(self) -> int:
        """Bytes of all stored tensors that the plan takes."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of all served tensors, over all ranks."""
        return sum(layer.bytes_after for layer in self.layers)

    def not_calibrated(self) -> list[Problem]:
        """What keeps it from being composed without a calibration: layers that ask for one."""
        scaled = set(self.calibrated_attentions)
        names = [x.name for x in self.layers if x.asks_for_calibration and x.name not in scaled]
        what = "rounding: calibrated is not done while a model is loaded"
        convert = (
            f"run mixedprec convert --model {self.source.path} --preset {self.preset.path} "
            "--out DIR and serve DIR"
        )
        remedy = f"{convert}, or write rounding: nearest"
        problems = [Problem(name, what, remedy, "not-calibrated") for name in names]
        if self.calibrated_attentions:
            where = f"{self.preset.path}: kv_cache.scales"
            what = "scales of the KV cache are not calibrated while a model is loaded"
            problems.append(Problem(where, what, convert, "not-calibrated"))
        return fold_problems(problems)

    def servable(self) -> Plan:
        """The plan with what keeps it from being served as it is loaded among its problems."""
        return dataclasses.replace(self, problems=(*self.problems, *self.not_calibrated()))

    def check(self) -> Plan:
        """Return the plan itself if it can be carried out.

        Raises:
            PlanError: with every error of the plan.
        """
        if self.errors:
            raise PlanError(self.errors)
        return self
