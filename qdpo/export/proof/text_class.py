"""The class as which merged files are reloaded, where the one that servers load cannot be compared."""

import json
from pathlib import Path

from qdpo.model.base.weight_names import folder_names
from qdpo.run.watcher import Say

# Classes of whole checkpoints that compute text otherwise than the text class that is trained (transformers 5.24).
UNLIKE = {
    "Llama4ForConditionalGeneration": "its forward pass fails without pictures",
    "Cohere2VisionForConditionalGeneration": "it leaves logit_scale out",
    "AyaVisionForConditionalGeneration": "it leaves logit_scale out",
}


def text_class(folder: Path, say: Say) -> str:
    """The text class as JSON for `reload`; empty if the class that config.json names is reloaded, as servers do."""
    names = folder_names(folder)
    why = UNLIKE.get(names.served.__name__)
    if why is None:
        return ""
    text = names.text
    say(f"compared as {text.cls.__name__} (transformers' {names.served.__name__}: {why})")
    tied = bool(getattr(text.config, "tie_word_embeddings", False))
    return json.dumps({"class": text.cls.__name__, "key_mapping": text.key_mapping, "tied": tied})
