"""What credentials and personal data look like: one row a kind, with the checks that tell it from what only
looks like it. Imports no torch.
"""

import base64
import binascii
import ipaddress
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """`kind`: its name in options and reports, in capitals what takes its place. `hints`: texts without any
    of them are not searched. `pattern`: its group `it`, or all of it, is what is found; `check` says whether
    it is one.
    """

    kind: str
    hints: tuple[str, ...]
    pattern: re.Pattern[str]
    check: Callable[[re.Match[str]], bool] = bool


def find(text: str, shapes: list[Shape]) -> Iterator[tuple[int, int, str]]:
    """Where each thing stands in `text`, and its kind; of two that overlap that of the first shape."""
    taken: list[tuple[int, int]] = []
    for shape in shapes:
        if not any(map(text.__contains__, shape.hints)):
            continue
        for match in shape.pattern.finditer(text):
            start, end = match.span("it" if "it" in shape.pattern.groupindex else 0)
            if shape.check(match) and all(end <= a or start >= b for a, b in taken):
                taken.append((start, end))
                yield start, end, shape.kind


def _varied(match: re.Match[str]) -> bool:
    """Random letters (Hugging Face's have no digits), no placeholder: `xxxx`, `your_key_here`.

    Of 16 random characters of 62 fewer than 9 are different once in 10^5 times; both cases are there but for
    once in 5 x 10^3.
    """
    body = re.sub(r"^[A-Za-z]{2,7}[_.-]", "", match[0])
    return len(set(body)) >= 9 and body != body.lower() and body != body.upper()


def _mixed(match: re.Match[str]) -> bool:
    """As `_varied`, in one stretch without - and _: `sk-toggleable__label-arrow-2B` is a name."""
    longest = max(re.split("[-_]", match[0]), key=len)
    return len(longest) >= 12 and len(set(longest)) >= 8 and any(c.isdigit() for c in longest)


def _jwt(match: re.Match[str]) -> bool:
    """Is its first part a JSON object that names an algorithm?"""
    head = match[0].partition(".")[0]
    try:
        return "alg" in json.loads(base64.urlsafe_b64decode(head + "=" * (-len(head) % 4)))
    except (ValueError, TypeError, binascii.Error):
        return False


def _password(match: re.Match[str]) -> bool:
    """Not a place for one: `user:password@`, `${PASSWORD}`, `<password>`, `***`."""
    word = match["it"]
    empty = word.lower() in (
        "password",
        "pass",
        "passwd",
        "pw",
        "pwd",
        "secret",
        "token",
        "key",
        "x" * len(word),
    )
    return not empty and not re.match(r"[$<{%\[]|\*+$|\.+$", word)


def luhn(digits: str) -> bool:
    """The check digit of card numbers."""
    doubled = (int(d) * (2 - (i % 2 == 0)) for i, d in enumerate(reversed(digits)))
    return sum(d - 9 * (d > 9) for d in doubled) % 10 == 0


# Issuers: Visa, Mastercard (2), American Express, Discover (3), JCB, Diners
_ISSUER = re.compile(
    r"4(\d{12}|\d{15}|\d{18})|(5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}|3[47]\d{13}"
    r"|(6011|64[4-9]\d|65\d\d)\d{12}|35(2[89]|[3-8]\d)\d{12}|3(0[0-5]|[68]\d)\d{11}"
)


def _card(match: re.Match[str]) -> bool:
    digits = re.sub(r"\D", "", match[0])
    return bool(_ISSUER.fullmatch(digits)) and luhn(digits) and len(set(digits)) > 2


# ISO 13616: length of an IBAN by country (the registry's entries of 2024)
_IBAN = """AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18 DO28
EE20 EG29 ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HN28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30
KW30 KZ20 LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24
PL28 PS29 PT25 QA29 RO24 RS22 RU33 SA24 SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29 VA22
VG24 XK20 YE30"""
IBAN = {word[:2]: int(word[2:]) for word in _IBAN.split()}


def _iban(match: re.Match[str]) -> bool:
    """Its country's length, and the remainder by 97."""
    word = re.sub(r"\s", "", match[0]).upper()
    turned = word[4:] + word[:4]
    return IBAN.get(word[:2]) == len(word) and int("".join(str(int(c, 36)) for c in turned)) % 97 == 1


# RFC 2606 and 6761: nobody's; git@ is how a host of repositories is spelled
_NOBODY = re.compile(r"@(.*\.)?(example|invalid|test|localhost|local)(\.(com|org|net|edu))?$|^git@", re.I)
# Endings of more than two letters; those of two are countries.
_ENDS = re.compile(
    "com|org|net|edu|gov|mil|int|info|biz|name|pro|dev|app|xyz|online|site|cloud|tech|shop|email|store|blog"
    "|news|agency|academy|group|world|life|live|digital|solutions|systems|network|media|studio|design|museum"
    "|aero|coop|jobs|mobi|travel|asia|berlin|hamburg|wien|koeln|london|paris|tokyo|bayern"
)


def _email(match: re.Match[str]) -> bool:
    end = match[0].rpartition(".")[2].lower()
    return bool(len(end) == 2 or _ENDS.fullmatch(end)) and not _NOBODY.search(match[0])


def _phone(match: re.Match[str]) -> bool:
    """8 to 15 digits (E.164) that are no decimal number: `+35236450.6`."""
    digits = re.sub(r"\D", "", match[0])
    decimal = re.fullmatch(r"\+\d{4,}\.\d+", match[0])
    return 8 <= len(digits) <= 15 and len(set(digits)) > 2 and not decimal


def _public(match: re.Match[str]) -> bool:
    """An address on the internet; no version of a program, no section of a text."""
    try:
        address = ipaddress.ip_address(match[0])
    except ValueError:
        return False
    before = match.string[max(0, match.start() - 12) : match.start()].lower()
    numbered = re.search(r"(version|release|ver\.?|\bv|[=<>~]=|sections?|chapter)[\s\"'-]*$", before)
    return address.is_global and not address.is_multicast and not numbered


def _shape(kind: str, hints: str, pattern: str, check: Callable[[re.Match[str]], bool] = bool) -> Shape:
    return Shape(kind, tuple(hints.split(" ")), re.compile(pattern), check)


_A, _Z = r"(?<![A-Za-z0-9_])", r"(?![A-Za-z0-9])"  # nothing of the word before or after it
CREDENTIALS = [
    Shape(
        "private_key",
        ("PRIVATE KEY",),
        re.compile(
            r"-----BEGIN (?P<of>[A-Z ]{0,40})PRIVATE KEY( BLOCK)?-----"
            r"(?P<it>(?:(?!-----)[\sA-Za-z0-9+/=:,.\\-]){40,20000}?)(?=-----END|$)"
        ),
    ),
    _shape("huggingface_token", "hf_ api_org_", rf"{_A}(hf_|api_org_)[A-Za-z0-9]{{30,}}{_Z}", _varied),
    _shape("github_token", "ghp_ gho_ ghu_ ghs_ ghr_", rf"{_A}gh[pousr]_[A-Za-z0-9]{{36,}}{_Z}", _varied),
    _shape("github_token", "github_pat_", rf"{_A}github_pat_[A-Za-z0-9_]{{40,}}{_Z}", _varied),
    _shape("gitlab_token", "glpat-", rf"{_A}glpat-[A-Za-z0-9_-]{{20,}}{_Z}", _varied),
    _shape(
        "aws_key",
        "AKIA ASIA ABIA ACCA",
        rf"{_A}(AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{{16}}{_Z}",
        lambda m: len(set(m[0])) > 7,
    ),
    _shape(
        "aws_secret",
        "aws AWS",
        r"(?i:aws_?secret[a-z_ ]{0,30})[\"']?\s{0,4}[=:]\s{0,4}[\"']?"
        r"(?P<it>[A-Za-z0-9/+]{40})(?![A-Za-z0-9/+=])",
    ),
    _shape("google_key", "AIza", rf"{_A}AIza[A-Za-z0-9_-]{{35}}{_Z}", _varied),
    _shape("npm_token", "npm_", rf"{_A}npm_[A-Za-z0-9]{{36}}{_Z}", _varied),
    _shape("pypi_token", "pypi-", rf"{_A}pypi-[A-Za-z0-9_-]{{50,}}{_Z}", _varied),
    _shape(
        "slack_token",
        "xox xapp-",
        rf"{_A}(xox[abeoprs]|xapp)-[A-Za-z0-9-]{{10,}}{_Z}",
        lambda m: sum(c.isdigit() for c in m[0]) > 5,
    ),
    _shape(
        "slack_token",
        "hooks.slack.com",
        r"hooks\.slack\.com/services/(?P<it>T[A-Z0-9]{6,}/B[A-Z0-9]{6,}/[A-Za-z0-9]{16,})",
    ),
    _shape("stripe_key", "_live_ _test_", rf"{_A}(sk|rk|pk)_(live|test)_[A-Za-z0-9]{{16,}}{_Z}", _varied),
    _shape("sendgrid_key", "SG.", rf"{_A}SG\.[A-Za-z0-9_-]{{16,}}\.[A-Za-z0-9_-]{{16,}}{_Z}", _varied),
    _shape("api_key", "sk-", rf"{_A}sk-[A-Za-z0-9_-]{{20,}}{_Z}", _mixed),
    _shape("jwt", "eyJ", rf"{_A}eyJ[A-Za-z0-9_-]{{8,}}\.[A-Za-z0-9_-]{{8,}}\.[A-Za-z0-9_-]{{8,}}", _jwt),
    _shape(
        "url_password",
        "://",
        r"(?<![A-Za-z0-9])[A-Za-z][A-Za-z0-9+.-]{1,20}://[^\s:/@\"'<>]{0,100}:(?P<it>[^\s:/@\"'<>]{1,200})@(?=[\w\[])",
        _password,
    ),
]
PERSONAL = [
    _shape(
        "email",
        "@",
        r"(?<![\w.+%@-])[\w.+%-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,5}[A-Za-z]{2,24}(?![\w(\[-]|\.\w)",
        _email,
    ),
    _shape(
        "iban",
        "".join(f"{c} " for c in IBAN).strip(),
        r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?(?![A-Za-z0-9])",
        _iban,
    ),
    _shape("card", "2 3 4 5 6", r"(?<![\d.-])[2-6]\d{3}(?:[ -]?\d{2,6}){2,4}(?![\d-]|\.\d)", _card),
    _shape("ip", ".", r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)", _public),
    _shape(
        "ip", ":", r"(?<![\w:.])(?:[0-9a-fA-F]{1,4}:){2,7}(?::?[0-9a-fA-F]{1,4}){1,6}(?![\w:]|\.\d)", _public
    ),
    _shape("phone", "+", r"(?<![\w+.)])\+[1-9](?:[ ().\-/]{0,2}\d){7,14}(?![\w.]\d|\d)", _phone),
    _shape(
        "phone",
        "- .",
        r"(?<![\w.+-])(?:\+?1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[-. ])[2-9]\d\d[-.]\d{4}(?:x\d{1,5})?"
        r"(?![\w-]|\.\d)",
        _phone,
    ),
    _shape(  # national numbers with the area's code apart, French ones in pairs
        "phone",
        "0",
        r"(?<![\w.,:+-])(?:\(0\d{1,5}\)[ -]?\d{3,4}[ -]?\d{2,5}|0[1-9]\d{1,4}[ /]\d{5,8}|0[1-9](?: \d\d){4})"
        r"(?![\w-]|[.:]\d)",
        _phone,
    ),
    _shape(
        "phone",
        "el hone obil andy fax Fax ufnummer all",
        r"(?i:\b(?:tel|phone|mobile|fax|cell|call|telefon|handy|mobil|rufnummer)\b[^\d\n]{0,20})"
        r"(?P<it>\(?\d(?:[ /().-]{0,2}\d){6,13})(?![\w-]|[.:]\d)",
    ),
]
SHAPES = CREDENTIALS + PERSONAL
KINDS = tuple(dict.fromkeys(shape.kind for shape in SHAPES))
