"""Typed TOML files: read, validated with every problem listed, written."""
