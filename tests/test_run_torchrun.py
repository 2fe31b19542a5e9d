"""Real torchrun: what it does to a run when somebody stops it, and what a run does when it is stopped."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from ranks import free_port
from rehearsal import rehearse, send, step_of
from runs import TINY, final, lines, start_ranks, status, wait_for, workers

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
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stop", STOPS)
def test_a_stop_leaves_a_checkpoint_and_is_not_restarted(tmp_path: Path, shards: Path, stop: str) -> None:
    whom, number, code = STOPS[stop]
    out = tmp_path / "out"
    options = ("--max-restarts=3", USR1, "--shutdown-timeout=60")
    process = start_ranks(*argv(tmp_path, shards, 100_000, out), options=options)
    try:
        wait_for(out, 3)
        send(process, out, whom, number)
        printed, errors = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == code, errors[-3000:]
    assert status(out) == "stopped" and final(out)["step"] == lines(out)[-1]["step"]
    assert printed.count("2 steps an epoch") == 1  # one start
    assert not workers(out)


@pytest.mark.slow
@pytest.mark.timeout(1200)
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
            before = lines(out)[-1]["step"]
            nodes.append(node())
            deadline = time.monotonic() + 240
            while len(workers(out)) < 2 or lines(out)[-1]["step"] < before + 5:
                assert time.monotonic() < deadline, "two nodes do not get there"
                assert nodes[0].poll() is None, nodes[0].communicate()[1][-3000:]
                time.sleep(0.1)
            both = workers(out)
            for pid in (nodes[-1].pid, both[1]):  # as where a machine is lost
                os.kill(pid, signal.SIGKILL)
            deadline, began = time.monotonic() + 240, None
            while began is None or (out / "status.json").stat().st_mtime < began or step_of(out) <= final(out)["step"]:
                assert time.monotonic() < deadline, "the node that is left does not go on"
                if began is None and workers(out).get(0, both[0]) != both[0]:
                    began = time.time()
                time.sleep(0.1)
        nodes[0].send_signal(signal.SIGTERM)
        nodes[0].communicate(timeout=100)
    finally:
        for process in nodes:
            process.kill()
    assert status(out) == "stopped"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_that_is_stopped_and_killed_at_random(tmp_path: Path) -> None:
    """The full rehearsal, and what came of it: docs/cluster.md."""
    assert rehearse(tmp_path, stops=4, kills=2).endswith("equal bit for bit")
