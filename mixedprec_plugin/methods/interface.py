"""What the package knows of a quantization method, and of a format that it only reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from mixedprec_plugin.methods.cards import Gpu
from mixedprec_plugin.methods.stored import Said, StoredFormat, Tensors, TensorSpec

Arguments = Mapping[str, Any]
Device = Literal["cuda", "cpu"]


@dataclasses.dataclass(frozen=True)
class Target:
    """What is planned for.

    Attributes:
        device: `cuda`, or `cpu` for the CPU platform.
        tp_size: number of tensor-parallel ranks.
        dtype: dtype that the model runs in, as a safetensors name.
        gpu: the GPU of each rank; None where it is not known, or there is none.
    """

    device: Device = "cuda"
    tp_size: int = 1
    dtype: str = "BF16"
    gpu: Gpu | None = None


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """The shape of one linear layer as the shape rules see it.

    Attributes:
        N: output features of the unfused layer.
        K: input features.
        shard_sizes: output features of every shard of the fused module that the layer is part of,
            in order; `(N,)` for a layer of its own.
        parallel: how the layer is split over tensor-parallel ranks.
        tp_size: number of tensor-parallel ranks.
        dtype: dtype that the model runs in, as a safetensors name (`BF16` or `F16`).
        shard_ranks: over how many ranks each shard is split under column parallelism, in the order
            of `shard_sizes`; empty stands for `tp_size` each. Less for the key and value shards of
            a model with fewer key-value heads than ranks: SGLang repeats those.
        is_expert: whether the layer is a projection of one expert; gate and up are shards of `w13`.
        is_head: whether it is `lm_head`; then `shard_sizes` is the padded vocabulary, and `N` what
            is stored of it.
        has_bias: whether a bias is added to its outputs.
    """

    N: int
    K: int
    shard_sizes: tuple[int, ...]
    parallel: Literal["column", "row", "replicated"]
    tp_size: int = 1
    dtype: str = "BF16"
    shard_ranks: tuple[int, ...] = ()
    is_expert: bool = False
    is_head: bool = False
    has_bias: bool = False


class Fault(NamedTuple):
    """Why a layer is not served: rule `shape` on any GPU, `gpu` on the one that is planned for.

    Attributes:
        remedy: where the method knows one; others are tried.
    """

    rule: str
    text: str
    remedy: str = ""


def choice(description: str, values: Sequence[Any]) -> dict[str, Any]:
    """Return the JSON Schema of an argument that takes some values, the first by default."""
    kind = {"type": "boolean"} if all(isinstance(value, bool) for value in values) else {}
    return {"description": description, **kind, "enum": list(values), "default": values[0]}


class Alternative(NamedTuple):
    """What to try where a method refuses a layer.

    Attributes:
        method: canonical name.
        settings: arguments to try, in order; those that are not named are the reader's own for the
            same method, and the defaults for another one.
    """

    method: str
    settings: tuple[Arguments, ...] = ({},)


@dataclasses.dataclass(frozen=True)
class Rounding:
    """How good a method's rounding is.

    Attributes:
        rank: for `on_fused_conflict: highest`; bits a weight, then quality.
        limit: relative RMS distance to the original, |W - R| / |R|, beyond which a layer is not
            explained by rounding alone; see `verify.thresholds`.
        error: (N, K) -> expected relative RMS error of a normally distributed [N, K] weight; 0
            where it is not known.
    """

    rank: float
    limit: float
    error: Callable[[int, int], float] = lambda _N, _K: 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """A way to store layers: every method is one, and some are only read.

    Attributes:
        name: what it is called; of a method, the registry key.
        recognize: (tensors, what config.json says) -> how a layer is stored; None if it is not so.
        read_config: lower-case `quant_method` of config.json -> reader of what it says of a layer.
        faults_as_stored: (stored, layer shape, target) -> why SGLang's own class, under `method:
            auto`, does not serve an expert, or computes it wrongly; None for a method's `faults`.
            Where it has no remedy, another method or source is one.
    """

    name: str
    recognize: Callable[[Tensors, Said], StoredFormat | None] = lambda _tensors, _said: None
    read_config: Mapping[str, Callable[[Mapping[str, Any], str], Said]] = dataclasses.field(
        default_factory=dict
    )
    faults_as_stored: Callable[[StoredFormat, LayerShape, Target], list[Fault]] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(Format):
    """A quantization method: its arguments, its stored form and the SGLang classes that run it.

    Other packages offer theirs in the entry-point group `mixedprec.methods`.

    Attributes:
        title: what it is, in one line, for people.
        description: what its weights and activations become, in a sentence, for the schema.
        aliases: other names that people type -> the arguments that the name implies.
        schema: argument -> its JSON Schema, with `description`, `enum` and `default`.
        config_classes: platform -> lazy `package.module:Class` of SGLang's config. Platforms are
            `cuda`, `cpu` and, for GPUs below `fallback_below`, `cuda_fallback`; empty if SGLang's
            unquantized methods serve it.
        config_arguments: (arguments, key of config_classes) -> keyword arguments of that class's
            constructor; pure.
        stored: (arguments, N, K, dtype) -> parameter suffix -> its dtype and shape, exactly what
            the codec makes and what a checkpoint must hold; dtype is that of the running model.
        declare: arguments -> what config.json's `quantization_config` says of such a checkpoint;
            `read_config` reads it back.
        faults: (arguments, layer shape, target) -> why SGLang does not serve the layer: ranks,
            shape, and what the target's GPU lacks beside `min_capability`.
        alternatives: what to try instead, the nearest in size and quality first.
        rounding: arguments -> how good it is.
        searched: arguments that a search for a preset tries; those that are not named are the
            defaults, and what can be calibrated is tried so, too. None for what quantizes nothing.
        codec: lazy module of `quantize.codec.Codec`; empty if there is nothing to store.
        min_capability: least CUDA compute capability, as major * 10 + minor.
        fallback_below: CUDA compute capability below which `cuda_fallback` is the class; 0 if there
            is no such class.
        why_not_repack: (stored, arguments, tensors, may round) -> why the method cannot hold
            exactly the numbers of a layer that is stored otherwise: empty if it can, None if the
            two have nothing in common. Where only values can tell, it may, unless a second rounding
            is allowed, which is right whatever they are.
        complete: (arguments, stored) -> arguments, with what a preset leaves to the source.
        conflict: arguments -> why they contradict each other; empty if they do not.
        sglang: lazy `package.module` of what SGLang needs of the method, empty if nothing; imported
            where a model is built. Each of these names may be in it:
            `UNSUMMED_EXPERTS: tuple[type, ...]`: SGLang's methods for its experts that can return
            every choice's output; on CUDA where they run in Triton's or Marlin's kernels.
            `repaired(config) -> config`: a config of SGLang's for it -> the one whose layers
            compute rightly; all others are returned as they are.
            `CPU_EXPERTS: type`: its method for groups of experts on the CPU platform, where it has
            no config class.
            `asked_of_model(config) -> Mapping[str, Any]`: attributes that its kernels ask the
            config of the whole model for.
        kernel: (arguments, layer shape, compute capability) -> the kernel that a linear layer runs
            in on CUDA, in the words of docs/cuda.md; empty if it is not known. Asked for layers
            without faults only; of experts `moe_kernels` tells it.
        serves_heads: whether SGLang's class on CUDA serves `lm_head`; most leave it unquantized.
        serves_linear: whether SGLang's class serves linear layers, and not experts alone.
        adds_expert_biases: whether its experts add biases, as gpt-oss's have them, and run the gate
            that these come with.
        moe_kernels: SGLang's kernels that its experts run in where no backend is asked for; empty
            if SGLang chooses by what is stored.
        moe_backends: explicit values of --moe-runner-backend that its experts really run in;
            SGLang's classes pass others over without a word (`create_moe_runner` in
            quantization/{unquant,fp8,blockwise_int8}.py). Marlin's run where none is asked for
            alone (gptq_kernels.py, awq_moe.py: `assert get_moe_runner_backend().is_auto()`).
        why_not_quantize: arguments -> why a layer cannot be quantized with them and must be stored
            so; empty if it can.
        quantizes_parts: whether a part of a weight whose edges lie between the words and scales of
            `stored` is quantized to that part of the whole's tensors, and a tensor [K] follows from
            the shape; then a rank makes its own part alone.
    """

    title: str
    description: str
    aliases: Mapping[str, Arguments]
    schema: Mapping[str, Mapping[str, Any]]
    stored: Callable[[Arguments, int, int, str], dict[str, TensorSpec]]
    declare: Callable[[Arguments], dict[str, Any]]
    faults: Callable[[Arguments, LayerShape, Target], list[Fault]]
    rounding: Callable[[Arguments], Rounding]
    alternatives: tuple[Alternative, ...] = ()
    searched: tuple[Arguments, ...] = ({},)
    config_classes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    config_arguments: Callable[[Arguments, str], dict[str, Any]] = lambda _arguments, _key: {}
    codec: str = ""
    min_capability: int = 75
    fallback_below: int = 0
    why_not_repack: Callable[[StoredFormat, Arguments, Tensors, bool], str | None] = (
        lambda _stored, _arguments, _tensors, _may_round: None
    )
    complete: Callable[[Arguments, StoredFormat], Arguments] = lambda arguments, _stored: arguments
    conflict: Callable[[Arguments], str] = lambda _arguments: ""
    why_not_quantize: Callable[[Arguments], str] = lambda _arguments: ""
    quantizes_parts: bool = False
    sglang: str = ""
    kernel: Callable[[Arguments, LayerShape, int], str] = lambda _arguments, _shape, _gpu: ""
    serves_heads: bool = False
    serves_linear: bool = True
    adds_expert_biases: bool = False
    moe_kernels: Literal["triton", "marlin", ""] = ""
    moe_backends: frozenset[str] = frozenset()

    @property
    def defaults(self) -> Arguments:
        """Every argument -> its default."""
        return {name: entry["default"] for name, entry in self.schema.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """The name and the aliases."""
        return (self.name, *self.aliases)

    def config_key(self, platform: str, capability: int | None) -> str:
        """The key of `config_classes` for a platform; old GPUs may have a class of their own.

        Args:
            capability: CUDA compute capability; None where there is no GPU, or it is not known.
        """
        is_old = capability is not None and capability < self.fallback_below
        return "cuda_fallback" if platform == "cuda" and is_old else platform

    def holds(
        self,
        arguments: Arguments,
        N: int,
        K: int,
        description: str,
        suffixes: Iterable[str],
        *,
        is_served: bool = True,
        **more: Any,
    ) -> StoredFormat:
        """Describe a layer that is stored in the method's form.

        Args:
            is_served: whether the method takes its tensors as they are.
            arguments, more: as of `StoredFormat`.
        """
        return StoredFormat(
            self.name if is_served else "",
            arguments if is_served else {},
            N,
            K,
            description,
            encoding=self.name,
            suffixes=frozenset(suffixes),
            codec=self.codec,
            like=self.name,
            limit=self.rounding(arguments).limit,
            **more,
        )
