#!/usr/bin/env bash
# A finished run as one model, and the commands that serve it: examples/merge_and_serve.sh [RUN]
# RUN: a run's folder (default: own-pairs/run, which examples/own_pairs.sh leaves). No server is started here.
set -euo pipefail
run=${1:-own-pairs/run}

# 1. One model for transformers, compared with the trained model before it gets its name. Exit code 7: they differ.
[ -d "$run/merged" ] || qdpo merge "$run"

# 2. Ollama: a folder with a Modelfile and the model as GGUF. It prints `ollama create` and `ollama run`.
qdpo export "$run" --to ollama --force

# 3. vLLM: prints the command that serves the merged model; --lora would serve base and adapter.
qdpo export "$run" --to vllm
