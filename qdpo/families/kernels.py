"""Optional packages of GPU kernels for layers other than attention, which transformers uses if installed. No torch."""

from dataclasses import dataclass
from importlib import util


@dataclass(frozen=True)
class KernelPackage:
    """A package as pip names it, the work of its kernels, and the models that have such layers."""

    name: str
    work: str
    models: str
    install: str

    @property
    def is_compiled(self) -> bool:
        """True if installing it compiles CUDA code against the torch that is there."""
        return "--no-build-isolation" in self.install


# By the name of the import.
KERNELS = {
    "fla": KernelPackage(
        "flash-linear-attention", "gated delta rules", "Qwen3.5, Qwen3-Next, OLMo-Hybrid, Kimi-Linear",
        "pip install flash-linear-attention",
    ),
    "causal_conv1d": KernelPackage(
        "causal-conv1d", "short convolutions", "the same, LFM2, and Mamba hybrids",
        "pip install --no-build-isolation causal-conv1d",
    ),
    "mamba_ssm": KernelPackage(
        "mamba-ssm", "state-space scans", "Granite 4, Nemotron-H, Falcon-H1, Bamba, Jamba, Mamba",
        "pip install --no-build-isolation mamba-ssm",
    ),
}  # fmt: skip


def is_installed(package: str) -> bool:
    """True if a package of `KERNELS` can be found; it is not imported."""
    return util.find_spec(package) is not None


def remedy(packages: list[str]) -> str:
    """The command that installs packages of `KERNELS`, and what it needs."""
    commands = " && ".join(KERNELS[package].install for package in packages)
    needs = " (it needs a CUDA compiler)" if any(KERNELS[package].is_compiled for package in packages) else ""
    return f"`{commands}`{needs}"
