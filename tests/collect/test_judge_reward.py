"""A reward model as a judge, against transformers' own forward pass, one dialogue at a time."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from qdpo.collect.candidates import Candidates, read_candidates
from qdpo.collect.decisions import Decision, opened
from qdpo.collect.judge import reward_scores
from qdpo.collect.judge.reward_model import RewardJudge, reward_judge
from qdpo.collect.judge.run import judge_candidates
from qdpo.errors import ConfigError, OutOfMemoryError
from qdpo.model.base.quant import dense_weight, four_bit_layers
from tests.conftest import Quiet, qdpo, save_tiny_base, tiny_rows, tiny_tokenizer, write_jsonl

CPU = torch.device("cpu")


def save_reward_model(folder: Path, labels: int = 1, template: bool = True, **others: Any) -> Path:
    """A random classifier of 2 layers, 64 wide."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(3)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        **shape, vocab_size=len(tokenizer), initializer_range=0.2, num_labels=labels, max_position_embeddings=256,
        **{"pad_token_id": tokenizer.pad_token_id, **others},
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.chat_template = tokenizer.chat_template if template else None
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reward_model(tmp_path_factory.mktemp("reward") / "tiny-reward")


@pytest.fixture
def items(tmp_path: Path) -> list[Candidates]:
    """20 prompts, one of them a dialogue, with three answers of many lengths."""
    rows: list[dict[str, Any]] = [
        {
            "prompt": row["prompt"],
            "answers": [row["chosen"], row["rejected"], row["chosen"] + " and " + row["rejected"]],
        }
        for row in tiny_rows(20)
    ]
    rows[7]["prompt"] = [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "river?"},
        {"role": "assistant", "content": "stone"}, {"role": "user", "content": "cloud?"},
    ]  # fmt: skip
    return read_candidates([write_jsonl(tmp_path / "candidates.jsonl", rows)]).items


def made(folder: Path, *, quantization: str = "none", margin: float = 0.0) -> RewardJudge:
    """The judge in float32, whatever this machine would choose."""

    def load() -> tuple[Any, Any]:
        options: dict[str, Any] = {"quantization": quantization, "dtype": "fp32", "device": CPU}
        model = reward_scores.load_reward_model(folder, announce=lambda line: None, **options)
        return model, AutoTokenizer.from_pretrained(folder)

    return RewardJudge("tiny", load, margin=margin, say=lambda line: None)


def decided(judge: RewardJudge, items: list[Candidates]) -> list[Decision]:
    judge.opening(items)
    found = list(judge.decide(items))
    assert all(isinstance(each, Decision) for each in found)
    return found  # type: ignore[return-value]


def plain_model(folder: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()


def plain_scores(folder: Path, model: Any, item: Candidates) -> dict[str, float]:
    """transformers alone: no batch, no padding, float32."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = {}
    for answer in item.answers:
        turns = [*item.turns, {"role": "assistant", "content": answer.text}]
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=False)
        with torch.no_grad():
            found[answer.id] = float(model(ids).logits[0, 0])
    return found


@pytest.mark.parametrize("pad", ["its own", None])
def test_scores_and_order_are_those_of_plain_transformers(
    model_folder: Path, items: list[Candidates], tmp_path: Path, pad: str | None
) -> None:
    folder = model_folder if pad else save_reward_model(tmp_path / "without-pad", pad_token_id=None)
    model = plain_model(folder)
    for item, found in zip(items, decided(made(folder), items), strict=True):
        truth = plain_scores(folder, model, item)
        assert found.prompt == item.id and found.scores == pytest.approx(truth, abs=1e-4)
        assert found.best == max(truth, key=truth.__getitem__) and found.worst == min(truth, key=truth.__getitem__)


def test_the_body_is_four_bit_and_the_head_is_not(model_folder: Path, items: list[Candidates]) -> None:
    judge = made(model_folder, quantization="nf4")
    found = decided(judge, items)
    model = plain_model(model_folder)
    layers = dict(four_bit_layers(judge._model))
    assert len(layers) == 14 and judge._model.score.weight.equal(model.score.weight)
    for name, layer in layers.items():  # seven a layer
        model.get_submodule(name).weight.data = dense_weight(layer, torch.float32)
    for item, each in zip(items, found, strict=True):
        assert each.scores == pytest.approx(plain_scores(model_folder, model, item), abs=1e-4)


def test_what_is_close_or_too_long_is_left_open(model_folder: Path, items: list[Candidates], tmp_path: Path) -> None:
    spreads = [max(each.scores.values()) - min(each.scores.values()) for each in decided(made(model_folder), items)]
    margin = sorted(spreads)[10]
    notes = [each.note for each in decided(made(model_folder, margin=margin), items)]
    assert [bool(note) for note in notes] == [spread < margin for spread in spreads]
    assert set(notes) == {"", f"scores differ by less than {margin:g}"}
    long = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "p", "answers": ["river " * 300, "stone"]}])
    note = decided(made(model_folder), read_candidates([long]).items)[0].note
    assert note.startswith("longer than the 256 tokens that the model reads: ")


def test_batches_shrink_until_they_fit(
    model_folder: Path, items: list[Candidates], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card is played by a limit of tokens; everything else is the real way."""
    plain, most, sizes = reward_scores.rewards, 150, list[int]()

    def limited(model: Any, rows: Any) -> list[float]:
        sizes.append(len(rows) * max(map(len, rows)))
        if sizes[-1] > most:
            raise torch.cuda.OutOfMemoryError
        return plain(model, rows)

    monkeypatch.setattr(reward_scores, "rewards", limited)
    judge = made(model_folder)
    found = decided(judge, items)
    assert sum(size > most for size in sizes) < 8 and len(found) == len(items)
    monkeypatch.setattr(reward_scores, "rewards", plain)
    for each, truth in zip(found, decided(made(model_folder), items), strict=True):
        assert each.scores == pytest.approx(dict(truth.scores), abs=1e-4)
    most = 10
    monkeypatch.setattr(reward_scores, "rewards", limited)
    with pytest.raises(OutOfMemoryError, match="cannot read"):
        decided(made(model_folder), items)


def test_what_is_no_reward_model_is_refused(tmp_path: Path, items: list[Candidates]) -> None:
    def refused(folder: Path) -> str:
        with pytest.raises(ConfigError) as error:
            reward_judge(str(folder), quantization="none", device="cpu", margin=0, say=lambda line: None).opening(items)
        return str(error.value)

    assert "has 2 labels" in refused(save_reward_model(tmp_path / "two", labels=2))
    assert "has no chat template" in refused(save_reward_model(tmp_path / "bare", template=False))
    chat = save_tiny_base(tmp_path / "chat")
    assert "LlamaForCausalLM, but a reward model is a" in refused(chat)
    config = json.loads((chat / "config.json").read_text())
    config |= {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "reward"}}
    (chat / "config.json").write_text(json.dumps(config))
    assert "lack score.weight, which would be random" in refused(chat)
    assert "There is no folder" in (said := refused(tmp_path / "absent")) and "model.path" not in said


def test_the_verb_scores_in_four_bits(model_folder: Path, items: list[Candidates], tmp_path: Path) -> None:
    words = ["judge", "candidates.jsonl", "--by", f"reward-model:{model_folder}", "--out", "pairs.jsonl"]
    ended = qdpo(*words, "--device", "cpu", "--limit", "3", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all(row["score_chosen"] > row["score_rejected"] for row in rows)
    assert rows[0]["judged_by"] == "reward-model:tiny-reward nf4 margin=0"
    with opened(tmp_path / "pairs.jsonl", items) as decisions:
        found = judge_candidates(made(model_folder), decisions, items, Quiet())
    assert (found.pairs, found.decided_before) == (17, 3)
