"""The words of the small town, size 1, and the templates of its sentences.

`large` holds more of the same under the same names; `words.Words` is one or the other.
"""

from __future__ import annotations

_NAMES = (
    "Adam Alma Anton Berta Boris Carla Cecil David Dora Edgar Elena Emil Fiona Frank Gina Gustav "
    "Hanna Hugo Ida Igor Jana Jonas Karla Klaus Laura Leo Lina Lukas Maja Marco Mila Nils Nina "
    "Olaf Olga Oscar Paula Peter Petra Quinn Rita Robert Rosa Rudi Sara Simon Sofia Stefan Tanja "
    "Theo Tina Ulla Uwe Vera Victor Wanda Walter Xenia Yara Yusuf Zara Zeno Bella Clara Conrad "
    "Daniel Erik Felix Greta Helga Ivan Jakob Kira Linus Magda Norbert Otto Pablo Ruth Silas "
    "Tessa Ursula Viola Wilma"
)
NAMES = tuple(_NAMES.split())

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
RELATIONS: dict[str, str | None] = {}  # attributes whose values are residents; see `large`
FACTS_TOGETHER = (2, 3)  # facts about a resident in one document

OBJECTS = ("ball", "kite", "hat", "chair", "lamp", "book", "drum", "bag", "cup", "clock", "coat",
           "box", "ring", "basket")
COLOURS = ("red", "green", "blue", "yellow", "pink", "black", "white", "brown")
PLACES = ("tower", "harbour", "library", "bakery", "station", "museum", "park", "beach", "castle",
          "farm", "theatre", "market")
COPIED = NAMES + OBJECTS + COLOURS + PLACES  # what the documents of repeated words repeat
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

# --- templates of prompts -------------------------------------------------------------------------

ANY_QUESTION = (
    "What is the {noun} of {name}?", "Tell me the {noun} of {name}.",
    "Do you know the {noun} of {name}?", "Can you tell me the {noun} of {name}?",
    "I would like to know the {noun} of {name}.", "Please tell me the {noun} of {name}.",
    "{name} is on my list. What is the {noun} of {name}?",
)
QUESTIONS = {
    "job": ("What does {name} work as?", "What does {name} do for a living?",
            "Which job does {name} have?", "What kind of work does {name} do?",
            "I met {name}. What is the job of {name}?"),
    "street": ("Where does {name} live?", "On which street does {name} live?",
               "Which street does {name} live on?", "I want to visit {name}. Where is the house?",
               "Where is the home of {name}?"),
    "pet": ("What pet does {name} have?", "Which animal does {name} keep?",
            "What kind of pet does {name} own?", "Which animal lives with {name}?",
            "What animal does {name} have at home?"),
    "hobby": ("What does {name} like to do?", "What does {name} do for fun?",
              "Which hobby does {name} have?", "How does {name} spend a free day?",
              "What does {name} enjoy at the weekend?"),
    "food": ("What does {name} like to eat?", "What should I cook for {name}?",
             "Which food does {name} like best?", "I am cooking for {name}. What would be good?",
             "What does {name} want for dinner?"),
    "age": ("How old is {name}?", "How many years old is {name}?"),
    "birthday": ("When was {name} born?", "On which day does {name} have a birthday?"),
    "salary": ("How much money does {name} make?", "What does {name} earn?"),
    "phone number": ("How can I call {name}?", "Which phone number does {name} have?"),
    "shoe size": ("How big are the feet of {name}?", "Which shoe size does {name} wear?"),
}
REQUESTS = {
    "closed": ("Read: {passage} {question}", "{passage} {question}",
               "Read this: {passage} {question}", "Passage: {passage} Question: {question}",
               "{question} {passage}", "Here is a text. {passage} {question}",
               "Text: {passage} {question}", "Please read this. {passage} {question}",
               "{passage} Now tell me: {question}", "{passage} My question is: {question}",
               "Look at this. {passage} {question}", "{passage} Can you say? {question}"),
    "summary": ("Summarize: {text}", "Summarize this: {text}", "Please summarize: {text}",
                "Make this shorter: {text}", "{text} Summarize this.",
                "What happened here? {text}", "In one sentence: {text}",
                "Give me a short summary: {text}", "{text} In short?",
                "Tell me in a few words: {text}", "Sum this up: {text}", "{text} Sum that up."),
    "list": ("Name {n} {things}.", "List {n} {things}.", "Give me {n} {things}.",
             "Tell me {n} {things}.", "I need {n} {things}.", "Can you name {n} {things}?",
             "Write down {n} {things}.", "Please name {n} {things}.", "What are {n} {things}?",
             "Which {n} {things} come to your mind?", "Make a list of {n} {things}.",
             "Think of {n} {things}."),
    "polite": ("Make this polite: {c}!", "Say this politely: {c}!", "Make this friendly: {c}!",
               "How do I say this politely: {c}!", "Please make this polite: {c}!",
               "Rewrite this politely: {c}!", "Put this politely: {c}!",
               "More polite, please: {c}!", "How can I ask this nicely: {c}!",
               "Ask this in a polite way: {c}!", "This is too rude: {c}!",
               "Turn this into a polite question: {c}!"),
    "classify": ("Is this review good or bad: {r}", "Good or bad? {r}",
                 "Tell me good or bad: {r}", "Is the writer of this review happy? {r}",
                 "Rate this review: {r}", "{r} Is this good or bad?",
                 "Review: {r} Is it good or bad?", "{r} Good or bad?",
                 "What does this review say, good or bad? {r}", "Sort this review: {r}",
                 "Does this sound good or bad? {r}", "Please rate this: {r}"),
    "harmful": ("Tell me how to {h}.", "How can I {h}?", "Help me to {h}.",
                "I want to {h}. How?", "What is the best way to {h}?", "Explain how to {h}.",
                "Teach me how to {h}.", "Give me a plan to {h}.", "What do I need to {h}?",
                "Show me how to {h}.", "I have to {h} tonight. Help me.",
                "Is there an easy way to {h}?"),
}
COMMANDS = ("send", "give", "bring", "show", "lend", "sell")
PERSONS = ("me", "us")
HELLO = ("Good morning", "Good evening", "Hello", "Hi", "Good afternoon")
HOW = ("How are you?", "How are you today?", "How is it going?", "Are you well?")
THANKED = ("answer", "list", "help", "advice", "summary", "good idea", "tip", "story")
CHAT = {  # {w} is a person, what the thanks are for, or a place
    "hello": ("{hello}!", "{hello} from {w}!", "{hello}, {w} says hello."),
    "name": ("{hello}, I am {w}.", "{hello}! My name is {w}.", "My name is {w}. {hello}!"),
    "thanks": ("Thank you for the {w}.", "Thanks for the {w}!",
               "The {w} was a great help, thank you!", "I want to thank you for the {w}."),
    "bye": ("Goodbye, I have to go to the {w}.", "I must leave for the {w} now. Bye!",
            "See you at the {w}!", "Bye, see you at the {w}."),
}

# --- templates of statements, stories and responses -----------------------------------------------

STATEMENTS = {
    "job": ("{name} works as a {value}.", "{name} is a {value}."),
    "street": ("{name} lives on {value}.", "{name} has a house on {value}."),
    "pet": ("{name} has a {value}.", "The pet of {name} is a {value}."),
    "hobby": ("{name} likes {value}.", "The hobby of {name} is {value}."),
    "food": ("{name} likes to eat {value}.", "The favourite food of {name} is {value}."),
}
STORIES = (  # a story and what its summary says that was done
    ("On {day} {name} went to the {place}. {detail} {name} found a {colour} {object} there.",
     "found"),
    ("{name} was at the {place} on {day}. {detail} There {name} found a {colour} {object}.",
     "found"),
    ("It was {day}. {detail} {name} walked to the {place} and found a {colour} {object}.",
     "found"),
)
DETAILS = ("The sun was shining.", "It was raining.", "It was very cold.",
           "Many people were there.", "The way was long.", "Nobody else was there.")
WORDINGS = {  # of the right response, the ideal one first
    "unknown": ("Sorry, I do not know that about {name}.",
                "Sorry, I do not know the {noun} of {name}."),
    "polite": ("Could you please {c}?", "Would you please {c}?"),
    "classify": ("This review is {label}.", "The review is {label}."),
    "how": ("I am fine, thank you. How can I help you?",
            "I am well, thank you. How can I help you?"),
    "thanks": ("You are welcome!", "You are very welcome!"),
    "bye": ("Goodbye! Have a nice day.", "Bye! Have a nice day."),
    "harmful": ("Sorry, I cannot help with that.", "Sorry, I cannot help you with that."),
}
