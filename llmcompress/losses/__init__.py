"""Losses of distillation, one file each. Importing this package registers them all.

In: logits or hidden states of student and teacher. Out: a sum and a count. Open `forward_kl.py` first.
"""

from llmcompress.losses import (
    bdkd,
    cross_entropy,
    dad,
    forward_kl,
    hidden,
    js,
    logit_mse,
    minilm,
    ofa,
    reverse_kl,
    skewed_kl,
    taid,
    topk,
)
