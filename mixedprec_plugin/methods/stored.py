"""How one layer is stored, and what config.json says of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mixedprec_plugin.checkpoint.headers import DTYPE_BITS, StoredTensor
from mixedprec_plugin.checkpoint.patterns import matches as matches

if TYPE_CHECKING:
    import torch

FLOAT_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
FLOAT = "float"

Tensors = Mapping[str, StoredTensor]


class TensorSpec(NamedTuple):
    """The dtype and shape of one stored tensor.

    Attributes:
        dtype: safetensors dtype name (`BF16`, `F16`, `F32`, `F8_E4M3`, `I8`, `I32`). Where this
            says one of `BF16`, `F16`, `F32`, a checkpoint may hold another of the three: the
            weight loaders cast.
        shape: the stored shape; `()` and `(1,)` are interchangeable in a checkpoint.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its length in a file."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclasses.dataclass(frozen=True)
class Said:
    """What config.json says of one layer.

    Attributes:
        encoding: as `StoredFormat.encoding`; None where it says nothing that could be held against
            tensors.
        facts: as `StoredFormat.said`; only what is said.
        label: the format's own name for people, such as `float-quantized`; may be empty.
        config: the whole `quantization_config`.
        ignores: what an entry of an ignore list leaves out: the layer that it names, or whose name
            ends so; what is `below` that, too; or whatever has it anywhere `within` its name
            (`gate` in `gate_proj`).
        is_ignored: whether a list leaves the layer out; None where tools read it differently.
    """

    encoding: str | None = None
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    label: str = ""
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ignores: Literal["named", "below", "within"] = "below"
    is_ignored: bool | None = False

    def of(self, encoding: str) -> Mapping[str, Any]:
        """The facts, where config.json speaks of this encoding; else none."""
        return self.facts if self.encoding == encoding else {}


class Turn(NamedTuple):
    """A matrix that a checkpoint multiplies a layer's inputs or outputs by as it runs.

    x -> x A or y -> y A, with A [n, n] for each run of n features. In the layer's own weight it is
    W A^T or A^T W, and its bias b A.

    Attributes:
        place: `input` or `output`.
        size: n.
        matrix: the stored tensor that holds it, by its suffix; empty for Sylvester's, which follows
            from n.
        order: the stored tensor that both rows and columns are taken in the order of; may be empty.
        is_hadamard: whether it holds signs, of which A is the matrix over sqrt(n).
        is_transposed: whether A is its transpose.
    """

    place: str
    size: int
    matrix: str = ""
    order: str = ""
    is_hadamard: bool = True
    is_transposed: bool = False

    def of_value(self, value: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return value A; of floats [..., features]."""
        return self._times(value, tensors, self.is_transposed)

    def of_weight(self, weight: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return a weight, float32 [N, K], with A in it."""
        if self.place == "input":
            return self._times(weight, tensors, not self.is_transposed).float()
        return self._times(weight.T, tensors, self.is_transposed).T.float().contiguous()

    def _times(
        self, value: torch.Tensor, tensors: Mapping[str, torch.Tensor], transposed: bool
    ) -> torch.Tensor:
        from mixedprec_plugin.quantize import turns

        if not self.matrix:
            return turns.times_sylvester(value, self.size)
        matrix = tensors[self.matrix]
        matrix = turns.signs(matrix, self.matrix) if self.is_hadamard else matrix.double()
        if self.order:
            order = tensors[self.order].long()
            matrix = matrix[order][:, order]
        return turns.times(value, matrix.T if transposed else matrix)


@dataclasses.dataclass(frozen=True)
class StoredFormat:
    """How one layer is stored.

    Attributes:
        method: canonical name of the method that takes the tensors as they are, or an empty string
            where none does.
        arguments: the method's arguments as far as the stored tensors fix them.
        N: output features; 0 where the tensors do not tell.
        K: input features; 0 where the tensors do not tell.
        description: for people, such as `gptq 4-bit group 128`.
        encoding: `float`, `awq`, `gptq`, `fp8`, `int8`, `pack-quantized`, `nvfp4`, `torchao`, or an
            empty string where we only know a name; what config.json says is held against it.
        numbers: what the codes are, once read: `integers` in groups along K, 8-bit codes that are
            `scaled` by tiles, `fp4` in blocks along K, or neither.
        facts: what the tensors tell of `bits`, `group_size`, `block`, `strategy`, `symmetric`.
        said: what config.json says of the layer, where it speaks of the same encoding: the same
            facts, and what tensors cannot tell: `desc_act`, and `inputs`, how the layer's
            activations are quantized (`dynamic`, `group_size`; None where they are not).
        suffixes: the tensors that make up the weight matrix; a bias is none of them.
        codec: lazy module whose `read` gives the numbers, see `quantize.codec.Codec`; empty for
            floats, and for what cannot be read.
        how: the arguments of `read`.
        like: canonical name of the method whose rounding it has; may be empty.
        limit: as of `interface.Rounding`.
        filled: tensors that the method needs, that are not stored and that follow from the rest.
        factor: tensor [K] that the layer's inputs are multiplied by, and so are the columns of its
            weight; empty if there is none.
        turns: what its inputs and outputs are multiplied by as it runs, one a side at most.
        matrices: the tensors of `turns`, which may lie with another layer.
        obstacle: why the layer computes something else than its weight says; empty if it does not.
        no_class: why SGLang has no class that reads it as config.json says; empty if it has.
        disagreements: where the tensors contradict config.json or each other.
        format: name of the `interface.Format` that recognized it; empty where none did.
    """

    method: str
    arguments: Mapping[str, Any]
    N: int
    K: int
    description: str
    encoding: str = ""
    numbers: Literal["", "integers", "scaled", "fp4"] = ""
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    said: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    suffixes: frozenset[str] = frozenset()
    codec: str = ""
    how: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    like: str = ""
    limit: float = 0.0
    filled: Mapping[str, TensorSpec] = dataclasses.field(default_factory=dict)
    factor: str = ""
    turns: tuple[Turn, ...] = ()
    matrices: Mapping[str, StoredTensor] = dataclasses.field(default_factory=dict)
    obstacle: str = ""
    no_class: str = ""
    disagreements: tuple[str, ...] = ()
    format: str = ""

    @property
    def is_float(self) -> bool:
        """Whether the layer is not quantized."""
        return self.encoding == FLOAT

    @property
    def is_plain(self) -> bool:
        """Whether the stored "weight" is the layer's."""
        return self.is_float and not self.is_composed

    @property
    def is_composed(self) -> bool:
        """Whether more than its codes or floats make the layer's weight."""
        return bool(self.factor or self.turns)

    @property
    def turns_outputs(self) -> bool:
        """Whether its bias is another one than is stored."""
        return any(turn.place == "output" for turn in self.turns)

    @property
    def is_readable(self) -> bool:
        """Whether the weight's values can be had, as they are stored or dequantized."""
        return not self.obstacle and (self.is_float or bool(self.codec))

    def dequantize(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the weight, float32 [N, K], of a layer that is readable.

        Args:
            tensors: parameter suffix -> tensor, at least `suffixes`; not modified.
        Raises:
            ShapeError: as `quantize.codec.Codec.read`, or a stored matrix is not what it should be.
        """
        from mixedprec_plugin.quantize.codec import load_codec

        if self.codec:
            weight = load_codec(self.codec).read(tensors, self.how).dequantize()
        else:
            weight = tensors["weight"].float()
        if self.factor:
            weight = weight * tensors[self.factor].float()
        for turn in self.turns:
            weight = turn.of_weight(weight, tensors)
        return weight

    def own_bias(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the bias [N] of a layer that has one; `tensors` as for `dequantize`."""
        bias = tensors["bias"]
        for turn in self.turns:
            if turn.place == "output":
                bias = turn.of_value(bias.float(), tensors).float()
        return bias

    @property
    def is_one_group(self) -> bool:
        """Whether the one group is of the size that config.json names; tensors say all of K."""
        return self.facts.get("group_size") == -1 and self.said.get("group_size") == self.K


def unusable(
    tensors: Tensors, description: str, N: int = 0, K: int = 0, **more: Any
) -> StoredFormat:
    """Name a format that is neither served nor dequantized; `more` is as of `StoredFormat`."""
    suffixes = frozenset(tensors) - {"bias"}
    return StoredFormat("", {}, N, K, description, suffixes=suffixes, **more)


def incomplete(tensors: Tensors, what: str, missing: list[str], encoding: str = "") -> StoredFormat:
    """Name a layer that lacks tensors of its format."""
    names = " and ".join(missing)
    text = f"lacks {names} beside {', '.join(sorted(tensors))}"
    return unusable(tensors, f"{what} without {names}", encoding=encoding, disagreements=(text,))


def said_keys(config: Mapping[str, Any], **keys: str) -> dict[str, Any]:
    """Fact -> value, for the keys that a config has."""
    return {fact: config[key] for fact, key in keys.items() if config.get(key) is not None}


def strings(value: Any) -> list[str]:
    """The entries of a list in config.json, or its one entry."""
    if isinstance(value, str):
        return [value]
    return [str(entry) for entry in value] if isinstance(value, list | tuple) else []


def block_of(value: Any) -> list[int] | None:
    """A [rows, columns] of config.json; None where it is none."""
    is_pair = isinstance(value, list | tuple) and len(value) == 2
    return list(value) if is_pair and all(isinstance(n, int) and n > 0 for n in value) else None
