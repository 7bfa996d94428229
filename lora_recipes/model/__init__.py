"""Base and adapter as library objects: base, targets, build (the one SFTTrainer), starts,
attach, merge, combine.

When and how long to train is not decided here.
"""
