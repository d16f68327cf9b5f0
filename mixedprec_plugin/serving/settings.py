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
_KEYS = (CONFIG_KEY, SET_KEY, PLAN_KEY)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The load format's settings.

    Attributes:
        config: path or packaged name of the preset.
        overrides: `KEY=VALUE` overrides of preset keys.
        plan_path: where to write the plan as JSON at start; empty for nowhere.
    """

    config: str
    overrides: tuple[str, ...] = ()
    plan_path: str = ""

    def to_extra_config(self) -> dict[str, Any]:
        """The settings as entries of SGLang's `model_loader_extra_config`."""
        extra: dict[str, Any] = {CONFIG_KEY: self.config}
        if self.overrides:
            extra[SET_KEY] = list(self.overrides)
        if self.plan_path:
            extra[PLAN_KEY] = self.plan_path
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
        the settings, None if there is no preset among them; and what is left for SGLang.
    Raises:
        UsageError: one of our keys has a value of the wrong type, or comes without a preset.
    """
    rest = {key: value for key, value in extra.items() if key not in _KEYS}
    config, overrides, plan_path = (extra.get(key) for key in _KEYS)
    wrong = [
        Problem(key, f"{value!r} is not {kind}")
        for key, value, kind, fits in (
            (CONFIG_KEY, config, "a path", config is None or isinstance(config, str)),
            (
                SET_KEY,
                overrides,
                "a list of KEY=VALUE",
                overrides is None or _is_strings(overrides),
            ),
            (PLAN_KEY, plan_path, "a path", plan_path is None or isinstance(plan_path, str)),
        )
        if not fits
    ]
    if not config and (overrides or plan_path):
        wrong.append(Problem(CONFIG_KEY, "is missing", "name a preset"))
    if wrong:
        raise UsageError(wrong)
    if not config:
        return None, rest
    return Settings(str(config), tuple(overrides or ()), str(plan_path or "")), rest


def read_settings(server_args: Any) -> Settings:
    """The settings that the command line or a caller of `sgl.Engine` left in ServerArgs.

    Raises:
        UsageError: there are none.
    """
    settings, _ = split_extra_config(parse_extra_config(server_args.model_loader_extra_config))
    if settings is None:
        raise UsageError(
            Problem(
                "model_loader_extra_config",
                "names no preset",
                'pass model_loader_extra_config={"mixedprec_config": PATH}',
                "flags",
            )
        )
    return settings


def _is_strings(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
