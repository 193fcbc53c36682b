"""PBS's answers, as OpenPBS's sources and its users' reports have them."""

from __future__ import annotations

import json

import pytest

from gateway_plugin.blocks.ledger import BlockPhase
from gateway_plugin.blocks.node_provider import block_name
from gateway_plugin.schedulers import pbs_cli as words
from gateway_plugin.schedulers.pbs_cli import Row
from gateway_plugin.schedulers.queue import number_of

ANSWER = r"""{
    "timestamp":1656687007,
    "pbs_version":"2022.1.1",
    "pbs_server":"polaris-pbs-01.hsn.cm.polaris.alcf.anl.gov",
    "Jobs":{
        "12.polaris-pbs-01":{
            "Job_Name":"gw-a100-0123abcd.1656686500.1",
            "Job_Owner":"u@polaris-login-01",
            "resources_used":{
                "cput":"00:00:00",
                "walltime":"00:00:10"
            },
            "job_state":"R",
            "exec_host":"x3001c0s1b0n0/0*64",
            "exec_vnode":"(x3001c0s1b0n0:ncpus=64:ngpus=4)",
            "Resource_List":{
                "ncpus":64,
                "walltime":"24:00:00"
            },
            "stime":"Fri Jul  1 14:42:57 2022",
            "substate":42,
            "Variable_List":{
                "PBS_O_HOME":"/users/u",
                "BASH_FUNC_module()":"() {  eval `\$LMOD_CMD bash \"$@\"` \'x\' }",
                "NUMBER":005
            },
            "comment":"Job run at Fri Jul 01 at 14:42 on (x3001c0s1b0n0:ncpus=64:ngpus=4)"
        },
        "13.polaris-pbs-01":{
            "Job_Name":"gw-a100-0123abce.1656686501.2",
            "job_state":"Q",
            "Resource_List":{
                "walltime":"24:00:00"
            },
            "estimated":{
                "start_time":"Sat Jul  2 01:00:00 2022"
            },
            "comment":"Not Running: Job would conflict with reservation or top job"
        }
    }
}
"""


def test_an_answer_with_an_environment_that_is_no_json() -> None:
    with pytest.raises(ValueError, match=r"escape|delimiter"):
        json.loads(ANSWER)
    running, pending = words.parse_jobs(ANSWER)
    assert running == Row(
        id="12.polaris-pbs-01",
        name="gw-a100-0123abcd.1656686500.1",
        state="R",
        comment="Job run at Fri Jul 01 at 14:42 on (x3001c0s1b0n0:ncpus=64:ngpus=4)",
        node="x3001c0s1b0n0",
        starts_at=1656686577.0,
        ends_at=1656686577.0 + 86400,
    )
    assert (pending.state, pending.starts_at, pending.ends_at, pending.node) == ("Q", 1656723600.0, None, None)
    assert words.parse_jobs('{"timestamp":1}') == ()
    with pytest.raises(ValueError, match="Expecting"):
        words.parse_jobs("")


@pytest.mark.parametrize(
    ("row", "phase", "reason"),
    [
        (Row("1", "b", "Q", comment="Not Running: no"), BlockPhase.PENDING, "Not Running: no"),
        (Row("1", "b", "H"), BlockPhase.PENDING, "held"),
        (Row("1", "b", "R", node="n1"), BlockPhase.RUNNING, None),
        (Row("1", "b", "E", node="n1"), BlockPhase.RUNNING, "exiting"),
        (Row("1", "b", "S", node="n1"), BlockPhase.RUNNING, "suspended"),
        (Row("1", "b", "F", exit_status=0), BlockPhase.COMPLETED, None),
        (Row("1", "b", "F", exit_status=0, deleted=True), BlockPhase.COMPLETED, None),
        (Row("1", "b", "F", deleted=True), BlockPhase.CANCELLED, "deleted"),
        (Row("1", "b", "F", exit_status=143, deleted=True), BlockPhase.CANCELLED, "deleted"),
        (Row("1", "b", "F", node="n1", exit_status=-29), BlockPhase.EXPIRED, "its walltime ended on n1"),
        (Row("1", "b", "F", exit_status=271, walltime_used_up=True), BlockPhase.EXPIRED, "its walltime ended"),
        (Row("1", "b", "F", exit_status=271), BlockPhase.FAILED, "its script was ended by signal 15"),
        (Row("1", "b", "F", exit_status=3), BlockPhase.FAILED, "its script left with exit code 3"),
        (Row("1", "b", "F", exit_status=-27), BlockPhase.FAILED, "it used more memory than its job may"),
        (
            Row("1", "b", "F", exit_status=-3, comment="too many failed attempts"),
            BlockPhase.FAILED,
            "PBS could not run its job (Exit_status -3; too many failed attempts)",
        ),
        (Row("1", "b", "F", comment="no"), BlockPhase.FAILED, "its job never ran (no)"),
    ],
)
def test_what_a_state_means(row: Row, phase: BlockPhase, reason: str | None) -> None:
    seen = words.status_in(row)
    assert seen is not None
    assert (seen.phase, seen.reason) == (phase, reason)


def test_of_a_state_that_nobody_knows_nothing_is_said() -> None:
    assert words.status_in(Row("1", "b", "M")) is None


@pytest.mark.parametrize(
    ("text", "expected"), [("24:00:00", 86400.0), ("00:10", 10.0), ("90", 90.0), ("--", None), (None, None)]
)
def test_durations(text: str | None, expected: float | None) -> None:
    assert words.duration_s(text) == expected


def test_only_what_pbs_says_it_does_not_know_is_unknown() -> None:
    said = "qstat: Unknown Job Id 17.server\nqstat: cannot connect to server s (errno=15010)\n"
    assert words.unknown_jobs(said) == {"17"}
    assert words.unknown_jobs("qstat: Unknown Job Id Error 18.server.domain") == {"18"}


def test_what_is_a_job_s_id() -> None:
    assert words.job_ids(["", "Welcome to 2026.", "123.pbs-01.anl.gov", "77"]) == ("123.pbs-01.anl.gov", "77")
    assert number_of("123.pbs-01.anl.gov") == "123"


@pytest.mark.parametrize(
    ("said", "refused"),
    [
        ("qsub: Unknown queue", True),
        ("qsub: cannot connect to server pbs (errno=15010)", True),
        ("qsub: End of File", False),
        ("qsub: Communication failure.", False),
    ],
)
def test_a_refusal_is_told_from_a_broken_connection(said: str, refused: bool) -> None:
    assert words.surely_refused(said) is refused


def test_the_names_of_jobs_are_within_pbs_s_limits() -> None:
    """A letter first, no blanks, 230 signs (PBS Pro 14 and later, OpenPBS). PBS Pro before 14 took 15 and refuses."""
    name = f"{block_name('a' * 16)}.1656686500.1234567"
    assert name[0].isalpha()
    assert name.isprintable()
    assert len(name) < 60
