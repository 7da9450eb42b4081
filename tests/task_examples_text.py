"""More hand-made examples: the free-text tasks."""

from task_examples_labels import Case


def squad_case(title: str, context: str, question: str, answers: list[str], rest: tuple) -> Case:
    """A case with the fields of SQuAD; ``rest`` is (prompt, gold texts, target)."""
    fields = {"title": title, "context": context, "question": question}
    spans = {"text": answers, "answer_start": [0] * len(answers)}
    return Case(fields | {"answers": spans}, rest[0], None, rest[1], rest[2])


SQUAD = [
    squad_case(
        "Moon",
        "The Moon is grey.",
        "What color is it?",
        ["grey", "gray"],
        ("Title: Moon\nContext: The Moon is grey.\nQuestion: What color is it?\nAnswer:", ("grey", "gray"), " grey\n"),
    ),
    squad_case(
        "Tea_ceremony",
        "Tea is hot",
        " Is tea hot ",
        ["hot"],
        ("Title: Tea_ceremony\nContext: Tea is hot\nQuestion: Is tea hot\nAnswer:", ("hot",), " hot\n"),
    ),
    squad_case(
        'A "B"',
        'He said "hi".',
        'Who said "hi"?',
        ["He"],
        ('Title: A "B"\nContext: He said "hi".\nQuestion: Who said "hi"?\nAnswer:', ("He",), " He\n"),
    ),
    squad_case(
        "{title}",
        "{0} {context}",
        "{question}?",
        ["{answer}"],
        ("Title: {title}\nContext: {0} {context}\nQuestion: {question}?\nAnswer:", ("{answer}",), " {answer}\n"),
    ),
    squad_case(
        " T ",
        " C ",
        "\tQ?\n",
        [" a ", "b"],
        ("Title:  T \nContext:  C \nQuestion: Q?\nAnswer:", (" a ", "b"), "  a \n"),
    ),
    squad_case(
        "Brontë",
        "Emily Brontë wrote.",
        "Qui?",
        ["Emily Brontë"],
        ("Title: Brontë\nContext: Emily Brontë wrote.\nQuestion: Qui?\nAnswer:", ("Emily Brontë",), " Emily Brontë\n"),
    ),
    squad_case(
        "X",
        "Line 1.\nLine 2.",
        "How many lines",
        ["2", "I have two", "2"],
        ("Title: X\nContext: Line 1.\nLine 2.\nQuestion: How many lines\nAnswer:", ("2", "I have two", "2"), " 2\n"),
    ),
    squad_case(
        "Rate",
        "It is 5% (five).",
        "Rate?",
        ["5%"],
        ("Title: Rate\nContext: It is 5% (five).\nQuestion: Rate?\nAnswer:", ("5%",), " 5%\n"),
    ),
    squad_case(
        "Cat",
        "A cat sat on the mat.",
        "Who sat on the mat?",
        ["A cat", "cat"],
        (
            "Title: Cat\nContext: A cat sat on the mat.\nQuestion: Who sat on the mat?\nAnswer:",
            ("A cat", "cat"),
            " A cat\n",
        ),
    ),
    squad_case(
        "Lily",
        "Lily was happy.",
        "What was Lily?",
        ["happy."],
        ("Title: Lily\nContext: Lily was happy.\nQuestion: What was Lily?\nAnswer:", ("happy.",), " happy.\n"),
    ),
]

SQUAD_V2 = [
    squad_case(
        "Sun",
        "The Sun is a star.",
        "What is it?",
        ["a star", "star"],
        ("Title: Sun\nContext: The Sun is a star.\nQuestion: What is it?\nAnswer:", ("a star", "star"), " a star\n"),
    ),
    squad_case(
        "Sun",
        "The Sun is a star.",
        "Who?",
        [],
        ("Title: Sun\nContext: The Sun is a star.\nQuestion: Who?\nAnswer:", ("unanswerable",), " unanswerable\n"),
    ),
    squad_case(
        "Q",
        "No mark",
        " why ",
        [],
        ("Title: Q\nContext: No mark\nQuestion: why\nAnswer:", ("unanswerable",), " unanswerable\n"),
    ),
    squad_case(
        "{a}",
        "{b}",
        "{c}",
        ["{d}", "{}"],
        ("Title: {a}\nContext: {b}\nQuestion: {c}\nAnswer:", ("{d}", "{}"), " {d}\n"),
    ),
    squad_case(
        'The "T"', '"C"', '"Q"?', ['"A"'], ('Title: The "T"\nContext: "C"\nQuestion: "Q"?\nAnswer:', ('"A"',), ' "A"\n')
    ),
    squad_case(
        "Ñandú",
        "El ñandú corre.",
        "¿Quién corre?",
        ["El ñandú"],
        ("Title: Ñandú\nContext: El ñandú corre.\nQuestion: ¿Quién corre?\nAnswer:", ("El ñandú",), " El ñandú\n"),
    ),
    squad_case(
        "N",
        "It is 7.",
        "How much?",
        ["7", "I have 7"],
        ("Title: N\nContext: It is 7.\nQuestion: How much?\nAnswer:", ("7", "I have 7"), " 7\n"),
    ),
    squad_case(
        "Two",
        "One.\n\nTwo.",
        "Blank?",
        [],
        ("Title: Two\nContext: One.\n\nTwo.\nQuestion: Blank?\nAnswer:", ("unanswerable",), " unanswerable\n"),
    ),
    squad_case(
        "Tim",
        "Tim had a ball. ",
        "What did Tim have?",
        ["a ball"],
        ("Title: Tim\nContext: Tim had a ball. \nQuestion: What did Tim have?\nAnswer:", ("a ball",), " a ball\n"),
    ),
    squad_case(
        "W",
        "This word is unanswerable.",
        "Which word?",
        ["unanswerable"],
        (
            "Title: W\nContext: This word is unanswerable.\nQuestion: Which word?\nAnswer:",
            ("unanswerable",),
            " unanswerable\n",
        ),
    ),
]


def drop_case(passage: str, question: str, spans: list[str], rest: tuple) -> Case:
    """A case with the fields of DROP; ``rest`` is (prompt, gold texts, target)."""
    answers = {"spans": spans, "types": ["span"] * len(spans)}
    return Case({"passage": passage, "question": question, "answers_spans": answers}, rest[0], None, rest[1], rest[2])


DROP = [
    drop_case(
        "The Jets won 7-3.",
        "Who won?",
        ["Jets", "The Jets"],
        ("Passage: The Jets won 7-3.\nQuestion: Who won?\nAnswer:", ("Jets", "The Jets"), " Jets\n"),
    ),
    drop_case(
        "5 cats and 2 dogs",
        "How many pets",
        ["7"],
        ("Passage: 5 cats and 2 dogs\nQuestion: How many pets\nAnswer:", ("7",), " 7\n"),
    ),
    drop_case(
        " Spaces. ", " When? ", ["May 1"], ("Passage:  Spaces. \nQuestion: When?\nAnswer:", ("May 1",), " May 1\n")
    ),
    drop_case(
        'The "Bills" lost.',
        'Who "lost"?',
        ['"Bills"'],
        ('Passage: The "Bills" lost.\nQuestion: Who "lost"?\nAnswer:', ('"Bills"',), ' "Bills"\n'),
    ),
    drop_case(
        "{passage} {}",
        "{question}",
        ["{0}"],
        ("Passage: {passage} {}\nQuestion: {question}\nAnswer:", ("{0}",), " {0}\n"),
    ),
    drop_case(
        "In Zürich, 40% voted.",
        "Percent that did not?",
        ["60", "60%"],
        ("Passage: In Zürich, 40% voted.\nQuestion: Percent that did not?\nAnswer:", ("60", "60%"), " 60\n"),
    ),
    drop_case("A.\nB.", "What's first?", ["A"], ("Passage: A.\nB.\nQuestion: What's first?\nAnswer:", ("A",), " A\n")),
    drop_case(
        "Ann, Bo and you ran.",
        "Who ran?",
        ["Ann", "Bo", "you"],
        ("Passage: Ann, Bo and you ran.\nQuestion: Who ran?\nAnswer:", ("Ann", "Bo", "you"), " Ann\n"),
    ),
    drop_case(
        "The girl went to the park.",
        "Where did she go?",
        ["the park"],
        ("Passage: The girl went to the park.\nQuestion: Where did she go?\nAnswer:", ("the park",), " the park\n"),
    ),
    drop_case(
        "日本 won 2\u20131.",
        "誰?",
        ["日本"],
        ("Passage: 日本 won 2\u20131.\nQuestion: 誰?\nAnswer:", ("日本",), " 日本\n"),
    ),
]


def summary_case(article: str, highlights: str, prompt: str, target: str) -> Case:
    """A case with the fields of CNN/DailyMail; the gold text is that of the target without the spaces around it."""
    return Case({"article": article, "highlights": highlights, "id": "0"}, prompt, None, (target.strip(),), target)


CNN_DAILYMAIL = [
    summary_case("A fire broke out.", "A fire .", "A fire broke out.\nTL;DR:", " A fire .\n"),
    summary_case("Rain. Floods.", "Rain .\nFloods .", "Rain. Floods.\nTL;DR:", " Rain . Floods .\n"),
    summary_case(" (CNN) -- Hi ", "Hi", " (CNN) -- Hi \nTL;DR:", " Hi\n"),
    summary_case('"Yes", he said', 'He said "yes"', '"Yes", he said\nTL;DR:', ' He said "yes"\n'),
    summary_case("{article} {}", "{highlights}\n{0}", "{article} {}\nTL;DR:", " {highlights} {0}\n"),
    summary_case("Line 1\nLine 2", "1\n2\n3", "Line 1\nLine 2\nTL;DR:", " 1 2 3\n"),
    summary_case("Málaga beat Cádiz.", "Málaga won", "Málaga beat Cádiz.\nTL;DR:", " Málaga won\n"),
    summary_case("TL;DR: already", "again", "TL;DR: already\nTL;DR:", " again\n"),
    summary_case(
        "Once upon a time there was a dog.",
        "There was a dog.",
        "Once upon a time there was a dog.\nTL;DR:",
        " There was a dog.\n",
    ),
    summary_case("Up 5%?", "Up 5%", "Up 5%?\nTL;DR:", " Up 5%\n"),
]
