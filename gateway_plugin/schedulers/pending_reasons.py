"""Schedulers' words for why a job pends, and which of them never clear by themselves.

PBS says so itself: its scheduler's comment begins with ``Can Never Run`` where the machine as a whole, or a limit for
one job, will not do, and with ``Not Running`` where waiting helps. Slurm has a word for each reason, and sentences for
some, whose words newer versions join by ``_``: a job that is held after its launch failed stays held until released.

Those below are from Slurm's list, https://slurm.schedmd.com/job_reason_codes.html: what a job asks for is over a limit
that holds for every single job, is not allowed, or comes out of a budget that past jobs have used up. Left out are
limits that running jobs fill and free again (``AssocGrpGRES``, ``QOSMaxJobsPerUserLimit``, ``...RunMinutes``), what
waits for a node or a partition to come back (``PartitionDown``, ``ReqNodeNotAvail``), and ``PartitionNodeLimit`` and
``PartitionConfig``, which Slurm also says while nodes are down.
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
    r"\b(requeued? held|requeued in held state|requeue hold|resv del hold)\b"  # after a launch that failed, say
    r"|^job's \w+ not permitted to use this partition",
    re.IGNORECASE,
)
"""What Slurm says in words, with blanks or ``_`` between them."""


def never_clears(reason: str | None) -> bool:
    """Whether a job that pends for ``reason`` waits for ever, unless somebody changes it or the site's rules."""
    said = reason or ""
    if said.casefold().startswith(_PBS_NEVER):
        return True
    if _SENTENCES.search(said.replace("_", " ")) is not None:
        return True
    word = re.match(r"\w+", said)
    return word is not None and (word[0] in _WORDS or _FAMILIES.fullmatch(word[0]) is not None)
