"""Pairs of a function's docstring and its source, from this repository's own package: `python
data/repo/make.py`.

A pair a documented function of five lines and more, as messages; every tenth goes to eval.jsonl. Fixed order,
so that the files are the same each time they are made from the same sources. Imports only the standard
library.
"""

import ast
import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LEAST = 5  # lines; shorter functions teach little (the documents' own limit)


def pairs() -> list[dict[str, list[dict[str, str]]]]:
    """One row a function: a user turn that gives its place, signature and docstring; the assistant's turn is
    its source.
    """
    rows = []
    for path in sorted((ROOT / "lora_recipes").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if not isinstance(node, ast.FunctionDef) or (node.end_lineno or 0) - node.lineno + 1 < LEAST:
                continue
            if said := ast.get_docstring(node):
                ask = (
                    f"Write the function `{node.name}({ast.unparse(node.args)})` of"
                    f" {path.relative_to(ROOT)}.\n\n{said}"
                )
                code = f"```python\n{ast.get_source_segment(source, node)}\n```"
                rows.append(
                    {
                        "prompt": [{"role": "user", "content": ask}],
                        "completion": [{"role": "assistant", "content": code}],
                    }
                )
    return rows


if __name__ == "__main__":
    rows = pairs()
    for name, chosen in (("train", [r for i, r in enumerate(rows) if i % 10]), ("eval", rows[::10])):
        (HERE / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in chosen), encoding="ascii"
        )
        print(f"{name}.jsonl: {len(chosen)} rows")
