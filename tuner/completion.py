"""What a shell offers after a part of a `tuner` command line: commands, config keys, groups and their options."""

import re
import sys
from collections.abc import Iterable

from tuner import arguments, config_reference

OPTION = "--complete"  # with which the scripts call tuner
OF_CONFIG = ("train", "sweep", "resume", "evaluate", "audit", "worker")  # these take KEY=VALUE
SCRIPTS = {
    "bash": """\
_tuner() {
  local line="${COMP_LINE:0:COMP_POINT}" word prefix=""
  word="${line##* }"
  [[ $word == *=* ]] && prefix="${word%%=*}="
  mapfile -t COMPREPLY < <(tuner --complete "$line")
  COMPREPLY=("${COMPREPLY[@]#"$prefix"}")  # bash has split the word at the equals sign
  [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace
}
complete -o default -F _tuner tuner""",
    "zsh": """\
_tuner() {
  local -a found keys
  found=(${(f)"$(tuner --complete "${(j: :)words[1,CURRENT]}")"})
  keys=(${(M)found:#*=})
  found=(${found:#*=})
  (( $#keys )) && compadd -S '' -- $keys
  (( $#found )) && compadd -- $found
  (( $#keys + $#found )) || _files
}
compdef _tuner tuner""",
    "fish": "complete -c tuner -a '(tuner --complete (commandline -cp))'",
}
INSTALL = {
    "bash": 'add this to ~/.bashrc:  eval "$(tuner completion bash)"',
    "zsh": 'add this to ~/.zshrc, after compinit:  eval "$(tuner completion zsh)"',
    "fish": "tuner completion fish > ~/.config/fish/completions/tuner.fish",
}


def script(words: list[str]) -> str:
    """The script for a shell. Exits with the names of the shells if there is none."""
    if len(words) != 1 or words[0] not in SCRIPTS:
        sys.exit("\n".join(["usage: tuner completion SHELL", *(f"  {shell}: {how}" for shell, how in INSTALL.items())]))
    return SCRIPTS[words[0]]


def candidates(line: str, commands: Iterable[str]) -> list[str]:
    """What may stand in place of the last word of a line, which may be empty."""
    before = line.split(" ")
    word = before[-1]
    words = [text for text in before[:-1] if text]
    if len(words) <= 1:
        return sorted(name for name in (*commands, "completion") if name.startswith(word))
    if words[1] == "completion":
        return [shell for shell in SCRIPTS if shell.startswith(word)]
    if word.startswith("-") and words[1] in arguments.OF_COMMAND:
        usage = arguments.OF_COMMAND[words[1]]().format_usage()
        return sorted({option for option in re.findall(r"--[\w-]+", usage) if option.startswith(word)})
    return of_config(word) if words[1] in OF_CONFIG else []


def of_config(word: str) -> list[str]:
    """Keys and groups, with an equals sign; after it, the options of a group."""
    if "=" in word:
        return [option.typed for option in config_reference.options() if option.typed.startswith(word)]
    groups = {option.group for option in config_reference.options()}
    keys = {entry.key for entry in config_reference.entries()}
    return [f"{name}=" for name in sorted(groups | keys) if name.startswith(word)]
