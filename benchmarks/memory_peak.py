"""Peak memory of one TSD-KD call beyond inputs, gradients and the dW accumulator, in this (fresh) process, as JSON.

python benchmarks/memory_peak.py '[tokens, vocabulary, student hidden, teacher hidden, budget in MiB or null, device]'
"""

import json
import sys

import torch
from cases import LOSSES, Case, Models, batches
from measure import MIB, Peak, clear, run
from peers import Ours

tokens, vocabulary, student, teacher, budget, device = json.loads(sys.argv[1])
loss, ours = LOSSES["TSD-KD"], Ours(memory_budget=budget and budget * MIB)


def batch(vocabulary: int, tokens: int):
    return batches(Case(Models("", student, teacher, vocabulary), tokens, (), ()), device, 1)[0]


run(device, batch(1000, 64), Ours(), loss)  # libraries and threads are up
real = batch(vocabulary, tokens)
peak = Peak(device)
run(device, real, ours, loss)
extra = peak.extra() - (real.hidden_s.grad.nbytes + real.weight_s.grad.nbytes) / MIB
if not torch.count_nonzero(real.weight_s.grad[:100]) > 0:
    raise SystemExit("the gradient is zero: nothing was computed")
clear(real)
one_chunk = tokens * 2 * vocabulary * real.weight_s.dtype.itemsize <= (budget or 384) * MIB
accumulator = 0.0 if one_chunk else vocabulary * student * 4 / MIB
print(json.dumps({"beyond_accumulator": extra - accumulator, "accumulator": accumulator}))
