"""Says of any artefact what it is, what it fits and what is wrong. Reads only; trusts nothing that it reads."""
