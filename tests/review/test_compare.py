"""Base against tuned: nothing differs under an untouched adapter, and every figure is that of plain softmax code."""

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from qdpo.data import prepare
from qdpo.data.tokens.prompts_only import Prompt, encode_prompts, read_prompts
from qdpo.errors import ConfigError, DataError
from qdpo.model.base.load import load_tokenizer
from qdpo.model.fast import divergence
from qdpo.model.fast.divergence import token_kl
from qdpo.model.fast.logps import Head
from qdpo.model.generate.generate import complete, stream
from qdpo.model.policy.adapter import Policy
from qdpo.report.screen.comparison import print_comparison
from qdpo.review.compare import CompletionParameters, compare, compare_run
from qdpo.run.record import Result
from qdpo.settings.schema import RunConfig
from tests.conftest import NOUNS, Quiet, qdpo, untouched_policy, write_jsonl

QUESTIONS = [f"tell me about {one} {other}" for one, other in zip(NOUNS, NOUNS[3:], strict=False)]


def asked(text: str) -> Prompt:
    return Prompt([{"role": "user", "content": text}], False, "here")


@pytest.fixture
def loaded(tiny_base: Path, pairs_file: Path) -> tuple[Policy, Any, list[list[int]]]:
    """The tiny policy with an untouched adapter, and prompts of several lengths."""
    tokenizer = load_tokenizer(tiny_base)
    config = RunConfig.model_validate({"data": {"path": str(pairs_file)}})
    pairs = prepare.read_pairs(config.data, tokenizer, Quiet())[1]
    prompts = encode_prompts([asked(text) for text in QUESTIONS], tokenizer, config.data)
    return untouched_policy(tiny_base, pairs), tokenizer, prompts


def tune(policy: Policy) -> None:
    torch.manual_seed(1)
    for name, parameter in policy.adapter_parameters().items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_untouched_adapter_changes_nothing(loaded: tuple[Policy, Any, list[list[int]]], temperature: float) -> None:
    policy, tokenizer, prompts = loaded
    found = compare(policy, tokenizer, prompts, CompletionParameters(16, temperature), Quiet(), tokens_per_row=200)
    assert len(found) == len(prompts) and len({one.base.text for one in found}) > 2
    for one in found:
        assert one.base.text == one.tuned.text and not one.changed and one.kl == one.kl_per_token == 0
        assert one.base.base_logp == one.base.tuned_logp < 0 and one.tuned.base_logp == one.tuned.tuned_logp


def plain(policy: Policy, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """fp32 log-softmax over full logits of one sequence, at the answer's tokens."""
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        return policy.peft(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)


@pytest.mark.parametrize("tokens_per_row", [0, 150])
def test_log_probs_and_kl_are_those_of_full_softmax(
    loaded: tuple[Policy, Any, list[list[int]]], tokens_per_row: int
) -> None:
    policy, tokenizer, prompts = loaded
    tune(policy)
    found = compare(policy, tokenizer, prompts, CompletionParameters(16, 1.0), Quiet(), tokens_per_row=tokens_per_row)
    with policy.reference():
        before = complete(policy.peft, tokenizer, prompts, max_new_tokens=16, temperature=1.0)
    after = complete(policy.peft, tokenizer, prompts, max_new_tokens=16, temperature=1.0)
    assert any(one.changed for one in found) and any(one.kl > 0.01 for one in found)
    for one, prompt, old, new in zip(found, prompts, before, after, strict=True):
        for answer, ids in ((one.base, old), (one.tuned, new)):
            on = plain(policy, prompt, ids)
            with policy.reference():
                off = plain(policy, prompt, ids)
            label = torch.tensor(ids)[:, None]
            assert answer.tokens == len(ids)
            assert answer.tuned_logp == pytest.approx(on.gather(1, label).mean().item(), abs=1e-4)
            assert answer.base_logp == pytest.approx(off.gather(1, label).mean().item(), abs=1e-4)
        kl = (on.exp() * (on - off)).sum(-1)  # of the tuned answer, the last of the two
        assert one.kl == pytest.approx(kl.sum().item(), abs=1e-4)
        assert one.kl_per_token == pytest.approx(kl.mean().item(), abs=1e-5)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_kl_in_tiles_is_that_of_full_distributions(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, other, weight = torch.randn(70, 8), torch.randn(70, 8), torch.randn(3000, 8)
    head = Head(weight, softcap=softcap)
    widths: list[int] = []
    logits = divergence.head_logits
    monkeypatch.setattr(divergence, "head_logits", lambda part, head: (widths.append(len(part)), logits(part, head))[1])
    found = token_kl(hidden, other, head, tile_mib=1)
    p, q = ((part @ weight.T).double() for part in (hidden, other))
    if softcap:
        p, q = (softcap * (part / softcap).tanh() for part in (p, q))
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    assert torch.allclose(found.double(), (p.exp() * (p - q)).sum(-1), rtol=1e-4, atol=1e-5)
    assert max(widths) == 21 and len(widths) == 8  # 1 MiB / (3000 · 16 bytes), both models, 70 rows
    assert not token_kl(hidden, hidden, head, tile_mib=1).any()


def test_a_drawn_answer_depends_on_its_seed(loaded: tuple[Policy, Any, list[list[int]]]) -> None:
    policy, tokenizer, prompts = loaded
    one, same, other = (
        complete(policy.peft, tokenizer, prompts, max_new_tokens=8, temperature=1.0, seed=seed) for seed in (3, 3, 4)
    )
    assert one == same != other
    cold = complete(policy.peft, tokenizer, prompts, max_new_tokens=8, temperature=1e-4)
    assert cold == complete(policy.peft, tokenizer, prompts, max_new_tokens=8)


def test_a_streamed_answer_is_the_completed_one(loaded: tuple[Policy, Any, list[list[int]]]) -> None:
    policy, tokenizer, prompts = loaded
    pieces: list[str] = []
    stream(policy.peft, tokenizer, prompts[0], pieces.append, max_new_tokens=16, temperature=0.0, top_p=0.9, seed=0)
    whole = complete(policy.peft, tokenizer, prompts[:1], max_new_tokens=16)[0]
    assert "".join(pieces) == tokenizer.decode(whole, skip_special_tokens=True) and len(pieces) > 1


def test_prompts_of_a_file_have_the_ids_of_training_rows(tiny_base: Path, tmp_path: Path, settings: Any) -> None:
    tokenizer, data = load_tokenizer(tiny_base), RunConfig.model_validate({"data": {"system": "Be brief."}}).data
    turns = [{"role": "user", "content": "about rivers"}]
    rows = [{"prompt": "about rivers"}, {"prompt": turns}]
    (tmp_path / "lines.txt").write_text("about rivers\n\n")
    read = [*read_prompts(write_jsonl(tmp_path / "p.jsonl", rows)), *read_prompts(tmp_path / "lines.txt")]
    pairs = write_jsonl(tmp_path / "q.jsonl", [{**row, "chosen": "a b", "rejected": "c"} for row in rows[:1]])
    trained = prepare.read_pairs(data.model_copy(update={"path": str(pairs)}), tokenizer, Quiet())[1][0].prompt
    assert encode_prompts(read, tokenizer, data) == 3 * [trained.tolist()]
    assert "Be brief." in tokenizer.decode(trained)


@pytest.mark.parametrize(
    ("row", "said"),
    [({"text": "x"}, "line 1: prompt is empty"), ({"prompt": [{"role": "user", "content": "a"},
      {"role": "assistant", "content": "b"}]}, "ends with an answer"), ({"prompt": 3}, "not a list of messages")],
)  # fmt: skip
def test_a_prompt_that_cannot_be_used_is_named(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        read_prompts(write_jsonl(tmp_path / "p.jsonl", [row]))


def test_a_trained_run_from_the_command_line(
    train: Callable[..., tuple[Result, Quiet]], settings: dict[str, str], tmp_path: Path
) -> None:
    train(train__steps="6", model__quantization="nf4")
    run, prompts = str(Path(settings["output.dir"]) / "run"), tmp_path / "p.txt"
    prompts.write_text("tell me about river\ntell me about stone\n")
    words = ["--prompts", str(prompts), "--max-new-tokens", "12", "--temperature", "1", "--json"]
    answered = qdpo("compare", run, *words, cwd=tmp_path)
    assert answered.returncode == 0, answered.stderr
    found = json.loads(answered.stdout)
    assert len(found["prompts"]) == 2 and found["summary"]["kl"]["mean"] > 0
    held_out = compare_run(Path(run), [], Quiet(), prompts=None, count=3, drawing=CompletionParameters(8))
    console = Console(file=StringIO(), width=100, soft_wrap=True)
    print_comparison(held_out, console)
    shown = console.file.getvalue()
    assert (
        "3 prompts of the run's held-out pairs, greedy" in shown and "KL an answer" in shown and "3. tell me" in shown
    )
    with pytest.raises(
        ConfigError, match=r"loss\.beta cannot differ .* Only model\.device, memory\.\*, cache\.dir can\. Leave it out"
    ):
        compare_run(Path(run), ["loss.beta=3"], Quiet(), prompts=None, count=3, drawing=CompletionParameters(8))
