"""Which form computes a mixture (mixing.py): arithmetic alone, which the estimate asks too."""

from __future__ import annotations

# Up to so many experts for each one that a token uses, computing them all is the faster form, by the bytes of a number
# (measured with tools/bench_mole.py on 2 cores that multiply bf16 matrices: there products cost little, and rows much).
_MASKED_UP_TO = {4: 6, 2: 16}
# ... and where rows stay where they are (of 4 experts 2 used, as rows or all of them: 1.11 and 1.12 of one expert's
# time in bf16, 1.03 and 1.11 in fp32).
_MASKED_UP_TO_IN_PLACE = 1.5
# Experts of a rank or a few cost little even all of them, while a row is as wide as ever: up to so many ranks for each
# expert that a token uses. (Of 64 experts of rank 1, 8 used: computing all took a twelfth of the rows' time in fp32 and
# a sixth in bf16.)
_THIN = 8
# Of so many experts one that a token uses, by the bytes of a number: on the CPU, kernels that pass over what is 0 are
# then faster than a product of all. (64 ranks, 1,024 tokens, 1,024 and 2,752 columns, of torch's time: an eighth used,
# 0.5 to 0.6 in bf16 and 0.3 to 0.5 in fp32; a quarter, 0.7 to 1.0 and 0.4 to 0.7; a quarter of 512, 1.0 to 1.3 and
# 0.5 to 0.7. A router's gradients, which are fp32's, go by what is found in them: kFew in cpu_kernels.cpp.)
_FEW_IN = {4: 4, 2: 8}


def computes_all(num_experts: int, top_k: int, rank: int, itemsize: int, *, in_place: bool = False) -> bool:
    """Whether every expert is computed for every token, of which each uses `top_k`; else each pair of a token and an
    expert that it uses is a row: a copy, or `in_place`, for kernels that take it from where it lies."""
    most = _MASKED_UP_TO_IN_PLACE if in_place else _MASKED_UP_TO.get(itemsize, 6)
    return num_experts <= most * top_k or num_experts * rank <= _THIN * top_k


def uses_few(num_experts: int, top_k: int, itemsize: int) -> bool:
    """Whether each token uses so few of the experts that products on the CPU are faster without the others."""
    return num_experts >= _FEW_IN.get(itemsize, 8) * top_k
