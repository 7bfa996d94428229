"""What a run is worth: held-out loss, probes, generations, pass@k, base against trained.

Reads what training left, not what the recipe meant.
"""
