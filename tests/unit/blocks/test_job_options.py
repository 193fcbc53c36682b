"""Options of a site's own lines that a block cannot have, in whatever spelling."""

from __future__ import annotations

from typing import Any

import pytest
from parsl.launchers import SimpleLauncher
from parsl.providers import PBSProProvider, SlurmProvider

from gateway_plugin.schedulers.job_options import pbs_refusal, slurm_asked, slurm_refusal

pytestmark = pytest.mark.process


def slurm(options: str = "", **more: Any) -> SlurmProvider:
    return SlurmProvider(launcher=SimpleLauncher(), scheduler_options=options, **more)


def pbs(options: str = "", **more: Any) -> PBSProProvider:
    return PBSProProvider(launcher=SimpleLauncher(), scheduler_options=options, **more)


@pytest.mark.parametrize(
    ("options", "named", "instead"),
    [
        ("#SBATCH --clusters=accelgor", "--clusters", "clusters='accelgor' of the provider"),
        ("#SBATCH -M accelgor", "-M", "clusters='accelgor' of the provider"),
        ("#SBATCH --cluster accelgor", "--cluster", "clusters='accelgor' of the provider"),
        ("#SBATCH -C gpu -q regular -J mine -o %j.out", "-J, -o", "leave it out"),
        ("#SBATCH -C gpu -Jmine", "-J", "leave it out"),
        ("#SBATCH --job-n=mine", "--job-n", "leave it out"),
        ("#SBATCH --mail-type=END --err x --arr=1-3", "--err, --arr", "leave it out"),
        ("#SBATCH --nodes=4", "--nodes", "one block is one node"),
        ("#SBATCH -N 1-4", "-N", "one block is one node"),
        ("#SBATCH -N$NODES", "-N", "one block is one node"),
        ("#SBATCH -t 48:00:00", "-t", "walltime= of the provider"),
        ("#SBATCH --wait", "--wait", "leave it out"),
        ("#SBATCH -Q", "-Q", "leave it out"),
        ("#SBATCH --test-only --parsable", "--test-only, --parsable", "leave it out"),
        ("#SBATCH --uid=1000", "--uid", "its own user"),
        ("#SBATCH --requeue", "--requeue", "leave it out"),
        ("#SBATCH -N1\n#SBATCH hetjob\n#SBATCH -N1", "hetjob", "one block is one job"),
        ("#PBS -N mine", "'#PBS -N mine'", "say it as #SBATCH"),
        ("  #SBATCH -A mine", "'#SBATCH -A mine'", "say it as #SBATCH, without blanks before it"),
        ("#sbatch -A mine", "'#sbatch -A mine'", "say it as #SBATCH"),
        ("#SBTACH --gpus=4", "'#SBTACH --gpus=4'", "say it as #SBATCH"),
        ("#MSUB -l nodes=4", "'#MSUB -l nodes=4'", "say it as #SBATCH"),
        ("#$ -pe mpi 4", "'#$ -pe mpi 4'", "say it as #SBATCH"),
        ("#flux: -N4", "'#flux: -N4'", "say it as #SBATCH"),
        ("#SBATCH -A x #SBATCH -p y", "'#SBATCH -A x #SBATCH -p y'", "begin another line"),
        ("#SBATCH --gpus=4; #SBATCH -p y", "'#SBATCH --gpus=4; #SBATCH -p y'", "begin another line"),
        ("#SBATCH account=mine", "'account=mine'", "no option"),
        ("#SBATCH \u2013gpus=4", "'\u2013gpus=4'", "no option"),
        ("#SBATCH --qos= high", "'high'", "no option"),
        ("#SBATCH: -A mine", "':'", "no option"),
        ("#SBATCH -A $ACCOUNT", "-A $ACCOUNT", "have Python do it"),
        ("#SBATCH --mail-user=${USER}@x.org", "--mail-user ${USER}@x.org", "have Python do it"),
        ("module load cuda", "'module load cuda'", "put it into worker_init="),
        ("--gres=gpu:4", "'--gres=gpu:4'", "put it into worker_init="),
    ],
)
def test_what_slurm_would_do_to_a_block_is_refused_by_name(options: str, named: str, instead: str) -> None:
    said = slurm_refusal(slurm(options))
    assert said is not None
    assert said.startswith(f"{named}: ")
    assert instead in said


@pytest.mark.parametrize(
    "options",
    [
        "",
        "#SBATCH -N1 --nodes=1-1 --ntasks=1",
        "#SBATCH --gres gpu:1 --gpus-per-node=1",
        "#SBATCH -A abc -p gpu -q high -C 'a100&hbm80g' --mem=0 --no-requeue --exclusive --hold",
        "#SBATCH --signal=B:USR1@60 --comment='-J mine' # -J mine",
        "##SBATCH -J mine\n# SBATCH -J mine\n# use -A of the project\n#BB create_persistent\n#DW jobdw type=scratch",
        "#SBATCH --comment=$HOME --chdir=/scratch/%u",
    ],
)
def test_the_rest_is_the_sites(options: str) -> None:
    assert slurm_refusal(slurm(options)) is None


def test_a_cluster_is_the_providers_to_name() -> None:
    assert slurm_refusal(slurm(clusters="accelgor")) is None
    assert slurm_refusal(slurm("#SBATCH -M accelgor", clusters="accelgor")) is None
    assert slurm_refusal(slurm("#SBATCH -M other", clusters="accelgor")) is not None


def test_what_ends_all_options_is_refused() -> None:
    """After ``--`` even the lines that Parsl writes for the provider's fields are none."""
    assert "no option" in str(slurm_refusal(slurm("#SBATCH -A mine --")))


def test_options_that_came_in_by_another_field_are_refused_too() -> None:
    assert str(slurm_refusal(slurm(partition="gpu a100"))).startswith("'a100': no option")
    for field in ("account", "partition", "qos", "constraint", "gres"):
        assert "-J: " in str(slurm_refusal(slurm(**{field: "x -J mine"})))
    assert "-J: " in str(slurm_refusal(slurm(worker_init="# modules\n#SBATCH -J mine\nmodule load x")))
    assert slurm_refusal(slurm(worker_init="module load x\n#SBATCH -J mine")) is None  # Slurm has read enough by then


def test_what_a_job_asks_for_is_told_by_fields_and_options_alike() -> None:
    said = slurm_asked(slurm("#SBATCH -A theirs -q high", account="ours"))
    assert (said.value("account"), said.value("qos"), said.value("partition")) == ("ours", "high", None)


@pytest.mark.parametrize(
    ("options", "named", "instead"),
    [
        ("#PBS -q main -N mine", "-N", "leave it out"),
        ("  #PBS -joe -o x", "-j, -o", "leave it out"),
        ("#PBS -l select=4:ncpus=8", "-l select=4:ncpus=8", "one block is one node"),
        ("#PBS -l filesystems=home,nodes=2", "-l nodes=2", "one block is one node"),
        ("#PBS -l walltime=1:00:00", "-l walltime=1:00:00", "walltime= of the provider"),
        ("#PBS -q main@other", "-q main@other", "queue= of the provider"),
        ("#PBS -W block=true", "-W block=true", "leave it out"),
        ("#PBS -hz", "-z", "leave it out"),
        ("#PBS -k oe", "-k oe", "or say -k doe"),
        ("#PBS -Roe", "-R", "leave it out"),
        ("#PBS -S /bin/tcsh", "-S /bin/tcsh", "started by bash"),
        ("#PBS -r y", "-r y", "start a block again"),
        ("#PBS -l min_walltime=1:00:00", "-l min_walltime=1:00:00", "walltime= of the provider"),
        ("#pbs -q main", "'#pbs -q main'", "say it as #PBS"),
        ("#COBALT -q main", "'#COBALT -q main'", "say it as #PBS"),
        ("#PBS -q a #PBS -A b", "'#PBS -q a #PBS -A b'", "begin another line"),
        ("#PBS -q main gpu", "'gpu'", "no option"),
        ("#PBS -A $PROJECT", "-A $PROJECT", "have Python do it"),
        ("#SBATCH -A x", "'#SBATCH -A x'", "say it as #PBS"),
        ("module load x", "'module load x'", "put it into worker_init="),
    ],
)
def test_what_pbs_would_do_to_a_block_is_refused_by_name(options: str, named: str, instead: str) -> None:
    said = pbs_refusal(pbs(options))
    assert said is not None
    assert said.startswith(f"{named}: ")
    assert instead in said


def test_of_pbs_too_the_rest_is_the_sites() -> None:
    assert pbs_refusal(pbs("#PBS -l filesystems=home:eagle -q main -A mine\n#PBS -r n -W depend=afterok:1")) is None
    assert pbs_refusal(pbs("#PBS -k doe -S /bin/bash -V -M a@b -m abe -l place=scatter")) is None
    assert pbs_refusal(pbs(select_options="ngpus=4:system=polaris")) is None
    assert "default server only" in str(pbs_refusal(pbs(queue="main@other")))
    assert "one block is one node" in str(pbs_refusal(pbs(select_options="ngpus=4+2:ncpus=1")))
