"""Proves that merged files are the trained model: compares its adapter on the 4-bit base with the files, reloaded.

Both run in float32, so that only the difference of their weights shows. The trained model runs first and is freed; it
leaves the hidden states of the answers' tokens and the head, from which any tile of logits can be computed.

Letters: N response tokens · D hidden width · R rows of one tile · V vocabulary.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import torch
from peft import PeftModel
from torch import Tensor

from qdpo import __version__
from qdpo.data.tokens.sieve import TokenPair
from qdpo.errors import ConfigError, VerificationError
from qdpo.export.proof import reload
from qdpo.export.proof.distance import Distance, DistanceTally, Side, distance, side, tiles
from qdpo.export.proof.text_class import text_class
from qdpo.model.base import quant
from qdpo.model.base.expert_stack import FourBitStack
from qdpo.model.base.experts import left_dense
from qdpo.model.base.load import load_base, model_config
from qdpo.model.base.text_model import decoder_of
from qdpo.model.device import release_memory
from qdpo.model.fast.logps import Head, head_logits, response_logps
from qdpo.model.policy import adapter
from qdpo.model.policy.lora_fit import check_fit
from qdpo.review.score import choose
from qdpo.run import disk
from qdpo.run.folder import RunDir
from qdpo.run.record import file_record
from qdpo.run.watcher import Watcher
from qdpo.settings.loss_rules import needs_reference
from qdpo.settings.schema import LossConfig

FILE = "qdpo_verification.json"
PAIRS = 32
# Rounding of merged weights to bf16 is far below these (SmolLM2-135M), a merge into the original weights far above.
LARGEST_KL, LEAST_TOP1 = 0.005, 0.99
TILE_BYTES = 2**27
START = "start"
# Ids of a prompt and an answer, and the answer's tokens.
AnswerIds = tuple[list[int], int]


@dataclass(frozen=True, kw_only=True)
class TrainedScores:
    """The trained model's results on the pairs, enough to compute any tile of its logits."""

    answers: list[AnswerIds]
    lengths: list[int]
    """Tokens of each answer, in the order of N: chosen, rejected, chosen, …"""
    source: str
    hidden_ND: Tensor
    label_N: Tensor
    head: Head
    logp_N: Tensor
    base_N: Tensor
    """Log-probs with the adapter off."""
    reference_N: Tensor | None
    loss: LossConfig
    quantized: bool


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The comparison of a merged model with the trained model. `enforced`: exceeding the bounds is an error."""

    base: str
    dtype: str
    source: str
    pairs: int
    tokens: int
    distance: Distance
    trained: Side
    merged: Side
    enforced: bool
    fault: str | None
    verdict: str

    def to_json(self, run: RunDir) -> dict[str, object]:
        """The content of qdpo_verification.json, without any path of this machine."""
        return {
            "schema": 1,
            "qdpo": __version__,
            "run": run.path.resolve().name,
            "adapter_sha256": file_record(run.adapter / adapter.WEIGHTS).sha256,
            "bounds": {"kl": LARGEST_KL, "top1": LEAST_TOP1} if self.enforced else None,
            **dataclasses.asdict(self),
        }


def score_trained(run: RunDir, data: Path | str | None, pairs: int, watcher: Watcher) -> TrainedScores:
    """Scores the run's held-out pairs, or those in `data`, with the adapter on its 4-bit base; then frees the model."""
    chosen = choose(run.path, [f"data.path={data}"] if data else [], watcher)
    config, pairs_used = chosen.opened.config, chosen.pairs[:pairs]
    if not pairs_used:
        raise ConfigError(f"There are no pairs to compare on (from {chosen.source}). Give some with `--data PATH`.")
    device = chosen.opened.device
    starts = config.adapter.start is not None and config.adapter.reference != "base"
    for folder in [run.adapter, *([Path(str(config.adapter.start))] if starts else [])]:
        check_fit(model_config(chosen.opened.place.folder), folder)
    watcher.begin("loading the trained model", 1, "model")
    record = chosen.opened.finished.record
    model = load_base(
        chosen.opened.place.folder, quantization=config.model.quantization, double_quant=config.model.double_quant,
        dtype=record.found.dtype, device=device, attention_name=None, announce=watcher.say,
        dense_experts=left_dense(record),
    )  # fmt: skip
    peft = PeftModel.from_pretrained(model, str(run.adapter), local_files_only=True).eval()
    if starts:
        peft.load_adapter(str(config.adapter.start), START, local_files_only=True)
    reload.in_float32(peft, lambda layer: quant.dense_weight(layer, torch.float32))
    for module in peft.modules():
        if isinstance(module, FourBitStack):
            module.dtype = torch.float32
    head = Head.of(peft.get_base_model())
    head = dataclasses.replace(head, weight_VD=head.weight_VD.float())
    passes = _Passes(peft, head, answers(pairs_used), device, watcher)
    watcher.begin("scoring the trained model", (3 if starts else 2) * len(passes.answers), "answer")
    with torch.no_grad():
        hidden_ND, logp_N = passes.run()
        with peft.disable_adapter():
            base_N = passes.run()[1]
        reference_N = base_N
        if starts:
            peft.set_adapter(START)
            reference_N = passes.run()[1]
    watcher.finish()
    label_N, lengths = passes.label_N, [length for _ids, length in passes.answers]
    del peft, model, passes
    release_memory(device)
    return TrainedScores(
        answers=answers(pairs_used),
        lengths=lengths,
        source=chosen.source,
        hidden_ND=hidden_ND,
        label_N=label_N,
        head=head,
        logp_N=logp_N,
        base_N=base_N,
        reference_N=reference_N if needs_reference(config.loss.name) else None,
        loss=config.loss,
        quantized=config.model.quantization != "none",
    )


def answers(pairs: Sequence[TokenPair]) -> list[AnswerIds]:
    """Chosen 0, rejected 0, chosen 1, …, each after its prompt."""
    both = [(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    return [([*map(int, prompt), *map(int, answer)], len(answer)) for prompt, answer in both]


@dataclass(frozen=True)
class _Passes:
    """Runs every answer through the model, one by one, by the architecture's own code, with the adapter on or off."""

    peft: Any
    head: Head
    answers: list[AnswerIds]
    device: torch.device
    watcher: Watcher

    @property
    def label_N(self) -> Tensor:
        ids = [token for tokens, length in self.answers for token in tokens[-length:]]
        return torch.tensor(ids, device=self.device)

    def run(self) -> tuple[Tensor, Tensor]:
        """Hidden states that predict the answers' tokens, (N, D), and the tokens' log-probs, (N)."""
        backbone, parts = decoder_of(self.peft.get_base_model()), []
        for tokens, length in self.answers:
            output = backbone(input_ids=torch.tensor([tokens], device=self.device), use_cache=False)
            parts.append(output.last_hidden_state[0, -length - 1 : -1])
            self.watcher.advance(1)
        hidden_ND = torch.cat(parts)
        scores = response_logps(hidden_ND, self.label_N, self.head, tile_mib=TILE_BYTES // 2**20, metrics=False)
        return hidden_ND, scores.logp.cpu()


def verify(
    trained: TrainedScores, folder: Path, *, base: Literal["dequantized", "original"], dtype: str, watcher: Watcher
) -> Verification:
    """Compares the model in `folder`, loaded by another process, with the trained model.

    Raises: VerificationError if transformers cannot load it, or its shape differs.
    """
    tally = DistanceTally([])
    rows = max(1, TILE_BYTES // (4 * trained.head.weight_VD.shape[0]))
    parts = list(tiles(trained.lengths, rows))
    reload_as = text_class(folder, watcher.say)
    watcher.begin("comparing with the merged files, reloaded", len(parts), "tile")
    with _reloaded(folder, trained, rows, reload_as) as stream:
        for part in parts:
            merged_RV = _next_tile(stream, part.stop - part.start, trained.head.weight_VD.shape[0])
            with torch.no_grad():
                trained_RV = head_logits(trained.hidden_ND[part], trained.head)
            tally.add(trained_RV, merged_RV.to(trained_RV.device), trained.label_N[part])
            watcher.advance(1)
    watcher.finish()
    found = distance(tally, trained.base_N, trained.logp_N)
    enforced = base == "dequantized" or not trained.quantized
    fault = _fault(found, enforced)
    return Verification(
        base=base,
        dtype=dtype,
        source=trained.source,
        pairs=len(trained.lengths) // 2,
        tokens=len(trained.label_N),
        distance=found,
        trained=side(trained.logp_N, trained.reference_N, trained.lengths, trained.loss),
        merged=side(torch.cat(tally.logps), trained.reference_N, trained.lengths, trained.loss),
        enforced=enforced,
        fault=fault,
        verdict=fault or _verdict(found, enforced),
    )


def _fault(found: Distance, enforced: bool) -> str | None:
    if not found.share == found.share:
        return "The adapter has no effect on these pairs: there is nothing to merge."
    if found.share + 3 * found.share_error < 0.5:
        return (
            f"The merged model has {found.share:.0%} (± {found.share_error:.0%}) of the adapter's effect: it is closer "
            "to the base than to the trained model."
        )
    if enforced and not (found.kl < LARGEST_KL and found.top1 >= LEAST_TOP1):
        return (
            f"The merged model is not the trained one: KL {found.kl:.4g} nats a token (bound {LARGEST_KL:g}), the same "
            f"most likely token at {found.top1:.2%} of tokens (bound {LEAST_TOP1:.0%})."
        )
    return None


def _verdict(found: Distance, enforced: bool) -> str:
    if enforced:
        return "This is the model that was trained, to rounding."
    if found.kl < LARGEST_KL and found.top1 >= LEAST_TOP1:
        return "The original base makes no difference here: this is the model that was trained, to rounding."
    if found.share_error > 0.25:
        return (
            "This is not the model that was trained. Its share of the adapter's effect cannot be measured on these "
            "pairs: it is too small next to the effect of quantisation. Use more pairs (`--pairs`)."
        )
    return (
        f"This is not the model that was trained and evaluated: at {1 - found.top1:.1%} of the answers' tokens the "
        f"most likely token differs. It has {found.share:.0%} of the adapter's effect. "
        "`--base dequantized` gives the model that was trained."
    )


@contextmanager
def _reloaded(folder: Path, trained: TrainedScores, rows: int, part: str) -> Iterator[IO[bytes]]:
    """Standard output of a process that has loaded the folder, its first line read and checked."""
    with tempfile.TemporaryDirectory() as work, (Path(work) / "errors").open("w+", encoding="utf-8") as errors:
        answers = Path(work) / "answers.json"
        answers.write_text(json.dumps(trained.answers), encoding="utf-8")
        process = subprocess.Popen(
            [sys.executable, "-P", reload.__file__, folder, answers, _device(folder), str(rows), part],
            stdout=subprocess.PIPE, stderr=errors, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert process.stdout is not None
        try:
            size = json.loads(process.stdout.readline() or b"{}").get("vocabulary")
            if size not in (None, trained.head.weight_VD.shape[0]):
                raise VerificationError(f"The merged model has {size} tokens, unlike the trained model.")
            yield process.stdout
            process.wait()
        except _Ended as error:
            process.wait()
            errors.seek(0)
            raise VerificationError(
                f"transformers could not load and run the merged model in {folder}: "
                f"{(errors.read().strip().splitlines() or ['it ended without a message'])[-1]}"
            ) from error
        finally:
            process.stdout.close()
            process.kill()
            process.wait()


class _Ended(Exception):
    """The other process wrote less than expected."""


def _next_tile(stream: IO[bytes], rows: int, vocabulary: int) -> Tensor:
    tile_RV = torch.empty(rows, vocabulary)
    view = tile_RV.numpy().data.cast("B")
    filled = 0
    while filled < len(view):
        count = stream.readinto(view[filled:])  # type: ignore[attr-defined]
        if not count:
            raise _Ended
        filled += count
    return tile_RV


def _device(folder: Path) -> str:
    """The card, if the merged model fits into its free memory, else the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    needed = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    free, _total = torch.cuda.mem_get_info()
    return f"cuda:{torch.cuda.current_device()}" if free > needed * 1.1 + 2 * 2**30 else "cpu"


def write_verification(folder: Path, run: RunDir, found: Verification) -> None:
    """Writes the result to the merged folder."""
    disk.write_json(folder / FILE, found.to_json(run))
