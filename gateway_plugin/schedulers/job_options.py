"""Options in a site's own scheduler lines that the gateway cannot honour, and what to use instead. Pure.

A gateway job has a name, an output, one node and the provider's walltime set by the gateway, and is queried where the
provider's fields point. An option that changes one of these is rejected, in any spelling; all others are the site's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from gateway_plugin.schedulers.directives import Directives, Option, pbs_directives, slurm_directives

_OWN = "the gateway's to give (a job is found by its name, and its script by its output); leave it out"
_WALLTIME = "set walltime= of the provider: a block's end is computed from it"
_ANSWER = "then the job's number is not what comes back, or not at once; leave it out"
_USER = "the gateway looks for jobs of its own user; leave it out"
_REQUEUE = "{} would start a block again under the name of a node that is gone; leave it out"
_STRAY = "no option, and no value of one; an option and its value are --name=value or -n value"
_REPEATED = "only the first sign of a line counts; begin another line"
_UNREAD = "a comment; say it as {}, without blanks before it"
_UNFILLED = "no variables are filled in here; write it out, or have Python do it"
_SHELL = "blocks are started by bash; leave it out"
_ONE_SERVER = "jobs are searched for on the default server only; set queue= of the provider, without a server"
_CHUNKS = "one block is one node: set cpus_per_node= and select_options= of the provider, without 'select=' and '+'"

_SLURM = {
    **dict.fromkeys(("job-name", "output", "error", "array"), _OWN),
    **dict.fromkeys(("parsable", "quiet", "wait", "test-only", "wrap", "help", "usage", "version"), _ANSWER),
    **dict.fromkeys(("uid", "gid"), _USER),
    "time": _WALLTIME,
    "requeue": _REQUEUE.format("Slurm"),
}
_PBS = {
    **dict.fromkeys(("N", "J", "o", "e", "j", "R"), _OWN),
    **dict.fromkeys(("z", "I", "X"), _ANSWER),
    "u": _USER,
}


def slurm_asked(provider: Any) -> Directives:
    """All options that the job of a ``SlurmProvider`` passes to ``sbatch``: its fields are lines of
    ``scheduler_options``, too, and the lines that ``worker_init`` begins with are parsed like them."""
    return slurm_directives(f"{provider.scheduler_options}\n{provider.worker_init}")


def pbs_asked(provider: Any) -> Directives:
    """All options that the job of a ``PBSProProvider`` passes to ``qsub``, except its fields."""
    return pbs_directives(f"{provider.scheduler_options}\n{provider.worker_init}")


def slurm_refusal(provider: Any) -> str | None:
    """The options of a ``SlurmProvider`` that cannot be honoured, each by its name as written; ``None``: there are
    none."""
    asked = slurm_asked(provider)
    wrong = [(option.said, _slurm_wrong(option, provider)) for option in asked.options]
    if asked.several_jobs:
        wrong.append(("hetjob", "one block is one job of one node; leave it out"))
    wrong += [(f"'{line}'", "Slurm obeys it, too; say it as #SBATCH") for line in asked.foreign]
    wrong += _odd(slurm_directives(provider.scheduler_options), asked, "#SBATCH")
    return _joined(wrong)


def _slurm_wrong(option: Option, provider: Any) -> str | None:
    if option.name == "clusters":
        instead = f"set clusters={option.value!r} of the provider: the job's state is queried from that cluster"
        return None if option.value == provider.clusters else instead
    if option.name == "nodes":
        one = re.fullmatch(r"1(-1)?", option.value) is not None
        return None if one else "one block is one node; leave it out, and set max_blocks= of the node type"
    return _SLURM.get(option.name)


def pbs_refusal(provider: Any) -> str | None:
    """Like ``slurm_refusal``, for a ``PBSProProvider``."""
    wrong = [(f"-{option.name}{word}", why) for option in pbs_asked(provider).options for word, why in _pbs(option)]
    if "@" in (provider.queue or ""):
        wrong.append((f"queue={provider.queue!r}", _ONE_SERVER))
    if "+" in provider.select_options:
        wrong.append((f"select_options={provider.select_options!r}", _CHUNKS))
    wrong += _odd(pbs_directives(provider.scheduler_options), pbs_asked(provider), "#PBS")
    return _joined(wrong)


def _pbs(option: Option) -> Iterable[tuple[str, str]]:
    """The reasons to reject an option: the text to show after its letter, and why."""
    if option.name in _PBS:
        yield "", _PBS[option.name]
    elif option.name == "l":
        for part in option.value.split(","):
            resource = part.partition("=")[0].strip()
            if resource in ("select", "nodes", "nodect"):
                yield f" {part}", _CHUNKS
            elif resource in ("walltime", "min_walltime", "max_walltime"):
                yield f" {part}", _WALLTIME
    elif option.name == "k" and "d" not in option.value:
        yield f" {option.value}", f"{_OWN}, or say -k d{option.value}"
    elif option.name == "r" and option.value.startswith("y"):
        yield f" {option.value}", _REQUEUE.format("PBS")
    elif option.name == "S" and not option.value.partition("@")[0].endswith("bash"):
        yield f" {option.value}", _SHELL
    elif option.name == "q" and "@" in option.value:
        yield f" {option.value}", _ONE_SERVER
    elif option.name == "W" and re.search(r"\bblock\s*=\s*true", option.value):
        yield f" {option.value}", _ANSWER


def _odd(lines: Directives, asked: Directives, sign: str) -> Iterable[tuple[str, str]]:
    """Directives that the scheduler silently ignores. ``lines``: those of ``scheduler_options``; ``asked``: all of the
    job."""
    yield from ((f"'{line}'", _UNREAD.format(sign)) for line in lines.unread)
    yield from ((f"'{line}'", _REPEATED) for line in asked.repeated)
    yield from ((f"'{word}'", _STRAY) for word in asked.stray)
    yield from ((f"{option.said} {option.value}", _UNFILLED) for option in asked.options if _unfilled(option))
    if lines.command:
        yield f"'{lines.command}'", "a command: no option after it is read; put it into worker_init="


def _unfilled(option: Option) -> bool:
    return option.name != "comment" and re.search(r"\$[A-Za-z_{(]", option.value) is not None


def _joined(wrong: Iterable[tuple[str, str | None]]) -> str | None:
    """One line; names with the same reason are grouped."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in wrong:
        if reason is not None and name not in by_reason.setdefault(reason, []):
            by_reason[reason].append(name)
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason.items()) or None
