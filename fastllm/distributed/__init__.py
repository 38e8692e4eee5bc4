"""A vocabulary cut over processes: the functions of ``fastllm.functional`` for tables and output layers of which every
process holds some rows.

``vocab_start=`` tells the first row that this process holds, ``group=`` the processes. Ids and targets are those of the whole
vocabulary, and the same in every process; so are results. Gradients of a part are its process's; the input's is summed
over processes. ``torch.compile`` calls these functions outside of its graphs.

:func:`plan` cuts a model's layers for ``torch.distributed.tensor.parallel.parallelize_module``: parameters become
``DTensor``s, with which the plain functions call these.
"""

from fastllm.distributed.dtensor import VocabParallel, plan
from fastllm.distributed.embedding import embedding
from fastllm.distributed.log_probs import linear_log_probs
from fastllm.distributed.losses import cross_entropy, linear_cross_entropy

__all__ = ["VocabParallel", "cross_entropy", "embedding", "linear_cross_entropy", "linear_log_probs", "plan"]
