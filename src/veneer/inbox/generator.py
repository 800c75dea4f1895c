"""Messages of an online shop's customers and the JSON that they stand for, from a seed.

A row is drawn as a :class:`Ticket` (the facts), then written down as a message; the completion is made from the facts
alone, so it is right by construction. ``demo/README.md`` has the rules.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import Any

from veneer.errors import UsageError
from veneer.inbox import notation, phrases, words
from veneer.inbox.notation import Language
from veneer.inbox.words import Split

KEYS = ("intent", "customer", "product", "order", "amount", "date")
_INTENTS = ", ".join(phrases.INTENTS)
SYSTEM = f"Reply in JSON: intent ({_INTENTS}), customer, product, order, amount, ISO date; null if missing."

LANGUAGES: tuple[Language, ...] = ("en", "de", "fr", "es")
CUSTOMER_RATE, ORDER_RATE, AMOUNT_RATE = 0.65, 0.62, 0.48
GREETING_RATE, FORM_RATE = 0.2, 0.2
# What is hard to learn is practised more often than it is met: dates, other languages, what is not asked for, typos.
LANGUAGE_WEIGHTS: dict[Split, tuple[int, ...]] = {"train": (49, 17, 17, 17), "heldout": (64, 14, 11, 11)}
DATE_RATE: dict[Split, float] = {"train": 0.6, "heldout": 0.52}
DISTRACTOR_RATE: dict[Split, float] = {"train": 0.36, "heldout": 0.12}
SINGLE_DIGIT_DAYS: dict[Split, float] = {"train": 0.25, "heldout": 0.0}
TYPO_RATE: dict[Split, float] = {"train": 0.14, "heldout": 0.08}


@dataclass(frozen=True)
class Ticket:
    """The facts of one message; None stands for a fact that the customer does not mention."""

    intent: str
    customer: str | None
    product: str
    order: str | None
    cents: int | None
    date: date | None

    def record(self) -> dict[str, Any]:
        """The facts as they stand in the JSON, in the order of :data:`KEYS`."""
        return {
            "intent": self.intent,
            "customer": self.customer,
            "product": self.product,
            "order": self.order,
            "amount": None if self.cents is None else notation.amount_value(self.cents),
            "date": None if self.date is None else self.date.isoformat(),
        }

    def completion(self) -> str:
        """One line of strict JSON, without spaces between the parts."""
        return json.dumps(self.record(), ensure_ascii=False, separators=(",", ":"))


def draw_ticket(rng: random.Random, split: Split) -> Ticket:
    """The facts of one message, with the names, products and order codes of this split."""
    return Ticket(
        intent=rng.choice(phrases.INTENTS),
        customer=words.draw_name(rng, split) if rng.random() < CUSTOMER_RATE else None,
        product=words.draw_product(rng, split),
        order=words.draw_code(rng, split) if rng.random() < ORDER_RATE else None,
        cents=notation.draw_cents(rng) if rng.random() < AMOUNT_RATE else None,
        date=notation.draw_date(rng, SINGLE_DIGIT_DAYS[split]) if rng.random() < DATE_RATE[split] else None,
    )


def write_message(rng: random.Random, ticket: Ticket, split: Split) -> str:
    """The message that states ``ticket``: greeting, then request and facts in any order, then a signature."""
    language = rng.choices(LANGUAGES, LANGUAGE_WEIGHTS[split])[0]

    def fill(template: str, **values: str) -> str:
        return _fill(_typo(rng, template) if rng.random() < TYPO_RATE[split] else template, values)

    middle = [fill(rng.choice(phrases.REQUESTS[ticket.intent][split]), product=ticket.product)]
    middle += _write_facts(rng, ticket, split, language, fill)
    rng.shuffle(middle)
    if rng.random() < DISTRACTOR_RATE[split]:
        middle.insert(rng.randrange(len(middle) + 1), _write_distractor(rng, split, language, fill))

    head = [rng.choice(phrases.GREETINGS[language][split])] if rng.random() < GREETING_RATE else []
    tail = []
    if ticket.customer is None:
        if rng.random() < 0.4:
            tail.append(rng.choice(phrases.THANKS[language][split]))
    elif rng.random() < 0.25:
        head.append(fill(rng.choice(phrases.INTRODUCTIONS[split]), name=ticket.customer))
    else:
        tail.append(fill(rng.choice(phrases.SIGNATURES[language][split]), name=ticket.customer))
    return " ".join([*head, *middle, *tail])


def generate_rows(count: int, seed: int = 0, split: Split = "train") -> list[dict[str, Any]]:
    """``count`` different rows, the same for the same arguments; a shorter list is the beginning of a longer one.

    Args:
        count: how many rows.
        seed: another seed, other rows.
        split: "train" or "heldout"; they share no name, no product, no order code and no sentence that carries a fact.

    Returns:
        rows ``{"messages": [system, user, assistant]}``, the shape that ``veneer train`` reads.

    Raises:
        UsageError: a negative count or an unknown split.
    """
    if count < 0:
        raise UsageError("the number of rows is negative", where=f"count: {count}", fix="ask for 0 rows or more")
    if split not in words.PRODUCTS:
        raise UsageError(f"unknown split '{split}'", fix="use 'train' or 'heldout'")
    rng = random.Random(f"veneer demo {split} {seed}")
    seen: set[str] = set()
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        ticket = draw_ticket(rng, split)
        message = write_message(rng, ticket, split)
        if message not in seen:
            seen.add(message)
            rows.append(as_row(message, ticket.completion()))
    return rows


def as_row(message: str, completion: str) -> dict[str, Any]:
    """One conversation: the instruction, the customer's message, the JSON."""
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": message},
            {"role": "assistant", "content": completion},
        ]
    }


Fill = Callable[..., str]


def _write_facts(rng: random.Random, ticket: Ticket, split: Split, language: Language, fill: Fill) -> list[str]:
    """Sentences, or one line like a form, that state order, amount and date."""
    values: dict[str, str] = {}
    if ticket.order is not None:
        values["order"] = ticket.order
    if ticket.cents is not None:
        values["amount"] = notation.write_amount(rng, ticket.cents)
    if ticket.date is not None:
        values["date"] = notation.write_date(rng, ticket.date, language)
    facts = list(values)
    rng.shuffle(facts)
    if facts and rng.random() < FORM_RATE:
        labels = phrases.LABELS[language]
        return [rng.choice([", ", "; ", " / "]).join(f"{labels[fact]}: {values[fact]}" for fact in facts) + "."]
    if "date" in values:
        values["on_date"] = on_date(values["date"], language)

    sentences = []
    pairs = {
        frozenset(("order", "date")): phrases.ORDER_DATE_SENTENCES,
        frozenset(("amount", "date")): phrases.AMOUNT_DATE_SENTENCES,
        frozenset(("order", "amount")): phrases.ORDER_AMOUNT_SENTENCES,
    }
    if len(facts) >= 2 and rng.random() < 0.5:
        sentences.append(fill(rng.choice(pairs[frozenset(facts[:2])][split]), **values))
        facts = facts[2:]
    singles = {"order": phrases.ORDER_SENTENCES, "amount": phrases.AMOUNT_SENTENCES, "date": phrases.DATE_SENTENCES}
    sentences += [fill(rng.choice(singles[fact][split]), **values) for fact in facts]
    return sentences


def _write_distractor(rng: random.Random, split: Split, language: Language, fill: Fill) -> str:
    """A sentence with a number, a date or a name that is not the one asked for."""
    kind = rng.choice(list(phrases.DISTRACTORS))
    day = notation.write_date(rng, notation.draw_date(rng), language)
    values = {
        "order": words.draw_code(rng, split),
        "amount": notation.write_amount(rng, rng.choice([290, 390, 490, 500, 995, 1000])),
        "date": day,
        "on_date": on_date(day, language),
        "phone": f"0{rng.randint(20, 89)} {rng.randint(10000, 99999)}",
        "postcode": str(rng.randint(10000, 99999)),
        "name": rng.choice(words.FIRST_NAMES[split]),
    }
    return fill(rng.choice(phrases.DISTRACTORS[kind][split]), **values)


def on_date(text: str, language: Language) -> str:
    """A date in running text: a numeric one after "on", a spelled one after the preposition of its language."""
    spelled = any(character.isalpha() for character in text)
    return f"{notation.DATE_PREPOSITION[language if spelled else 'en']} {text}"


def _fill(template: str, values: dict[str, str]) -> str:
    """Puts ``values`` into the template's braces in one pass, so that a value is never read as a template."""
    return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], template)


def _typo(rng: random.Random, template: str) -> str:
    """Swaps, drops or doubles one inner letter of one longer word; never touches what stands in braces."""
    spots = [match.span() for match in re.finditer(r"(?<![{\w])[^\W\d_]{5,}(?![}\w])", template)]
    if not spots:
        return template
    start, end = rng.choice(spots)
    at = rng.randrange(start + 1, end - 2)
    a, b = template[at], template[at + 1]
    return template[:at] + rng.choice([b + a, b, a + a + b]) + template[at + 2 :]
