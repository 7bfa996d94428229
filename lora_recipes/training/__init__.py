"""One run from start to end: train, launch, watch, verify, finish, resume, the record.

One run only; many are in ablation/.
"""
