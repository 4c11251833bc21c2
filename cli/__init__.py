"""The command line: one module a command group. Installed as `lora_lexicon.cli`."""
