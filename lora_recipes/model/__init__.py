"""Base and adapter as library objects: base, what is adapted (targets), the one
SFTTrainer (build), how an adapter begins, trained adapters on their base, merge, combine.

When and how long to train is not decided here.
"""
