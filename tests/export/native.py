"""llama.cpp for tests: built once from llama-cpp-python's source into a cache, and run as a process of its own."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from qdpo.run.disk import cache_folder

VERSION = "0.3.36"
BUILD_LIMIT_S = 1200
# Only the library, for any CPU of this kind. -O1: twenty-five per cent less time to build (measured, 2 cores: about
# 4 minutes in place of 5), and quick enough for a model of 135 M.
CMAKE_ARGS = (
    "-DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF "
    "-DLLAMA_BUILD_SERVER=OFF -DLLAMA_CURL=OFF -DGGML_NATIVE=OFF -DGGML_CUDA=OFF -DGGML_METAL=OFF -DGGML_OPENMP=OFF "
    "-DGGML_LLAMAFILE=OFF -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS_RELEASE=-O1 -DCMAKE_C_FLAGS_RELEASE=-O1"
)


def installed() -> Path:
    """The folder to put on PYTHONPATH. Skips the test, with pip's words, where the package cannot be had or built."""
    tools = cache_folder(None) / "test-tools"
    tools.mkdir(parents=True, exist_ok=True)
    target = tools / f"llama-cpp-python-{VERSION}-py{sys.version_info[0]}{sys.version_info[1]}-{platform.machine()}"
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            part = target.with_name(f"{target.name}.part")
            words = ["--target", str(part), "--no-deps", "--upgrade", "--quiet", "--disable-pip-version-check"]
            command = [sys.executable, "-m", "pip", "install", *words, f"llama-cpp-python=={VERSION}", "diskcache"]
            environment = {**os.environ, "CMAKE_ARGS": CMAKE_ARGS, "CMAKE_BUILD_PARALLEL_LEVEL": "2"}
            try:
                found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=BUILD_LIMIT_S)
            except subprocess.TimeoutExpired:
                pytest.skip(f"llama-cpp-python {VERSION} was not built within {BUILD_LIMIT_S} s")
            if found.returncode != 0:
                pytest.skip(f"llama-cpp-python {VERSION} cannot be installed: {found.stderr.strip()[-400:]}")
            part.rename(target)
    return target


def ask(tools: Path, **request: Any) -> dict[str, Any]:
    """What `llama_cpp_worker` answers to a request."""
    worker = Path(__file__).with_name("llama_cpp_worker.py")
    found = subprocess.run(
        [sys.executable, str(worker)],
        input=json.dumps({name: str(value) if isinstance(value, Path) else value for name, value in request.items()}),
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(tools)},
    )
    assert found.returncode == 0, found.stderr[-2000:]
    answer: dict[str, Any] = json.loads(found.stdout)
    return answer
