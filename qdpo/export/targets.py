"""The targets of `qdpo export --to`: each checks, writes whole or not at all, and prints the command to run next."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from qdpo.errors import ConfigError, VerificationError
from qdpo.export import servers
from qdpo.export.gguf import check, model
from qdpo.export.gguf.adapter import TYPES, write_gguf_adapter
from qdpo.export.merge.lora import Lora, is_plain, read_lora
from qdpo.export.plain_peft import NormalAdapter, check_loads, write_normal
from qdpo.export.trained import TrainedRun, require_free
from qdpo.families.config_fields import family_of
from qdpo.families.serving import VLLM_RELEASE, serving_of
from qdpo.model.base.folder import read_json
from qdpo.model.base.load import load_tokenizer
from qdpo.model.base.text_model import text_model
from qdpo.model.base.weight_names import folder_names
from qdpo.report.card import card_text
from qdpo.run import disk
from qdpo.run.watcher import Say
from qdpo.train.start.tokenizer import keeps_conversation, shipped_otherwise, write_conversation_files

# A float32 copy of the merged model, and one of the model read back.
BYTES_A_WEIGHT = 8


@dataclass(frozen=True, kw_only=True)
class Order:
    """The options of the command line."""

    trained: TrainedRun
    out: Path | None
    quant: str | None
    merged: Path | None
    lora: bool
    name: str
    force: bool
    say: Say

    def place(self, default: str, suffix: str = "") -> Path:
        """The output path: the one given, or `default` in the run's export folder; must be free, or replaceable."""
        place = self.out or self.trained.exports / default
        if suffix and place.suffix != suffix:
            place = place / Path(default).name
        require_free(place, self.force)
        return place


def export_peft(order: Order) -> None:
    """The normalised adapter."""
    default = order.trained.exports / "peft"
    if order.out is None and default.exists() and not order.force:
        raise ConfigError(
            f"{default} exists already, from an earlier `--to peft` or `--to vllm --lora`, which write the same "
            f"adapter there. Use that folder, write it again with `--force`, or write another: `qdpo export "
            f"{order.trained.run.path} FOLDER --to peft`."
        )
    out = order.place("peft")
    written = _write_normal(order, order.trained.base(order.say), out)
    order.say(
        f"wrote {out}: {len(written.lora.layers)} layers, rank {written.lora.rank}, scale inside B; read back equal"
    )
    order.say(f"plain PEFT finds every matrix on {written.served}, the class that servers load")


def _write_normal(order: Order, base: Path, out: Path) -> NormalAdapter:
    """The normalised adapter, with a card whose code loads it."""
    card = card_text(order.trained.finished, is_served=True)
    return write_normal(order.trained.run.adapter, base, out, card=card)


def export_gguf_adapter(order: Order) -> None:
    """The adapter for llama.cpp."""
    quant = order.quant or "f32"
    out = order.place("adapter.gguf", ".gguf")
    model.require_quant(quant, TYPES, out)
    base = order.trained.base(order.say)
    error = write_gguf_adapter(order.trained.run.adapter, base, out, quant=quant, name=order.name)
    order.say(f"wrote {out} ({quant}); read back: largest error {error:.1e} of a layer's largest change")
    order.say(f"next: {servers.command('llama-cli', '-m', 'BASE.gguf', '--lora', out)}")
    order.say(
        "BASE.gguf is the base as GGUF. The adapter was trained over this run's quantised base, and behaves slightly "
        "differently over another quantisation. `--to gguf` exports exactly the trained model."
    )


def export_gguf(order: Order) -> None:
    """The merged model for llama.cpp."""
    quant = order.quant or "bf16"
    model.require_quant(quant, model.TYPES, order.trained.exports / "model-bf16.gguf")
    merged = order.trained.merged(order.merged)
    out = order.place(f"model-{quant}.gguf", ".gguf")
    _write_gguf(order, merged, out, quant)
    order.say(f"next: {servers.command('llama-cli', '-m', out)}")
    if quant != "q8_0":
        smaller = out.with_name("model-q4_k_m.gguf")
        order.say(f"smaller: {servers.command('llama-quantize', out, smaller, 'Q4_K_M')}")


def _write_gguf(order: Order, merged: Path, out: Path, quant: str) -> None:
    base_gguf = order.trained.base_gguf(order.say)
    conversation = order.trained.tokenizer(merged)
    if differing := shipped_otherwise(conversation, merged):
        order.say(f"{' and '.join(differing)}: as the run trained, not as in {merged}")
    found = model.write_gguf(
        merged, out, quant=quant, name=order.name, base_gguf=base_gguf, tokenizer=conversation
    )  # fmt: skip
    order.say(
        f"wrote {out.name}: {found.weights} weights as {quant}, read back within rounding (largest error "
        f"{found.largest_error:.1e}); {found.vocabulary}, its ids checked"
    )
    _compare_logits(order, merged, out, quant)


def _compare_logits(order: Order, merged: Path, out: Path, quant: str) -> None:
    config = text_model(merged).config
    family = family_of(config)
    if family is not None and family.gguf is not None and not family.gguf.is_readable:
        order.say(f"logits: not compared (transformers does not read GGUF files of the family {config.model_type})")
        return
    count = sum(path.stat().st_size for path in merged.glob("*.safetensors")) // 2
    needed, free = BYTES_A_WEIGHT * count * 1.2, psutil.virtual_memory().available
    if needed > free:
        order.say(f"logits: not compared (needs {needed / 2**30:.0f} GiB of memory, {free / 2**30:.0f} GiB are free)")
        return
    try:
        largest, kl = check.check_logits(out, merged, load_tokenizer(merged), quant)
    except VerificationError:
        out.unlink()
        raise
    order.say(f"logits: read back by transformers, largest difference {largest:.2g}, mean KL {kl:.2g} nats")


def export_ollama(order: Order) -> None:
    """A folder with a Modelfile and the files that it names."""
    out = order.place("ollama")
    if order.lora:
        folder = order.trained.base(order.say)
    else:
        folder = order.trained.merged(order.merged)
    found = order.trained.tokenizer(folder)

    def text_for(source: str, adapter: str | None) -> str:
        return servers.modelfile(found.tokenizer, folder, source=source, adapter=adapter, ends=found.ends.every)

    text_for("./model.gguf", None)  # fails before gigabytes are written

    def fill(part: Path) -> None:
        source, adapter = (
            _over_base(order, folder, part) if order.lora else (_over_merged(order, folder, part, out), None)
        )
        (part / "Modelfile").write_text(text_for(source, adapter), encoding="utf-8")

    disk.write_folder(out, fill)
    order.say(f"wrote {out}; its chat template gives the same text as the run's on test conversations")
    order.say(f"next: {servers.command('ollama', 'create', order.name, '-f', out / 'Modelfile')}")
    order.say(f"      {servers.command('ollama', 'run', order.name)}")


def _over_base(order: Order, base: Path, part: Path) -> tuple[str, str]:
    """FROM and ADAPTER for the adapter over the base that it was trained on."""
    target = part / "adapter.gguf"
    try:
        write_gguf_adapter(order.trained.run.adapter, base, target, quant="f32", name=order.name)
    except ConfigError as error:  # its command names the file, whose folder is gone when the command is typed
        kept = order.trained.exports / target.name
        raise ConfigError(str(error).replace(str(target), str(kept))) from error
    source = order.trained.base_gguf(order.say) or base
    return str(source.resolve()), "./adapter.gguf"


def _over_merged(order: Order, merged: Path, part: Path, out: Path) -> str:
    """FROM for the merged model: a GGUF file next to the Modelfile, else the folder, which Ollama may convert."""
    quant = order.quant or "bf16"
    model.require_quant(quant, model.TYPES, order.trained.exports / "model-bf16.gguf")
    try:
        _write_gguf(order, merged, part / "model.gguf", quant)
    except ConfigError as error:
        why = str(error).replace(str(part), str(out))  # the command is for later, when the folder has its name
        order.say(why)
        order.say(
            f"the Modelfile names the folder {merged} and leaves the conversion to Ollama (not tried here). If `ollama "
            f"create` refuses that folder, run the command above, then write `FROM ./model.gguf` in {out / 'Modelfile'}"
        )
        return str(merged.resolve())
    return "./model.gguf"


def export_vllm(order: Order) -> None:
    """The command that serves the model; writes nothing, except a normalised adapter where vLLM needs it."""
    if order.out is not None:
        raise ConfigError(f"--to vllm prints a command and writes no file. Leave out {order.out}.")
    if not order.lora:
        merged = order.trained.merged(order.merged).resolve()
        order.say(servers.vllm_merged(merged, order.name, _vllm_conversation(order, merged)))
        return
    base, adapter = order.trained.base(order.say), order.trained.run.adapter
    serving = serving_of(read_json(base / "config.json"))
    if serving is not None and serving.vllm == "merged":
        raise ConfigError(
            f"{VLLM_RELEASE} serves {serving.architecture} without adapters. Serve the merged model: `qdpo merge "
            f"{order.trained.run.path}`, then `qdpo export {order.trained.run.path} --to vllm`."
        )
    lora = read_lora(adapter)
    servers.lora_rank(lora.rank)
    why = _rewritten(lora, adapter, base)
    if why:
        out = order.trained.exports / "peft"
        require_free(out, force=True)  # the same adapter as that of an earlier export, of which there is nothing else
        _write_normal(order, base, out)
        order.say(f"# {why}; {out} holds the adapter as vLLM reads it")
        adapter = out
    else:
        check_loads(adapter, base, set(lora.layers), scaled=True)
    commit = order.trained.record.base.commit
    name = [order.trained.record.base.name, "--revision", commit] if commit else [str(base.resolve())]
    served = folder_names(base).served.__name__
    order.say(f"# plain PEFT finds all {len(lora.layers)} adapted layers on {served}; vLLM itself was not run")
    order.say(
        "# vLLM serves the base as stored; the adapter was trained over it quantised, and behaves slightly differently"
    )
    conversation = _vllm_conversation(order, base)
    order.say(servers.vllm_adapter(name, adapter.resolve(), order.name, lora.rank, conversation))


def _rewritten(lora: Lora, adapter: Path, base: Path) -> str | None:
    """The reason why servers need the adapter in another form than the run's; None if they read it as it is."""
    names = folder_names(base)
    if not names.is_served_as_trained:
        return f"the adapter's names are those of {names.text.cls.__name__}, and vLLM loads {names.served.__name__}"
    if not is_plain(lora.config):
        return "this adapter's scale is special (rsLoRA or patterns)"
    return None


def _vllm_conversation(order: Order, served: Path) -> list[object]:
    """Options for what the run trained and `served` does not say, with the files that they name."""
    found = order.trained.tokenizer(served)
    differing = shipped_otherwise(found, served)
    if "chat template" in differing and found.template is None:
        order.say("# trained on bare text: ask for /v1/completions; a chat would be written with the base's template")
        differing.remove("chat template")
    kept = order.trained.run.adapter
    if differing and not keeps_conversation(found, kept):
        kept = order.trained.exports / "vllm"
        disk.write_folder(kept, lambda part: write_conversation_files(found, part, served))
    if differing:
        order.say(f"# {' and '.join(differing)}: in {served.name} not as trained, so vLLM reads it from {kept.name}/")
    return servers.vllm_conversation(kept.resolve(), differing)


TARGETS: dict[str, Callable[[Order], None]] = {
    "peft": export_peft,
    "gguf-adapter": export_gguf_adapter,
    "gguf": export_gguf,
    "ollama": export_ollama,
    "vllm": export_vllm,
}
