"""`mixedprec completion`: a script by which a shell completes verbs, options and presets."""

from __future__ import annotations

import argparse
from typing import TextIO

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
    from mixedprec_plugin.cli.main import VERBS, parser_of

    options = {verb: parser_of(verb).option_strings for verb in VERBS}
    presets = " ".join(preset_names())
    if args.shell == "fish":
        print("complete -c mixedprec -n __fish_use_subcommand -f", file=out)
        for verb, (_, summary) in VERBS.items():
            print(f"complete -c mixedprec -n __fish_use_subcommand -a {verb} -d {summary!r}",
                  file=out)  # fmt: skip
            for option in options[verb]:
                how = f"-l {option[2:]}" if option.startswith("--") else f"-s {option[1:]}"
                more = f" -xa {presets!r}" if option == "--preset" else ""
                seen = f"-n '__fish_seen_subcommand_from {verb}'"
                print(f"complete -c mixedprec {seen} {how}{more}", file=out)
        return 0
    cases = "\n".join(
        f"    {verb}) words={' '.join((*words, *(preset_names() if verb == 'serve' else ())))!r};;"
        for verb, words in options.items()
    )
    script = _BASH.format(presets=presets, cases=cases, verbs=" ".join(VERBS))
    print((_ZSH if args.shell == "zsh" else "") + script, end="", file=out)
    return 0
