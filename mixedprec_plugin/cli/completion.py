"""`mixedprec completion`: a script by which a shell completes verbs, options and presets."""

from __future__ import annotations

import argparse
from typing import TextIO

from mixedprec_plugin.cli.output import print_json
from mixedprec_plugin.resources import preset_names

EXAMPLES = """
  source <(mixedprec completion bash)                                  in ~/.bashrc
  source <(mixedprec completion zsh)                                   in ~/.zshrc
  mixedprec completion fish > ~/.config/fish/completions/mixedprec.fish
"""
# words stand in the script: nothing is started while somebody types
_BASH = """_mixedprec() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=
  case $before in --preset) words="{presets}";; --gpu|--reference|--model|--out) ;; *)
  case ${{COMP_WORDS[1]}} in
{cases}
  esac;; esac
  [ "$COMP_CWORD" = 1 ] && words="{verbs}"
  COMPREPLY=($(compgen -W "$words" -- "$word") $(compgen -f -- "$word"))
}}
complete -o filenames -F _mixedprec mixedprec
"""
_ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="which shell")


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Print the script."""
    script = _fish() if args.shell == "fish" else _bash()
    if args.shell == "zsh":
        script = f"{_ZSH}{script}"
    if args.json:
        print_json({"script": script}, out)
    else:
        print(script, end="", file=out)
    return 0


def _bash() -> str:
    from mixedprec_plugin.cli.main import VERBS, parser_of

    presets = preset_names()
    words = {verb: parser_of(verb).option_strings for verb in VERBS}
    words["serve"] += presets
    cases = "\n".join(f"    {verb}) words={' '.join(words[verb])!r};;" for verb in VERBS)
    return _BASH.format(presets=" ".join(presets), cases=cases, verbs=" ".join(VERBS))


def _fish() -> str:
    from mixedprec_plugin.cli.main import VERBS, parser_of

    presets = " ".join(preset_names())
    lines = ["complete -c mixedprec -n __fish_use_subcommand -f"]
    for verb, (_, summary) in VERBS.items():
        lines.append(f"complete -c mixedprec -n __fish_use_subcommand -a {verb} -d {summary!r}")
        for option in parser_of(verb).option_strings:
            how = f"-l {option[2:]}" if option.startswith("--") else f"-s {option[1:]}"
            more = f" -xa {presets!r}" if option == "--preset" else ""
            lines.append(
                f"complete -c mixedprec -n '__fish_seen_subcommand_from {verb}' {how}{more}"
            )
    return "\n".join(lines) + "\n"
