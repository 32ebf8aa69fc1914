"""The grid on a cluster: what Slurm is asked and answers, and a grid of jobs, one killed and one preempted."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from conftest import handlers_kept
from test_reproduce import all_gone, files, start_by_fork, started

import reproduce
import train
from grid import cluster
from grid.cluster import Chunk, Cluster
from grid.workers import _cause_of_death
from utils.config import HOME
from utils.errors import UserError

submitit = pytest.importorskip("submitit")

JOBS = {name: [("train", ["--dataset", "nowhere", "--method", "clip"])] for name in "abcde"}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Programs by the names of Slurm's, which write down their calls; squeue lists what the file `queue` holds."""
    answers = {
        "srun": "",
        "scancel": "",
        "squeue": "cat queue",
        "sbatch": "[ ! -f refusal ] || { cat refusal >&2; exit 1; }; echo batch job 7",
    }
    for name, answer in answers.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\necho {name} "$@" >> calls\n{answer}\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cluster, "POLL", 0)
    Path("queue").touch()


def nothing():
    pass


def interrupt():
    raise KeyboardInterrupt


def test_slurm_is_asked_for_an_array_which_ctrl_c_cancels(slurm, capsys):
    Path("queue").write_text("7_0\n7_1\n7_2\n")
    settings = ["partition=gpu", "timeout_min=90", "gpus_per_node=1", "mem_gb=8", "array_parallelism=2",
                "setup=[module load cuda]", "additional_parameters={reservation: ours}"]  # fmt: skip
    with pytest.raises(KeyboardInterrupt), Cluster("slurm", settings, ["auto"], size=2) as jobs:
        list(jobs.run(JOBS, interrupt))
    script = Path("jobs/7_submission.sh").read_text()
    for line in ("array=0-2%2", "partition=gpu", "time=90", "gpus-per-node=1", "mem=8GB", "reservation=ours",
                 "signal=USR2@90", "job-name=reproduce"):  # fmt: skip
        assert f"#SBATCH --{line}\n" in script
    assert "\nmodule load cuda\n" in script
    assert f"env PYTHONPATH={HOME} {sys.executable} -u -m submitit.core._submit {Path('jobs').absolute()}\n" in script
    assert "scancel 7_0 7_1 7_2\n" in Path("calls").read_text()
    out, err = capsys.readouterr()
    assert out == "submitted: jobs 7_0 to 7_2; logs are in jobs/\n"
    assert err == "jobs 7_0 7_1 7_2 are cancelled; logs are in jobs/\n"


def test_results_and_jobs_that_leave_none(slurm):
    """Of three jobs one leaves a result with a failure, one an error; the third is neither in the queue nor has any."""
    dump = submitit.core.utils.cloudpickle_dump

    def end():
        dump(("success", {"b": "train.py: a mistake."}), "jobs/7_0_0_result.pkl")
        dump(("error", "a traceback"), "jobs/7_1_0_result.pkl")
        Path("jobs/7_1_0_log.err").write_text("Traceback\nRuntimeError: wrong\n")
        Path("jobs/7_2_0_log.err").write_text("slurmstepd: error: oom-kill\n")

    with Cluster("slurm", [], ["cpu"], size=2) as jobs:
        assert {name: " ".join(errors) for name, errors in jobs.run(JOBS, end)} == {
            "a": "",
            "b": "train.py: a mistake. Log: jobs/7_0_0_log.err",
            "c": "job 7_1 ended by an error (RuntimeError: wrong). Log: jobs/7_1_0_log.err",
            "d": "job 7_1 ended by an error (RuntimeError: wrong). Log: jobs/7_1_0_log.err",
            "e": "job 7_2 ended without a result (slurmstepd: error: oom-kill). Log: jobs/7_2_0_log.err",
        }
    assert Path("calls").read_text().count("squeue") == 1 + cluster.GONE


def test_what_slurm_refuses_is_told_in_one_sentence(slurm, monkeypatch):
    Path("refusal").write_text("sbatch: error: invalid partition specified: gpu")
    with Cluster("slurm", ["partition=gpu"], ["cpu"], 1) as jobs:
        with pytest.raises(UserError, match=r"refuses 5 jobs .*invalid partition specified: gpu.*change --slurm"):
            list(jobs.run(JOBS, nothing))
        Path("refusal").unlink()
        monkeypatch.setattr(cluster, "SILENT", -1)
        Path("queue").unlink()
        with pytest.raises(UserError, match=r"squeue has not answered for .* minutes: cat: queue: No such file"):
            list(jobs.run(JOBS, nothing))
    Path("queue").write_text("7_3 Resources\n8 None\n")
    with pytest.raises(UserError, match=r"1 jobs of an earlier command are not over in .*`scancel 7_3`"):
        Cluster("slurm", [], ["cpu"], 1).__enter__()


def test_mistakes_end_before_anything_is_submitted(world, refusal, monkeypatch):
    def error(*argv):
        return refusal(reproduce.main, "--datasets", "shapes", "--methods", "clip", *argv)

    assert "--cells-per-job must be at least 1, not 0" in error("--cluster", "local", "--cells-per-job", "0")
    assert "--slurm and --cells-per-job are of jobs of a cluster" in error("--slurm", "partition=gpu")
    assert "--slurm takes key=value, not 'gpu'" in error("--cluster", "local", "--slurm", "gpu")
    assert "Unknown argument 'partitoin'" in error("--cluster", "local", "--slurm", "partitoin=gpu")
    for most in ("0", "two", "1.5", "true"):
        expected = "array_parallelism must be a whole number, 1 or more, not "
        assert expected in error("--cluster", "local", "--slurm", f"array_parallelism={most}")
    for setting in ("nodes=2", "tasks_per_node=2", "ntasks_per_node=2"):
        expected = f"--slurm {setting}: a job is one process that starts others: use --devices."
        assert expected in error("--cluster", "local", "--slurm", setting)
    assert 'Parameter "timeout_min" expected type' in error("--cluster", "local", "--slurm", "timeout_min=soon")
    if shutil.which("srun") is None:
        assert 'Could not detect "srun"' in error("--cluster", "slurm")
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert "--cluster needs submitit: run `pip install -r requirements-extra.txt`." in error("--cluster", "local")


def test_a_held_job_is_named_once(slurm, capsys):
    Path("queue").write_text("7_0 None\n7_1 JobHeldUser\n7_2 launch failed requeued held\n7_3 QOSUsageThreshold\n")
    looks = []

    def look():
        looks.append(capsys.readouterr().err)
        if len(looks) == 3:
            Path("queue").write_text("")

    with Cluster("slurm", [], ["cpu"], size=1) as jobs:
        list(jobs.run({name: JOBS[name] for name in "abcd"}, look))
    assert looks[0] == (
        "job 7_1 is held (JobHeldUser) and does not start: `scontrol release 7_1` or `scancel 7_1`\n"
        "job 7_2 is held (launch failed requeued held) and does not start: `scontrol release 7_2` or `scancel 7_2`\n"
    )
    assert not any(looks[1:])


@pytest.mark.parametrize("seen", [None, "", "1,3"])
def test_jobs_of_this_machine_see_its_gpus(tmp_path, monkeypatch, seen):
    """Submitit starts them with CUDA_VISIBLE_DEVICES=""; they have that of the command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    python = Cluster("local", [], ["auto"], 1).executor._executor.python
    program = "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'), os.environ['PYTHONPATH'])"
    started = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    printed = subprocess.check_output([*shlex.split(python), "-S", "-c", program], text=True, env=started)
    assert printed == f"{seen} {HOME}\n"


def test_jobs_of_this_machine_that_outlived_their_command_are_named(tmp_path, monkeypatch):
    """Of three processes, whose ids are those of jobs, one is a job's of this folder."""
    monkeypatch.chdir(tmp_path)
    Path("jobs").mkdir()
    wait = [sys.executable, "-S", "-c", "input()"]
    job = ["submitit.local._local", str(tmp_path / "jobs")]
    flags = (job, [job[0], "elsewhere"], [])
    processes = [subprocess.Popen([*wait, *words], stdin=subprocess.PIPE) for words in flags]
    try:
        for name in [*(process.pid for process in processes), "7_0"]:
            Path("jobs", f"{name}_submitted.pkl").touch()
        with pytest.raises(UserError, match=rf"1 jobs of an earlier .*: wait for them, or `kill {processes[0].pid}`"):
            Cluster("local", [], ["cpu"], 1).__enter__()
    finally:
        for process in processes:
            process.communicate(b"\n")
    Cluster("local", [], ["cpu"], 1).__enter__()


def test_a_second_sigterm_leaves_the_saving_alone():
    interrupted = []

    def save():
        interrupted.append(True)
        if len(interrupted) < 3:
            signal.raise_signal(signal.SIGTERM)

    chunk = Chunk({}, ["cpu"])
    chunk.workers = SimpleNamespace(interrupt=save)
    with handlers_kept(signal.SIGTERM), pytest.raises(SystemExit):
        signal.signal(signal.SIGTERM, chunk._terminated)
        signal.raise_signal(signal.SIGTERM)
    assert len(interrupted) == 1


def test_causes_of_death():
    assert _cause_of_death(1) == "its process ended with exit code 1."
    assert _cause_of_death(-signal.SIGKILL) == "its process was ended by SIGKILL (out of memory?)."
    assert _cause_of_death(-40) == "its process was ended by signal 40."


def test_a_preempted_chunk_goes_on_with_what_is_left(monkeypatch):
    """SIGUSR2 in the second of three jobs; the process that it interrupts is gone before the job is requeued."""
    start_by_fork(monkeypatch)
    parent, pids = os.getpid(), []

    def main(flags):
        if "b" in flags:
            os.kill(parent, signal.SIGUSR2)
            time.sleep(60)
        print("train.py: a mistake.", file=sys.stderr)
        raise SystemExit(2)

    def preempt(*_):
        pids.append(chunk.workers.workers[0].process)
        left.append(chunk.checkpoint().function)
        raise SystemExit(255)

    monkeypatch.setattr(train, "main", main)
    chunk, left = Chunk({name: [("train", [name])] for name in "abc"}, ["cpu"]), []
    with handlers_kept(signal.SIGTERM, signal.SIGUSR2), pytest.raises(SystemExit):
        signal.signal(signal.SIGUSR2, preempt)
        chunk()
    deadline = time.monotonic() + 10
    while pids[0].exitcode is None and time.monotonic() < deadline:
        time.sleep(0.01)  # the pool's thread waits for the process, too, and may yet have to note its exit code
    assert list(left[0].jobs) == ["b", "c"] and list(left[0].failed) == ["a"] and pids[0].exitcode == 130


METHODS = ["asymvlm-psd", "pfe", "clip"]
GRID = ["--datasets", "shapes", "--methods", *METHODS, "--seeds", "0", "1", "--devices", "cpu", "--quiet"]
GRID += ["--set", "train.epochs=60", "train.save_every=0"]
ON_CLUSTER = ["--cluster", "local", "--slurm", "array_parallelism=2", *GRID]


def tasks(cell):
    """The processes in which the job of a cell computes, the first of which submitit's signals go to."""
    [job] = [path for path in Path("jobs").glob("*_submitted.pkl") if cell.encode() in path.read_bytes()]
    controller = psutil.Process(int(job.name.split("_")[0]))
    return [process for process in controller.children(recursive=True) if "resource_tracker" not in process.cmdline()]


def wait_for(path):
    deadline = time.monotonic() + 120
    while not list(Path.cwd().glob(path)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.usefixtures("one_figure")
def test_a_grid_of_which_one_job_is_killed_and_one_preempted(world, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    unbroken = tmp_path_factory.mktemp("unbroken")
    (unbroken / "embeddings").symlink_to(world / "embeddings")
    with monkeypatch.context() as patch:
        start_by_fork(patch)
        patch.chdir(unbroken)
        reproduce.main(GRID)
        expected = files("results", "checkpoints"), Path("results/shapes/table.md").read_bytes()
    process = started(ON_CLUSTER, "checkpoints/**/asymvlm-psd/seed0/state.pt")
    tasks("asymvlm-psd/seed0")[0].send_signal(signal.SIGUSR2)
    wait_for("checkpoints/**/pfe/seed0/state.pt")
    tasks("pfe/seed0")[0].kill()
    _, error = process.communicate(timeout=300)
    assert process.returncode == 1
    assert error.count("shapes/shapes-tiny/") == error.count("Log: jobs/") == error.count("\n") == 1, error
    assert error.startswith("shapes/shapes-tiny/pfe/seed0: job ")
    [log] = [path for path in Path("jobs").glob("*.err") if "this job is preempted" in path.read_text()]
    assert "asymvlm-psd/seed0: done" in log.with_suffix(".out").read_text()
    reproduce.main(ON_CLUSTER)
    assert (files("results", "checkpoints"), Path("results/shapes/table.md").read_bytes()) == expected


@pytest.mark.slow
def test_ctrl_c_cancels_jobs_of_this_machine_which_save(world, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    process = started(ON_CLUSTER, "checkpoints/**/state.pt")
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=300)  # 10 s alone, 60 on a machine that computes much else
    assert process.returncode == 130
    first, second = error.splitlines()
    assert first.startswith("jobs ") and first.endswith(" are cancelled; logs are in jobs/")
    assert second == "reproduce.py: interrupted; the same command resumes from what was last saved."
    assert all_gone(process.pid)
