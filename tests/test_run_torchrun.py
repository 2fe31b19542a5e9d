"""Runs under real torchrun: what torchrun does when it is stopped, and what the run does then."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from ranks import free_port
from rehearsal import rehearse, send, step_of
from runs import PATIENCE, TINY, final, lines, start_ranks, status, wait_for, workers

from trainer import checkpoint

USR1 = "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"


def argv(tmp_path: Path, shards: Path, steps: int, out: Path) -> list[str]:
    (config := tmp_path / "tiny.yaml").write_text(TINY.replace("steps: 6", f"steps: {steps}"))
    return ["--config", str(config), "--shards", str(shards), "--data.num_threads", "1", "--out", str(out)]


# What is signalled, with what, and torchrun's exit code: it takes a signal to itself for a failure.
STOPS = {
    "SIGTERM to the launcher": ("the launcher", signal.SIGTERM, 1),
    "SIGUSR1 to the launcher": ("the launcher", signal.SIGUSR1, 1),
    "SIGTERM to the workers": ("the workers", signal.SIGTERM, 0),
    "SIGUSR1 to one worker": ("one worker", signal.SIGUSR1, 0),
    "SIGUSR1 to all": ("all", signal.SIGUSR1, 1),  # SLURM; the launcher passes it on, so that the workers get it twice
    "SIGTERM to all": ("all", signal.SIGTERM, 1),
    "SIGINT to all": ("all", signal.SIGINT, 1),  # Ctrl-C
}


@pytest.mark.slow
@pytest.mark.timeout(3 * PATIENCE)
@pytest.mark.parametrize("stop", STOPS)
def test_a_stop_leaves_a_checkpoint_and_is_not_restarted(tmp_path: Path, shards: Path, stop: str) -> None:
    whom, number, code = STOPS[stop]
    out = tmp_path / "out"
    options = ("--max-restarts=3", USR1, "--shutdown-timeout=60")
    process = start_ranks(*argv(tmp_path, shards, 100_000, out), options=options)
    try:
        wait_for(out, 3)
        send(process, out, whom, number)
        printed, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == code, errors[-3000:]
    assert status(out) == "stopped" and final(out)["step"] == lines(out)[-1]["step"]
    assert printed.count("2 steps an epoch") == 1  # one start
    assert not workers(out)


SLOW_DISK = """
import os, time
sync = os.fsync
def fsync(file):
    if ".pt" in os.readlink(f"/proc/self/fd/{file}"):
        time.sleep(40)
    sync(file)
os.fsync = fsync
"""


@pytest.mark.slow
@pytest.mark.timeout(3 * PATIENCE)
@pytest.mark.parametrize(("patience", "state"), [(90, "stopped"), (5, "running")])
def test_torchrun_waits_for_a_slow_checkpoint_as_long_as_it_is_told(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, patience: int, state: str
) -> None:
    """One that takes longer than torchrun's own 30 s: whole with a longer --shutdown-timeout, lost with a shorter."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_DISK)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    out = tmp_path / "out"
    options = ("--max-restarts=3", f"--shutdown-timeout={patience}")
    process = start_ranks(*argv(tmp_path, shards, 100_000, out), options=options, quiet=True)
    try:
        wait_for(out, 3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=PATIENCE) == 1
    finally:
        process.kill()
    assert status(out) == state and not workers(out)
    assert (checkpoint.latest(out / "checkpoints") is not None) == (state == "stopped")


@pytest.mark.slow
@pytest.mark.timeout(9 * PATIENCE)
def test_torchrun_restarts_three_times_and_no_more(tmp_path: Path, shards: Path) -> None:
    out = tmp_path / "out"
    options = (*argv(tmp_path, shards, 100_000, out), "--log.checkpoint_every", "2")
    process = start_ranks(*options, options=("--max-restarts=3",))
    killed, seen = 0, 0
    try:
        for _ in range(4):
            deadline = time.monotonic() + PATIENCE
            while workers(out).get(1, killed) == killed or step_of(out) < seen + 4:  # a checkpoint lies between
                assert time.monotonic() < deadline, "it does not go on"
                assert process.poll() is None
                time.sleep(0.1)
            killed, seen = workers(out)[1], step_of(out)
            os.kill(killed, signal.SIGKILL)
        printed, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 1 and "Signal 9 (SIGKILL)" in errors
    assert printed.count("2 steps an epoch") == 4 and printed.count("resuming from step") == 3
    assert final(out)["step"] >= seen - 2 and not workers(out)


@pytest.mark.slow
@pytest.mark.timeout(9 * PATIENCE)
def test_a_node_that_leaves_and_comes_back(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elastic torchrun: one node, then two, then one that counts restarts from 1, and a new one that does from 0."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # without it torch 2.14 never lets a node in later
    out = tmp_path / "out"
    wanted = argv(tmp_path, shards, 100_000, out)
    options = ("--nnodes=1:2", f"--rdzv-endpoint=localhost:{free_port()}", "--rdzv-id=any", "--max-restarts=3")
    options += ("--rdzv-conf=last_call_timeout=5,keep_alive_interval=2,keep_alive_max_attempt=5",)

    def node() -> subprocess.Popen[str]:
        return start_ranks(*wanted, ranks=1, options=options)

    nodes = [node()]
    try:
        wait_for(out, 3)
        for _ in range(2):
            alone = workers(out)
            nodes.append(node())
            deadline, before = time.monotonic() + PATIENCE, None
            while before is None or step_of(out) < before + 5:
                assert time.monotonic() < deadline, "two nodes do not get there"
                assert nodes[0].poll() is None, nodes[0].communicate()[1][-3000:]
                both = workers(out)
                if before is None and len(both) == 2 and alone[0] not in both.values():  # until then it trains alone
                    before = step_of(out)
                time.sleep(0.1)
            for pid in (nodes[-1].pid, both[1]):  # as where a machine is lost
                os.kill(pid, signal.SIGKILL)
            deadline, began = time.monotonic() + PATIENCE, None
            while began is None or (out / "status.json").stat().st_mtime < began or step_of(out) <= final(out)["step"]:
                assert time.monotonic() < deadline, "the node that is left does not go on"
                if began is None and workers(out).get(0, both[0]) != both[0]:
                    began = time.time()
                time.sleep(0.1)
        nodes[0].send_signal(signal.SIGTERM)
        nodes[0].communicate(timeout=PATIENCE)
    finally:
        for process in nodes:
            process.kill()
    assert status(out) == "stopped"


@pytest.mark.slow
@pytest.mark.timeout(20 * PATIENCE)
def test_a_run_that_is_stopped_and_killed_at_random(tmp_path: Path) -> None:
    """The full rehearsal, and what came of it: docs/cluster.md."""
    assert rehearse(tmp_path, stops=4, kills=2).endswith("equal bit for bit")
