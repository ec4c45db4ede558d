"""The programs that serve a trained model, and the architectures that they take, by the class of a config.json.

Read in the sources of those programs: the converter of llama.cpp as packaged with llama-cpp-python 0.3.36
(vendor/llama.cpp/conversion: the names that its classes are registered with), and the classes of vLLM 0.33.0 with and
without SupportsLoRA (model_executor/models/registry.py). Neither program was run here; a later release may take more.
No torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from qdpo.families.config_fields import family_of, field

LLAMA_CPP_RELEASE = "llama-cpp-python 0.3.36"
VLLM_RELEASE = "vLLM 0.33.0"


def _named(causal: str, whole: str, other: str = "") -> frozenset[str]:
    """Class names from their beginnings: …ForCausalLM, …ForConditionalGeneration, and others in full."""
    names = [f"{name}ForCausalLM" for name in causal.split()]
    return frozenset([*names, *(f"{name}ForConditionalGeneration" for name in whole.split()), *other.split()])


# Architectures of convert_hf_to_gguf.py.
LLAMA_CPP = _named(
    """
    Afmoe Apertus Arcee Bamba BitNet Bloom Cohere2 Cohere2Moe Cohere Dbrx DeepseekV2 DeepseekV32 DeepseekV3
    DeepseekV4 Dots1 Dots3Note Ernie4_5 Ernie4_5_Moe Exaone4 ExaoneMoe Falcon FalconH1 FalconMamba GPTBigCode
    GPTNeoX Gemma2 Gemma3 Gemma3n Gemma4 Gemma Glm4 Glm4Moe Glm4MoeLite Glm GlmMoeDsa GptOss Granite GraniteMoe
    GraniteMoeHybrid GraniteMoeSWA GraniteMoeShared GraniteSWA HYV3 HYV4 HrmText HunYuanDenseV1 HunYuanMoEV1
    Jais2 Jamba KimiLinear Laguna Lfm2 Lfm2Moe Llama4 Llama Mamba2 Mamba Mellum MiMoV2Flash MiniCPM3 MiniMaxM2
    Ministral3 Mistral Mixtral Nemotron NemotronH Olmo2 Olmo3 Olmo Olmoe Phi3 Phi Qwen2 Qwen2Moe Qwen3 Qwen3Moe
    Qwen3Next Qwen3_5 Qwen3_5Moe Qwen4Exp SeedOss SmolLM3 SolarOpen StableLm Starcoder2 Youtu
    """,
    """
    Dots3Note Exaone4_5_ Gemma3 Gemma3n Gemma4 Gemma4Unified Glm4v Glm4vMoe Glm5Next GlmOcr HunYuanVL Llama4
    Llava MiniCPMV4_6 MiniMaxM3Sparse Mistral3 MuseGlimmer PaddleOCRVL Qwen2VL Qwen2_5_VL Qwen3VL Qwen3VLMoe
    Qwen3_5 Qwen3_5Moe Qwen4Exp Step3p7
    """,
    "GPT2LMHeadModel",
)
# Architectures that vLLM serves with adapters over them.
VLLM_ADAPTER = _named(
    """
    AXK1 Afmoe Apertus Arcee Cohere2 Cohere Cwm DeepseekV2 DeepseekV32 DeepseekV3 Ernie4_5 Ernie4_5_Moe Exaone4
    ExaoneMoe FalconH1 FlexOlmo GPTBigCode GPTNeoX Gemma2 Gemma3 Gemma4 Gemma Glm4 Glm4Moe Glm4MoeLite Glm
    GlmMoeDsa GptOss Granite GraniteMoe GraniteMoeHybrid GraniteMoeSWA GraniteMoeShared GraniteSWA HYV3 HYV4
    HunYuanDenseV1 HunYuanMoEV1 HyperCLOVAX Inkling Jais2 Jamba Kolibri1 Laguna Lfm2 Lfm2Moe Llama4 Llama
    LongcatFlash Mellum MiniCPM3 MiniMaxM2 Ministral3 Mistral Mixtral Nemotron NemotronH OPT Olmo2 Olmo3 Olmo
    OlmoHybrid Olmoe Phi3 Phi Qwen2 Qwen2Moe Qwen3 Qwen3Moe Qwen3Next Qwen3_5 Qwen3_5Moe Qwen4Exp SeedOss
    SmolLM3 Starcoder2 VaultGemma
    """,
    """
    CohereCompass Ernie4_5_VLMoe Exaone4_5_ Gemma3 Gemma4 Gemma4Unified Glm4v Glm4vMoe Glm5Next GlmOcr
    Granite4Vision HunYuanVL Idefics3 Inkling InternVL Lfm2Vl Llama4 Llava LlavaNext LlavaNextVideo MiniCPMOcr
    MiniCPMV4_6 MiniCPMV4_7 Mistral3 Molmo2 MuseGlimmer MuseSpark PaliGemma QianfanOCR Qwen2VL Qwen2_5_VL
    Qwen3VL Qwen3VLMoe Qwen3_5 Qwen3_5Moe Qwen4Exp SmolVLM
    """,
)
# Architectures that vLLM serves, but without adapters.
VLLM_MERGED = _named(
    """
    Bloom Cohere2Moe Dbrx DeepseekV4 Dots3Note Falcon FalconMamba GPTJ Gemma3n HrmText KimiLinear Mamba2 Mamba
    MiMoV2Flash StableLm Zamba2
    """,
    """
    Aria Cohere2Vision Gemma3n LlavaOnevision MiniMaxM3Sparse PaddleOCRVL Step3p7
    """,
    "GPT2LMHeadModel",
)


@dataclass(frozen=True, kw_only=True)
class Serving:
    """The programs that take a model of one architecture."""

    architecture: str
    """The class that servers load."""
    gguf: Literal["qdpo", "llama.cpp", None]
    """The writer of its GGUF file; None if neither knows the architecture."""
    vllm: Literal["adapter", "merged", None]
    """`adapter`: the base with the adapter over it, or the merged model; `merged`: the merged model alone."""

    @classmethod
    def unknown(cls, architecture: str) -> "Serving":
        """A model whose config.json names no class."""
        return cls(architecture=architecture, gguf=None, vllm=None)

    def without_own_gguf(self) -> "Serving":
        """The same for a config with settings that qdpo does not write as GGUF."""
        return replace(self, gguf="llama.cpp" if self.architecture in LLAMA_CPP else None)


def serving_of(config: Mapping[str, Any]) -> Serving | None:
    """The programs for the model of a config.json; None if it does not name its class."""
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    if not isinstance(name, str):
        return None
    text = field(config, "text_config")
    text = text if isinstance(text, Mapping) else config
    family = family_of(text)
    # llama.cpp scales queries by the head's size; see `gguf_exact` for what else a config may hold.
    is_scaled_alike = field(text, "query_pre_attn_scalar") in (None, field(text, "head_dim"))
    by_qdpo = family is not None and family.gguf is not None and is_scaled_alike
    return Serving(
        architecture=name,
        gguf="qdpo" if by_qdpo else "llama.cpp" if name in LLAMA_CPP else None,
        vllm="adapter" if name in VLLM_ADAPTER else "merged" if name in VLLM_MERGED else None,
    )


def ships_as(serving: Serving, beginning: str | None = None) -> str:
    """The ways out of a run in one line; `beginning` is that of the adapter's names for servers."""
    ways = [f"merged folder ({serving.architecture})"]
    if serving.gguf == "qdpo":
        ways.append("GGUF")
    elif serving.gguf == "llama.cpp":
        ways.append("GGUF by llama.cpp's convert_hf_to_gguf.py")
    under = f" under {beginning}*" if beginning else ""
    if serving.vllm == "adapter":
        ways.append(f"adapter for PEFT and vLLM{under}")
    else:
        ways.append(f"adapter for PEFT{under}")
    if serving.vllm == "merged":
        ways.append("vLLM: merged only")
    lacks = [] if serving.gguf else [f"GGUF (llama.cpp's converter does not know it, {LLAMA_CPP_RELEASE})"]
    lacks += [] if serving.vllm else [f"vLLM (does not list it, {VLLM_RELEASE})"]
    return ", ".join(ways) + (f"; not as: {', '.join(lacks)}" if lacks else "")
