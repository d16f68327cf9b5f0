from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixedprec_plugin.errors import PresetError
from mixedprec_plugin.preset import reader
from mixedprec_plugin.preset.document import Findings
from mixedprec_plugin.preset.load import load_preset
from mixedprec_plugin.preset.reader import read_text
from tests.preset.conftest import Refuse, Write

RULES = "version: 1\nrules: [{match: '*', method: awq}]\n"

ALIAS_REMEDY = "point at the value with an interpolation such as ${schemes.NAME}"


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("on", 3, "on is true in YAML 1.1 and text in YAML 1.2; write true or '\"on\"'"),
        ("No", 3, "No is false in YAML 1.1 and text in YAML 1.2; write false or '\"No\"'"),
        ("010", 3, "010 is 8 in YAML 1.1 and 10 in YAML 1.2; write 8 or '\"010\"'"),
        ("-0x1F", 3, "-0x1F is -31 in YAML 1.1 and text in YAML 1.2; write -31 or '\"-0x1F\"'"),
        ("1_000", 3, "1_000 is 1000 in YAML 1.1 and text in YAML 1.2; write 1000 or '\"1_000\"'"),
        ("0o17", 3, "0o17 is text in YAML 1.1 and 15 in YAML 1.2; write 15 or '\"0o17\"'"),
        ("08", 3, "08 is text in YAML 1.1 and 8 in YAML 1.2; write 8 or '\"08\"'"),
        ("1e3", 3, "1e3 is text in YAML 1.1 and 1000.0 in YAML 1.2; write 1000.0 or '\"1e3\"'"),
        ("1:30", 3, "1:30 is 90 in YAML 1.1 and text in YAML 1.2; write 90 or '\"1:30\"'"),
        ("1:30.5", 3, "1:30.5 is 90.5 in YAML 1.1 and text in YAML 1.2; "
         "write 90.5 or '\"1:30.5\"'"),
        ("2024-01-31", 3, "2024-01-31 is a date in YAML 1.1 and text in YAML 1.2; "
         "write '\"2024-01-31\"'"),
        ("2024-13-31", 3, "2024-13-31 is special in YAML 1.1 and text in YAML 1.2; "
         "write '\"2024-13-31\"'"),
        (".inf", 3, ".inf is not a plain decimal number; write it as in 0.5, or '\".inf\"'"),
        ("=", 3, "= is special in YAML 1.1 and text in YAML 1.2; write '\"=\"'"),
        ("0x_", 3, "0x_ is special in YAML 1.1 and text in YAML 1.2; write '\"0x_\"'"),
        ("1" + ":59" * 400 + ".5", 3, "1:59:59:59:59:59:59:… is special in YAML 1.1 and text in "
         "YAML 1.2; write '\"1:59:59:59:59:59:59:…\"'"),
        ("-0b_", 3, "-0b_ is special in YAML 1.1 and text in YAML 1.2; write '\"-0b_\"'"),
        *((digits, 3, f"{digits[:20]}… has more than 18 digits; write a smaller number")
          for digits in ("9" * 30, "1_" + "1" * 5000, "0x" + "f" * 5000, "0" + "7" * 6000,
                         "0o" + "7" * 6000)),
        ("!!python/name:os.system x", 3, "the tag !!python/name:os.system is not read in presets; "
         "leave it out; put quotes around text"),
        ("!mine x", 3, "the tag !mine is not read in presets; leave it out; "
         "put quotes around text"),
        ("&a x", 3, f"the anchor &a is not read in presets; {ALIAS_REMEDY}"),
        ("*a", 3, "the alias *a is not read in presets; quote it if it is a pattern ('\"*a\"'), "
         "else point at the value with an interpolation such as ${schemes.NAME}"),
    ],
)  # fmt: skip
def test_surprising_scalar_is_refused_with_its_line(
    refuse: Refuse, text: str, line: int, what: str
) -> None:
    assert refuse(f"{RULES}description: {text}\n") == [f"p.yaml:{line}: description: {what}"]


@pytest.mark.parametrize(
    "text", ["true", "12", "-3", "0.5", "1.5e+3", "null", "~", "yes!", "v1", "''", "0x1F", "'on'"]
)
def test_scalars_that_all_yaml_versions_agree_on_are_read(text: str) -> None:
    findings = Findings()
    assert read_text(f"key: {text}\n", "p.yaml", findings) is not None
    assert not findings.has_errors()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1: a\n", "p.yaml:3: the key 1 is a YAML int (expected text); write '\"1\"'"),
        ("on: a\n", "p.yaml:3: the key on is a YAML bool (expected text); write '\"on\"'"),
        ("null: a\n", "p.yaml:3: the key null is a YAML null (expected text); write '\"null\"'"),
        (
            "<<: {a: 1}\n",
            "p.yaml:3: the merge key << is not read in presets; use 'extends', or an interpolation "
            "such as ${schemes.NAME}",
        ),
        (
            "? [a]\n: 3\n",
            "p.yaml:3: a list is used as a key (expected text); put quotes around a value that "
            "starts with '{' or '['",
        ),
        (
            "version: 1\n",
            "p.yaml:3: version: 'version' stands here a second time (first on line 1); "
            "keep one of them",
        ),
        (
            "schemes:\n  a: {method: awq, method: gptq}\n",
            "p.yaml:4: schemes.a.method: 'method' stands here a second time (first on line 4); "
            "keep one of them",
        ),
        (
            "---\nversion: 1\n",
            "p.yaml:3: a second document starts (expected one); keep one preset in a file",
        ),
    ],
)
def test_keys_and_documents_are_checked(refuse: Refuse, text: str, message: str) -> None:
    assert message in refuse(RULES + text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "p.yaml: the file is empty (expected a mapping with 'version' and 'rules')"),
        (
            "# nothing\n",
            "p.yaml: the file is empty (expected a mapping with 'version' and 'rules')",
        ),
        (
            "- a\n",
            "p.yaml:1: a list is not a preset (expected a mapping with 'version' and 'rules')",
        ),
        ("a\n", "p.yaml:1: 'a' is not a preset (expected a mapping with 'version' and 'rules')"),
        (
            "rules:\n  - {match: *.q_proj, method: awq}\n",
            "p.yaml:2: is not YAML: expected alphabetic or numeric character, but found '.'; "
            'put patterns in quotes: match: "*.q_proj"',
        ),
        (
            "rules:\n\t- a\n",
            "p.yaml:2: is not YAML: found character '\\t' that cannot start any token; "
            "indent with spaces, not tabs",
        ),
        (
            "rules:\n  -\tmatch: a\n  \tmethod: b\n",
            "p.yaml:2: is not YAML: found character '\\t' that cannot start any token; "
            "indent with spaces, not tabs",
        ),
        (
            "schemes:\n  a: {b: ${schemes.c}}\n",
            "p.yaml:2: is not YAML: a ',' or '}' is missing before this; "
            'within { } or [ ] put interpolations in quotes: "${schemes.NAME}"',
        ),
        *(
            (
                f'\na: "\\U{code}"\n',
                "p.yaml:2: is not YAML: an escape names no character (expected "
                "\\U0010FFFF at most); remove it",
            )
            for code in ("FFFFFFFF", "00110000")
        ),
        (
            "a: b: c\n",
            "p.yaml:1: is not YAML: a ':' stands where no key can be; "
            "indent the keys of a mapping alike",
        ),
        ("a: \x01\n", "p.yaml:1: the character U+0001 is not allowed in YAML; remove it"),
        ("[" * 5000, "p.yaml:1: nested more than 32 deep; a preset needs four levels"),
        ("? " * 5000, "p.yaml:1: nested more than 32 deep; a preset needs four levels"),
        (
            "null\n",
            "p.yaml:1: None is not a preset (expected a mapping with 'version' and 'rules')",
        ),
    ],
)
def test_text_that_is_no_preset_is_refused(refuse: Refuse, text: str, message: str) -> None:
    assert refuse(text) == [message]


@pytest.mark.parametrize("ends", ["\r", "\r\n", "\x85", "\u2028", "\u2029"])
def test_line_of_a_syntax_error_is_found_with_any_line_ends(write: Write, ends: str) -> None:
    path = write("p.yaml", "")
    path.write_bytes(f"version: 1{ends}# a{ends}# b{ends}  rules: [{ends}".encode())
    with pytest.raises(PresetError, match=r"^p.yaml:4: is not YAML: this line is not indent"):
        load_preset(path)


def test_billion_laughs_are_refused_at_once(refuse: Refuse) -> None:
    bomb = "version: 1\na: &a [x, x]\n" + "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
        for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    )
    assert f"p.yaml:2: a: the anchor &a is not read in presets; {ALIAS_REMEDY}" in refuse(bomb)


def test_text_that_is_not_utf8_is_refused_with_its_line(write: Write) -> None:
    path = write("p.yaml", "")
    path.write_bytes(b"version: 1\ndescription: caf\xe9\n")
    with pytest.raises(PresetError) as caught:
        load_preset(path)
    assert str(caught.value) == "p.yaml:2: byte 0xe9 is not UTF-8; save the file as UTF-8"


def test_byte_order_mark_is_read_over(write: Write) -> None:
    assert load_preset(write("p.yaml", "\ufeff" + RULES)).rules[0].scheme.method == "awq"


def test_a_character_that_json_writes_in_two_halves_is_one(write: Write, refuse: Refuse) -> None:
    path = write("p.yaml", json.dumps({"version": 1, "description": "\U0001f600"}) + "\n")
    assert "\\ud83d\\ude00" in path.read_text()
    assert reader.read_file(path, Findings()).data["description"] == "\U0001f600"
    assert refuse(f'{RULES}description: "x\\ud83d"\n') == [
        "p.yaml:3: description: 'x\\ud83d' has half of a character in it; "
        "write the character itself"
    ]


def test_a_key_that_is_no_text_is_one_problem(refuse: Refuse) -> None:
    assert len(refuse(f"{RULES}? [a]\n: 3\n")) == 1


def test_windows_line_ends_are_read(write: Write) -> None:
    path = write("p.yaml", "")
    path.write_bytes(RULES.replace("\n", "\r\n").encode())
    assert load_preset(path).rules[0].location.line == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.yaml", "none.yaml: no such file (expected a preset)"),
        ("deep/none.yaml", "deep/none.yaml: no such file (expected a preset)"),
        (".", ".: is a folder (expected a YAML file)"),
        ("/dev/null/x.yaml", "/dev/null/x.yaml: cannot be read: Not a directory; "
         "check the path and its permissions"),
    ],
)  # fmt: skip
def test_file_that_cannot_be_read_is_refused(write: Write, name: str, message: str) -> None:
    with pytest.raises(PresetError) as caught:
        load_preset(name)
    assert str(caught.value) == message


def test_misspelt_packaged_preset_names_the_nearest(write: Write) -> None:
    with pytest.raises(PresetError, match=r"fp8-blok: no such preset .*; did you mean 'fp8-block'"):
        load_preset("fp8-blok")


def test_huge_file_is_refused_before_it_is_read(write: Write) -> None:
    path = write("p.yaml", "")
    with path.open("wb") as file:
        file.truncate(reader.MAX_FILE_BYTES + 1)
    with pytest.raises(PresetError) as caught:
        load_preset(Path("p.yaml"))
    assert str(caught.value) == (
        "p.yaml: has 1048577 bytes (expected 1048576 at most); a preset is a few kilobytes of rules"
    )
