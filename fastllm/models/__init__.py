"""Language models on fastllm's operations."""

from fastllm.models.mlp import MLPLanguageModel

__all__ = ["MLPLanguageModel"]
