"""llama.cpp's own converter on a merged folder, from its sources on this machine."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = "convert_hf_to_gguf.py"


def convert(sources: Path, merged: Path, out: Path) -> dict[str, Any]:
    """Writes the GGUF file `out` of a merged folder; returns the number of its tensors.

    Raises: ValueError with the last line of what the script said.
    """
    words = [sys.executable, "-P", __file__, str(sources), str(merged), str(out)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    print(done.stderr)
    if done.returncode:
        raise ValueError((done.stderr.strip().splitlines() or ["it ended without a message"])[-1])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(sources: str, merged: str, out: str) -> None:
    """Runs the script in this process, with the gguf package that belongs to it.

    It knows the pre-tokenizers of published models by a hash, which a tiny tokenizer does not have: its name is given
    here, and all else is the script's.
    """
    sys.path[:0] = [sources, f"{sources}/gguf-py"]
    from conversion.base import TextModel  # type: ignore[import-not-found]

    TextModel.get_vocab_base_pre = lambda *_: "default"
    import convert_hf_to_gguf  # type: ignore[import-not-found]
    from gguf import GGUFReader

    sys.argv = [SCRIPT, merged, "--outfile", out, "--outtype", "f32"]
    convert_hf_to_gguf.main()
    print(json.dumps({"tensors": len(GGUFReader(out).tensors)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
