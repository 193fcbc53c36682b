"""Schedulers' reasons for pending jobs, and which of them never clear by themselves.

PBS reports this itself: the comment begins with ``Can Never Run`` if the job exceeds the whole machine or a limit per
job, and with ``Not Running`` if waiting helps. Slurm has a code for each reason, and sentences for some, which newer
versions join by ``_``: a job that is held after a failed launch stays held until released.

The reasons below are from Slurm's list, https://slurm.schedmd.com/job_reason_codes.html: the request is over a limit
that holds for every single job, is not allowed, or draws on a budget that past jobs have used up. Left out are
limits that running jobs fill and free again (``AssocGrpGRES``, ``QOSMaxJobsPerUserLimit``, ``...RunMinutes``), waits
for a node or a partition to come back (``PartitionDown``, ``ReqNodeNotAvail``), and ``PartitionNodeLimit`` and
``PartitionConfig``, which Slurm also reports while nodes are down.
"""

from __future__ import annotations

import re

_PBS_NEVER = "can never run"
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
_SENTENCES = re.compile(
    r"\b(requeued? held|requeued in held state|requeue hold|resv del hold)\b"  # after a failed launch, for example
    r"|^job's \w+ not permitted to use this partition",
    re.IGNORECASE,
)
"""Slurm's reasons in sentences, with blanks or ``_`` between the parts."""


def never_clears(reason: str | None) -> bool:
    """Whether a job that pends for ``reason`` pends until a person changes the job or a limit of the site."""
    said = reason or ""
    if said.casefold().startswith(_PBS_NEVER):
        return True
    if _SENTENCES.search(said.replace("_", " ")) is not None:
        return True
    word = re.match(r"\w+", said)
    return word is not None and (word[0] in _WORDS or _FAMILIES.fullmatch(word[0]) is not None)
