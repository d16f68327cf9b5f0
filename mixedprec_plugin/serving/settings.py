"""What the user asked of the load format, as it travels to every rank."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from mixedprec_plugin.convert.parts import parse_size
from mixedprec_plugin.errors import Problem, UsageError

# field of `Settings` -> key of SGLang's `model_loader_extra_config`, which argparse gives our flag
KEYS: Mapping[str, str] = {
    "config": "mixedprec_config",
    "overrides": "mixedprec_set",
    "plan_path": "mixedprec_plan",
    "verify": "mixedprec_verify",
    "cache": "mixedprec_cache",
    "quantize_on": "mixedprec_quantize_on",
    "inputs": "mixedprec_inputs",
    "input_tokens": "mixedprec_inputs_tokens",
}
PLACES = ("device", "cpu")
_INPUT_TOKENS = 2048


@dataclasses.dataclass(frozen=True)
class Settings:
    """The load format's settings.

    Attributes:
        config: path or packaged name of the preset; empty for the one that a converted checkpoint
            carries.
        overrides: `KEY=VALUE` overrides of preset keys.
        plan_path: where to write the plan as JSON at start; empty for nowhere.
        verify: checkpoint folder that the composed layers are compared with; empty for none.
        cache: most bytes of layers that are kept for the next start, such as `64GiB` or `0`; empty
            for MIXEDPREC_CACHE_SIZE, or 64GiB.
        quantize_on: where weights are quantized, `cpu` or `device`; empty for the former.
        inputs: folder that what the layers read is gathered in; empty for none.
        input_tokens: how many tokens of it; empty for 2,048.
    """

    config: str = ""
    overrides: tuple[str, ...] = ()
    plan_path: str = ""
    verify: str = ""
    cache: str = ""
    quantize_on: str = ""
    inputs: str = ""
    input_tokens: str = ""

    @property
    def cache_bytes(self) -> int:
        """Most bytes of layers that are kept.

        Raises:
            UsageError: it is no size.
        """
        size, where = self.cache, "--mixedprec-cache"
        if not size:
            size, where = os.environ.get("MIXEDPREC_CACHE_SIZE", "64GiB"), "MIXEDPREC_CACHE_SIZE"
        return 0 if size == "0" else parse_size(size, where)

    @property
    def num_input_tokens(self) -> int:
        """How many tokens are gathered.

        Raises:
            UsageError: it is no number of them.
        """
        if not self.input_tokens:
            return _INPUT_TOKENS
        # only this needs torch
        from mixedprec_plugin.calibrate.gathered import MIN_TOKENS

        if not self.input_tokens.isdecimal() or int(self.input_tokens) < MIN_TOKENS:
            what = f"{self.input_tokens!r} is no number of tokens (expected {MIN_TOKENS} or more)"
            raise UsageError(Problem("--mixedprec-inputs-tokens", what))
        return int(self.input_tokens)

    def to_extra_config(self) -> dict[str, Any]:
        said = {key: getattr(self, field) for field, key in KEYS.items()}
        return {key: value for key, value in said.items() if value or key == KEYS["config"]}


def parse_extra_config(extra: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Read SGLang's `model_loader_extra_config`, a mapping or its JSON.

    Raises:
        UsageError: it is neither.
    """
    where = "--model-loader-extra-config"
    try:
        value = json.loads(extra) if isinstance(extra, str) and extra else extra or {}
    except ValueError as error:
        raise UsageError(Problem(where, f"is not JSON ({error})")) from error
    if not isinstance(value, Mapping):
        raise UsageError(Problem(where, "is not a JSON object"))
    return dict(value)


def split_extra_config(
    extra: str | Mapping[str, Any] | None,
) -> tuple[Settings | None, dict[str, Any]]:
    """Take our settings out of an extra config.

    Returns:
        the settings, None if none of them are there; and what is left for SGLang.
    Raises:
        UsageError: it is none, or one of our keys has a value of the wrong type.
    """
    extra = parse_extra_config(extra)
    rest = {key: value for key, value in extra.items() if key not in KEYS.values()}
    if len(rest) == len(extra):
        return None, rest
    given = {field: extra[key] for field, key in KEYS.items() if extra.get(key) is not None}
    overrides = given.pop("overrides", ())
    wrong = [
        Problem(KEYS[field], f"{value!r} is not text")
        for field, value in given.items()
        if not isinstance(value, str)
    ]
    if not isinstance(overrides, list | tuple) or not all(isinstance(x, str) for x in overrides):
        wrong.append(Problem(KEYS["overrides"], f"{overrides!r} is not a list of KEY=VALUE"))
    if not wrong and given.get("quantize_on", "") not in ("", *PLACES):
        what = f"{given['quantize_on']!r} (expected {' or '.join(PLACES)})"
        wrong.append(Problem(KEYS["quantize_on"], what))
    if wrong:
        raise UsageError(wrong)
    return Settings(overrides=tuple(overrides), **given), rest


def read_settings(server_args: Any) -> Settings:
    """The settings that the command line or a caller of `sgl.Engine` left in ServerArgs."""
    settings, _ = split_extra_config(server_args.model_loader_extra_config)
    return settings or Settings()
