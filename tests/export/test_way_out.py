"""From a checkpoint as a hub ships it to what can be served: run, merge, export; the ways out said at the start."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import PeftModel

from qdpo.export import targets
from qdpo.export.proof.prove import MergeOptions, merge_proved
from qdpo.export.targets import Order
from qdpo.export.trained import trained_run
from qdpo.run.folder import RunDir
from tests.conftest import Quiet
from tests.model.multimodal import save_folder, text_logits, whole_model

Train = Callable[..., tuple[Any, Quiet]]
WAYS = {
    "gemma4": "merged folder (Gemma4ForConditionalGeneration), GGUF by llama.cpp's convert_hf_to_gguf.py, adapter for "
    "PEFT and vLLM under model.language_model.*",
    "gemma3": "merged folder (Gemma3ForConditionalGeneration), GGUF by llama.cpp's convert_hf_to_gguf.py, adapter for "
    "PEFT and vLLM under model.language_model.*",
}


def export(run: RunDir, to: str, *, lora: bool = False) -> str:
    said: list[str] = []
    order = Order(
        trained=trained_run(run.path), out=None, quant=None, merged=None, lora=lora, name="tuned", force=True,
        say=said.append,
    )  # fmt: skip
    targets.TARGETS[to](order)
    return "\n".join(said)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", sorted(WAYS))
def test_a_checkpoint_of_the_hub_is_trained_merged_and_exported(tmp_path: Path, family: str, train: Train) -> None:
    base = save_folder(whole_model(family), tmp_path / "hub", "inner" if family == "gemma4" else "outer", shards=2)
    (base / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')
    result, watcher = train(
        model__path=str(base), model__quantization="nf4", model__dtype="bf16", train__steps="3",
        data__max_tokens="256", train__learning_rate="2e-2",
    )  # fmt: skip
    assert f"ships as: {WAYS[family]}" in watcher.text
    run = RunDir(tmp_path / "runs" / "run")
    # A Gemma 4 this narrow, in bf16, is near the proof's bound of 99 % of tokens on either side; fp32 rounds nothing.
    options = MergeOptions(dtype="fp32" if family == "gemma4" else None)
    report, found = merge_proved(run, run.merged, options, Quiet())
    assert report.dequantized == report.proved > 0 and found[0].fault is None
    assert (run.merged / "preprocessor_config.json").read_bytes() == (base / "preprocessor_config.json").read_bytes()
    served: Any = getattr(hf, type(whole_model(family)).__name__)
    said = export(run, "peft")
    assert f"plain PEFT finds every matrix on {served.__name__}" in said
    said = export(run, "vllm", lora=True)
    assert "vllm serve" in said and str(run.path / "export" / "peft") in said
    assert "vllm serve" in export(run, "vllm")
    over = served.from_pretrained(base, dtype=torch.float32).eval()
    plain = text_logits(over)
    tuned = text_logits(PeftModel.from_pretrained(over, run.path / "export" / "peft"))
    merged = text_logits(served.from_pretrained(run.merged, dtype=torch.float32).eval())
    # Both hold the adapter; one the base in 4 bits and back, the other the original.
    assert (tuned - plain).abs().mean() > 1e-3
    assert torch.corrcoef(torch.stack([(tuned - plain).flatten(), (merged - plain).flatten()]))[0, 1] > 0
