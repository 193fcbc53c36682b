"""The header ``x-gateway-deadline-s``: how long a client waits in all. Checked here, passed on to the ingress. Pure."""

from __future__ import annotations

from gateway_plugin.edge.error_pages import Refusal
from gateway_plugin.errors import InvalidRequest

HEADER = "x-gateway-deadline-s"
_POSITIVE = r"^(?![0.]+\z)[0-9]{1,6}(?:\.[0-9]{1,3})?\z"

NOT_A_DEADLINE = Refusal("deadline", InvalidRequest(f"The header {HEADER} is one positive number of seconds."))

READ_DEADLINE = f"""\
{NOT_A_DEADLINE.when(f"{{ req.fhdr_cnt({HEADER}) gt 0 }} !{{ req.fhdr({HEADER}) -m reg {_POSITIVE} }}")}
{NOT_A_DEADLINE.when(f"{{ req.fhdr_cnt({HEADER}) gt 1 }}")}
  http-request set-var(txn.deadline) req.fhdr({HEADER}) if inference {{ req.fhdr_cnt({HEADER}) gt 0 }}"""
"""Rules of the front door, before the caller's headers are removed."""

TELL_DEADLINE = f"  http-request set-header {HEADER} %[var(txn.deadline)] if {{ var(txn.deadline) -m found }}"
"""And after that."""
