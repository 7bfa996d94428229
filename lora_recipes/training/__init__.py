"""One run from start to end: train, launch, watch, verify, finish, resume.

One run only; many are in ablation/.
"""
