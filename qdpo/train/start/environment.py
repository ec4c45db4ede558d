"""The versions and the device that a run is computed with, for its record."""

import platform
from importlib import metadata

import torch

from qdpo import __version__
from qdpo.run.record import Environment

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "safetensors")


def environment(device: torch.device) -> Environment:
    """Versions and device, for the record."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return Environment(
        # A clone that is not installed has no metadata.
        packages={"qdpo": __version__, **{name: metadata.version(name) for name in PACKAGES}},
        python=platform.python_version(),
        platform=platform.platform(),
        device=f"{device.type}: {name}",
        threads=torch.get_num_threads(),
    )
