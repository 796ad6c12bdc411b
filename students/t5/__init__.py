"""The T5 student: a T5 encoder with a two-layer projection, in the layout of LifuWang/DistillT5."""
