"""The sizes that determine a step's memory: of a row, and of a run's settings; no torch."""

from dataclasses import dataclass

GIB = 2**30
# Weights and their float32 gradients, per trained number; the optimizer's two states are extra.
STATE_BYTES = {"paged_adamw8bit": 2, "adamw8bit": 2, "adamw": 8}


@dataclass(frozen=True)
class RowSize:
    """The sizes of a row of pairs that determine its memory: all tokens, prompt tokens (each once), and pairs."""

    tokens: int
    prompts: int
    pairs: int = 1

    @property
    def sequence(self) -> float:
        """Tokens of a prompt and its answer, in a row of equal pairs."""
        return (self.prompts + self.responses / 2) / max(self.pairs, 1)

    @property
    def responses(self) -> int:
        return self.tokens - self.prompts

    @property
    def keys(self) -> int:
        return self.tokens + self.prompts


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """The settings of a run that determine its memory."""

    rank: int = 16
    optimizer: str = "paged_adamw8bit"
    quantised: bool = True
    double_quant: bool = True
    element: int = 2
    """Bytes of the compute type."""
    tile_mib: int = 128
    kept_layers: int = 0
    offload: bool = False
    host_embeddings: bool = False
    """The embedding table is in host memory."""
    cuda: bool = True
    context: bool = True
    """The CUDA context counts; it does not if free memory was measured after the context was created."""


def nf4_bytes(numbers: int, double_quant: bool) -> float:
    """A matrix in 4 bits: a scale for each 64 numbers, in float32 or again in 8 bits (QLoRA, section 3)."""
    blocks = numbers / 64
    return numbers / 2 + (blocks + 4 * blocks / 256 + 1024 if double_quant else 4 * blocks) + 64


def trained_bytes(numbers: int, run: MemorySettings) -> dict[str, float]:
    """Bytes of so many trained numbers, by cause: weights and gradients in float32, and the optimizer's two states."""
    return {
        "adapter": 4.0 * numbers,
        "gradients": 4.0 * numbers,
        "optimizer": STATE_BYTES[run.optimizer] * numbers * (1.02 if run.optimizer != "adamw" else 1.0),
    }
