"""What an installation can do: versions, the start-up hook, devices and their measured speed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import site
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from pydantic import BaseModel

from mergekit_stf.core import methods
from mergekit_stf.core.features import choose_route
from mergekit_stf.host import architectures
from mergekit_stf.host.plugin.autoload import REQUIREMENT, installed_host, is_supported
from mergekit_stf.host.plugin.method import registered_names

PACKAGES = (
    "mergekit-stf",
    "mergekit",
    "torch",
    "transformers",
    "peft",
    "safetensors",
    "matplotlib",
    "jinja2",
)
HOOK_FILES = ("mergekit_stf_autoload.pth", "mergekit_stf_autoload.start")
SWITCH = "MERGEKIT_STF_AUTOLOAD"

SIDE = 1024
SECONDS = 0.25
"""How long a product of square matrices of this side is repeated to measure a device."""


class Device(BaseModel):
    """A device and what it does per second.

    Attributes:
        name: as torch calls it.
        description: the hardware's own name.
        float32: measured 10⁹ operations per second in a 1024 × 1024 product.
        float64: the same in double precision.
        routes: the engine's decomposition for checkpoints of each type.
    """

    name: str
    description: str
    float32: float
    float64: float
    routes: dict[str, str]


class Health(BaseModel):
    """The state of an installation.

    Attributes:
        python: version and build.
        system: operating system and machine.
        versions: of the packages that matter, None where one is missing.
        methods: of ours that mergekit knows in this process.
        registered: whether these are all of ours.
        autoload: whether a fresh interpreter arms the hook, so that ``mergekit-yaml`` finds it.
        hook_files: the start-up files that do so.
        tables: whether mergekit uses our tables of architectures beside its own.
        threads: that torch uses.
        devices: every device torch can compute on.
        problems: what keeps a merge from working, with the remedy.
        missing: what only some commands need.
    """

    python: str
    system: str
    versions: dict[str, str | None]
    methods: list[str]
    registered: bool
    autoload: bool
    hook_files: list[str]
    tables: bool
    threads: int
    devices: list[Device]
    problems: list[str]
    missing: list[str]


def examine_installation() -> Health:
    """Look at this installation; takes about a second a device."""
    versions = {name: _version(name) for name in PACKAGES}
    known = registered_names()
    registered = set(methods.names()) <= set(known)
    autoload, files = is_armed_at_start(), [str(path) for path in _hook_files()]
    return Health(
        python=f"{platform.python_version()} ({sys.executable})",
        system=f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        versions=versions,
        methods=known,
        registered=registered,
        autoload=autoload,
        hook_files=files,
        tables=architectures.switched_on(),
        threads=torch.get_num_threads(),
        devices=[_device(name) for name in _device_names()],
        problems=list(find_problems(installed_host(), registered, autoload, files)),
        missing=list(_missing()),
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _hook_files() -> Iterator[Path]:
    folders = [*site.getsitepackages(), site.getusersitepackages()]
    for folder in dict.fromkeys(folders):
        for name in HOOK_FILES:
            if (path := Path(folder) / name).exists():
                yield path


def is_armed_at_start() -> bool:
    """Ask a fresh interpreter: this one has imported us, which arms the hook by itself."""
    question = (
        "import sys; print(any(type(f).__module__ == '_mergekit_stf_autoload' "
        "for f in sys.meta_path))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", question], capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() == "True"


def find_problems(
    host: str | None, registered: bool, autoload: bool, files: list[str]
) -> Iterator[str]:
    """Yield what keeps a merge from working, with the remedy.

    Args:
        host: the version of mergekit, None where its metadata has none.
        registered: whether mergekit knows all of our methods.
        autoload: whether a fresh interpreter arms the hook.
        files: the start-up files that do so.
    """
    if host is not None and not is_supported(host):
        yield f"mergekit {host} is installed: pip install 'mergekit{REQUIREMENT}'"
    elif not registered:
        yield (
            "mergekit does not know our methods: "
            "pip install --force-reinstall --no-deps mergekit-stf"
        )
    if autoload:
        return
    if os.environ.get(SWITCH) == "0":
        yield f"{SWITCH}=0 hides our methods: unset it, or use mergekit-stf merge"
    elif not files:
        yield (
            "no start-up file is installed, so mergekit-yaml does not find our methods: "
            "pip install --force-reinstall --no-deps mergekit-stf, or use mergekit-stf merge"
        )
    else:
        yield f"{files[0]} does not run at start-up (python -S or -I?): use mergekit-stf merge"


def _missing() -> Iterator[str]:
    absent = [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]
    if absent:
        names = " and ".join(absent)
        yield f"{names}, for mergekit-stf report: pip install 'mergekit-stf[report]'"
    if not torch.cuda.is_available():
        yield "a CUDA device: everything works on the CPU, only slower"


def _device_names() -> Iterator[str]:
    yield "cpu"
    for index in range(torch.cuda.device_count()):
        yield f"cuda:{index}"


def _device(name: str) -> Device:
    device = torch.device(name)
    on_card = device.type == "cuda"
    sample = torch.ones(1, 1, device=device)
    types = (torch.float16, torch.bfloat16, torch.float32)
    routes = {str(t).removeprefix("torch."): choose_route(sample, t) for t in types}
    routes["float64"] = choose_route(sample.double(), torch.float64)
    return Device(
        name=name,
        description=torch.cuda.get_device_name(device) if on_card else _processor(),
        float32=_rate(device, torch.float32),
        float64=_rate(device, torch.float64),
        routes=routes,
    )


def _processor() -> str:
    """Return the CPU's own name; Linux tells Python nothing and keeps it in a file."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor()) or platform.machine()


def _rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return 10⁹ operations per second of a matrix product."""
    x = torch.ones(SIDE, SIDE, device=device, dtype=dtype)
    _product(x)
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < SECONDS:
        _product(x)
        count += 1
    return count * 2 * SIDE**3 / elapsed / 1e9


def _product(x: torch.Tensor) -> None:
    torch.mm(x, x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
