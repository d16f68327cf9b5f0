"""Methods as another package would offer them through the entry-point group."""

from __future__ import annotations

import dataclasses

from mixedprec_plugin.methods import gptq

SPEC = dataclasses.replace(gptq.METHOD, name="foreign", aliases={"foreign_int4": {"bits": 4}})
TAKES_BUILT_IN_NAME = dataclasses.replace(gptq.METHOD, name="fp8", aliases={})
TAKES_ALIAS = dataclasses.replace(gptq.METHOD, name="mine", aliases={"int8": {}})
NOT_A_SPEC = {"name": "mine"}
