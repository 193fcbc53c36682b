"""Which pending reasons of Slurm and PBS never clear by themselves."""

from __future__ import annotations

import pytest

from gateway_plugin.schedulers.pending_reasons import never_clears


@pytest.mark.parametrize(
    "reason",
    ["PartitionTimeLimit", "BadConstraints", "InvalidAccount", "InvalidQOS", "AccountNotAllowed", "JobHeldAdmin",
     "QOSMaxWallDurationPerJobLimit", "AssocMaxWallDurationPerJobLimit", "QOSMaxGRESPerJob", "QOSMaxMemoryPerNode",
     "AssocMaxCpuPerJobLimit", "QOSMinGRES", "QOSMinCpuNotSatisfied", "AssocGrpCPUMinutesLimit", "QOSGrpGRESMinutes",
     "MaxMemPerLimit", "launch failed requeued held", "launch_failed_requeued_held", "requeue_hold",
     "user env retrieval failed requeued held", "job_requeued_in_held_state", "resv_del_hold",
     "Job's account not permitted to use this partition (gpu allows a not b)",
     "Can Never Run: Insufficient amount of resource: ngpus (R: 8 A: 4 T: 4)"],
)  # fmt: skip
def test_reasons_that_never_clear(reason: str) -> None:
    assert never_clears(reason)


@pytest.mark.parametrize(
    "reason",
    ["Priority", "Resources", "Dependency", "BeginTime", "AssocGrpCPURunMinutesLimit", "QOSGrpGRESRunMinutes",
     "AssocGrpGRES", "AssocGrpJobsLimit", "QOSMaxJobsPerUserLimit", "QOSMaxCpuPerUserLimit", "AssocMaxJobsLimit",
     "MaxGRESPerAccount", "PartitionDown", "Licenses", "JobArrayTaskLimit", "None", "", None,
     "ReqNodeNotAvail, UnavailableNodes:n[1-4]", "Nodes required for job are DOWN, DRAINED or reserved",
     "Not Running: Insufficient amount of resource: ngpus (R: 4 A: 0 T: 4)", "Not Running: Queue not started.", "held"],
)  # fmt: skip
def test_reasons_that_clear(reason: str | None) -> None:
    assert not never_clears(reason)
