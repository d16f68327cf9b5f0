"""SGLang's own things, for tests of what they do."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any


def gptq_marlin(desc_act: bool = False) -> Any:
    """GPTQ for Marlin: 4 bits, groups of 128."""
    from sglang.srt.layers.quantization.gptq.gptq import GPTQMarlinConfig

    return GPTQMarlinConfig(4, 128, desc_act, True, False, {}, {})


def parsed(function: Any) -> ast.AST:
    """The syntax tree of a function or a method."""
    return ast.parse(textwrap.dedent(inspect.getsource(function)))
