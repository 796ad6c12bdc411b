"""Where prompts come from: corpora, CommonText, and their mix."""
