"""The program that trains a language model on text: ``fastllm train``, ``generate``. The kernels do not need it."""
