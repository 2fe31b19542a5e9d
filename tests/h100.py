"""A simulated H100 on a machine without a GPU: enough to trace and compile a training step.

Nothing is computed or launched. The Python side is patched. A small library (h100.c), loaded before CUDA's libraries,
answers the CUDA calls of autograd's engine and Triton. This needs a separate process: see `environment`.
"""

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 * 2**30,
    L2_cache_size=50 * 2**20,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    gcnArchName="",
    is_integrated=0,
    clock_rate=1980000,
    memory_clock_rate=2619000,
    memory_bus_width=5120,
    uuid="none",
)


def environment(folder: Path) -> dict[str, str]:
    """The environment of a process that shall see an H100. Builds the library in `folder`, with gcc."""
    library = folder / "libcuda.so.1"  # under this name, and beside what is linked as libcudart
    source = Path(__file__).with_name("h100.c")
    words = ["gcc", "-w", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", str(library), str(source)]
    subprocess.run(words, check=True)
    path = f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    return {**os.environ, "LD_PRELOAD": str(library), "LD_LIBRARY_PATH": path, "SEES_H100": "1"}


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 1.0


class _Driver:
    """What Triton asks of its driver while it compiles: the target, and nothing that launches."""

    binary_ext = "cubin"

    def __init__(self) -> None:
        limits = {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}
        clocks = {"sm_clock_rate": 1980000, "mem_clock_rate": 2619000, "mem_bus_width": 5120}
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: limits | clocks,
            # module, function, registers, spills, threads at most
            load_binary=lambda name, kernel, shared, device: (0, 0, 32, 0, 1024),
        )

    def launcher_cls(self, *_: Any, **__: Any) -> Any:
        return lambda *_, **__: None

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None: ...

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda

    def assemble_tensormap_to_arg(self, *_: Any) -> tuple[()]:
        return ()

    @staticmethod
    def is_active() -> bool:
        return True


def _answers(value: Any) -> Any:
    """A function that always says the same; one of its own for each name, since Dynamo keeps a table of functions."""
    return lambda *_, **__: value


CUDA = {
    "_exchange_device": 0,
    "_maybe_exchange_device": 0,
    "_lazy_init": None,
    "is_available": True,
    "is_initialized": True,
    "is_bf16_supported": True,
    "device_count": 1,
    "current_device": 0,
    "set_device": None,
    "synchronize": None,
    "get_device_properties": PROPERTIES,
    "get_device_capability": (9, 0),
    "get_device_name": PROPERTIES.name,
    "mem_get_info": (PROPERTIES.total_memory, PROPERTIES.total_memory),
    "max_memory_allocated": 0,
    "get_rng_state": torch.zeros(16, dtype=torch.uint8),
    "set_rng_state": None,
}
COMPILER = {
    "is_available": True,
    "is_bf16_supported": True,
    "is_triton_capable": True,
    "raise_if_triton_unavailable": None,
    "device_count": 1,
    "current_device": 0,
    "set_device": None,
    "synchronize": None,
    "get_compute_capability": 90,
    "get_device_properties": PROPERTIES,
    "get_raw_stream": 0,
    "exchange_device": 0,
    "maybe_exchange_device": 0,
}


def pretend(compiles: bool = False) -> None:
    """Patches torch and, where something is compiled, Triton and Inductor; before anything asks what devices exist."""
    core: Any = torch._C
    core._ensureCUDADeviceGuardSet()  # while there is no GPU yet: a guard that does nothing
    core._set_only_lift_cpu_tensors(True)  # likewise: constants are made on the host and moved
    for name in ("_cuda_getCurrentRawStream", "_cuda_exchangeDevice", "_cuda_maybeExchangeDevice"):
        setattr(core, name, _answers(0))
    for name, value in CUDA.items():
        setattr(torch.cuda, name, _answers(value))
    torch.cuda.Event = _Event  # type: ignore[assignment, misc]
    from torch.cuda.amp import common

    common.amp_definitely_not_available = _answers(False)
    if not compiles:
        return
    from torch._dynamo import device_interface
    from torch._inductor.runtime import triton_helpers
    from triton.runtime import driver

    driver.set_active(_Driver())
    triton_helpers.set_driver_to_gpu = _answers(None)  # what Inductor writes would look for libcuda itself
    interface: Any = device_interface.CudaInterface
    for name, value in COMPILER.items():
        setattr(interface, name, staticmethod(_answers(value)))
    for name in ("set_device", "current_device", "get_device_properties"):
        setattr(interface.Worker, name, staticmethod(_answers(COMPILER[name])))
