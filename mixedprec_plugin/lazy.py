"""Objects named by lazy `package.module:Name` strings."""

from __future__ import annotations

import importlib
from typing import Any


def load_object(lazy: str) -> Any:
    """Import what a lazy string names.

    Args:
        lazy: `package.module:Name`.
    Raises:
        ImportError: the module or the name is not there.
    """
    module_name, _, attribute = lazy.partition(":")
    module = importlib.import_module(module_name)
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        raise ImportError(f"{module_name} has no {attribute!r}") from error
