"""Slurm's words for why a job pends, and which of them never clear by themselves.

From Slurm's list of reasons, https://slurm.schedmd.com/job_reason_codes.html: what a job asks for is over a limit that
holds for every single job, is not allowed, or comes out of a budget that past jobs have used up. Left out are limits
that running jobs fill and free again (``AssocGrpGRES``, ``QOSMaxJobsPerUserLimit``, ``...RunMinutes``), what waits for
a node or a partition to come back (``PartitionDown``, ``ReqNodeNotAvail``), and ``PartitionNodeLimit`` and
``PartitionConfig``, which Slurm also says while nodes are down.
"""

from __future__ import annotations

import re

_WORDS = frozenset(
    {
        "AccountNotAllowed",
        "AssociationTimeLimit",
        "BadConstraints",
        "DependencyNeverSatisfied",
        "InvalidAccount",
        "InvalidQOS",
        "JobHeldAdmin",
        "JobHeldUser",
        "JobHoldMaxRequeue",
        "MaxMemPerLimit",
        "PartitionTimeLimit",
        "QOSNotAllowed",
        "QOSTimeLimit",
        "ReservationDeleted",
    }
)
_FAMILIES = re.compile(
    r"(Assoc|QOS)Max\w+Per(Job|Node)(Limit)?"  # one job asks for more than any job may
    r"|QOSMin\w+"  # or for less
    r"|(Assoc|QOS)Grp\w+(?<!Run)Minutes(Limit)?"  # the budget of past, present and future jobs is used up
)


def never_clears(reason: str | None) -> bool:
    """Whether a job that pends for ``reason`` waits for ever, unless somebody changes it or the site's rules."""
    word = re.match(r"\w+", reason or "")
    return word is not None and (word[0] in _WORDS or _FAMILIES.fullmatch(word[0]) is not None)
