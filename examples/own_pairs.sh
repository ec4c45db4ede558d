#!/usr/bin/env bash
# Your own pairs, from a file to a report: examples/own_pairs.sh [SETTINGS]
# SETTINGS are the words that `qdpo run` takes; without any: preset=demo, a small real model on the CPU, minutes.
# For your card: examples/own_pairs.sh preset=7b-24gb. All files go to $FOLDER (default: own-pairs).
set -euo pipefail
[ $# -gt 0 ] || set -- preset=demo train.epochs=4
folder=${FOLDER:-own-pairs}
mkdir -p "$folder"

# 1. One JSON object a line: a prompt, the answer you want, an answer you do not want. Hundreds of pairs, not twelve.
[ -f "$folder/pairs.jsonl" ] || cat > "$folder/pairs.jsonl" <<'PAIRS'
{"prompt": "Where is my parcel?", "chosen": "Open Orders and press Track. It shows the last scan.", "rejected": "Great question! Parcels are wonderful things, and there are many places where one could be right now."}
{"prompt": "Can I return shoes that I wore outside?", "chosen": "No. We take back unworn shoes within 30 days.", "rejected": "Thank you so much for reaching out! Returns are a topic that many customers care about deeply."}
{"prompt": "How do I change my address?", "chosen": "Account, then Addresses, then Edit.", "rejected": "Moving house is exciting! Let me first tell you a little about how addresses work in general."}
{"prompt": "Do you deliver on Sundays?", "chosen": "No, Monday to Saturday.", "rejected": "Delivery days depend on a great number of things, as I am sure you can imagine."}
{"prompt": "My code SAVE10 does not work.", "chosen": "SAVE10 ended on 1 March. WELCOME5 works for first orders.", "rejected": "Oh no, I am so sorry to hear that! Codes can be tricky, and your feelings are valid."}
{"prompt": "How long is the guarantee on a kettle?", "chosen": "Two years from the day of delivery.", "rejected": "Guarantees are an important part of our promise of quality, which we take very seriously."}
{"prompt": "Can I pay by invoice?", "chosen": "Yes, from the second order on.", "rejected": "There are many ways to pay these days, from coins to cards, and each has its charm."}
{"prompt": "The lamp arrived broken.", "chosen": "Send a photo to help@example.com. We ship a new one today.", "rejected": "What a pity! Lamps are fragile by nature, which is part of what makes them so special."}
{"prompt": "Which size fits a 30 cm pot?", "chosen": "Size L: it takes pots of 28 to 32 cm.", "rejected": "Choosing a size is a personal journey. Let us explore what pots mean to you."}
{"prompt": "Is the blue chair still available?", "chosen": "Yes, four are left.", "rejected": "Blue is one of our most loved colours, and chairs are among our most loved products!"}
{"prompt": "How do I delete my account?", "chosen": "Account, then Privacy, then Delete. It is final after 14 days.", "rejected": "We would be so sad to see you go! Have you considered everything that an account offers?"}
{"prompt": "Do you have a shop in Leeds?", "chosen": "Yes: 12 Boar Lane, open until 18:00.", "rejected": "Leeds is a lovely city with a rich history of trade, and shops have long been part of it."}
PAIRS

# 2. What a run would make of them: layout, lengths, faults, a verdict. Exit code 3: a run would stop.
qdpo data check "$folder/pairs.jsonl" "$@" --report "$folder/data_report.jsonl"

# 3. Does it fit? Nothing is loaded or downloaded for the answer. Add --gpu-gib 12 for another card.
mine=("$@" data.path="$folder/pairs.jsonl" data.eval_fraction=0.25 output.dir="$folder" output.name=run)
qdpo plan "${mine[@]}"

# 4. Train. The same command continues a stopped run.
qdpo run "${mine[@]}"

# 5. Did it work? One page, opened from disk. Its curves need matplotlib: pip install 'qdpo[report]'
qdpo report "$folder/run"
