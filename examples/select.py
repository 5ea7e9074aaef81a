# SPDX-License-Identifier: Apache-2.0
"""Which positions the last queries of a sequence attend to, from PyTorch tensors."""

import torch

import misa

q, w, k = torch.randn(4, 64, 128), torch.rand(4, 64), torch.randn(9000, 128)
ks, ke = torch.zeros(4, dtype=torch.int32), torch.arange(8997, 9001, dtype=torch.int32)
out = misa.select(q, w, k, ks, ke, config=misa.Config("misa", top_k=2048, heads=8, ordered=True))
print(f"query 0 attends to positions {out.indices[0, 0]} ... {out.indices[0, -1]}")
