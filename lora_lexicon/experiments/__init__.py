"""The tables and figures of the LM-Lexicon paper, run again: on the embedded base, or on another."""
