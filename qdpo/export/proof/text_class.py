"""The class as which merged files are reloaded, where the one that servers load cannot be compared."""

import json
from pathlib import Path

from qdpo.model.base.folder import read_json
from qdpo.model.base.text_model import text_model
from qdpo.run.watcher import Say

# Classes of whole checkpoints that compute text otherwise than the text class that is trained (transformers 5.24).
UNLIKE = {
    "Llama4ForConditionalGeneration": "its forward pass fails without pictures",
    "Cohere2VisionForConditionalGeneration": "it leaves logit_scale out",
    "AyaVisionForConditionalGeneration": "it leaves logit_scale out",
}


def text_class(folder: Path, say: Say) -> str:
    """The text class as JSON for `reload`; empty if the class that config.json names is reloaded, as servers do."""
    named = (read_json(folder / "config.json").get("architectures") or [""])[0]
    if named not in UNLIKE:
        return ""
    text = text_model(folder)
    say(f"compared as {text.cls.__name__} (transformers' {named}: {UNLIKE[named]})")
    tied = bool(getattr(text.config, "tie_word_embeddings", False))
    return json.dumps({"class": text.cls.__name__, "key_mapping": text.key_mapping, "tied": tied})
