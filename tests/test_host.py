"""The machine's cores, memory and cache folder; atomic files, JSON and locks."""

import multiprocessing
import os
from pathlib import Path
from typing import BinaryIO

import pytest

from pipeline import host


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(host, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(host, "_MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    return tmp_path


def limit(root: Path, group: str, name: str, text: str) -> None:
    (root / "cgroup" / group).mkdir(parents=True, exist_ok=True)
    (root / "cgroup" / group / name).write_text(f"{text}\n")


@pytest.mark.parametrize(
    ("text", "cores"), [("max 100000", 8), ("150000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8), ("9", 8)]
)
def test_cores_are_the_affinity_or_the_quota(groups: Path, text: str, cores: int) -> None:
    limit(groups, ".", "cpu.max", text)
    assert host.cores() == cores


def test_without_control_groups_the_affinity_counts(groups: Path) -> None:
    assert host.quota() is None
    assert host.cores() == 8


@pytest.mark.parametrize(("quota", "cores"), [("-1", 8), ("250000", 3), ("1000", 1)])
def test_quotas_of_control_groups_v1(groups: Path, quota: str, cores: int) -> None:
    limit(groups, "cpu", "cpu.cfs_quota_us", quota)
    limit(groups, "cpu", "cpu.cfs_period_us", "100000")
    assert host.cores() == cores


def test_the_tightest_group_above_a_process_counts(groups: Path) -> None:
    """As a batch system sets them: no namespace hides the path, and the job's limit lies above the task's."""
    (groups / "membership").write_text("12:memory:/job\n3:cpu,cpuacct:/slurm/job_7/step_0\n0::/system/job_7/task\n")
    limit(groups, "system/job_7", "cpu.max", "400000 100000")
    limit(groups, "system/job_7/task", "cpu.max", "max 100000")
    assert host.quota() == 4
    limit(groups, "cpu/slurm/job_7", "cpu.cfs_quota_us", "200000")
    limit(groups, "cpu/slurm/job_7", "cpu.cfs_period_us", "100000")
    assert host.quota() == 2
    limit(groups, "other", "cpu.max", "1000 100000")
    assert host.cores() == 2


def test_memory_is_what_the_machine_or_a_control_group_has_left(groups: Path) -> None:
    free = host.memory()
    assert free is not None and free > 10**6
    limit(groups, ".", "memory.max", "max")
    limit(groups, ".", "memory.current", "5000")
    assert abs(host.memory() - free) < 10**9  # others come and go meanwhile
    limit(groups, "memory", "memory.limit_in_bytes", "9000")
    limit(groups, "memory", "memory.usage_in_bytes", "5000")
    assert host.memory() == 4000
    (groups / "membership").write_text("4:memory:/job\n0::/job\n")
    limit(groups, "job", "memory.max", "3000")
    limit(groups, "job", "memory.current", "2500")
    limit(groups, "job", "memory.stat", "anon 7\ninactive_file 100\nactive_file 900")
    assert host.memory() == 600


def test_the_cache_lies_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert host.cache_folder("tables") == Path("/somewhere/dense-ssl/tables")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert host.cache_folder("tables") == Path("/home/me/.cache/dense-ssl/tables")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # a user without an entry and without HOME
    with pytest.raises(OSError, match="set XDG_CACHE_HOME"):
        host.cache_folder("tables")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("torn")])
def test_a_failing_write_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"

    def fail(file: BinaryIO) -> None:
        file.write(b"half of")
        raise error

    for before in (None, b"what was there"):
        if before:
            path.write_bytes(before)
        with pytest.raises(type(error)):
            host.write_atomic(path, fail)
        assert (path.read_bytes() if path.exists() else None) == before
        assert set(tmp_path.iterdir()) <= {path}


def test_a_file_appears_whole_with_the_umasks_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "file", []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(str(Path(f"/proc/self/fd/{fd}").readlink())) or fsync(fd))

    def write(file: BinaryIO) -> None:
        file.write(b"content")
        assert not path.exists()

    old = os.umask(0o027)
    try:
        host.write_atomic(path, write)
    finally:
        os.umask(old)
    assert path.read_bytes() == b"content"
    assert path.stat().st_mode & 0o777 == 0o640
    assert synced[0].startswith(f"{path}.")  # the content first, then its name
    assert synced[1:] == [str(tmp_path)]
    assert list(tmp_path.iterdir()) == [path]
    host.write_atomic(path, b"other content")
    assert path.read_bytes() == b"other content"


def test_json_that_cannot_be_had_is_none(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    assert host.read_json(path) is None
    assert host.read_json(tmp_path) is None
    for content in (b"", b'{"a": 1', b"[1, 2]", b"\xff\xfe{}", b'{"a":' * 100_000, b"null"):
        path.write_bytes(content)
        assert host.read_json(path) is None
    path.write_bytes(b'{"a": [1]}')
    assert host.read_json(path) == {"a": [1]}


def _try(path: Path, queue: "multiprocessing.Queue[str]") -> None:
    try:
        with host.lock(path):
            queue.put("held")
    except BlockingIOError:
        queue.put("refused")


def test_a_lock_is_held_by_one_process_and_freed_at_its_end(tmp_path: Path) -> None:
    path, queue = tmp_path / "lock", multiprocessing.get_context("fork").Queue()

    def other() -> str:
        process = multiprocessing.get_context("fork").Process(target=_try, args=(path, queue))
        process.start()
        process.join()
        return queue.get(timeout=10)

    with host.lock(path):
        assert other() == "refused"
        with pytest.raises(BlockingIOError), host.lock(path):  # nor twice by one
            pass
    assert other() == "held"
    with host.lock(path):
        pass
