"""Prompts: corpora, CommonText, and their mix."""
