"""What the user asked of the load format, as it travels to every rank."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from mixedprec_plugin.errors import Problem, UsageError

CONFIG_KEY = "mixedprec_config"
SET_KEY = "mixedprec_set"
PLAN_KEY = "mixedprec_plan"
VERIFY_KEY = "mixedprec_verify"
_KEYS = (CONFIG_KEY, SET_KEY, PLAN_KEY, VERIFY_KEY)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The load format's settings.

    Attributes:
        config: path or packaged name of the preset; empty for the one that a converted checkpoint
            carries.
        overrides: `KEY=VALUE` overrides of preset keys.
        plan_path: where to write the plan as JSON at start; empty for nowhere.
        verify: checkpoint folder that the composed layers are compared with; empty for none.
    """

    config: str = ""
    overrides: tuple[str, ...] = ()
    plan_path: str = ""
    verify: str = ""

    def to_extra_config(self) -> dict[str, Any]:
        """The settings as entries of SGLang's `model_loader_extra_config`."""
        extra: dict[str, Any] = {CONFIG_KEY: self.config}
        if self.overrides:
            extra[SET_KEY] = list(self.overrides)
        if self.plan_path:
            extra[PLAN_KEY] = self.plan_path
        if self.verify:
            extra[VERIFY_KEY] = self.verify
        return extra


def parse_extra_config(extra: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Read SGLang's `model_loader_extra_config`, a mapping or its JSON.

    Raises:
        UsageError: it is neither.
    """
    if not extra:
        return {}
    if isinstance(extra, Mapping):
        return dict(extra)
    try:
        value = json.loads(extra)
    except ValueError as error:
        raise UsageError(
            Problem("--model-loader-extra-config", f"is not JSON ({error})")
        ) from error
    if not isinstance(value, dict):
        raise UsageError(Problem("--model-loader-extra-config", "is not a JSON object"))
    return value


def split_extra_config(extra: Mapping[str, Any]) -> tuple[Settings | None, dict[str, Any]]:
    """Take our settings out of an extra config.

    Returns:
        the settings, None if none of them are there; and what is left for SGLang.
    Raises:
        UsageError: one of our keys has a value of the wrong type.
    """
    rest = {key: value for key, value in extra.items() if key not in _KEYS}
    if len(rest) == len(extra):
        return None, rest
    texts = {key: extra.get(key) for key in (CONFIG_KEY, PLAN_KEY, VERIFY_KEY)}
    wrong = [
        Problem(key, f"{value!r} is not a path")
        for key, value in texts.items()
        if value is not None and not isinstance(value, str)
    ]
    overrides = extra.get(SET_KEY)
    if overrides is not None and not _is_strings(overrides):
        wrong.append(Problem(SET_KEY, f"{overrides!r} is not a list of KEY=VALUE"))
    if wrong:
        raise UsageError(wrong)
    config, plan_path, verify = (str(value or "") for value in texts.values())
    return Settings(config, tuple(overrides or ()), plan_path, verify), rest


def read_settings(server_args: Any) -> Settings:
    """The settings that the command line or a caller of `sgl.Engine` left in ServerArgs."""
    settings, _ = split_extra_config(parse_extra_config(server_args.model_loader_extra_config))
    return settings or Settings()


def _is_strings(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
