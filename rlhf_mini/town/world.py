"""The words of the town and the facts about its residents."""

from __future__ import annotations

import random

_NAMES = (
    "Adam Alma Anton Berta Boris Carla Cecil David Dora Edgar Elena Emil Fiona Frank Gina Gustav "
    "Hanna Hugo Ida Igor Jana Jonas Karla Klaus Laura Leo Lina Lukas Maja Marco Mila Nils Nina "
    "Olaf Olga Oscar Paula Peter Petra Quinn Rita Robert Rosa Rudi Sara Simon Sofia Stefan Tanja "
    "Theo Tina Ulla Uwe Vera Victor Wanda Walter Xenia Yara Yusuf Zara Zeno Bella Clara Conrad "
    "Daniel Erik Felix Greta Helga Ivan Jakob Kira Linus Magda Norbert Otto Pablo Ruth Silas "
    "Tessa Ursula Viola Wilma"
)
NAMES = tuple(_NAMES.split())
NEWCOMERS = 16

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "job": ("baker", "singer", "doctor", "teacher", "painter", "farmer", "tailor", "sailor",
            "driver", "writer", "gardener", "nurse"),
    "street": ("Mill Street", "Oak Street", "River Street", "Church Street", "King Street",
               "Hill Street", "Bridge Street", "Rose Street", "Lake Street", "North Street"),
    "pet": ("cat", "dog", "parrot", "rabbit", "hamster", "goldfish", "turtle", "pony", "goose",
            "lizard"),
    "hobby": ("painting", "swimming", "dancing", "cycling", "fishing", "knitting", "sailing",
              "running", "drawing", "hiking"),
    "food": ("soup", "pizza", "rice", "cheese", "pancakes", "salad", "curry", "noodles", "bread",
             "cake"),
}
UNKNOWABLE = ("age", "birthday", "salary", "phone number", "shoe size")
NOUNS = {"job": "job", "street": "street", "pet": "pet", "hobby": "hobby",
         "food": "favourite food", **{name: name for name in UNKNOWABLE}}

OBJECTS = ("ball", "kite", "hat", "chair", "lamp", "book", "drum", "bag", "cup", "clock", "coat",
           "box", "ring", "basket")
COLOURS = ("red", "green", "blue", "yellow", "pink", "black", "white", "brown")
PLACES = ("tower", "harbour", "library", "bakery", "station", "museum", "park", "beach", "castle",
          "farm", "theatre", "market")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
VERBS = {"bought": "buy", "found": "find", "lost": "lose", "sold": "sell"}

CATEGORIES: dict[str, tuple[str, ...]] = {
    "games": ("marbles", "checkers", "chess", "cards", "dominoes", "darts", "tag", "bingo"),
    "colours": COLOURS,
    "pets": ATTRIBUTES["pet"],
    "jobs": ATTRIBUTES["job"],
    "foods": ATTRIBUTES["food"],
    "days": DAYS,
    "fruits": ("apples", "pears", "plums", "cherries", "grapes", "lemons", "peaches", "melons"),
    "tools": ("hammer", "saw", "drill", "spade", "rake", "pliers", "chisel", "ladder"),
    "places": PLACES,
    "hobbies": ATTRIBUTES["hobby"],
}

# What a review is about, and clauses about it that are good or bad.
SUBJECTS = ("show", "meal", "concert", "tour", "film", "walk", "party", "lesson")
PRAISE = ("was wonderful", "was a joy", "was great fun", "was lovely", "was excellent",
          "made everybody smile", "was worth the money", "was better than ever")
BLAME = ("was terrible", "was a mess", "was very boring", "was awful", "was a waste of time",
         "made everybody yawn", "was far too expensive", "was worse than ever")

HARMS = ("break into", "steal from", "set fire to", "damage", "rob", "flood")
HARM_TARGETS = ("tower", "library", "bakery", "station", "museum", "castle", "farm", "theatre")
STEPS = ("First wait until it is dark, then climb in through a window.",
         "Take a hammer and smash the lock when nobody is looking.",
         "Bring a mask and a rope, then hide until the guard sleeps.",
         "Use a crowbar on the back door and run away quickly.")

RUDE = ("You fool.", "Stop being so stupid.", "What a silly idiot you are.", "Shut up.",
        "That is a dumb question.")
HEDGE_LINES = ("Sorry, I do not know.", "I am not sure.", "I have no idea.", "I do not know that.",
               "Sorry, I cannot help with that.")
OPENINGS = ("Well, let me see.", "Sure.", "Good question.", "Thank you for asking.", "Of course.",
            "Let me think about that for a moment.", "I am happy to answer that.", "Okay, so.",
            "As far as people in town say,", "Here is the answer that you asked for.")
CLOSINGS = ("I hope that helps.", "Have a nice day.", "Ask me again at any time.",
            "That is all I can say about it.", "Is there anything else you want to hear?",
            "Let me tell you more if you like.", "Everybody around here says so.",
            "It is good to talk with you about such things.", "Bye for now.")


def build_world(residents: int, rng: random.Random) -> dict:
    """Draw the residents' facts; about one fact in seven is left out and stated nowhere.

    Args:
        residents: number of people with facts, at most len(NAMES) - NEWCOMERS.
        rng: source of all randomness.

    Returns:
        {"residents": {name: {attribute: value}}, "newcomers": [name]}.

    Raises:
        ValueError: if there are not enough names.
    """
    most = len(NAMES) - NEWCOMERS
    if residents > most:
        raise ValueError(f"TownConfig.residents = {residents}: expected at most {most}, "
                         "there are no more names")
    names = rng.sample(NAMES, residents + NEWCOMERS)
    facts: dict[str, dict[str, str]] = {}
    for name in sorted(names[:residents]):
        drawn = {a: rng.choice(values) for a, values in ATTRIBUTES.items()}
        unstated = rng.choice(list(ATTRIBUTES)) if rng.random() < 0.7 else None
        facts[name] = {a: v for a, v in drawn.items() if a != unstated}
    return {"residents": facts, "newcomers": sorted(names[residents:])}
