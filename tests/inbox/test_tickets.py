"""The rows of recipes/classification.yaml."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from veneer.inbox.phrases import INTENTS
from veneer.inbox.tickets import labelled_rows, write_tickets
from veneer.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


def test_the_files_beside_the_recipe_are_what_the_generator_writes(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / "classification.yaml")
    assert recipe.is_classification
    written = write_tickets(tmp_path)
    for path, there in ((written["train"], recipe.data.train), (written["heldout"], recipe.data.eval)):
        assert path.read_bytes() == Path(str(there)).read_bytes()


def test_every_class_is_there_and_no_held_out_message_is_trained_on() -> None:
    train, heldout = labelled_rows(480, 0, "train"), labelled_rows(120, 0, "heldout")
    for rows in (train, heldout):
        counts = Counter(row["label"] for row in rows)
        assert set(counts) == set(INTENTS)
        assert max(counts.values()) < 2 * min(counts.values())
    assert not {row["text"] for row in train} & {row["text"] for row in heldout}
    assert labelled_rows(30) == labelled_rows(480)[:30]
