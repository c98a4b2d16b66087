"""The check digits of cards, accounts and national numbers. Pure: each takes a number without its separators."""

from datetime import date
from typing import Final

_DOUBLED: Final = bytes.maketrans(b"0123456789", b"0246813579")
_DNI: Final = "TRWAGMYFPDXBNJZSQVHLCKE"
_PESEL: Final = (1, 3, 7, 9, 1, 3, 7, 9, 1, 3)
_NO_NINO: Final = frozenset(("BG", "GB", "KN", "NK", "NT", "TN", "ZZ"))

_IBAN_LENGTHS: Final = {
    code: int(length)
    for length, codes in {
        15: "NO", 16: "BE", 18: "DK FI FK FO GL NL", 19: "MK SI", 20: "AT BA EE KZ LT LU MN XK", 21: "CH HR LI LV",
        22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ OM SO TL", 24: "AD CZ ES MD PK RO SA SE SK TN VG",
        25: "LY PT ST", 26: "IS TR", 27: "BI DJ FR GR IT MC MR SM", 28: "AL AZ BY CY DO GT HU LB NI PL SV",
        29: "BR EG PS QA UA", 30: "JO KW MU", 31: "MT SC", 32: "LC", 33: "RU",
    }.items()
    for code in codes.split()
}  # fmt: skip

# Codice fiscale: what each character is worth at an odd place; at an even one a letter is its number.
_CF_ODD: Final = dict(
    zip(
        "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ",
        (1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16,
         10, 22, 25, 24, 23),
        strict=True,
    )
)  # fmt: skip
_CF_EVEN: Final = {c: int(c) if c.isdigit() else ord(c) - ord("A") for c in _CF_ODD}

_VERHOEFF_TIMES: Final = (
    "0123456789", "1234067895", "2340178956", "3401289567", "4012395678",
    "5987604321", "6598710432", "7659821043", "8765932104", "9876543210",
)  # fmt: skip
_VERHOEFF_TURN: Final = (
    "0123456789", "1576283094", "5803796142", "8916043527", "9453126870", "4286573901", "2793806415", "7046913258",
)  # fmt: skip


def luhn(digits: str) -> bool:
    raw = digits.encode()
    plain, doubled = raw[-1::-2], raw[-2::-2].translate(_DOUBLED)
    return (sum(plain) + sum(doubled) - 48 * len(raw)) % 10 == 0


def card_lengths(digits: str) -> tuple[int, ...]:
    """How long a card that starts with these four digits may be; nothing where none does."""
    two, three, four = int(digits[:2]), int(digits[:3]), int(digits[:4])
    if two // 10 == 4:
        return (13, 16, 19)  # Visa
    if 51 <= two <= 55 or 2200 <= four <= 2204 or 2221 <= four <= 2720 or 3528 <= four <= 3589:
        return (16,)  # Mastercard, Mir, JCB
    if two in (34, 37):
        return (15,)  # American Express
    if 300 <= three <= 305 or two in (36, 38, 39):
        return (14, 16)  # Diners
    if two in (62, 65) or 644 <= three <= 649 or four == 6011:
        return (16, 17, 18, 19)  # UnionPay, Discover
    if four in (5018, 5020, 5038, 5893, 6304, 6759, 6761, 6762, 6763):
        return (12, 13, 14, 15, 16, 17, 18, 19)  # Maestro
    return ()


def iban_length(country: str) -> int:
    """How many characters an IBAN of this country has; 0 where there are none."""
    return _IBAN_LENGTHS.get(country, 0)


def iban(code: str) -> bool:
    """The country's length, and ISO 7064 mod 97-10. Upper case."""
    if len(code) != iban_length(code[:2]):
        return False
    return int("".join(str(int(character, 36)) for character in code[4:] + code[:4])) % 97 == 1


def ssn(digits: str) -> bool:
    """A United States SSN that can have been given out, or an ITIN: neither has a check digit."""
    area, group, serial = int(digits[:3]), int(digits[3:5]), int(digits[5:])
    if area >= 900:
        return 50 <= group <= 65 or 70 <= group <= 88 or 90 <= group <= 92 or 94 <= group <= 99
    return area not in (0, 666) and group != 0 and serial != 0


def nino(code: str) -> bool:
    """A British National Insurance number: no check digit, but few letters are allowed."""
    return code[:2] not in _NO_NINO


def nhs(digits: str) -> bool:
    rest = 11 - _weighed(digits[:9], range(10, 1, -1)) % 11
    return rest != 10 and rest % 11 == int(digits[9])


def steuer_id(digits: str) -> bool:
    """A German tax number: ISO 7064 mod 11,10, and among the first ten one digit comes twice or thrice."""
    counts = sorted((digits[:10].count(digit) for digit in set(digits[:10])), reverse=True)
    if digits[0] == "0" or counts[0] not in (2, 3) or counts[1] != 1:
        return False
    product = 10
    for digit in digits[:10]:
        product = ((int(digit) + product) % 10 or 10) * 2 % 11
    return (11 - product) % 10 == int(digits[10])


def nir(code: str) -> bool:
    """A French social security number: 97 less the number mod 97; Corsica's 2A and 2B count as 19 and 18."""
    number = int(code[:13].replace("2A", "19").replace("2B", "18"))
    return 97 - number % 97 == int(code[13:])


def dni(code: str) -> bool:
    """A Spanish DNI, or a NIE, whose X, Y or Z stands for 0, 1 or 2."""
    number = code[:-1].translate(str.maketrans("XYZ", "012"))
    return _DNI[int(number) % 23] == code[-1]


def codice_fiscale(code: str) -> bool:
    total = sum((_CF_EVEN if place % 2 else _CF_ODD)[character] for place, character in enumerate(code[:15]))
    return chr(ord("A") + total % 26) == code[15]


def bsn(digits: str) -> bool:
    """A Dutch citizen's number: the eleven test."""
    return digits != "000000000" and (_weighed(digits[:8], range(9, 1, -1)) - int(digits[8])) % 11 == 0


def pesel(digits: str) -> bool:
    """A Polish number: check digit, and a date of birth whose month carries the century."""
    return -_weighed(digits[:10], _PESEL) % 10 == int(digits[10]) and _day(int(digits[2:4]) % 20, int(digits[4:6]))


def belgian(digits: str) -> bool:
    """A Belgian national number: mod 97, with a 2 before it for those born since 2000."""
    check = int(digits[9:])
    return check in (97 - int(digits[:9]) % 97, 97 - int("2" + digits[:9]) % 97)


def personnummer(digits: str) -> bool:
    """A Swedish number of ten digits: Luhn, and a date (60 more on the day of a co-ordination number)."""
    return luhn(digits) and _day(int(digits[2:4]), int(digits[4:6]) % 60)


def cpf(digits: str) -> bool:
    """A Brazilian taxpayer's number: two check digits."""
    if len(set(digits)) == 1:
        return False
    checks = (_weighed(digits[:end], range(end + 1, 1, -1)) * 10 % 11 % 10 for end in (9, 10))
    return all(check == int(digits[place]) for place, check in zip((9, 10), checks, strict=True))


def verhoeff(digits: str) -> bool:
    """An Indian Aadhaar number's check."""
    state = 0
    for place, digit in enumerate(reversed(digits)):
        state = int(_VERHOEFF_TIMES[state][int(_VERHOEFF_TURN[place % 8][int(digit)])])
    return state == 0


def _weighed(digits: str, weights: range | tuple[int, ...]) -> int:
    return sum(int(digit) * weight for digit, weight in zip(digits, weights, strict=True))


def _day(month: int, day: int) -> bool:
    try:
        date(2000, month, day)  # a leap year, so that no 29th of February is lost
    except ValueError:
        return False
    return True
