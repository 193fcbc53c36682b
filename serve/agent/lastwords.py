"""The last output of an engine, shortened: pure."""

from __future__ import annotations

import re

from gateway_plugin.masking import masked
from gateway_plugin.plain import plain

_LIMIT = 600
_LINES = 5
_LOOKED_AT = 200
"""Lines from the end: errors long before are not why it ended."""
_HARMLESS = ("DEBUG", "INFO", "WARNING")
_PREFIX = re.compile(
    r"^(?:\((?:[\w:]+ )+pid=\d+\)\s*)?(?:(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL|FATAL)\s*:?\s+)?"
    r"(?:\d\d(?:\d\d)?-\d\d(?:-\d\d)?[ T]\d\d:\d\d:\d\d(?:[.,]\d+)?\s+)?(?:\[[\w./]+(?::\d+)?\]\s?)?"
)
"""As vLLM writes it: ``(EngineCore pid=12) ERROR 11-22 16:02:19 [core.py:1510] ``."""
_EXCEPTION = re.compile(r"^(?:[A-Za-z_][\w]*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit|Failure|Warning)\b(?::|$)")
_FATAL = re.compile(r"\b(?:fatal|error|out of memory|killed|abort(?:ed)?|segmentation fault)\b", re.IGNORECASE)
_MEMORY = re.compile(
    r"out of memory|OutOfMemory|\bMemoryError\b|cannot allocate memory|no available memory"
    r"|memory\b.* is less than desired",
    re.IGNORECASE,
)
_SAYS_NOTHING = re.compile(r"See root cause above|Engine core initialization failed|^SystemExit\b|Warning\b")
_FRAME = re.compile(r"^(?:\s|Traceback \(|During handling|The above exception|[~^]+$)")
_NEXT_TRACEBACK = re.compile(r"^(?:Traceback \(|During handling|The above exception|\s+File \")")


def last_words(log: str, secrets: tuple[str, ...] = ()) -> str:
    """The lines of ``log`` that show why an engine ended, at most 5 lines and 600 characters, joined by ``" | "``.

    (1) The last exception that is itself a cause (not "see root cause above"), with the lines after it;
    (2) else the last lines that mention an error; (3) else the last lines. ``""`` for an empty log.
    """
    log = masked(plain(log), secrets)  # plain first: a colour in its middle would hide a secret
    whole = [line.rstrip() for line in log.splitlines() if line.strip()][-_LOOKED_AT:]
    harmless = {line for line in whole if (found := _PREFIX.match(line)) and found["level"] in _HARMLESS}
    told = [(_PREFIX.sub("", line), line in harmless) for line in whole]
    lines = [line for line, _ in told if line.strip()]
    reasons = [i for i, line in enumerate(lines) if _EXCEPTION.match(line) and not _SAYS_NOTHING.search(line)]
    if reasons:  # (1)
        chosen = [lines[reasons[-1]]]
        for line in lines[reasons[-1] + 1 :]:
            if len(chosen) == _LINES or _NEXT_TRACEBACK.match(line) or _EXCEPTION.match(line):
                break
            chosen.append(line)
    else:
        said = [line.strip() for line in lines if not _FRAME.match(line)]
        errors = [line.strip() for line, fine in told if not fine and not _FRAME.match(line) and _FATAL.search(line)]
        chosen = errors[-_LINES:] or said[-_LINES:]  # (2), (3)
    return _short(" | ".join(dict.fromkeys(line.strip() for line in chosen)))


def summary_of(how: str, words: str) -> str:
    """An engine's end as shown to users that are not administrators: ``how`` it ended, without its own output.

    That may contain paths, hosts, and other users' prompts.
    """
    return "it ran out of memory" if _MEMORY.search(words) else how


def _short(text: str) -> str:
    return text if len(text) <= _LIMIT else f"{text[: _LIMIT - 3]}..."
