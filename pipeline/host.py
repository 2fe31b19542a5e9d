"""The resources of this process (cores, memory, cache folder), and atomic files, JSON and locks."""

import fcntl
import hashlib
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def cores() -> int:
    """Return the number of CPU cores that this process may use: its affinity, or less if a container has a quota."""
    allowed, limit = len(os.sched_getaffinity(0)), quota()
    return allowed if limit is None else min(allowed, math.ceil(limit))


def quota() -> float | None:
    """Return the CPU time, in cores, that the control groups of this process (v1 or v2) allow; None if unlimited."""
    limits = map(_limit, _groups("cpu"))
    return min((limit for limit in limits if limit is not None), default=None)


def memory() -> int | None:
    """Return the number of bytes that this process can still allocate: the machine's available memory, or less if a
    control group has a limit. Returns None if neither is known.
    """
    lines = _text(Path("/proc/meminfo")).splitlines()
    found = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    for group in _groups("memory"):
        for names in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            limit, used = (_text(group / name).strip() for name in names)
            if limit.isdecimal() and used.isdecimal():
                pages = [line.split() for line in _text(group / "memory.stat").splitlines()]
                cache = max((int(n) for name, n in pages if name.endswith("inactive_file")), default=0)  # reclaimable
                found.append(max(0, int(limit) - int(used) + cache))
    return min(found, default=None)


def _groups(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control groups and of their parents, whose limits apply as well."""
    yield from (_CGROUPS, _CGROUPS / controller)  # in a container its own group is mounted here
    for line in _text(_MEMBERSHIP).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            group = (_CGROUPS / controller if controllers else _CGROUPS) / path.lstrip("/")
            yield from (folder for folder in (group, *group.parents) if _CGROUPS in folder.parents)


def _limit(group: Path) -> float | None:
    words = _text(group / "cpu.max").split()
    words = words or [_text(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    if len(words) == 2 and all(word.isdecimal() and int(word) > 0 for word in words):  # not "max", not -1
        return int(words[0]) / int(words[1])
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def cache_folder(name: str) -> Path:
    """Return the folder of this user's cache `name`, which may not exist. Raises OSError if there is no home."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        raise FileNotFoundError("this user has no home directory: set XDG_CACHE_HOME to a folder for caches") from None
    return home / "dense-ssl" / name


def write_atomic(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Replace `path` atomically and durably with `content`, or with the output of `content(file)`.

    The umask sets the file's mode. On any failure `path` is unchanged and no temporary file remains. A killed process
    leaves ``NAME.*.part``. Raises OSError and the exceptions of `content`.
    """
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # several hosts may write to one folder
    try:
        with part.open("xb") as file:
            file.write(content) if isinstance(content, bytes) else content(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make a folder's entries durable: files created, renamed or removed in it. Raises OSError."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object from a file. Returns None if the file is missing or unreadable, or holds no valid object."""
    try:
        return json_object(path.read_bytes())
    except OSError:
        return None


def json_object(text: bytes) -> dict[str, Any] | None:
    """Parse `text` as a JSON object. Returns None if it is invalid, nested too deeply or not an object."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def digest(content: object) -> str:
    """Return a hash of `content`, which JSON must be able to represent, as 32 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`, which is created if missing.

    The kernel releases the lock when the process ends, however it ends; the file stays. Raises BlockingIOError if
    another process holds the lock, OSError if the file cannot be opened or locked.
    """
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
