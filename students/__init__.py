"""Kinds of student networks: sizes read off tensors, the module that is trained, the module that is served."""
