"""What training holds at its peak: one step on tensors without bytes, and which cards it fits.

Nothing is measured here; training/usage.py does that.
"""
