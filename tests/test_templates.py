"""The templates for clusters in the documents: they parse, fit themselves, and start what is there."""

import math
import os
import re
import shlex
import stat
import subprocess
from pathlib import Path

import pytest

from experiments import train

FOLDER = Path(__file__).parents[1] / "docs" / "guides" / "cluster"
SLURM = FOLDER / "slurm.sh"
FLAGS = {
    *("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task"),
    *("time", "signal", "requeue", "open-mode", "output"),
}
"""Of sbatch, as its manual has them."""


def directives():
    pairs = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", SLURM.read_text(), flags=re.MULTILINE)
    assert len(pairs) == SLURM.read_text().count("#SBATCH")
    return dict(pairs)


def require_shared_out(words, devices):
    config, resumes = train.parse(words)
    assert not resumes and config.batch_size % devices == config.pretrain.batch_size % devices == 0
    return config


def test_the_slurm_script_is_bash_and_names_flags_that_exist():
    assert subprocess.run(["bash", "-n", SLURM], check=False).returncode == 0
    assert set(directives()) <= FLAGS


@pytest.fixture
def slurm(tmp_path):
    """Runs the script with a Slurm that writes down what it is asked for."""
    tools = tmp_path / "bin"
    tools.mkdir()
    fakes = {
        "scontrol": 'if [ "$1" = show ]; then echo node7; echo node8; else echo "$@" > "$OUT/requeued"; fi',
        "srun": 'printf "%s\\n" "$JAX_COORDINATOR_ADDRESS" "$@" > "$OUT/started"; exit "${STATUS:-0}"',
    }
    for name, text in fakes.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(stat.S_IRWXU)

    def run(status=0):
        variables = {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "OUT": tmp_path,
            "RUN": tmp_path / "run",
            "STATUS": status,
        }
        variables |= {"SLURM_JOB_ID": 123456, "SLURM_JOB_NODELIST": "node[7-8]"}
        done = subprocess.run(["bash", SLURM], env={name: str(value) for name, value in variables.items()}, check=False)
        return done.returncode, (tmp_path / "started").read_text().splitlines()

    return run


def test_slurm_starts_a_run_that_its_devices_can_share_and_goes_on_with_it(slurm, tmp_path):
    code, (address, flag, program, *words) = slurm()
    assert (code, address, flag, program) == (0, "node7:23456", "--kill-on-bad-exit=1", ".venv/bin/python")
    assert words[:2] == ["-m", "experiments.train"] and not (tmp_path / "requeued").exists()
    processes = int(directives()["nodes"]) * int(directives()["ntasks-per-node"])
    assert require_shared_out(words[2:], processes).output_dir == str(tmp_path / "run")

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").touch()
    assert slurm()[1][-2:] == ["--resume", str(tmp_path / "run")]


@pytest.mark.parametrize(("status", "is_requeued"), [(143, True), (1, False)])
def test_slurm_queues_a_run_again_that_was_saved_in_time_and_no_other(slurm, tmp_path, status, is_requeued):
    assert slurm(status)[0] == status
    assert (tmp_path / "requeued").exists() == is_requeued
    assert not is_requeued or (tmp_path / "requeued").read_text() == "requeue 123456\n"


def test_the_kubernetes_job_fits_itself_and_its_devices_can_share_the_run(tmp_path):
    yaml = pytest.importorskip("yaml")
    service, job = yaml.safe_load_all((FOLDER / "gke.yaml").read_text())
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert (service["kind"], job["kind"], spec["completionMode"]) == ("Service", "Job", "Indexed")
    assert service["spec"]["selector"] == {"job-name": name} and service["spec"]["clusterIP"] == "None"
    assert pod["subdomain"] == service["metadata"]["name"]

    variables = {one["name"]: one.get("value") for one in container["env"]}
    port = container["ports"][0]["containerPort"]
    assert variables["JAX_COORDINATOR_ADDRESS"] == f"{name}-0.{pod['subdomain']}:{port}"
    assert int(variables["JAX_NUM_PROCESSES"]) == spec["completions"] == spec["parallelism"]
    (index,) = [one for one in container["env"] if one["name"] == "JAX_PROCESS_ID"]
    assert "job-completion-index" in index["valueFrom"]["fieldRef"]["fieldPath"]

    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert chips == spec["completions"] * container["resources"]["limits"]["google.com/tpu"]
    mounts = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
    assert mounts.keys() == {one["name"] for one in pod["volumes"]}
    assert all(variables[key].startswith(f"{mounts['runs']}/") for key in ("RUN", "XDG_CACHE_HOME"))

    (script,) = container["args"]
    told = script.replace("exec python", "printf '%s\\n'")
    for folder, expected in ((tmp_path / "new", None), (tmp_path, ["--resume", str(tmp_path)])):
        (tmp_path / "config.json").touch()
        done = subprocess.run([*container["command"], told], env={"RUN": str(folder)}, capture_output=True, text=True)
        _, program, *words = done.stdout.splitlines()
        assert program == "experiments.train", shlex.join(words)
        if expected is None:
            require_shared_out(words, chips)
        else:
            assert words == expected
