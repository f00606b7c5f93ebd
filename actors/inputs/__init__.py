"""Batch inputs of other formats, and how they become JSON lines: :mod:`actors.inputs.sources`."""
