"""How customers write dates and amounts, each way with its one meaning.

The rules (also in this folder's README): a day is never taken for a month, because a numeric date is either
``day.month.year`` with dots, or ``year/month/day``, or ``year-month-day``; in an amount, a separator followed by
exactly two digits is the decimal one, and a separator followed by three digits groups thousands.
"""

from __future__ import annotations

import random
from datetime import date, timedelta
from typing import Literal

Language = Literal["en", "de", "fr", "es"]

MONTHS: dict[Language, str] = {
    "en": "January February March April May June July August September October November December",
    "de": "Januar Februar März April Mai Juni Juli August September Oktober November Dezember",
    "fr": "janvier février mars avril mai juin juillet août septembre octobre novembre décembre",
    "es": "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre",
}

_FIRST_DAY, _LAST_DAY = date(2023, 1, 1), date(2026, 12, 31)

# The word that stands before a date in running text ("bought on 3 March 2025", "bought le 3 mars 2025").
DATE_PREPOSITION: dict[Language, str] = {"en": "on", "de": "am", "fr": "le", "es": "el"}


def draw_date(rng: random.Random, single_digits: float = 0.0) -> date:
    """A day of the years 2023 to 2026; this share of them has a day of one digit for certain."""
    day = _FIRST_DAY + timedelta(days=rng.randrange((_LAST_DAY - _FIRST_DAY).days + 1))
    return day.replace(day=rng.randint(1, 9)) if single_digits and rng.random() < single_digits else day


def write_date(rng: random.Random, day: date, language: Language) -> str:
    """``day`` in a notation that people of this language use; about a third of the dates are numeric."""
    if rng.random() < 0.34:
        dotted = f"{day.day:02}.{day.month:02}.{day.year}"
        if language != "en":
            return dotted
        return rng.choice([f"{day.year}/{day.month:02}/{day.day:02}", day.isoformat(), dotted])
    month = MONTHS[language].split()[day.month - 1]
    if language == "de":
        return f"{day.day}. {month} {day.year}"
    if language == "fr":
        return f"{'1er' if day.day == 1 else day.day} {month} {day.year}"
    if language == "es":
        return f"{day.day} de {month} de {day.year}"
    return rng.choice(
        [
            f"{day.day} {month} {day.year}",
            f"{day.day} {month[:3]} {day.year}",
            f"{month} {day.day}, {day.year}",
            f"{month} {ordinal(day.day)}, {day.year}",
            f"{ordinal(day.day)} of {month} {day.year}",
        ]
    )


def ordinal(number: int) -> str:
    """ "1st", "2nd", "3rd", "4th", ... "11th", ... "21st"."""
    suffix = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"


def draw_cents(rng: random.Random) -> int:
    """An amount of money in cents: mostly below 200 units, one in eight above 1,000."""
    units = rng.randint(1000, 2999) if rng.random() < 0.125 else rng.randint(4, 199)
    return units * 100 + rng.choice([0, 0, 0, 50, 90, 95, 99, rng.randint(1, 98)])


def amount_value(cents: int) -> int | float:
    """The number that stands in the JSON: in whole units where there are no cents, else with the fewest digits."""
    return cents // 100 if cents % 100 == 0 else cents / 100


def write_amount(rng: random.Random, cents: int) -> str:
    """``cents`` with a currency, in the English ("$1,299.50") or the continental ("1.299,50 €") manner."""
    units, rest = divmod(cents, 100)
    continental = rng.random() < 0.45
    group, decimal = (".", ",") if continental else (",", ".")
    thousands = f"{units:,}".replace(",", group)
    digits = rng.choice([thousands, str(units)]) if units >= 1000 else str(units)
    if rest or rng.random() < 0.4:
        digits += f"{decimal}{rest:02}"
    if continental:
        return rng.choice([f"{digits} €", f"{digits}€", f"EUR {digits}", f"{digits} euros"])
    return rng.choice([f"${digits}", f"£{digits}", f"€{digits}", f"USD {digits}"])
