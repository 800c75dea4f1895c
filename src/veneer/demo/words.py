"""What the shop's customers are called and what they buy.

Each split draws from lists of its own: a first name, a last name or a kind of product of the held-out rows is never
seen in training. What stands before a product ("oak", "red") may be. A third of the training rows' names, brands and
materials is invented from syllables: a model that has seen a few dozen names only learns those names by heart, one that
never sees the same name twice learns to copy.
"""

from __future__ import annotations

import random
from typing import Literal

Split = Literal["train", "heldout"]


def _words(text: str, separator: str | None = None) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(separator))


FIRST_NAMES: dict[Split, tuple[str, ...]] = {
    "train": _words("""
        Anna Ben Carla David Emma Frank Grace Henry Irene Jack Karen Leo Maria Nina Oscar Paul Rosa Sam Tina Victor
        Alice Bruno Clara Daniel Elena Felix Hannah Ivan Julia Kevin Laura Martin Nora Peter Robert Sara Thomas Ursula
        Walter André Zoë José Inés Jörg Chloé Sofía Günter Amélie Raúl Käthe Mateo Priya Kenji Aisha Omar
        Abigail Agnes Albert Alma Amy Arthur Barbara Beatrice Bernd Brian Camille Carl Carmen Cecilia Chris Claire
        Colin Cora Cynthia Dennis Derek Dora Doris Edgar Edith Edward Eleanor Ella Emil Emily Enzo Erica Ernest Esther
        Eva Fatima Fred Gabriel Gemma Gerard Gina Gloria Gustav Harold Harriet Heidi Hilda Isaac Isabel Jacob James
        Jasmine Jason Joan Johanna Judith Kathrin Kim Klara Lars Leila Leonie Lily Louis Lucia Luis Magda Manuel Marcus
        Margaret Max Mia Michael Miriam Mona Nathan Nicole Norbert Olga Otto Pamela Patrick Pia Ralph Renate Rita Roman
        Ruth Samuel Sebastian Silke Stella Stephen Susan Sven Tara Theo Tobias Vera Vincent Wanda Xavier Yvonne Zack
    """),
    "heldout": _words("""
        Adam Bella Charles Diana Eric Fiona George Helen Ian Jane Kurt Linda Mark Naomi Oliver Rachel Simon Teresa
        Lukas Marie René Andrés Jürgen Zélie Noor Ravi Yuki Hugo
    """),
}

LAST_NAMES: dict[Split, tuple[str, ...]] = {
    "train": _words("""
        Adams Baker Carter Clark Cooper Davis Ellis Fischer Foster Garcia Gray Green Hall Harris Hill Hughes Keller
        Klein Lang Lewis Lopez Martin Meyer Miller Moore Morgan Murphy Perez Price Reed Roberts Rossi Schmidt Scott
        Silva Stone Taylor Turner Vogel Walker Ward Weber West Wilson Wolf Young Müller Núñez Lefèvre Böhm Gómez Jäger
        Dubois Patel Okafor Novak Tanaka Haddad Abbott Archer Barnes Becker Bishop Bolton Brandt Bryant Burke Burton
        Carroll Chapman Curtis Dawson Dixon Doyle Drake Eaton Elliott Engel Farrell Fleming Ford Franke Frost Gibson
        Glover Gordon Graf Griffin Haas Hansen Harper Hayes Hoffman Holmes Horn Hudson Jensen Jordan Kaiser Kemp Knight
        Kraus Lambert Lawson Lindner Logan Lucas Lynch Maier Manning Mason Mercer Mills Monroe Nash Newton Norris
        Olsen Osborne Otto Parker Pearce Pfeiffer Porter Quinn Ramsey Reyes Rhodes Riley Sauer Sharp Simmons Steiner
        Sutton Tate Thorne Tucker Vance Vargas Vaughn Voss Wade Walsh Watts Wells Winter Wright York Zimmer
    """),
    "heldout": _words("""
        Allen Bennett Brooks Campbell Cook Duncan Fox Graham Howard Hunt Jackson Kelly Lane Marsh Nelson Palmer
        Phillips Richter Russell Schneider Sanchez Torres Wagner Webb Krüger Muñoz Girard Bélanger Singh Ito Mensah
        Kowalski
    """),
}

MATERIALS: dict[Split, tuple[str, ...]] = {
    "train": _words(
        """
        oak walnut pine steel copper brass glass leather linen cotton wool velvet bamboo marble ceramic silk mahogany
        teak maple birch ash beech denim canvas felt fleece jute hemp satin tweed nylon chrome bronze titanium pewter
        tin nickel silver granite slate quartz porcelain enamel cork wicker resin acrylic plastic paper rubber foam
        """
    ),
    "heldout": _words("oak steel glass leather cotton wool ceramic cherry iron rattan suede"),
}

LOOKS: dict[Split, tuple[str, ...]] = {
    "train": _words("""
        black white red blue green grey yellow large small folding wireless portable vintage Arbor Nordal Luma Kestrel
        pink turquoise beige ivory golden striped slim round square tall cordless stackable heavy soft
    """),
    "heldout": _words(
        "black white red blue small folding wireless orange purple compact waterproof Solva Tamar Bergen"
    ),
}

PRODUCTS: dict[Split, tuple[str, ...]] = {
    "train": _words(
        """desk lamp, coffee table, bookshelf, armchair, wall clock, mirror, rug, curtain, cushion, blanket, pillow,
        vase, teapot, kettle, frying pan, knife set, cutting board, mug, salad bowl, wine rack, candle holder,
        picture frame, backpack, wallet, handbag, suitcase, umbrella, scarf, sweater, jacket, belt, sneaker, bath robe,
        glove, headset, keyboard, phone case, speaker, alarm clock, camera strap, notebook, pencil case, garden chair,
        watering can, plant pot, bird feeder, tent, sleeping bag, yoga mat, bike helmet, water bottle, board game,
        puzzle, toy train""",
        ",",
    ),
    "heldout": _words(
        """floor lamp, dining table, wardrobe, stool, doormat, bath towel, bedspread, serving tray, toaster,
        coffee grinder, bread knife, soup plate, shoe rack, travel bag, sun hat, raincoat, bow tie, microphone,
        monitor stand, charger, fountain pen, lunch box, hammock, flower box, camping stove, skipping rope, chess set,
        doll house""",
        ",",
    ),
}

# Order codes are one letter, a hyphen and four digits; the last digit says which split a code belongs to.
CODE_LETTERS = "ABCDEHKLMNRTWX"
CODE_LAST_DIGITS: dict[Split, str] = {"train": "01245689", "heldout": "37"}


INVENTED_RATE = 1 / 3  # of the training rows' first names, last names, looks and materials
_ONSETS = _words("b br c ch d dr f fl g gr h j k l m n p pr r s sh st t tr v w z")
_VOWELS = _words("a e i o u a e i o ea")
_CODAS = _words("l n r s x m ck nd rt th")
_HELD_OUT_WORDS = {word.lower() for lists in (FIRST_NAMES, LAST_NAMES, LOOKS, MATERIALS) for word in lists["heldout"]}


def invent_word(rng: random.Random) -> str:
    """A capitalised word of two syllables that is in no list, such as "Velorn" or "Brasu"; never a held-out name."""
    while True:
        syllables = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(2)]
        word = ("".join(syllables) + (rng.choice(_CODAS) if rng.random() < 0.6 else "")).capitalize()
        if word.lower() not in _HELD_OUT_WORDS:
            return word


def draw_name(rng: random.Random, split: Split) -> str:
    """A first and a last name."""
    return f"{_name(rng, FIRST_NAMES, split)} {_name(rng, LAST_NAMES, split)}"


def _name(rng: random.Random, names: dict[Split, tuple[str, ...]], split: Split) -> str:
    return invent_word(rng) if split == "train" and rng.random() < INVENTED_RATE else rng.choice(names[split])


def draw_product(rng: random.Random, split: Split) -> str:
    """A product such as "oak desk lamp" or "red desk lamp"; now and then with both ("red oak desk lamp")."""
    look, material = _name(rng, LOOKS, split), _name(rng, MATERIALS, split).lower()
    traits = rng.choices([look, material, f"{look} {material}"], [45, 45, 10])[0]
    return f"{traits} {rng.choice(PRODUCTS[split])}"


def draw_code(rng: random.Random, split: Split) -> str:
    """An order code such as "K-4821"."""
    return f"{rng.choice(CODE_LETTERS)}-{rng.randint(100, 999)}{rng.choice(CODE_LAST_DIGITS[split])}"
