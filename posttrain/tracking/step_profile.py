"""`profile_steps=3`: torch's profiler over steps of a run, from the second on, as the first one
compiles and allocates. In the run folder: `profile/trace.json` for https://ui.perfetto.dev, and
`profile/kernels.txt`, the time by class and the longest kernels. On a CPU the kernels are torch's
operations.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch._C._profiler import _ExperimentalConfig

# parts of names; the first class that fits
CLASSES = {
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "splitk", "::mm", "::addmm", "::bmm", "::linear"),
    "optimizer, norm": ("multi_tensor", "adam", "lpnorm", "_norm"),
    "copies, casts": ("copy", "memcpy", "memset", "catarray", "::cat", "::to", "index", "gather", "embedding"),
}
LONGEST = 20


class StepProfile:
    """Profiles the steps `first` to `first + count - 1`."""

    def __init__(self, folder: Path, first: int, count: int):
        self._folder, self._steps = folder, range(first, first + count)
        self._profiler: torch.profiler.profile | None = None
        self._profiled = 0

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        if number not in self._steps:
            yield
            return
        if self._profiler is None:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            # training and sampling have threads of their own
            config = _ExperimentalConfig(profile_all_threads=True)
            self._profiler = torch.profiler.profile(activities=activities, experimental_config=config)
            self._profiler.start()
        yield
        self._profiled += 1
        if number == self._steps[-1]:
            self.finish()

    def finish(self) -> None:
        """Writes what was profiled, also when a run ends within the steps."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        self._folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(self._folder / "trace.json"))
        on_gpu = torch.cuda.is_available()
        spent = {
            event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count)
            for event in profiler.key_averages()
            if is_kernel(event) or not on_gpu
        }
        (self._folder / "kernels.txt").write_text(kernel_table(spent, self._profiled))
        print(f"profile of {self._profiled} steps: {self._folder}", flush=True)


def is_kernel(event: Any) -> bool:
    """Of a GPU. torch's profiler gives a kernel's time to the operation that launched it, too, and to the
    ranges around it that have a name, such as a compiled graph."""
    return event.device_type != DeviceType.CPU and not event.is_user_annotation


def kernel_class(name: str) -> str:
    lower = name.lower()
    return next((kind for kind, parts in CLASSES.items() if any(part in lower for part in parts)), "element-wise")


def kernel_table(spent: dict[str, tuple[float, int]], steps: int) -> str:
    """`spent`: microseconds and calls of each kernel, over all steps."""
    kinds: dict[str, tuple[float, int]] = {}
    for name, (microseconds, calls) in spent.items():
        before = kinds.get(kernel_class(name), (0.0, 0))
        kinds[kernel_class(name)] = before[0] + microseconds, before[1] + calls
    total = sum(microseconds for microseconds, _ in spent.values()) or 1.0
    longest = dict(sorted(spent.items(), key=lambda item: -item[1][0])[:LONGEST])
    lines = []
    for title, rows in (("class", kinds), ("kernel", longest)):
        lines.append(f"{title:<60}{'ms per step':>12}{'share':>8}{'calls':>9}")
        for name, (microseconds, calls) in sorted(rows.items(), key=lambda item: -item[1][0]):
            per_step = microseconds / 1e3 / steps
            lines.append(f"{name[:58]:<60}{per_step:>12.2f}{microseconds / total:>8.1%}{calls // steps:>9}")
        lines.append("")
    return "\n".join(lines)
