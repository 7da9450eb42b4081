"""More hand-made examples: tasks with fixed labels, and tasks whose candidates differ between examples."""

from task_examples_labels import Case, one_of

MULTIRC = one_of(
    ("No", "Yes"),
    (
        {"paragraph": "Pip ate figs.", "question": "What did Pip eat?", "answer": "Figs", "label": 1},
        'Pip ate figs.\nQuestion: What did Pip eat?\nI found this answer "Figs". Is that correct? Yes or No?\n',
        1,
    ),
    (
        {"paragraph": "Pip ate figs", "question": "What did Pip eat", "answer": "Plums.", "label": 0},
        'Pip ate figs\nQuestion: What did Pip eat\nI found this answer "Plums.". Is that correct? Yes or No?\n',
        0,
    ),
    (
        {"paragraph": '"Go", he said.', "question": 'Who said "go"?', "answer": '"he"', "label": 1},
        '"Go", he said.\nQuestion: Who said "go"?\nI found this answer ""he"". Is that correct? Yes or No?\n',
        1,
    ),
    (
        {"paragraph": " One. ", "question": " How many? ", "answer": " 1 ", "label": 1},
        ' One. \nQuestion:  How many? \nI found this answer " 1 ". Is that correct? Yes or No?\n',
        1,
    ),
    (
        {"paragraph": "{a} {paragraph}", "question": "{question}?", "answer": "{answer} {}", "label": 0},
        '{a} {paragraph}\nQuestion: {question}?\nI found this answer "{answer} {}". Is that correct? Yes or No?\n',
        0,
    ),
    (
        {"paragraph": "Åse sang.\nÅse danced.", "question": "Who?", "answer": "Åse", "label": 1},
        'Åse sang.\nÅse danced.\nQuestion: Who?\nI found this answer "Åse". Is that correct? Yes or No?\n',
        1,
    ),
    (
        {"paragraph": "<b>Sent 1: </b>It rained.<br>", "question": "Dry?", "answer": "No", "label": 1},
        '<b>Sent 1: </b>It rained.<br>\nQuestion: Dry?\nI found this answer "No". Is that correct? Yes or No?\n',
        1,
    ),
    (
        {"paragraph": "It is 5 o'clock.", "question": "When?", "answer": "6 o'clock", "label": 0},
        "It is 5 o'clock.\nQuestion: When?\nI found this answer \"6 o'clock\". Is that correct? Yes or No?\n",
        0,
    ),
    (
        {"paragraph": "Tab\there.", "question": "Where?", "answer": "", "label": 0},
        'Tab\there.\nQuestion: Where?\nI found this answer "". Is that correct? Yes or No?\n',
        0,
    ),
    (
        {"paragraph": "A\\B", "question": "C\\n?", "answer": "😀", "label": 0},
        'A\\B\nQuestion: C\\n?\nI found this answer "😀". Is that correct? Yes or No?\n',
        0,
    ),
)

MNLI = one_of(
    ("Yes", "Maybe", "No"),
    (
        {"premise": "Two boys swim.", "hypothesis": "Boys are wet.", "label": 0},
        'Two boys swim.\nDoes this mean that "Boys are wet." is true? Yes, Maybe, or No?\n',
        0,
    ),
    (
        {"premise": "A man sleeps", "hypothesis": "He is tired", "label": 1},
        'A man sleeps\nDoes this mean that "He is tired" is true? Yes, Maybe, or No?\n',
        1,
    ),
    (
        {"premise": "It is noon.", "hypothesis": "It is night.", "label": 2},
        'It is noon.\nDoes this mean that "It is night." is true? Yes, Maybe, or No?\n',
        2,
    ),
    (
        {"premise": 'The "mayor" left.', "hypothesis": 'A "mayor" left?', "label": 0},
        'The "mayor" left.\nDoes this mean that "A "mayor" left?" is true? Yes, Maybe, or No?\n',
        0,
    ),
    (
        {"premise": " uh yeah ", "hypothesis": " no ", "label": 2},
        ' uh yeah \nDoes this mean that " no " is true? Yes, Maybe, or No?\n',
        2,
    ),
    (
        {"premise": "{x} and {premise}", "hypothesis": "{hypothesis}", "label": 1},
        '{x} and {premise}\nDoes this mean that "{hypothesis}" is true? Yes, Maybe, or No?\n',
        1,
    ),
    (
        {"premise": "Curaçao is hot.", "hypothesis": "Curaçao is an island.", "label": 1},
        'Curaçao is hot.\nDoes this mean that "Curaçao is an island." is true? Yes, Maybe, or No?\n',
        1,
    ),
    (
        {"premise": "I do.\nI don't.", "hypothesis": "I might.", "label": 2},
        'I do.\nI don\'t.\nDoes this mean that "I might." is true? Yes, Maybe, or No?\n',
        2,
    ),
    (
        {"premise": "Why not?", "hypothesis": "Maybe", "label": 1},
        'Why not?\nDoes this mean that "Maybe" is true? Yes, Maybe, or No?\n',
        1,
    ),
    (
        {"premise": "$5 is 5%.", "hypothesis": "$5", "label": 0},
        '$5 is 5%.\nDoes this mean that "$5" is true? Yes, Maybe, or No?\n',
        0,
    ),
)

TREC = one_of(
    (" Description", " Entity", " Expression", " Human", " Location", " Number"),
    ({"label": 0, "text": "What is a zither ?"}, "What is a zither ?\nType:", 0),
    ({"label": 1, "text": "Which bird lays blue eggs ?"}, "Which bird lays blue eggs ?\nType:", 1),
    ({"label": 2, "text": "What does `` RSVP '' stand for ?"}, "What does `` RSVP '' stand for ?\nType:", 2),
    ({"label": 5, "text": "How many {legs} has a crab"}, "How many {legs} has a crab\nType:", 5),
    ({"text": "What is NATO short for?", "coarse_label": 0, "fine_label": 0}, "What is NATO short for?\nType:", 2),
    ({"text": 'Which "fruit" is red?', "coarse_label": 1, "fine_label": 13}, 'Which "fruit" is red?\nType:', 1),
    ({"text": "Why is the sky blue?", "coarse_label": 2, "fine_label": 27}, "Why is the sky blue?\nType:", 0),
    ({"text": "Who painted Guérnica ?", "coarse_label": 3, "fine_label": 29}, "Who painted Guérnica ?\nType:", 3),
    ({"text": " Where is Oslo ? ", "coarse_label": 4, "fine_label": 32}, " Where is Oslo ? \nType:", 4),
    ({"text": "When was 1% taxed ?", "coarse_label": 5, "fine_label": 39}, "When was 1% taxed ?\nType:", 5),
)

COPA = [
    Case(
        {
            "premise": "Rex barked.",
            "choice1": "The cat ran.",
            "choice2": "It slept.",
            "question": "effect",
            "label": 0,
        },
        "Rex barked so ",
        ("the cat ran.", "it slept."),
        frozenset({0}),
        "the cat ran.",
    ),
    Case(
        {
            "premise": "Ice melted.",
            "choice1": "It was cold.",
            "choice2": "It was hot.",
            "question": "cause",
            "label": 1,
        },
        "Ice melted because ",
        ("it was cold.", "it was hot."),
        frozenset({1}),
        "it was hot.",
    ),
    Case(
        {"premise": "I was late", "choice1": "I ran.", "choice2": "I'm slow.", "question": "effect", "label": 0},
        "I was late so ",
        ("I ran.", "i'm slow."),
        frozenset({0}),
        "I ran.",
    ),
    Case(
        {
            "premise": "She waited... ",
            "choice1": "He Left.",
            "choice2": "In May it Fell",
            "question": "cause",
            "label": 1,
        },
        "She waited.. because ",
        ("he Left.", "in May it Fell"),
        frozenset({1}),
        "in May it Fell",
    ),
    Case(
        {"premise": "Who won?", "choice1": "NASA won.", "choice2": "It did.", "question": "effect", "label": 1},
        "Who won? so ",
        ("nasa won.", "it did."),
        frozenset({1}),
        "it did.",
    ),
    Case(
        {"premise": 'He said "stop."', "choice1": '"Go" she said.', "choice2": "I", "question": "cause", "label": 0},
        'He said "stop." because ',
        ('"go" she said.', "I"),
        frozenset({0}),
        '"go" she said.',
    ),
    Case(
        {
            "premise": " The {s} is {}. \n",
            "choice1": "{A} won.",
            "choice2": "{B} won.",
            "question": "effect",
            "label": 1,
        },
        " The {s} is {} so ",
        ("{a} won.", "{b} won."),
        frozenset({1}),
        "{b} won.",
    ),
    Case(
        {"premise": "Émile sang.", "choice1": "Élise wept.", "choice2": "Øre fell.", "question": "effect", "label": 0},
        "Émile sang so ",
        ("élise wept.", "øre fell."),
        frozenset({0}),
        "élise wept.",
    ),
    Case(
        {"premise": "They fled.", "choice1": "I  DID  It.", "choice2": "Rain Fell. ", "question": "cause", "label": 1},
        "They fled because ",
        ("I  DID  It.", "rain Fell. "),
        frozenset({1}),
        "rain Fell. ",
    ),
    Case(
        {"premise": "A.", "choice1": "B.", "choice2": "C-D.", "question": "cause", "label": 0, "idx": 9},
        "A because ",
        ("b.", "c-d."),
        frozenset({0}),
        "b.",
    ),
]

RECORD = [
    Case(
        {
            "passage": "Rita beat Omar in Rome.\n@highlight\nRita won\n@highlight\nOmar lost",
            "query": "After the match @placeholder held the cup.",
            "entities": ["Omar", "Rita", "Rome"],
            "answers": ["Rita"],
        },
        "Rita beat Omar in Rome.\n- Rita won\n- Omar lost\n-",
        (
            " After the match Omar held the cup.",
            " After the match Rita held the cup.",
            " After the match Rome held the cup.",
        ),
        frozenset({1}),
        " After the match Rita held the cup.",
    ),
    Case(  # several gold answers, in another order than the entities
        {
            "passage": "The US (United States) voted.\n@highlight\nA vote",
            "query": "@placeholder chose @placeholder",
            "entities": ["US", "Oslo", "United States"],
            "answers": ["United States", "US"],
        },
        "The US (United States) voted.\n- A vote\n-",
        (" US chose US", " Oslo chose Oslo", " United States chose United States"),
        frozenset({0, 2}),
        " United States chose United States",
    ),
    Case(
        {"passage": "No highlight here", "query": '"@placeholder" wins', "entities": ["A", "B"], "answers": ["A"]},
        "No highlight here\n-",
        (' "A" wins', ' "B" wins'),
        frozenset({0}),
        ' "A" wins',
    ),
    Case(
        {
            "passage": "In text @highlight stays.\n@highlight\nEnd.",
            "query": "We saw @placeholder's car.",
            "entities": ["Jo", "Al"],
            "answers": ["Al"],
        },
        "In text @highlight stays.\n- End.\n-",
        (" We saw Jo's car.", " We saw Al's car."),
        frozenset({1}),
        " We saw Al's car.",
    ),
    Case(
        {"passage": "{a}\n@highlight\n{b}", "query": "{c} @placeholder", "entities": ["{x}", "y"], "answers": ["{x}"]},
        "{a}\n- {b}\n-",
        (" {c} {x}", " {c} y"),
        frozenset({0}),
        " {c} {x}",
    ),
    Case(
        {
            "passage": "Müller und Søn.\n@highlight\nÅ",
            "query": "Für @placeholder 🎉.",
            "entities": ["Müller", "Søn", "Å"],
            "answers": ["Søn", "Å"],
        },
        "Müller und Søn.\n- Å\n-",
        (" Für Müller 🎉.", " Für Søn 🎉.", " Für Å 🎉."),
        frozenset({1, 2}),
        " Für Søn 🎉.",
    ),
    Case(
        {
            "passage": " Spaces \n@highlight\n x ",
            "query": " @placeholder came ",
            "entities": ["P", "Q"],
            "answers": ["Q"],
        },
        " Spaces \n-  x \n-",
        ("  P came ", "  Q came "),
        frozenset({1}),
        "  Q came ",
    ),
    Case(
        {"passage": "One\n@highlight\nTwo", "query": "by @placeholder", "entities": ["Only"], "answers": ["Only"]},
        "One\n- Two\n-",
        (" by Only",),
        frozenset({0}),
        " by Only",
    ),
    Case(
        {
            "passage": "@placeholder?\n@highlight\nB",
            "query": "Is @placeholder",
            "entities": ["b", "c"],
            "answers": ["c"],
        },
        "@placeholder?\n- B\n-",
        (" Is b", " Is c"),
        frozenset({1}),
        " Is c",
    ),
    Case(
        {
            "passage": "Ada, Bob, Cy and Di met.",
            "query": "@placeholder paid",
            "entities": ["Di", "Cy", "Bob", "Ada"],
            "answers": ["Ada", "Di"],
            "idx": {"passage": 0, "query": 3},
        },
        "Ada, Bob, Cy and Di met.\n-",
        (" Di paid", " Cy paid", " Bob paid", " Ada paid"),
        frozenset({0, 3}),
        " Ada paid",
    ),
]
