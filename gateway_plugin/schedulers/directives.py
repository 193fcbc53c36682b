"""Scheduler directives of a job script, parsed as ``sbatch`` and ``qsub`` parse them. Pure.

Both join the arguments of all directive lines (``#SBATCH``, ``#PBS``) into one command line, including several options
in a line and values on the next line, until the first line that is a command. Each rule of ``sbatch`` is as observed
in version 22.05.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """One option of a job script."""

    name: str
    """The long name without its dashes (``job-name``); for PBS the letter. Independent of the spelling."""
    value: str
    """Empty if it has none."""
    said: str
    """As written in the script: ``-J``, ``--job-na``."""


@dataclass(frozen=True)
class Directives:
    """The directives at the head of a job script."""

    options: tuple[Option, ...]
    foreign: tuple[str, ...] = ()
    """Lines with another scheduler's prefix, which ``sbatch`` obeys too."""
    unread: tuple[str, ...] = ()
    """Lines that look like directives and are comments to the scheduler: another prefix, or a blank before it."""
    stray: tuple[str, ...] = ()
    """Arguments that belong to no option: the scheduler rejects the script, or ignores them."""
    repeated: tuple[str, ...] = ()
    """Lines with a second prefix: the rest of such a line is a comment."""
    command: str = ""
    """The line that ends the head."""
    several_jobs: bool = False
    """A line contains ``hetjob``: the options after it belong to another job."""

    def value(self, name: str) -> str | None:
        """The value of an option; the last one counts. ``None``: not requested."""
        return next((option.value for option in reversed(self.options) if option.name == name), None)

    def all(self, *names: str) -> tuple[Option, ...]:
        """Every option of these names, in order."""
        return tuple(option for option in self.options if option.name in names)


_SHORT = {
    **{"a": "array", "A": "account", "b": "begin", "B": "extra-node-info", "c": "cpus-per-task", "C": "constraint"},
    **{"d": "dependency", "D": "chdir", "e": "error", "F": "nodefile", "G": "gpus", "i": "input", "J": "job-name"},
    **{"L": "licenses", "M": "clusters", "m": "distribution", "N": "nodes", "n": "ntasks", "o": "output"},
    **{"p": "partition", "q": "qos", "S": "core-spec", "t": "time", "w": "nodelist", "x": "exclude"},
}
"""Options of ``sbatch`` that take a value."""
_SHORT_ALONE = {
    **{"H": "hold", "h": "help", "k": "no-kill", "O": "overcommit", "Q": "quiet", "s": "oversubscribe"},
    **{"u": "usage", "v": "verbose", "V": "version", "W": "wait", "I": "immediate"},
}
_LONG_NAMES = """
    acctg-freq bb bbf cluster cluster-constraint comment container container-id context cores-per-socket cpu-freq
    cpus-per-gpu deadline delay-boot export export-file extra gid gpu-bind gpu-freq gpus-per-node gpus-per-socket
    gpus-per-task gres gres-flags hint kill-on-invalid-dep mail-type mail-user mcs-label mem mem-bind mem-per-cpu
    mem-per-gpu mincpus network ntasks-per-core ntasks-per-gpu ntasks-per-node ntasks-per-socket ntasks-per-tres
    open-mode power prefer priority profile reservation segment signal sockets-per-node switches tasks tasks-per-node
    thread-spec threads-per-core time-min tmp tres-bind tres-per-node tres-per-task uid wait-all-nodes wckey workdir
    wrap
"""
_LONG_NAMES_ALONE = """
    contiguous exclusive get-user-env ignore-pbs nice no-requeue parsable propagate reboot requeue share spread-job
    stepmgr test-only use-min-nodes
"""
_LONG = frozenset(_SHORT.values()) | frozenset(_LONG_NAMES.split())
"""The long options of ``sbatch`` that take a value."""
_LONG_ALONE = frozenset(_SHORT_ALONE.values()) | frozenset(_LONG_NAMES_ALONE.split())
"""Options that take no value, or only after ``=``."""
_SAME = {"cluster": "clusters", "tasks": "ntasks", "tasks-per-node": "ntasks-per-node", "workdir": "chdir"}

_PBS_VALUED = "aAceijJklmMNopPqrRSuvW"

_OTHER_SIGN = re.compile(r"\s*#(?!PBS\b)[A-Za-z$][\w:]*\s+--?[A-Za-z]")
"""A comment that looks like a directive: ``#sbatch -A x``, ``#MSUB -l nodes=4``, ``#$ -pe mpi 4``."""
_SECOND_SIGN = re.compile(r".#(SBATCH|PBS)\b")


def slurm_directives(head: str) -> Directives:
    """The options of ``head``, the beginning of a job script, as ``sbatch`` parses them."""
    arguments: list[str] = []
    foreign, unread, repeated, several = [], [], [], False
    lines, command = _split(head)
    for line in lines:
        if line.startswith(("#SBATCH", "#SLURM")):
            if re.search("hetjob|packjob", line, re.IGNORECASE) is not None:
                several = True
                continue
            arguments += _arguments(line.removeprefix("#SBATCH").removeprefix("#SLURM"))
            if _SECOND_SIGN.search(line):
                repeated.append(line)
        elif line.startswith(("#PBS", "#BSUB")):
            foreign.append(line)
        elif re.match(r"\s+#(SBATCH|SLURM)", line) or _OTHER_SIGN.match(line):
            unread.append(line.strip())
    options, stray = _options(arguments, _SHORT, _SHORT_ALONE)
    obeyed = () if any(option.name == "ignore-pbs" for option in options) else tuple(foreign)
    return Directives(options, obeyed, tuple(unread), stray, tuple(repeated), command, several)


def pbs_directives(head: str) -> Directives:
    """The options of ``head`` as ``qsub`` parses them: short ones only; blanks may precede the prefix."""
    arguments: list[str] = []
    unread, repeated = [], []
    lines, command = _split(head)
    for line in lines:
        if (found := re.match(r"\s*#PBS", line)) is not None:
            arguments += _arguments(line[found.end() :])
            if _SECOND_SIGN.search(line.strip()):
                repeated.append(line.strip())
        elif _OTHER_SIGN.match(line):
            unread.append(line.strip())
    options, stray = _options(arguments, {letter: letter for letter in _PBS_VALUED}, {})
    return Directives(options, (), tuple(unread), stray, tuple(repeated), command)


def _split(head: str) -> tuple[list[str], str]:
    """The lines before the first command, and that."""
    lines = head.splitlines()
    end = next((place for place, line in enumerate(lines) if re.match(r"\s*[^\s#]", line)), len(lines))
    return lines[:end], "".join(lines[end : end + 1]).strip()


def _arguments(text: str) -> list[str]:
    """The arguments of a line: quotes keep blanks, a backslash escapes the next character, a comment may begin in an
    argument."""
    arguments: list[str] = []
    word: str | None = None
    quote, kept = "", False
    for sign in text:
        if kept:
            word, kept = (word or "") + sign, False
        elif sign == "\\":
            kept = True
        elif quote:
            quote, word = ("", word) if sign == quote else (quote, (word or "") + sign)
        elif sign in "\"'":
            quote = sign
        elif sign == "#":
            break
        elif not sign.isspace():
            word = (word or "") + sign
        elif word is not None:
            arguments.append(word)
            word = None
    return arguments if word is None else [*arguments, word]


def _options(
    arguments: Iterable[str], valued: Mapping[str, str], alone: Mapping[str, str]
) -> tuple[tuple[Option, ...], tuple[str, ...]]:
    """Options as ``getopt_long`` parses them; and arguments that belong to no option: the scheduler rejects the script
    for them."""
    left = list(arguments)
    options: list[Option] = []
    stray: list[str] = []
    while left:
        word = left.pop(0)
        if word == "--":
            return tuple(options), (*stray, *left)
        if word.startswith("--"):
            said, given, value = word.partition("=")
            name = _long_name(said[2:])
            unknown = name not in _LONG | _LONG_ALONE  # of a later Slurm: it may take a value
            if not given and left and (name in _LONG or (unknown and not left[0].startswith("-"))):
                value = left.pop(0)
            options.append(Option(_SAME.get(name, name), value, said))
        elif word.startswith("-"):
            options += _cluster(word, left, valued, alone)
        else:
            stray.append(word)
    return tuple(options), tuple(stray)


def _cluster(word: str, left: list[str], valued: Mapping[str, str], alone: Mapping[str, str]) -> Iterable[Option]:
    """``-HJ mine`` is ``-H -J mine``, and so is ``-HJmine``."""
    for place, letter in enumerate(word[1:], start=2):
        if letter in valued:
            value = word[place:] or (left.pop(0) if left else "")
            yield Option(valued[letter], value, f"-{letter}")
            return
        yield Option(alone.get(letter, letter), "", f"-{letter}")


def _long_name(name: str) -> str:
    """The full name: ``getopt_long`` accepts any unique prefix."""
    if name in _LONG | _LONG_ALONE:
        return name
    meant = {_SAME.get(full, full) for full in _LONG | _LONG_ALONE if full.startswith(name)}
    return meant.pop() if len(meant) == 1 else name
