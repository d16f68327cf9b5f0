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
# where a server tells its plan
PLAN_ADDRESS = "/mixedprec/plan"
DOCUMENT_ADDRESS = f"{PLAN_ADDRESS}/document"
_INPUT_TOKENS = 2048


def _setting(text: str, initial: Any = "", **options: Any) -> Any:
    """A field, and how `argparse` takes its flag."""
    options["help"] = text
    return dataclasses.field(default=initial, metadata=options)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The load format's settings, as their flags' help says; empty where they are not given.

    Without `config` a converted checkpoint's own preset is taken.
    """

    config: str = _setting(
        "YAML preset that names a quantization method for each layer: a path, or the name of "
        "a packaged preset. A checkpoint that mixedprec convert wrote carries its own.",
        metavar="PRESET",
    )
    overrides: tuple[str, ...] = _setting(
        "Override a key of the preset, such as schemes.experts.group_size=64; repeatable.",
        (),
        metavar="KEY=VALUE",
        action="append",
        default=[],
    )
    plan_path: str = _setting("Write the plan to FILE as JSON at start.", metavar="FILE")
    verify: str = _setting(
        "Compare every composed layer with this checkpoint while loading, and do not serve a "
        "model that is too far from it.",
        metavar="DIR",
    )
    cache: str = _setting(
        "Keep what is quantized or repacked for the next start, up to SIZE, such as 20GiB; 0 "
        "keeps nothing (default: MIXEDPREC_CACHE_SIZE, or 64GiB; in ~/.cache/mixedprec).",
        metavar="SIZE",
    )
    quantize_on: str = _setting(
        "Where weights are quantized while they are loaded: on the CPU (the default), or on "
        "the device that serves them.",
        choices=PLACES,
    )
    inputs: str = _setting(
        "Gather what each layer reads of the first prompts, for mixedprec search --inputs. "
        "It slows prefill until there are enough tokens, and prompts can be read out of it.",
        metavar="FOLDER",
    )
    input_tokens: str = _setting(
        "How many tokens are gathered, an eighth of them of one pass at most (default: 2048).",
        metavar="N",
    )

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
            what = (
                f"{self.input_tokens!r} is not a number of tokens (expected {MIN_TOKENS} or more)"
            )
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
