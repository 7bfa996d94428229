"""Rows from any source to checked tokens: read, gate, render, tokenizers.

No model, and nothing that trains.
"""
