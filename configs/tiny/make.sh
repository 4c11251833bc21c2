#!/usr/bin/env bash
# Makes what ships as the pack `tiny`, and the demo's data, from two Debian packages: wordnet-base and dict-jargon.
# One and a half to two hours on two cores. `make tiny` runs it; nothing is replaced before the last step.
set -euo pipefail
wordnet=${WORDNET:-/usr/share/wordnet}
jargon=${JARGON:-/usr/share/dictd/jargon.index}
build=${BUILD:-build/tiny}
lexicon=${LEXICON:-.venv/bin/lora-lexicon}

# The words that ship for the demo; the base must not see them.
$lexicon data sample "$wordnet" --train 5000 --valid 120 --test 1000 --out "$build/samples/wordnet.jsonl.gz"
$lexicon data sample "$jargon" --train 500 --valid 100 --test 200 --all-words --out "$build/samples/jargon.jsonl.gz"

# The base: tokenizer and 8.4M parameters, from nothing.
[ -f "$build/base/training.json" ] || $lexicon train base "$wordnet" --recipe tiny/base --out "$build/base"

# Domains and experts, on entries that are new to the base: a seed adapter on all, then one expert a domain from it.
$lexicon data prepare "$build/samples/wordnet.jsonl.gz" --out "$build/entries" --overwrite
$lexicon domains fit "$build/entries" --base "$build/base" --recipe tiny/domains --out "$build/domains" --overwrite
$lexicon train --data "$build/entries" --domain none --base "$build/base" --recipe tiny/lora \
  --out "$build/seed"
$lexicon train --data "$build/entries" --domains "$build/domains" --domain all --base "$build/base" --recipe tiny/lora \
  --from "$build/seed/dense" --out "$build/experts"
$lexicon pack build "$build/experts" --base "$build/base" --router "$build/domains" \
  --include-base --name tiny --licence LicenseRef-WordNet-3.0 --out "$build/pack" --overwrite --description \
  "Four domains of WordNet's glosses on a base of 8.4 million parameters: to try the toolkit without GPU or network."

# Everything is there: take it.
rm -rf adapters/tiny
cp -r "$build/pack" adapters/tiny
cp "$build"/samples/*.jsonl.gz lora_lexicon/data/samples/
