"""A run on two ranks under torchrun, stopped and killed at random times, and one that nobody disturbs: are they equal?

PYTHONPATH=. python tests/rehearsal.py /tmp/rehearsal --stops 30 --kills 10      # some minutes on a quiet machine
"""

import argparse
import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from mapimages import write_set
from runs import PATIENCE, TINY, assert_same_run, lines, on_ranks, start_ranks, status, workers

OPTIONS = ("--max-restarts=3", "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1", "--shutdown-timeout=60")
WHOM = ("the launcher", "one worker", "the workers", "all")


def step_of(out: Path) -> int:
    """The last one that the run in `out` logged."""
    log = lines(out) if (out / "log.jsonl").exists() else []
    return log[-1]["step"] if log else 0


def send(process: subprocess.Popen[str], out: Path, whom: str, number: signal.Signals) -> None:
    pids = list(workers(out).values())
    pids = {"the launcher": [], "one worker": pids[:1]}.get(whom, pids)
    for pid in [process.pid] * (whom in ("the launcher", "all")) + pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def rehearse(folder: Path, stops: int, kills: int, *, seed: int = 0) -> str:
    """Runs both and compares them bit for bit; returns what was done. Raises AssertionError where they differ."""
    draws = random.Random(seed)
    events = draws.sample(["stop"] * stops + ["kill"] * kills, stops + kills)
    steps = 12 + 3 * len(events)
    shards = write_set(folder / "shards", 24, 1)
    (config := folder / "tiny.yaml").write_text(
        TINY.replace("nano", "pico").replace("steps: 6", f"steps: {steps}").replace("y: 100", "y: 4")
    )
    argv = ["--config", str(config), "--shards", str(shards), "--data.num_threads", "1", "--out"]
    on_ranks(*argv, str(folder / "undisturbed"), timeout=4 * PATIENCE)
    out, process, told, starts = folder / "disturbed", None, [], 0
    for event in events:
        if process is None or process.poll() is not None:
            process, starts = start_ranks(*argv, str(out), options=OPTIONS, quiet=True), starts + 1
        if early := draws.random() < 0.2:  # perhaps before it trains
            time.sleep(draws.uniform(0, 20))
        else:
            wanted, deadline = step_of(out) + draws.randint(1, 3), time.monotonic() + PATIENCE
            while step_of(out) < wanted:
                assert time.monotonic() < deadline, f"no step {wanted}"
                assert process.poll() is None, process.returncode
                time.sleep(0.02)
            time.sleep(draws.uniform(0, 0.3))
        whom = draws.choice(WHOM if event == "stop" else ("one worker", "all"))
        if event == "kill":
            numbers = [signal.SIGKILL]
        else:
            numbers = draws.sample([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], draws.randint(1, 2))
        for number in numbers:
            send(process, out, whom, number)
            time.sleep(draws.uniform(0, 0.2))
        told.append(f"{'+'.join(n.name for n in numbers)} to {whom}{', early' * early}")
        before, deadline = step_of(out), time.monotonic() + PATIENCE
        torchrun_restarts = (event, whom) == ("kill", "one worker")
        while process.poll() is None and not torchrun_restarts:
            assert time.monotonic() < deadline, "it does not end"
            if early and step_of(out) > before + 1:  # there was no worker yet that could have been asked
                break
            time.sleep(0.05)
        print(
            f"{told[-1]}: step {step_of(out)}, {status(out) if (out / 'status.json').exists() else 'not begun'}",
            flush=True,
        )
    if process is not None and process.poll() is None:
        process.wait(timeout=PATIENCE)
    while status(out) != "done":
        before = step_of(out)
        assert start_ranks(*argv, str(out), options=OPTIONS, quiet=True).wait(timeout=PATIENCE) == 0
        starts += 1
        assert step_of(out) > before or status(out) == "done"
    assert_same_run(out, folder / "undisturbed")
    return f"{stops} stops and {kills} kills in {starts} starts of torchrun, {steps} steps: equal bit for bit"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stops", type=int, default=30)
    parser.add_argument("--kills", type=int, default=10)
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    print(rehearse(args.folder, args.stops, args.kills))
