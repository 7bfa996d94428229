"""What `lora-recipes data secrets` finds of what was planted, and of what only looks like it, beside
detect-secrets; and what it finds in the Python standard library and in data that another program made.

pip install detect-secrets==1.5.0 faker
python -m benchmarks.credentials     writes benchmarks/results/credentials.md
"""

import sysconfig
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from lora_recipes.curate.secrets import clean
from lora_recipes.curate.shapes import SHAPES, find
from tests.cases.planted import harmless, planted

RESULTS = Path(__file__).parent / "results" / "credentials.md"
EACH, THEIRS = 500, 50  # texts of each kind; detect-secrets, which reads files, is given fewer
LOCALES = ("en_US", "en_GB", "de_DE", "fr_FR", "nl_NL", "es_ES", "it_IT", "pl_PL")


def kinds(text: str) -> list[str]:
    """What ours finds in a text."""
    return [kind for *_, kind in find(text, SHAPES)]


def others(texts: list[str]) -> list[bool]:
    """Does detect-secrets, with its default plugins and filters, find anything in each?"""
    from detect_secrets import SecretsCollection
    from detect_secrets.settings import default_settings

    found = []
    with tempfile.TemporaryDirectory() as folder, default_settings():
        for i, text in enumerate(texts):
            file = Path(folder) / f"{i}.txt"
            file.write_text(text)
            secrets = SecretsCollection()
            secrets.scan_file(str(file))
            found.append(bool(secrets.data))
    return found


def table(head: str, rows: list[tuple[object, ...]]) -> list[str]:
    """A Markdown table."""
    return [
        f"| {head} |",
        "|---" * (head.count("|") + 1) + "|",
        *(f"| {' | '.join(map(str, r))} |" for r in rows),
        "",
    ]


def made_elsewhere() -> list[tuple[object, ...]]:
    """Of values that Faker makes for eight countries: how many are found, and are wholly gone."""
    from faker import Faker

    rows: list[tuple[object, ...]] = []
    makers = ("free_email", "iban", "credit_card_number", "phone_number", "ipv4_public", "ipv6")
    issuers = ("visa16", "mastercard", "amex", "discover")  # others of Faker's are no issuer's today
    for maker in makers:
        hit = total = 0
        for locale in LOCALES:
            fake = Faker(locale)
            Faker.seed(1)
            for i in range(100):
                value = getattr(fake, maker)(*issuers[i % 4 : i % 4 + 1] if "card" in maker else ())
                hit += value not in clean(f"My contact: {value}\n", SHAPES, [])
                total += 1
        rows.append((maker, total, f"{hit / total:.1%}"))
    return rows


def main() -> None:
    """Measure, write."""
    rows: list[tuple[object, ...]] = []
    began = time.perf_counter()
    ours = [(k, text, part, part not in clean(text, SHAPES, [])) for k, text, part in planted(EACH, 1)]
    seconds = time.perf_counter() - began
    for kind in dict.fromkeys(k for k, *_ in ours):
        mine = [gone for k, *_, gone in ours if k == kind]
        theirs = others([text for k, text, *_ in ours if k == kind][:THEIRS])
        rows.append((kind, f"{sum(mine) / len(mine):.1%}", f"{sum(theirs) / len(theirs):.0%}"))
    alarms: list[tuple[object, ...]] = []
    all_harmless = list(harmless(EACH, 1))
    for what in dict.fromkeys(w for w, _ in all_harmless):
        texts = [t for w, t in all_harmless if w == what]
        theirs = others(texts[:THEIRS])
        alarms.append(
            (
                what,
                f"{sum(map(bool, map(kinds, texts))) / len(texts):.1%}",
                f"{sum(theirs) / len(theirs):.0%}",
            )
        )
    library = Path(sysconfig.get_path("stdlib"))
    files = [f for f in library.rglob("*.py") if not {"site-packages", "test", "tests"} & {*f.parts}]
    counted = Counter(k for f in files for k in kinds(f.read_text(encoding="utf-8", errors="replace")))
    lines = [
        "# Credentials and personal data: found, missed, false alarms",
        "",
        f"`python -m benchmarks.credentials`: {EACH} texts of each kind made by tests/cases/planted.py, of",
        f"which detect-secrets {version('detect-secrets')} (default plugins, filters; any finding counts)",
        f"saw {THEIRS}. The texts and our shapes are by the same hand: what nobody thought of is not there.",
        f"Ours took {seconds:.1f} s for {len(ours):,} texts.",
        "",
        "## Planted: share that is found and wholly gone",
        "",
        *table("kind | ours | detect-secrets", rows),
        "## Harmless: share with a false alarm",
        "",
        *table("what it is | ours | detect-secrets", alarms),
        f"## Values made by Faker {version('faker')} for {len(LOCALES)} countries",
        "",
        *table("of | values | found and gone", made_elsewhere()),
        f"## The standard library of Python ({len(files):,} files)",
        "",
        ", ".join(f"{kind} {count}" for kind, count in counted.most_common())
        + ". The addresses of e-mail are its authors'; credentials: none.",
        "",
    ]
    RESULTS.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
