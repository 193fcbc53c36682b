"""The headers that say how long a client waits: ``x-gateway-wait`` (for its model) and ``x-gateway-deadline-s`` (in
all). Checked here, and passed on to the ingress. Pure text."""

from __future__ import annotations

from gateway_plugin.edge.error_pages import Refusal
from gateway_plugin.errors import InvalidRequest

_HEADERS = (
    ("x-gateway-wait", r"^[0-9]{1,6}\z", "one whole number of seconds"),
    ("x-gateway-deadline-s", r"^(?![0.]+\z)[0-9]{1,6}(?:\.[0-9]{1,3})?\z", "one positive number of seconds"),
)
NOT_PATIENCE = tuple(
    Refusal(header[len("x-gateway-") :].replace("-", "_"), InvalidRequest(f"The header {header} is {what}."))
    for header, _, what in _HEADERS
)


def _read(refusal: Refusal, header: str, pattern: str) -> str:
    said = f"{{ req.fhdr_cnt({header}) gt 0 }}"
    return f"""\
{refusal.when(f"{said} !{{ req.fhdr({header}) -m reg {pattern} }}")}
{refusal.when(f"{{ req.fhdr_cnt({header}) gt 1 }}")}
  http-request set-var(txn.{refusal.name}) req.fhdr({header}) if inference {said}
"""


READ_PATIENCE = "".join(
    _read(refusal, header, pattern) for refusal, (header, pattern, _) in zip(NOT_PATIENCE, _HEADERS, strict=True)
)
"""Rules of the front door before it removes the caller's headers."""

TELL_PATIENCE = "".join(
    f"  http-request set-header {header} %[var(txn.{refusal.name})] if {{ var(txn.{refusal.name}) -m found }}\n"
    for refusal, (header, *_) in zip(NOT_PATIENCE, _HEADERS, strict=True)
)
"""And after that."""
