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
        Aaron Ada Alina Amara Anton Ariel Arlo Asha Astrid Axel Beata Bianca Bodo Boris Bridget Caleb Celia Chiara
        Dalia Damian Dario Delia Dmitri Edda Elias Elsa Emre Esra Ezra Felicia Flora Freya Gavin Gideon Giulia Greta
        Hamza Ida Ilse Imani Ingrid Ivo Jana Jelena Jonas Josef Joy Kai Kamal Katja Kofi Lena Liam Lila Lorenz Mara
        Milan Mira Nadia Nico Nils Nuria Odette Omid Owen Paolo Petra Quentin Rafael Rahul Rhea Romy Rory Rufus Sanjay
        Selma Sina Soren Talia Tamsin Ugo Uma Uwe Valentin Viola Wilma Yara Yusuf Zara Zeno
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
        Abbas Ahmed Albrecht Aydin Bauer Bianchi Bloom Brennan Cho Conti Costa Cruz Dahl Diaz Eriksen Farah Ferrari
        Flores Fontaine Ghosh Gupta Haug Herrera Hirsch Iqbal Ivanov Joshi Kaya Khan Kim Kovac Lam Larsen Lemaire Lind
        Maki Marino Mehta Molina Mori Nakamura Nowak Ochoa Okoye Orlov Ortega Osei Pavlov Pereira Petit Popov Quiroga
        Rahman Ramos Renard Romano Roux Sato Schulz Shah Sokolov Soto Suzuki Tran Udo Ueda Vidal Vlasov Weiss Zhou
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
        elm fir yew cedar palm balsa alder hazel spruce larch willow poplar rosewood ebony olive plum pear apple fig
        clay jade onyx opal amber coral pearl gold zinc lead iridium carbon chalk sand straw reed raffia sisal kapok
        mohair angora alpaca cashmere flannel tulle lace chiffon muslin corduroy gauze terry chenille oilcloth vinyl
        """
    ),
    "heldout": _words("oak steel glass leather cotton wool ceramic cherry iron rattan suede"),
}

LOOKS: dict[Split, tuple[str, ...]] = {
    "train": _words("""
        black white red blue green grey yellow large small folding wireless portable vintage Arbor Nordal Luma Kestrel
        pink turquoise beige ivory golden striped slim round square tall cordless stackable heavy soft
        teal mauve lilac olive crimson navy khaki cyan maroon scarlet indigo peach mint rusty pale dark bright matt
        oval narrow wide long short flat thin thick mini giant double single light quiet smart retro classic modern
        rustic antique foldaway adjustable rotating magnetic electric solar battery waterless washable shockproof
        windproof fireproof oversized padded quilted woven knitted painted polished carved hanging floating nautical
        Arlo Boden Casper Delta Ekko Fjord Gable Ikon Juno Koala Lynx Mistral Nimbus Otter Puma Raven Sparrow Tundra
        Umbra Viper Willow Yeti Zephyr Orion Badger Falcon Heron
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
        puzzle, toy train, ottoman, sideboard, bench, cabinet, nightstand, towel rail, bath mat, bed sheet, duvet,
        tea tray, whisk, grater, ladle, blender, juicer, pepper mill, butter dish, cake stand, coat rack, key ring,
        beanie, tie clip, cardigan, slipper, earphone, webcam, power bank, mouse pad, laptop sleeve, ink pot, ruler,
        stapler, lantern, deck chair, parasol, rake, trowel, cooler, rope ladder, kite, card game, teddy bear,
        rocking horse""",
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


INVENTED_RATE = 2 / 3  # of the training rows' first names, last names, looks and materials
_ONSETS = _words("b br c ch d dr f fl g gr h j k l m n p ph pr qu r s sh st sw t tr v w z")
_VOWELS = _words("a e i o u a e i o ea ee ai ou ue")
_MIDDLES = _words("b c d f g k l m n p r s t v ck dd ll ld mp nd nn ng rk rr ss st tt th")
_ENDS = _words("a e o y an ar as el en er ia ie in is it le on or us al ed ock ane ide ort ude")
_HELD_OUT_WORDS = {word.lower() for lists in (FIRST_NAMES, LAST_NAMES, LOOKS, MATERIALS) for word in lists["heldout"]}


def invent_word(rng: random.Random) -> str:
    """A capitalised word that is in no list, such as "Vuttan", "Elder" or "Brasorude"; never a held-out name."""
    while True:
        start = rng.choice(_ONSETS) if rng.random() < 0.85 else ""
        longer = rng.choice(_MIDDLES) + rng.choice(_VOWELS) if rng.random() < 0.1 else ""
        word = start + rng.choice(_VOWELS) + longer + rng.choice(_MIDDLES) + rng.choice(_ENDS)
        if word not in _HELD_OUT_WORDS:
            return word.capitalize()


def draw_name(rng: random.Random, split: Split) -> str:
    """A first and a last name."""
    return f"{_name(rng, FIRST_NAMES, split)} {_name(rng, LAST_NAMES, split)}"


def _name(rng: random.Random, names: dict[Split, tuple[str, ...]], split: Split) -> str:
    if split == "heldout":
        return rng.choice(names[split])
    if rng.random() < INVENTED_RATE:
        return invent_word(rng)
    return names[split][int(rng.random() ** 2 * len(names[split]))]  # some words are common, most are rare


def draw_product(rng: random.Random, split: Split) -> str:
    """A product such as "oak desk lamp" or "red desk lamp"; now and then with both ("red oak desk lamp")."""
    look, material = _name(rng, LOOKS, split), _name(rng, MATERIALS, split).lower()
    traits = rng.choices([look, material, f"{look} {material}"], [45, 45, 10])[0]
    return f"{traits} {rng.choice(PRODUCTS[split])}"


def draw_code(rng: random.Random, split: Split) -> str:
    """An order code such as "K-4821"."""
    return f"{rng.choice(CODE_LETTERS)}-{rng.randint(100, 999)}{rng.choice(CODE_LAST_DIGITS[split])}"
