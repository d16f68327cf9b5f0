"""The composite quantization config: for each module that the model builds, the plan's method."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase, ReplicatedLinear
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead

from mixedprec_plugin.checkpoint.source import Source
from mixedprec_plugin.errors import LoadError, Problem
from mixedprec_plugin.experts.composite import experts_method
from mixedprec_plugin.experts.groups import ExpertGroup
from mixedprec_plugin.experts.loading import keep_apart
from mixedprec_plugin.families.names import kv_scale
from mixedprec_plugin.families.table import family_of
from mixedprec_plugin.methods.construct import build_config, offered, repaired
from mixedprec_plugin.methods.registry import AUTO, METHODS, UNQUANTIZED
from mixedprec_plugin.plan.folding import fold_names
from mixedprec_plugin.plan.model import Plan, PlannedLayer
from mixedprec_plugin.preset.model import Scheme
from mixedprec_plugin.serving.late import check_config
from mixedprec_plugin.serving.module_names import ModuleNames
from mixedprec_plugin.serving.source_configs import (
    config_of_source,
    experts_method_under_auto,
    guard,
    refusals,
)

Others = Mapping[str, tuple[str | None, ...]]


class MixedPrecisionConfig(QuantizationConfig):
    """Answers SGLang's question "which method does this layer get?" with what the plan says.

    Not a subclass of any SGLang config and with a name of its own: SGLang takes shortcuts for
    whole-model FP8 that would be wrong for a mixed one (model_loader/loader.py:221, 1046).

    Attributes:
        plan: what every layer runs as.
        built: module name, as the plan spells it -> the module that the model built for it; filled
            while it is built.
        attentions: attention layer that has scales of the KV cache -> the modules that take them;
            filled once it is built.
        others: name that the plan does not know -> the planned module that each layer of this name
            is, in the order that SGLang builds them; None for one that stays unquantized. See
            `outline`.

    It also has the attributes that methods' kernels ask of it, see `asked_of_model` in
    `Method.sglang`.
    """

    def __init__(self, plan: Plan, others: Others = MappingProxyType({})) -> None:
        super().__init__()
        self.plan = plan
        self.others = others
        self._num_asked: Counter[str] = Counter()
        self.built: dict[str, torch.nn.Module] = {}
        family = family_of(plan.source.config)
        self._names = ModuleNames(plan.modules, family)
        self.attentions: dict[str, list[torch.nn.Module]] = {}
        tensors = (f"{layer.name}.{suffix}" for layer in plan.layers for suffix in layer.outputs)
        scales = filter(None, map(kv_scale, tensors))
        scaled = {name for scale in scales for name in scale.attentions}
        self._attention_names = ModuleNames(scaled, family)
        self.packed_modules_mapping = {
            module: list(shards) for module, shards in family.fused_modules.items()
        }
        self._children: dict[Any, QuantizationConfig] = {}

    def get_name(self) -> str:
        return "mixedprec"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Every dtype that some method runs in; each child is checked on its own."""
        return [torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """None of its own; each child is checked on its own."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """No file: the config is made from a plan."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        """Never called: the config is made from a plan."""
        raise LoadError("MixedPrecisionConfig is made from a plan, not from a config.json")

    def get_scaled_act_names(self) -> list[str]:
        """No method of ours scales activations."""
        return []

    def get_cache_scale(self, name: str) -> None:
        """None: scales of the KV cache are no layer's (models/granitemoehybrid.py:656)."""

    def apply_weight_name_mapper(self, hf_to_sglang_mapper: Any) -> None:
        """Take into account how a model renames the checkpoint's modules."""
        self._names.apply(hf_to_sglang_mapper)
        self._attention_names.apply(hf_to_sglang_mapper)

    def module_of(self, prefix: str) -> str | None:
        """The planned module that SGLang calls `prefix`; None if there is none.

        Raises:
            LoadError: several planned modules could be meant.
        """
        return self._names.find(prefix)

    def attention_of(self, prefix: str) -> str | None:
        """The attention layer that SGLang calls `prefix`, if the checkpoint has scales for it."""
        return self._attention_names.find(prefix)

    def can_fuse_shared_expert(self) -> bool:
        """Never: a shared expert is a layer of its own, in a scheme of its own.

        GLM-4-MoE's model does not ask; see `build_model`.
        Source: `quant_blocks_shared_experts_fusion` (models/deepseek_common/utils.py:159).
        """
        return False

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return SGLang's method for one module.

        Returns:
            None for embeddings, attention, and unquantized experts and heads, as SGLang expects it.
        Raises:
            LoadError: the plan does not know the module, the GPU or the model's dtype is none
                that the method runs on, or the method's SGLang class would leave it unquantized.
        """
        if isinstance(layer, ParallelLMHead):
            return self._head_method(layer, prefix)
        if not isinstance(layer, LinearBase | FusedMoE):
            return None
        if prefix in self.others:
            module = self.others[prefix][self._num_asked[prefix]]
            self._num_asked[prefix] += 1
            if module is None:
                return None if isinstance(layer, FusedMoE) else UnquantizedLinearMethod()
        else:
            module = self.module_of(prefix)
        if module is None:
            built = f"the model builds it ({type(layer).__name__})"
            what = f"{built}, but no layer of the checkpoint belongs to it"
            remedy = "the architecture names its modules otherwise than the checkpoint does"
            where, remedy = prefix or "(a layer without a name)", f"{remedy}; please report it"
            raise LoadError(Problem(where, what, remedy, "unknown-module"))
        self.built[module] = layer
        if isinstance(layer, FusedMoE):
            return self._experts_method(layer, module, prefix)
        planned = self.plan.modules[module][0]
        if planned.is_unquantized:
            return UnquantizedLinearMethod()
        return self._method_of(planned, layer, prefix)

    def _head_method(self, layer: ParallelLMHead, prefix: str) -> QuantizeMethodBase | None:
        """None for a head in floats, which is the embedding's where they are tied.

        SGLang's AWQ asks for sizes that only linear layers have (marlin_utils.py:211).
        """
        module = self.module_of(prefix)
        planned = None if module is None else self.plan.modules[module][0]
        if module is None or planned is None or planned.is_unquantized:
            return None
        self.built[module] = layer
        layer.input_size, layer.output_size = layer.embedding_dim, layer.num_embeddings_padded
        return self._method_of(planned, layer, prefix)

    def _experts_method(
        self, layer: FusedMoE, module: str, prefix: str
    ) -> QuantizeMethodBase | None:
        """SGLang's own method where the experts share a scheme; None for unquantized ones."""
        planned = self.plan.modules[module][0]
        keep_apart(layer)
        if planned.method == AUTO:
            child = self._child_under_auto(planned)
            with refusals(prefix, type(child).__name__):
                return guard(experts_method_under_auto(child, layer, prefix), prefix)
        groups = [
            ExpertGroup(
                group.experts,
                group.scheme.method,
                group.scheme.label,
                None if group.scheme.method == UNQUANTIZED else self._child(group.scheme),
            )
            for group in self.plan.expert_groups[module]
        ]
        return experts_method(layer, prefix, groups)

    def _method_of(
        self, planned: PlannedLayer, layer: torch.nn.Module, prefix: str
    ) -> QuantizeMethodBase:
        scheme = planned.scheme
        assert scheme is not None
        is_auto = scheme.method == AUTO
        child = self._child_under_auto(planned) if is_auto else self._child(scheme)
        with refusals(prefix, type(child).__name__) if is_auto else contextlib.nullcontext():
            asked = repaired(child, METHODS) if is_auto else child
            method = asked.get_quant_method(layer, prefix)
        if method is None or isinstance(method, UnquantizedLinearMethod):
            owner = f" ({type(child).__name__})" if is_auto else ""
            wanted = "as it is stored" if is_auto else f"in {scheme.label}"
            text = f"SGLang{owner} would leave it unquantized, not {wanted}"
            raise LoadError(Problem(prefix, text, rule="left-unquantized"))
        if isinstance(layer, ReplicatedLinear):
            _create_in_shards(method, self.plan.modules[planned.module])
        return guard(method, prefix) if is_auto else method

    def _child(self, scheme: Scheme) -> QuantizationConfig:
        def build() -> QuantizationConfig:
            return build_config(scheme.method, scheme.arguments, self.plan.target.device)

        return self._known(scheme.identity, scheme, build)

    def _child_under_auto(self, planned: PlannedLayer) -> QuantizationConfig:
        """One for each source, and of our own checkpoints for each that their layers came from."""
        assert planned.scheme is not None
        source = self.plan.sources[planned.source]
        said = source.quantization_config_of(planned.name)

        def build() -> QuantizationConfig:
            where = self._under_auto(source, said)
            return config_of_source(source, planned.name, self.packed_modules_mapping, where)

        return self._known((AUTO, source.name, repr(said)), planned.scheme, build)

    def _known(
        self, key: object, scheme: Scheme, build: Callable[[], QuantizationConfig]
    ) -> QuantizationConfig:
        if key not in self._children:
            child = build()
            check_config(self.plan, scheme, child)
            child.update_packed_modules_mapping(self.packed_modules_mapping)
            self._children[key] = child
            self._answer_for(child, METHODS if scheme.method == AUTO else (scheme.method,))
        return self._children[key]

    def _answer_for(self, child: QuantizationConfig, methods: Iterable[str] = METHODS) -> None:
        """Take over what a method's kernels ask of the whole model's config, in prefill graphs."""
        for method in methods:
            asked = offered(method, "asked_of_model")
            for name, value in asked(child).items() if asked else ():
                own = getattr(self, name, value)
                if own != value:
                    text = (
                        f"has {method} layers whose {name} is {own} and others where it is "
                        f"{value}, and in prefill graphs SGLang asks the whole model for one"
                    )
                    remedy = "take them from one source"
                    raise LoadError(Problem("the plan", text, remedy, "model-attribute"))
                setattr(self, name, value)

    def _under_auto(self, source: Source, said: Mapping[str, Any]) -> str:
        """The layers that run as a source stores them by what it says, for messages."""
        layers = (x.name for x in self.plan.layers if x.method == AUTO and x.source == source.name)
        return ", ".join(fold_names(x for x in layers if source.quantization_config_of(x) == said))


def _create_in_shards(method: QuantizeMethodBase, shards: Sequence[PlannedLayer]) -> None:
    """Let a layer that SGLang builds as one whole have a scale for each shard that has its own.

    It is q_a and kv_a of an MLA block, whose last one would be that of both
    (models/deepseek_v2.py, `fused_qkv_a_proj_with_mqa`).
    """
    sizes = [shard.stored.N for shard in shards if shard.stored is not None]
    if len(sizes) < 2 or all(math.prod(x.shape) > 1 for x in shards[0].outputs.values()):
        return
    create = method.create_weights

    def create_weights(layer: Any, input_size: int, _: list[int], *args: Any, **keys: Any) -> None:
        create(layer, input_size, sizes, *args, **keys)

    method.create_weights = create_weights
