"""Process-wide settings of torch on which bits depend. Any code may change them, also a library.

They are compared at the beginning and at the end of each step, which costs 10 us. A change ends the job before the step counts, since later
steps would have other bits.
"""

from __future__ import annotations

from typing import Any

import torch

from elastic.engine.executor import Enter
from elastic.errors import TrainerError
from elastic.memory import device

_SMALLEST, _SMALLEST_NORMAL = 5e-324, 2.2250738585072014e-308  # variables, so that Python does not compute with them beforehand
_MEANS = {
    "threads": "torch.set_num_threads",
    "default dtype": "torch.set_default_dtype",
    "deterministic algorithms": "torch.use_deterministic_algorithms",
    "autocast": "the Trainer's autocast=",
    "denormals flushed": "torch.set_flush_denormal, or loading a library that was compiled with -ffast-math",
    "oneDNN": "torch.backends.mkldnn",
    "NNPACK": "torch.backends.nnpack",
    "float32 products": "torch.set_float32_matmul_precision, or torch.backends",
    "float32 convolutions": "torch.backends",
    "attention kernels": "torch.backends.cuda.enable_*_sdp, or torch.nn.attention.sdpa_kernel",
    "cuDNN": "torch.backends.cudnn",
}


def modes() -> dict[str, Any]:
    """Returns the current settings by name; JSON values."""
    backends: Any = torch.backends
    return {
        "threads": torch.get_num_threads(),
        "default dtype": str(torch.get_default_dtype()),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "autocast": torch.is_autocast_enabled(device.current().type),
        "denormals flushed": _SMALLEST * 1.0 == 0.0 or _SMALLEST_NORMAL * 0.5 == 0.0,
        "oneDNN": torch._C._get_mkldnn_enabled(),
        "NNPACK": torch._C._get_nnpack_enabled(),
        "float32 products": [backends.mkldnn.matmul.fp32_precision, backends.cuda.matmul.fp32_precision],
        "float32 convolutions": [backends.mkldnn.conv.fp32_precision, backends.cudnn.conv.fp32_precision],
        "attention kernels": [
            backends.cuda.flash_sdp_enabled(),
            backends.cuda.mem_efficient_sdp_enabled(),
            backends.cuda.math_sdp_enabled(),
        ],
        "cuDNN": [torch._C._get_cudnn_enabled(), torch._C._get_cudnn_benchmark(), torch._C._get_cudnn_deterministic()],
    }


class Modes:
    """The settings at the beginning of a training, `first`. `threads` is the job's; another number in torch raises TrainerError."""

    def __init__(self, threads: int) -> None:
        self.first = modes()
        self._checked = -1
        if self.first["threads"] != threads:
            raise TrainerError(
                f"torch computes with {self.first['threads']} threads here, and the job was started with threads={threads}; bits depend on "
                "it: pass threads= to elastic.run, and leave torch.set_num_threads out (or the library that calls it)"
            )

    def check(self, when: str) -> None:
        """Raises TrainerError if a setting has changed."""
        now = modes()
        if now == self.first:
            return
        for name, before in self.first.items():
            if now[name] != before:
                raise TrainerError(
                    f"{when}, torch's setting of {name} was changed from {before} to {now[name]}: bits depend on it, so the steps would "
                    f"not be those of other layouts. Set it before the Trainer is made, on every worker, never after it ({_MEANS[name]})"
                )

    def watched(self, enter: Enter) -> Enter:
        """Returns `enter` with a check where a step's first phase begins and where its gradients are complete."""

        def entering(phase: str, step: int, micro_batch: int) -> None:
            enter(phase, step, micro_batch)
            if phase == "ready":
                self.check(f"while step {step} was computed")
            elif phase == "forward" and step != self._checked:
                self._checked = step
                self.check(f"before step {step}")

        return entering
