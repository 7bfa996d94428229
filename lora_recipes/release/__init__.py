"""What becomes of a trained adapter in use: releases, retraining on a schedule, a watch over its answers.

How a run trains and what it is worth is said below; this room decides and records.
"""
