"""Golden supports of transformers' TopKLogitsWarper and TopPLogitsWarper, top-k applied first as its generate() does.

python tests/golden/make_transformers.py
"""

from __future__ import annotations

import numpy as np
import torch
from golden_file import write
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper


def main() -> None:
    rng = np.random.default_rng(5)
    # no ties: at a tie, which token stays is a matter of sort order and not of definition
    logits = torch.tensor([rng.permutation(np.round(rng.normal(0, 2, 10), 3)).tolist() for _ in range(6)])
    supports = []
    for top_k, top_p in [(1, 1.0), (4, 1.0), (None, 0.3), (None, 0.9), (5, 0.7), (20, 0.95)]:
        warpers = LogitsProcessorList()
        if top_k is not None:
            warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            warpers.append(TopPLogitsWarper(top_p))
        kept = torch.isfinite(warpers(torch.LongTensor([[0]] * 6), logits.clone()))
        supports.append({"top_k": top_k, "top_p": top_p, "support": kept.tolist()})
    write("transformers", ["transformers", "torch"], {"logits": logits.tolist(), "supports": supports})


if __name__ == "__main__":
    main()
