"""The sentences that messages are put together from.

Each pool has a part for training and a part for the held-out rows. The sentences that carry the intent and those that
carry an order, an amount, a date or a name are never shared between the two. A space in braces is filled by the
generator: ``{product}``, ``{order}``, ``{amount}``, ``{date}`` (the bare date), ``{on_date}`` (with its preposition),
``{name}``, ``{phone}``, ``{postcode}``.
"""

from __future__ import annotations

from veneer.inbox.notation import Language
from veneer.inbox.words import Split

Pool = dict[Split, tuple[str, ...]]

INTENTS = ("cancel", "damage", "delivery", "exchange", "invoice", "refund")

# What the customer wants. Each sentence names the product and makes exactly one intent plain.
REQUESTS: dict[str, Pool] = {
    "cancel": {
        "train": (
            "Please cancel the {product}.",
            "I want to cancel my {product}.",
            "I no longer need the {product}, please cancel it.",
            "Could you cancel the {product} before it ships?",
            "Stop the order for the {product}, I changed my mind.",
            "Don't send the {product}, I changed my mind.",
            "I ordered the {product} by mistake, cancel it please.",
            "Can I still call off the {product}?",
            "Cancel one {product}, please.",
            "Forget about that {product}, I don't want it any more.",
        ),
        "heldout": (
            "Kindly cancel my order of the {product}.",
            "I have to cancel the {product}, sorry.",
            "Please don't ship the {product}, I changed my mind.",
            "We no longer want the {product}, so cancel that one.",
        ),
    },
    "damage": {
        "train": (
            "The {product} arrived broken.",
            "My {product} came with a big crack.",
            "The {product} is damaged.",
            "There is a deep scratch on the {product}.",
            "I opened the box and the {product} was in pieces.",
            "The {product} stopped working after a day.",
            "One corner of the {product} is dented.",
            "The {product} is defective.",
            "You sent me a broken {product}.",
            "What I unpacked was a badly dented {product}.",
        ),
        "heldout": (
            "My {product} was broken when I opened the parcel.",
            "The {product} has a crack and a scratch.",
            "I received a damaged {product}.",
            "The {product} no longer works, it is defective.",
        ),
    },
    "delivery": {
        "train": (
            "Where is my {product}?",
            "The {product} has not arrived yet.",
            "When will the {product} be delivered?",
            "I am still waiting for the {product}.",
            "Any news on the delivery of the {product}?",
            "Tracking for the {product} has not moved for days.",
            "Has the {product} been shipped?",
            "The parcel with the {product} is late.",
            "I was promised a {product} last week and nothing came.",
            "Your driver never brought our {product}.",
        ),
        "heldout": (
            "I have not received the {product} yet.",
            "When does the {product} arrive?",
            "The delivery of the {product} is late.",
            "Still no sign of the {product}, where is it?",
        ),
    },
    "exchange": {
        "train": (
            "I'd like to exchange the {product}.",
            "Can I swap the {product} for another colour?",
            "The {product} is too small, I need a bigger size.",
            "Please exchange the {product} for another model.",
            "Could you replace the {product} with a larger one?",
            "You sent the wrong colour of the {product}, please swap it.",
            "Wrong size: can the {product} be exchanged?",
            "I want to trade the {product} for a different size.",
            "I'd rather have a bigger {product}, can we swap?",
            "Please take this {product} back and send another size.",
        ),
        "heldout": (
            "May I exchange my {product} for another size?",
            "The {product} is the wrong size, please swap it.",
            "Is it possible to swap the {product} for a different colour?",
            "I would prefer another colour of the {product}, can we exchange it?",
        ),
    },
    "invoice": {
        "train": (
            "Please send me the invoice for the {product}.",
            "I need an invoice for the {product}.",
            "Could I get a receipt for the {product}?",
            "The invoice for the {product} is missing.",
            "My accountant asks for the bill of the {product}.",
            "Can you email the invoice for my {product}?",
            "I never got a receipt for the {product}.",
            "I need a bill with VAT for the {product}.",
            "We bought a {product} and need the invoice for our books.",
            "Please write an invoice for one {product}.",
        ),
        "heldout": (
            "Could you send the invoice of the {product} again?",
            "There was no invoice in the box with the {product}.",
            "For my taxes I need the receipt of the {product}.",
            "Please email me a bill for the {product}.",
        ),
    },
    "refund": {
        "train": (
            "I want a refund for the {product}.",
            "I'd like my money back for the {product}.",
            "I sent back the {product}, where is my refund?",
            "Please refund the {product}.",
            "When do I get my money back for the {product}?",
            "I returned the {product} and await the refund.",
            "I am not happy with the {product} and ask for a refund.",
            "Please pay me back for the {product}.",
            "I sent you a {product} back, now I want my money.",
            "Refund this {product}, please.",
        ),
        "heldout": (
            "Could you refund my {product}?",
            "I returned the {product} but my money is not back yet.",
            "I request a full refund of the {product}.",
            "Give me my money back for the {product}, please.",
        ),
    },
}

# Facts in running text, one per sentence.
ORDER_SENTENCES: Pool = {
    "train": (
        "Order {order}.",
        "Order number {order}.",
        "My order is {order}.",
        "It is order {order}.",
        "Ref. {order}.",
    ),
    "heldout": ("The order number is {order}.", "Order: {order}.", "This is about order {order}."),
}
AMOUNT_SENTENCES: Pool = {
    "train": (
        "I paid {amount}.",
        "It cost {amount}.",
        "Price: {amount}.",
        "It cost me {amount}.",
        "You charged {amount}.",
    ),
    "heldout": ("I paid {amount} for it.", "The price was {amount}.", "I was charged {amount}."),
}
DATE_SENTENCES: Pool = {
    "train": (
        "Bought {on_date}.",
        "I ordered it {on_date}.",
        "Ordered {on_date}.",
        "Order date: {date}.",
        "Purchased {on_date}.",
    ),
    "heldout": ("I bought it {on_date}.", "It was ordered {on_date}.", "Date of purchase: {date}."),
}

# Two facts in one sentence.
ORDER_DATE_SENTENCES: Pool = {
    "train": ("Order {order} of {date}.", "I placed order {order} {on_date}.", "Order {order}, {date}."),
    "heldout": ("Order {order} was placed {on_date}.", "Order {order} from {date}."),
}
AMOUNT_DATE_SENTENCES: Pool = {
    "train": ("I paid {amount} {on_date}.", "Bought {on_date} for {amount}.", "Ordered {on_date}, {amount}."),
    "heldout": ("I bought it {on_date} for {amount}.", "Paid {amount} {on_date}."),
}
ORDER_AMOUNT_SENTENCES: Pool = {
    "train": ("Order {order}, {amount}.", "I paid {amount} for order {order}.", "Order {order} for {amount}."),
    "heldout": ("Order {order} cost {amount}.", "Order {order} (total {amount})."),
}

# Labels of a message written like a form, by language.
LABELS: dict[Language, dict[str, str]] = {
    "en": {"order": "Order", "amount": "Total", "date": "Date"},
    "de": {"order": "Bestellung", "amount": "Preis", "date": "Datum"},
    "fr": {"order": "Commande", "amount": "Prix", "date": "Date"},
    "es": {"order": "Pedido", "amount": "Precio", "date": "Fecha"},
}

GREETINGS: dict[Language, Pool] = {
    "en": {
        "train": ("Hi,", "Hello,", "Good morning,", "Hi there,", "Dear team,"),
        "heldout": ("Hello there,", "Good evening,", "Hi,", "Dear shop,"),
    },
    "de": {"train": ("Hallo,", "Guten Tag,"), "heldout": ("Guten Morgen,", "Hallo,")},
    "fr": {"train": ("Bonjour,", "Salut,"), "heldout": ("Bonsoir,", "Bonjour,")},
    "es": {"train": ("Hola,", "Buenos días,"), "heldout": ("Buenas tardes,", "Hola,")},
}

INTRODUCTIONS: Pool = {
    "train": ("This is {name}.", "My name is {name}.", "{name} here."),
    "heldout": ("I am {name}.", "{name} writing."),
}

SIGNATURES: dict[Language, Pool] = {
    "en": {
        "train": ("Thanks, {name}", "Regards, {name}", "{name}", "Best, {name}", "Thank you, {name}"),
        "heldout": ("Cheers, {name}", "Kind regards, {name}", "Many thanks, {name}", "- {name}"),
    },
    "de": {
        "train": ("Danke, {name}", "Gruß, {name}", "Liebe Grüße, {name}", "Danke im Voraus, {name}", "MfG, {name}"),
        "heldout": ("Viele Grüße, {name}", "Besten Dank, {name}"),
    },
    "fr": {
        "train": ("Merci, {name}", "Cordialement, {name}", "Merci d'avance, {name}", "Salutations, {name}"),
        "heldout": ("Merci bien, {name}", "Bien à vous, {name}"),
    },
    "es": {
        "train": ("Gracias, {name}", "Saludos, {name}", "Atentamente, {name}", "Un abrazo, {name}"),
        "heldout": ("Muchas gracias, {name}", "Un saludo, {name}"),
    },
}

THANKS: dict[Language, Pool] = {
    "en": {"train": ("Thanks!", "Thank you.", "Please hurry."), "heldout": ("Many thanks!", "Please reply soon.")},
    "de": {"train": ("Danke!", "Danke schön!", "Bitte schnell!"), "heldout": ("Vielen Dank!",)},
    "fr": {"train": ("Merci !", "Merci d'avance !"), "heldout": ("Merci beaucoup !",)},
    "es": {"train": ("¡Gracias!", "¡Mil gracias!"), "heldout": ("¡Muchas gracias!",)},
}

# Things that look like a fact and are none; the words around them say so.
DISTRACTORS: dict[str, Pool] = {
    "order": {
        "train": (
            "My last order {order} was fine.",
            "Not order {order}, that one came.",
            "My customer code is {order}.",
            "My previous order was {order}.",
            "Keep order {order}.",
            "Order {order} was for my sister.",
        ),
        "heldout": ("My earlier order {order} was fine.", "Please leave order {order} as it is."),
    },
    "amount": {
        "train": (
            "Shipping was {amount}.",
            "I have a voucher of {amount}.",
            "Delivery fee: {amount}.",
            "The coupon was for {amount}.",
            "Postage is {amount}.",
            "My gift card has {amount} left.",
        ),
        "heldout": ("Shipping cost {amount}.", "My voucher is worth {amount}."),
    },
    "date": {
        "train": (
            "I am away until {date}.",
            "I need an answer by {date}.",
            "My birthday is {on_date}.",
            "Call me before {date}.",
            "We move {on_date}.",
        ),
        "heldout": ("I am on holiday until {date}.", "Please answer by {date}."),
    },
    "phone": {
        "train": ("Phone {phone}.", "Call me: {phone}.", "My number is {phone}."),
        "heldout": ("Tel. {phone}.", "You can call me on {phone}."),
    },
    "postcode": {
        "train": ("I live in {postcode}.", "My postcode is {postcode}."),
        "heldout": ("Postcode {postcode}.", "My address is in {postcode}."),
    },
    "person": {
        "train": (
            "{name} from your team could not help.",
            "I spoke to {name} of your hotline.",
            "My neighbour {name} saw it.",
            "Your agent {name} was kind.",
        ),
        "heldout": ("Your colleague {name} could not help.", "I talked to {name} from support."),
    },
}
