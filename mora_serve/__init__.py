"""Core of mora-serve: the MORA method, its ports and the command line.

Plain Python by contract: nothing below this package imports ray, torch, vllm, transformers, trl or
fastapi, so the method can be read, tested and simulated without an engine.
"""

__version__ = "0.1.0"
