"""Making a data set: rows in, rows out, and a report of what became of each (dedupe, secrets,
mix, split, convert, ...).

Nothing that trains: a recipe reads what these verbs leave.
"""
