"""A run from a bucket of a real object store, killed and resumed, gives the same weights as a run from the disk."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mapimages import write_set
from runs import ROOT, TINY, assert_same_run, lines
from servers import Bucket, client_of, publish, seaweed

STEPS = 200


def command(*argv: str) -> list[str]:
    return [sys.executable, "trainer/run.py", "--data.num_threads", "1", *argv]


def step_of(out: Path) -> int:
    log = out / "log.jsonl"
    lines = log.read_text().splitlines() if log.is_file() else []
    return json.loads(lines[-1])["step"] if lines else 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_from_a_bucket_is_killed_and_resumed(tmp_path: Path) -> None:
    folder = publish(write_set(tmp_path / "set", 240, 40))
    config = tmp_path / "tiny.yaml"
    config.write_text(
        TINY.replace("nano", "pico")
        .replace("batch_size: 8", "batch_size: 2")
        .replace("steps: 6", f"steps: {STEPS}")
        .replace("checkpoint_every: 100", "checkpoint_every: 20")
    )
    argv = ["--config", str(config), "--shards"]
    local = command(*argv, str(folder), "--data.order", "block", "--out", str(tmp_path / "local"))
    subprocess.run(local, cwd=ROOT, check=True, capture_output=True)
    (tmp_path / "server").mkdir()
    with seaweed(tmp_path / "server", seconds=900) as writer:
        bucket = Bucket(writer["AWS_ENDPOINT_URL"], client_of(writer), "bucket")
        address = bucket.upload(folder, "in1k")
        cache = tmp_path / "user"
        there = {**os.environ, **writer, "AWS_ACCESS_KEY_ID": "reader"}
        remote = command(
            *argv, address, "--cache.folder", str(cache), "--cache.size", "0.001", "--out", str(tmp_path / "remote")
        )
        with subprocess.Popen(remote, cwd=ROOT, env=there, stdout=subprocess.DEVNULL) as run:
            while step_of(tmp_path / "remote") < STEPS // 3:
                assert run.poll() is None
                time.sleep(0.02)
            run.send_signal(signal.SIGKILL)
        assert step_of(tmp_path / "remote") < STEPS
        assert list(cache.rglob("0000??.tar"))
        done = subprocess.run(remote, cwd=ROOT, env=there, check=True, capture_output=True, text=True)
        assert "resuming from step" in done.stdout
        hits = [line["cache_hits"] for line in lines(tmp_path / "remote")[-30:]]  # the last step asks for nothing more
        assert sum(hits) > 15
        assert_same_run(tmp_path / "remote", tmp_path / "local")
        denied = subprocess.run(
            remote,
            cwd=ROOT,
            env={**there, "AWS_SECRET_ACCESS_KEY": "another"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert denied.returncode == 2
        assert "access is denied" in denied.stderr and "another" not in denied.stderr
