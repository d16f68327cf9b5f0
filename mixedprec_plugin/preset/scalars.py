"""Plain YAML scalars, refused where YAML 1.1 and 1.2 read them differently."""

from __future__ import annotations

import re

from mixedprec_plugin.preset.tree import Scalar

_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?[0-9]+\.[0-9]*([eE][-+][0-9]+)?")
_FLOAT_1_2 = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_OCTAL_1_2 = re.compile(r"0o[0-7]+")
_TAG = "tag:yaml.org,2002:"
MAX_DIGITS = 18


class SurprisingScalarError(ValueError):
    """A scalar that another YAML reader would take for something else.

    Attributes:
        remedy: what to write instead.
    """

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.remedy = remedy


def read_scalar(text: str, tag: str) -> Scalar:
    """Turn an unquoted scalar into a value.

    Args:
        text: the scalar as written.
        tag: what YAML 1.1 takes it for.
    Raises:
        SurprisingScalarError: YAML 1.1 and YAML 1.2 disagree about it, or no preset needs it.
    """
    kind = tag.removeprefix(_TAG)
    if kind == "null":
        return None
    if kind == "bool":
        return _read_bool(text)
    if kind == "int":
        return _read_int(text)
    if kind == "float":
        return _read_float(text)
    if kind == "timestamp":
        raise SurprisingScalarError(f"{text} is a date in YAML", f"write '\"{text}\"'")
    if kind != "str":
        raise SurprisingScalarError(f"{text} means something in YAML", f"write '\"{text}\"'")
    if _OCTAL_1_2.fullmatch(text):
        raise SurprisingScalarError(
            f"{text} is text in YAML 1.1 and {int(text[2:], 8)} in YAML 1.2",
            f"write {int(text[2:], 8)} or '\"{text}\"'",
        )
    if _FLOAT_1_2.fullmatch(text):
        number = float(text) if len(text) <= MAX_DIGITS else text
        shown = int(number) if isinstance(number, float) and number.is_integer() else number
        raise SurprisingScalarError(
            f"{text} is text in YAML 1.1 and a number in YAML 1.2",
            f"write {shown} or '\"{text}\"'",
        )
    return text


def _read_bool(text: str) -> bool:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    meaning = "true" if text.lower() in ("yes", "on") else "false"
    raise SurprisingScalarError(
        f"{text} is {meaning} in YAML 1.1 and text in YAML 1.2",
        f"write {meaning} or '\"{text}\"'",
    )


def _read_int(text: str) -> int:
    if _INT.fullmatch(text):
        if len(text) > MAX_DIGITS:
            raise SurprisingScalarError(
                f"{text[:20]}… has more than {MAX_DIGITS} digits", "write a smaller number"
            )
        return int(text)
    digits = text.replace("_", "").lstrip("-+")
    if ":" in digits:
        raise SurprisingScalarError(
            f"{text} is a number in base 60 in YAML 1.1 and text in YAML 1.2",
            f"write '\"{text}\"'",
        )
    base = {"0x": 16, "0b": 2}.get(digits[:2].lower(), 8 if digits.startswith("0") else 10)
    value = int(digits[2:] if base in (16, 2) else digits, base)
    value = -value if text.startswith("-") else value
    raise SurprisingScalarError(
        f"{text} is {value} in YAML 1.1 and may be something else in YAML 1.2",
        f"write {value} or '\"{text}\"'",
    )


def _read_float(text: str) -> float:
    if _FLOAT.fullmatch(text):
        return float(text)
    if ":" in text:
        what = f"{text} is a number in base 60 in YAML 1.1 and text in YAML 1.2"
        raise SurprisingScalarError(what, f"write '\"{text}\"'")
    raise SurprisingScalarError(
        f"{text} is not a plain decimal number", f"write it as in 0.5, or '\"{text}\"'"
    )
