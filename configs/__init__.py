"""YAML recipes that ship with the project."""
