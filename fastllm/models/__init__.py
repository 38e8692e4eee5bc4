"""Language models on fastllm's operations."""

from fastllm.models.mlp import MLPLanguageModel
from fastllm.models.transformer import TransformerLanguageModel

__all__ = ["MLPLanguageModel", "TransformerLanguageModel"]
