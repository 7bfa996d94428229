"""Texts with a credential or personal data in each, and texts with what only looks like one. All are made
when they are asked for: nothing token-like stands here.
"""

import base64
import json
import random
import string
from collections.abc import Iterator

from lora_recipes.curate.shapes import IBAN, luhn

LETTERS, DIGITS = string.ascii_letters, string.digits
ANY, UPPER = LETTERS + DIGITS, string.ascii_uppercase + DIGITS
URL = ANY + "-_"
FRAMES = [
    "My key is {}, keep it.",
    'token = "{}"\nclient = Client(token)',
    "export SECRET='{}'",
    '{{"role": "admin", "key": "{}"}}',
    "Here it is:\n{}\nThanks!",
    "see ({}) above",
    "a sentence that ends with {}.",
    "# {}",
]
BARE = ["{}", "call {} now", "it is {}.", "a;{};b", "({})", "Contact:\t{}\n", "{}, or later", "Line one\n{}"]


def some(rng: random.Random, letters: str, count: int) -> str:
    return "".join(rng.choice(letters) for _ in range(count))


def jwt(rng: random.Random) -> str:
    parts = [{"alg": "HS256", "typ": "JWT"}, {"sub": some(rng, DIGITS, 10), "iat": rng.randrange(10**9)}]
    coded = [base64.urlsafe_b64encode(json.dumps(p).encode()).decode().rstrip("=") for p in parts]
    return ".".join([*coded, some(rng, URL, 43)])


def iban(rng: random.Random) -> str:
    country = rng.choice(["DE", "GB", "FR", "NL", "ES", "CH"])
    body = some(rng, DIGITS, IBAN[country] - 4)
    if country in ("GB", "NL"):
        body = some(rng, string.ascii_uppercase, 4) + body[4:]
    rest = 98 - int("".join(str(int(c, 36)) for c in f"{body}{country}00")) % 97
    word = f"{country}{rest:02}{body}"
    return word if rng.random() < 0.5 else " ".join(word[i : i + 4] for i in range(0, len(word), 4))


def card(rng: random.Random, sound: bool = True) -> str:
    start, size = rng.choice([("4", 16), ("5" + rng.choice("12345"), 16), ("37", 15), ("6011", 16)])
    body = start + some(rng, DIGITS, size - len(start) - 1)
    last = next(d for d in DIGITS if luhn(body + d))
    word = body + (last if sound else str((int(last) + 1) % 10))
    return word if rng.random() < 0.5 or size != 16 else " ".join(word[i : i + 4] for i in range(0, 16, 4))


def phone(rng: random.Random) -> str:
    digits = lambda n: some(rng, "23456789", n)  # noqa: E731
    return rng.choice(
        [
            f"+49 30 {digits(7)}",
            f"+44 20 {digits(4)} {digits(4)}",
            f"+1 ({digits(3)}) {digits(3)}-{digits(4)}",
            f"+336{digits(8)}",
            f"({digits(3)}) {digits(3)}-{digits(4)}",
            f"{digits(3)}-{digits(3)}-{digits(4)}",
            f"Tel. 030/{digits(7)}",
            f"phone: 0171 {digits(7)}",
        ]
    )


def key(rng: random.Random) -> str:
    dashes, name = "-----", rng.choice(["RSA ", "EC ", "OPENSSH ", ""]) + "PRIVATE KEY"
    lines = "\n".join(some(rng, ANY + "+/", 64) for _ in range(6))
    return f"{dashes}BEGIN {name}{dashes}\n{lines}\n{dashes}END {name}{dashes}"


def address(rng: random.Random) -> str:
    first = rng.choice([5, 8, 31, 46, 78, 91, 134, 185, 193, 212])
    if rng.random() < 0.3:
        return "2a0" + ":".join(
            [some(rng, "123456789", 1), *(some(rng, "123456789abcdef", 4) for _ in range(7))]
        )
    return f"{first}.{rng.randrange(1, 255)}.{rng.randrange(1, 255)}.{rng.randrange(1, 255)}"


def mail(rng: random.Random) -> str:
    name, host = (some(rng, string.ascii_lowercase, rng.randrange(4, 9)) for _ in range(2))
    joined = f"{name}.{rng.choice(['smith', 'mueller', 'x+news', '1984'])}" if rng.random() < 0.5 else name
    return f"{joined}@{rng.choice(['', 'mail.'])}{host}.{rng.choice(['com', 'de', 'co.uk', 'org', 'io'])}"


MAKERS = {
    "private_key": key,
    "huggingface_token": lambda r: "hf_" + some(r, LETTERS, 34),
    "github_token": lambda r: (
        r.choice(["ghp_", "gho_", "ghs_"]) + some(r, ANY, 36)
        if r.random() < 0.5
        else f"github_pat_{some(r, ANY, 22)}_{some(r, ANY, 59)}"
    ),
    "gitlab_token": lambda r: "glpat-" + some(r, URL, 20),
    "aws_key": lambda r: "AKIA" + some(r, string.ascii_uppercase + "234567", 16),
    "aws_secret": lambda r: "aws_secret_access_key = " + some(r, ANY + "/+", 40),
    "google_key": lambda r: "AIza" + some(r, URL, 35),
    "npm_token": lambda r: "npm_" + some(r, ANY, 36),
    "pypi_token": lambda r: "pypi-AgEI" + some(r, URL, 150),
    "slack_token": lambda r: f"xoxb-{some(r, DIGITS, 12)}-{some(r, DIGITS, 12)}-{some(r, ANY, 24)}",
    "stripe_key": lambda r: "sk_live_" + some(r, ANY, 24),
    "sendgrid_key": lambda r: f"SG.{some(r, URL, 22)}.{some(r, URL, 43)}",
    "api_key": lambda r: r.choice(["sk-", "sk-proj-", "sk-ant-api03-"]) + some(r, ANY, 48),
    "jwt": jwt,
    "url_password": lambda r: f"postgresql://app:{some(r, ANY, 14)}@db.internal:5432/main",
    "email": mail,
    "iban": iban,
    "card": card,
    "phone": phone,
    "ip": address,
}


def planted(each: int, seed: int = 0) -> Iterator[tuple[str, str, str]]:
    """(kind, text, what must not be left of it): `each` of every kind."""
    rng = random.Random(seed)
    for kind, make in MAKERS.items():
        for i in range(each):
            value = make(rng)
            frames = BARE if kind in ("email", "iban", "card", "phone", "ip") else FRAMES
            text = frames[i % len(frames)].format(value)
            yield kind, text, _secret(kind, value)


def _secret(kind: str, value: str) -> str:
    """The part of a value that must not be left."""
    if kind == "private_key":
        return value.splitlines()[1]
    if kind == "url_password":
        return value.split(":")[2].split("@")[0]
    return value.split(" = ")[-1].removeprefix("Tel. ").removeprefix("phone: ")


def harmless(each: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """(what it is, text): `each` of every kind that only looks like a secret."""
    rng = random.Random(seed)
    word = lambda n: some(rng, string.ascii_lowercase, n)  # noqa: E731
    number = lambda n: some(rng, DIGITS, n)  # noqa: E731
    broken = lambda: iban(rng).replace(" ", "")  # noqa: E731
    makers = {
        "git hash": lambda: f"commit {some(rng, '0123456789abcdef', 40)}",
        "uuid": lambda: "-".join(some(rng, "0123456789abcdef", n) for n in (8, 4, 4, 4, 12)),
        "sha256": lambda: f"sha256:{some(rng, '0123456789abcdef', 64)}",
        "base64": lambda: f"data:image/png;base64,{some(rng, ANY + '+/', 120)}",
        "function of hf": lambda: f"hf_{word(6)}_{word(8)}_{word(12)}_{word(6)}(x)",
        "placeholder": lambda: rng.choice(
            ["hf_" + "x" * 34, "sk-your-api-key-goes-here-please", "ghp_" + "X" * 36, "AKIA" + "X" * 16]
        ),
        "style": lambda: f"div.sk-toggleable__{word(7)}-label-{word(9)} {{}}",
        "npm setting": lambda: f"npm_config_{word(10)}_{word(20)}=1",
        "version": lambda: f"version {number(1)}.{rng.randrange(30)}.{rng.randrange(30)}.{rng.randrange(9)}",
        "pinned": lambda: f"{word(6)}==8.{rng.randrange(30)}.{rng.randrange(30)}.{rng.randrange(9)}",
        "private address": lambda: f"http://192.168.{rng.randrange(255)}.{rng.randrange(255)}:8000/v1",
        "loopback": lambda: f"ssh {word(4)}@127.0.0.1 -p 22",
        "mac address": lambda: ":".join(some(rng, "0123456789abcdef", 2) for _ in range(6)),
        "time": lambda: (
            f"at 12:{rng.randrange(10, 60)}:{rng.randrange(10, 60)} on 2024-0{number(1)}-1{number(1)}"
        ),
        "date and number": lambda: f"20{number(2)}-11-{rng.randrange(10, 30)} {number(6)}",
        "card without check digit": lambda: f"order {card(rng, sound=False)}",
        "iban of a wrong sum": lambda: f"{(b := broken())[:2]}{(int(b[2:4]) + 1) % 100:02}{b[4:]}",
        "long number": lambda: f"id {number(20)}",
        "decimal": lambda: f"{number(2)}.{number(16)}",
        "mail of nobody": lambda: f"{word(5)}@example.{rng.choice(['com', 'org', 'net'])}",
        "repository": lambda: f"git clone git@github.com:{word(6)}/{word(8)}.git",
        "product of matrices": lambda: f"y = {word(1)}@{word(1)}.T + q@k.transpose(-1, -2)",
        "decorator": lambda: f"@{word(5)}.{word(6)}\ndef {word(4)}(): ...",
        "package": lambda: f"npm install {word(6)}@{number(1)}.{number(1)}.{number(1)}",
        "password's place": lambda: f"postgres://user:${{{word(6).upper()}}}@host/db",
        "url with a port": lambda: f"https://{word(6)}.com:8443/{word(5)}@2x.png",
        "slice": lambda: f"x[{number(1)}:{number(2)}] and {number(3)}:{number(2)}",
        "sum": lambda: f"{number(3)} +{number(4)} - {number(3)}",
        "isbn": lambda: f"ISBN 978-{number(1)}-{number(3)}-{number(5)}-{number(1)}",
        "words": lambda: " ".join(word(rng.randrange(2, 9)) for _ in range(30)),
    }
    for kind, make in makers.items():
        for _ in range(each):
            yield kind, make()
