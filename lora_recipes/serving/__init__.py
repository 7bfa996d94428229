"""vLLM: its rules, the export under the served class's names, the command, the server, the live proof.

Reads adapter folders, not recipes; no torch.
"""
