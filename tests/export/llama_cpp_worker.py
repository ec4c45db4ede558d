"""Runs llama.cpp on a GGUF file, as a process of its own: reads a JSON request from stdin, answers in JSON on stdout.

    {"gguf": path, "lora": path or null, "texts": […], "ids": [[…]], "greedy": [[[…], count]]}

Answers the token ids of each text, the logits after each position of each list of ids, and greedy continuations.
"""

import json
import os
import sys

import numpy as np


def main() -> None:
    request = json.load(sys.stdin)
    # llama.cpp prints to both streams at the level of C; the answer must stay alone.
    answer_to = os.dup(1)
    os.dup2(2, 1)
    from llama_cpp import Llama

    model = Llama(
        request["gguf"],
        lora_path=request.get("lora"),
        n_ctx=512,
        n_threads=1,
        logits_all=True,
        verbose=False,
        seed=0,
        type_k=0,
        type_v=0,
    )
    answer = {
        "tokens": [model.tokenize(text.encode(), add_bos=False, special=True) for text in request.get("texts", [])],
        "logits": [logits(model, ids) for ids in request.get("ids", [])],
        "greedy": [greedy(model, ids, count) for ids, count in request.get("greedy", [])],
        "template": model.metadata.get("tokenizer.chat_template"),
    }
    with os.fdopen(answer_to, "w") as file:
        json.dump(answer, file)


def logits(model: object, ids: list[int]) -> list[list[float]]:
    model.reset()
    model.eval(ids)
    return np.asarray(model.scores[: len(ids)], dtype=float).tolist()


def greedy(model: object, ids: list[int], count: int) -> list[int]:
    model.reset()
    model.eval(ids)
    found: list[int] = []
    for _ in range(count):
        best = int(np.argmax(model.scores[model.n_tokens - 1]))
        found.append(best)
        if best == model.token_eos():
            break
        model.eval([best])
    return found


main()
