"""Requests: transient failures are retried, lasting ones are outages, and a batch's images are requested together."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from mapimages import still_recipe
from remote_sets import IMAGES, IMPATIENT, until
from servers import SECRET, Bucket, Proxy

from pipeline import Loader, ReadError, ShardSet, remote

pytestmark = pytest.mark.usefixtures("network")


@pytest.mark.parametrize(
    "faults",
    [["reset"], ["cut 700"], ["cut 20"] * 2, ["stall 700"], ["503"], ["429", "500"]],
    ids="+".join,
)
def test_what_passes_is_retried(
    address: str, local: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, faults: list[str]
) -> None:
    if "stall" in faults[0]:
        monkeypatch.setattr(remote, "_CLIENT", IMPATIENT)
    found = ShardSet(address, cache_size=0)
    proxy.drop()
    proxy.faults[:] = faults
    assert found.read(5) == ShardSet(local).read(5)
    assert not proxy.faults


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("reset", "could not be read: no connection"),
        ("503", "could not be read: the server answers 503"),
        ("stall 0", "could not be read: no answer in time"),
        ("403", "access is denied: check the address, and set AWS_ACCESS_KEY_ID"),
        ("404", "is missing"),
    ],
)
def test_what_lasts_is_an_outage_and_makes_no_sample_bad(
    address: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, fault: str, says: str
) -> None:
    if "stall" in fault:
        monkeypatch.setattr(remote, "_CLIENT", IMPATIENT)
    loader = Loader(ShardSet(address, cache_size=0), still_recipe(), 4, num_threads=1)
    first = next(iter(loader)).index
    state = loader.state_dict()
    loader.close()
    proxy.drop()
    proxy.faults[:] = [fault] * 1000
    with pytest.raises(ReadError, match=says) as caught:
        next(iter(loader))
    assert loader.bad == {} and "\n" not in str(caught.value) and SECRET not in str(caught.value)
    assert loader.state_dict() == state
    proxy.faults.clear()
    later = next(iter(loader)).index  # the run goes on where it stood
    assert not set(later.tolist()) & set(first.tolist())


def test_an_object_that_changed_is_noticed(bucket: Bucket, local: Path) -> None:
    address = bucket.upload(local, "changing")
    found = ShardSet(address, cache_size=0)
    path = local / "map-0001.tar"
    for body in (bytes(path.stat().st_size), b"short"):
        bucket.client.put_object(Bucket=bucket.name, Key="changing/map-0001.tar", Body=body)
        with pytest.raises(ReadError, match=r"map-0001.tar has changed since this run began"):
            found.read(4)
    assert found.read(1) == ShardSet(local).read(1)
    bucket.client.delete_object(Bucket=bucket.name, Key="changing/map-0001.tar")
    with pytest.raises(ReadError, match=r"map-0001.tar is missing"):
        found.read(4)


def test_a_fork_raises_where_it_would_hang(address: str) -> None:
    found = ShardSet(address)
    child = os.fork()
    if child == 0:
        codes = 0
        for k, use in enumerate((lambda: found.read(0), lambda: ShardSet(address))):
            try:
                use()
            except RuntimeError as error:
                codes |= ("before this process was forked" in str(error)) << k
        os._exit(codes)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


def test_the_images_of_a_batch_are_asked_for_together(
    address: str, local: Path, proxy: Proxy, requests: list[str]
) -> None:
    found = ShardSet(address, cache_size=0)
    found.read(0)
    requests.clear()
    proxy.latency = 0.1
    wanted = np.arange(0, IMAGES, 6)
    start = time.perf_counter()
    found.advise(wanted)
    images = [found.read(int(i)) for i in wanted]
    assert time.perf_counter() - start < 1.0 < 0.1 * len(wanted)
    assert images == [ShardSet(local).read(int(i)) for i in wanted]
    requests.clear()
    found.advise(np.arange(9, 15))  # two whole shards: images side by side come together
    assert [found.read(i) for i in range(9, 15)] == [ShardSet(local).read(i) for i in range(9, 15)]
    assert len(requests) == 2


def test_a_program_ends_at_once_in_an_outage(address: str, proxy: Proxy) -> None:
    """Ctrl-C while threads wait for a server that is silent: nobody waits for them to give up."""
    program = (
        "import signal, sys; sys.path.insert(0, 'tests'); from mapimages import still_recipe\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored\n"
        "from pipeline import Loader, ShardSet\n"
        "loader = Loader(ShardSet(sys.argv[1]), still_recipe(), 8, num_threads=1)\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "try: next(iter(loader))\n"
        "except KeyboardInterrupt: print('interrupted', flush=True)\n"
    )
    argv = [sys.executable, "-c", program, address]
    root = Path(__file__).resolve().parents[1]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as run:
        assert run.stdin and run.stdout
        assert run.stdout.readline() == "ready\n"
        proxy.drop()
        proxy.faults[:] = ["stall 0"] * 1000
        before = proxy.connections
        run.stdin.write("go\n")
        run.stdin.flush()
        until(lambda: proxy.connections > before)
        run.send_signal(signal.SIGINT)  # a real one: it ends a wait for a lock
        assert run.stdout.readline() == "interrupted\n"
        start = time.monotonic()
        assert run.wait(30) == 0
    assert time.monotonic() - start < 10
