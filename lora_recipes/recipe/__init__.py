"""What a recipe may say, and whether it is right: load, check, override, schema, contracts, other
tools' names, rules between keys.

Nothing that looks at weights or rows, and no torch.
"""
