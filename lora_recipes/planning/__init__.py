"""What would be trained: counts, coverage, steps, processes, in one plan.

Loads no weights and trains nothing.
"""
