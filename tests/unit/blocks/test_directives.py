"""What a job script's lines say; those with ``#SBATCH`` as ``sbatch -vv`` 22.05 told what it made of them."""

from __future__ import annotations

import pytest

from gateway_plugin.schedulers.directives import pbs_directives, slurm_directives


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("#SBATCH --nodes=4", {"nodes": "4"}),
        ("#SBATCH --nodes 4", {"nodes": "4"}),
        ("#SBATCH -N4", {"nodes": "4"}),
        ("#SBATCH\t-N\t4", {"nodes": "4"}),
        ("#SBATCH-N 4", {"nodes": "4"}),
        ("#SBATCH --node=4", {"node": "4"}),  # ambiguous: sbatch refuses it
        ("#SBATCH --job-na=mine", {"job-name": "mine"}),
        ("#SBATCH -C gpu -q regular -Jmine -o %j.out",
         {"constraint": "gpu", "qos": "regular", "job-name": "mine", "output": "%j.out"}),
        ("#SBATCH -J\n#SBATCH mine", {"job-name": "mine"}),
        ("#SBATCH -HJ mine", {"hold": "", "job-name": "mine"}),
        ("#SBATCH -HJmine", {"hold": "", "job-name": "mine"}),
        ("#SBATCH -k -N3", {"no-kill": "", "nodes": "3"}),
        ("#SBATCH --exclusive -N3", {"exclusive": "", "nodes": "3"}),
        ("#SBATCH --exclusive=user -N3", {"exclusive": "user", "nodes": "3"}),
        ("#SBATCH --cluster=foo", {"clusters": "foo"}),
        ("#SBATCH -Mfoo", {"clusters": "foo"}),
        ("#SBATCH --export NONE -N3", {"export": "NONE", "nodes": "3"}),
        ("#SBATCH --comment='a # \"b\"' -N 3", {"comment": 'a # "b"', "nodes": "3"}),
        ("#SBATCH --comment=\"a 'b'\" -N 3", {"comment": "a 'b'", "nodes": "3"}),
        ("#SBATCH --comment=a\\ b -N3", {"comment": "a b", "nodes": "3"}),
        ("#SBATCH --job-name mine # --nodes=4", {"job-name": "mine"}),
        ("#SBATCH --comment=a#b -N4", {"comment": "a"}),
        ("#SBATCH --job-name mine -- --nodes=4", {"job-name": "mine"}),
        ("##SBATCH -N4\n# SBATCH -N4\n#sbatch -N4\n  #SBATCH -N4", {}),
        ("\n# a comment\n\n#SBATCH -N4", {"nodes": "4"}),
        ("module load x\n#SBATCH -N4", {}),
        ("#SLURM -J mine", {"job-name": "mine"}),
        ("#SBATCH --later-option=1 -N4", {"later-option": "1", "nodes": "4"}),
        ("#SBATCH --later-option x -N4", {"later-option": "x", "nodes": "4"}),
    ],
)  # fmt: skip
def test_options_are_found_in_every_spelling(lines: str, expected: dict[str, str]) -> None:
    assert {option.name: option.value for option in slurm_directives(lines).options} == expected


def test_an_option_is_shown_as_it_is_written_and_the_last_of_several_counts() -> None:
    found = slurm_directives("#SBATCH -A one --acco=two\n#SBATCH --account three")
    assert [option.said for option in found.options] == ["-A", "--acco", "--account"]
    assert found.value("account") == "three"
    assert found.value("qos") is None


def test_what_else_a_head_may_say() -> None:
    assert slurm_directives("#PBS -N mine\n#BSUB -n 4").foreign == ("#PBS -N mine", "#BSUB -n 4")
    assert slurm_directives("#SBATCH --ignore-pbs\n#PBS -N mine").foreign == ()
    assert slurm_directives("  #SBATCH -N4").unread == ("#SBATCH -N4",)
    assert slurm_directives("#SBATCH hetjob\n#SBATCH -N4").several_jobs
    assert slurm_directives("#SBATCH -N1\n\n  module load x\n").command == "module load x"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("#PBS -N mine -l select=4:ngpus=4", {"N": "mine", "l": "select=4:ngpus=4"}),
        ("  #PBS -Nmine", {"N": "mine"}),
        ("#PBS -r n -q main # -N mine", {"r": "n", "q": "main"}),
        ("#PBS -hzN mine", {"h": "", "z": "", "N": "mine"}),
        ("module load x\n#PBS -N mine", {}),
        ("##PBS -N mine\n#SBATCH -N4", {}),
    ],
)
def test_options_of_pbs(lines: str, expected: dict[str, str]) -> None:
    assert {option.name: option.value for option in pbs_directives(lines).options} == expected
