#!/usr/bin/env bash
# Prompts, but no pairs: your model answers, a rule judges, the pairs are trained on: examples/judge.sh [SETTINGS]
# SETTINGS are the words that `qdpo run` takes; without any: preset=demo, a small real model on the CPU, minutes.
# For your card: examples/judge.sh preset=7b-24gb. All files go to $FOLDER (default: judged).
set -euo pipefail
[ $# -gt 0 ] || set -- preset=demo train.epochs=4
folder=${FOLDER:-judged}
mkdir -p "$folder"

# 1. One prompt a line. Use your own, hundreds of them.
[ -f "$folder/prompts.txt" ] || cat > "$folder/prompts.txt" <<'PROMPTS'
What is the capital of Peru?
How many minutes does a soft egg take?
Name three trees that keep their leaves in winter.
Why is the sea salty?
How do I get ink out of a shirt?
What does a router do?
Which planet is closest to the sun?
What is a good first sentence for a letter of complaint?
PROMPTS

# 2. Four different answers to each prompt. A stopped call continues and writes the same file.
qdpo sample "$folder/prompts.txt" "$@" --max-new-tokens "${TOKENS:-120}" --out "$folder/candidates.jsonl"

# 3. A rule decides: the shorter answer that is not cut wins. Other judges: regex:PATTERN, reward-model:PATH, openai:URL.
qdpo judge "$folder/candidates.jsonl" --by length --out "$folder/pairs.jsonl"

# 4. You decide what the judge left open, or disagree with:  qdpo label judged/candidates.jsonl --out judged/pairs.jsonl

# 5. Train on the pairs. `data check` also shows how many answers are the model's own.
qdpo data check "$folder/pairs.jsonl" "$@" --report "$folder/data_report.jsonl"
qdpo run "$@" data.path="$folder/pairs.jsonl" data.eval_fraction=0.25 output.dir="$folder" output.name=run
