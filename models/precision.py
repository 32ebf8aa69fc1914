"""What is computed in: float32, unless TF32 or bfloat16 is asked for. And, where asked for, the same bits each time."""

import os

import torch
import torch.nn.functional as F
from torch import nn

from models.shares import current_share
from utils.errors import UserError

# Largest error of a float32 product, relative to its largest entry. float32 has 5e-7, TF32 4e-4, bfloat16 3e-3.
TOLERANCE = 1e-5

# With one of two workspaces, cuBLAS sums in the same order each time. It reads this before its first product, and these
# are the sizes that it takes on recent GPUs anyway.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def set_deterministic(wanted: bool) -> None:
    """Compute the same bits in each run on the same GPU, if `wanted`, in the whole process; CPUs do so anyway.

    An operation that cannot raises RuntimeError, of which `utils.errors.exits_cleanly` makes a sentence.
    """
    if wanted != torch.are_deterministic_algorithms_enabled():  # setting it loads torch's compiler, in seconds
        torch.use_deterministic_algorithms(wanted)
    torch.backends.cudnn.deterministic = wanted


def set_precision(device: torch.device, name: str = "float32") -> None:
    """Compute products of float32 in float32 on `device`, or in TF32 if that is the `name`; bfloat16: see `Perceptron`.

    Whatever this process has set before is undone. Raises UserError where the device lacks that precision, and where
    something outside of this process, such as an environment variable, lowers that of float32.
    """
    is_cuda = device.type == "cuda"
    if name == "tf32" and not (is_cuda and torch.cuda.get_device_capability(device) >= (8, 0)):
        raise UserError(f"{device} has no TF32, which GPUs of NVIDIA have from Ampere on: choose another --precision.")
    if name == "bfloat16" and is_cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"{device} has no bfloat16: choose another --precision.")
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "tf32"  # by default on, for convolutions
    if name != "tf32" and product_error(device) > TOLERANCE:
        raise UserError(
            f"{device} computes products of float32 in a lower precision: remove what asks for it, for example the"
            " environment variable NVIDIA_TF32_OVERRIDE, TORCH_ALLOW_TF32_CUBLAS_OVERRIDE or"
            " ONEDNN_DEFAULT_FPMATH_MODE."
        )


def product_error(device: torch.device) -> float:
    """Largest error of a product of random float32 matrices on `device`, relative to the largest entry."""
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    exact = a.double() @ b.double().T
    return ((F.linear(a.to(device), b.to(device)).cpu().double() - exact).abs().max() / exact.abs().max()).item()


class Perceptron(nn.Sequential):
    """Layers that train in bfloat16 if that is set, with weights, inputs and outputs in float32.

    Outside of training they always compute in float32, so validation and evaluation do not change. Processes that share
    a training step share the rows.
    """

    bfloat16 = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share = current_share() if self.training else None
        if share and all(map(_is_by_rows, self)):
            return share.gather(self._compute(x[share.rows(len(x))]), len(x))
        return self._compute(x)

    def _compute(self, x):
        if not (self.bfloat16 and self.training):
            return super().forward(x)
        with torch.autocast(x.device.type, torch.bfloat16):
            return super().forward(x).to(x.dtype)


def _is_by_rows(layer):
    """Whether a layer computes each row alone. Dropout does not: it draws for all rows, as one process does."""
    return isinstance(layer, nn.Linear | nn.ReLU) or (isinstance(layer, nn.Dropout) and layer.p == 0)


def train_in_bfloat16(adaptor: nn.Module) -> None:
    """Let all perceptrons of an adaptor train in bfloat16; everything else computes in float32."""
    for module in adaptor.modules():
        if isinstance(module, Perceptron):
            module.bfloat16 = True
