"""Typed TOML files: read, checked with every problem listed, written."""
