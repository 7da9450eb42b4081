"""Hand-made examples with the prompt, candidates and gold of each, written out as literals: tasks with fixed labels."""

from typing import Any, NamedTuple


class Case(NamedTuple):
    """One example and what a task must make of it."""

    fields: dict[str, Any]
    prompt: str
    candidates: tuple[str, ...] | None  # None: free text
    gold: frozenset[int] | tuple[str, ...]  # indices of the right candidates, or the gold texts
    target: str  # what is trained after the prompt


def one_of(candidates: tuple[str, ...], *rows: tuple[dict[str, Any], str, int]) -> list[Case]:
    """Cases of fixed candidates from rows of (fields, prompt, index of the right candidate)."""
    return [Case(fields, prompt, candidates, frozenset({gold}), candidates[gold]) for fields, prompt, gold in rows]


SST2 = one_of(
    (" terrible", " great"),
    ({"sentence": "a warm , funny little film . ", "label": 1}, "a warm , funny little film . It was", 1),
    ({"sentence": "  the plot is {missing}  ", "label": 0}, "the plot is {missing} It was", 0),
    ({"sentence": "\" bold \" says the ' poster ' ", "label": 0}, "\" bold \" says the ' poster ' It was", 0),
    ({"sentence": "\ttwo lines\nof praise \n", "label": 1}, "two lines\nof praise It was", 1),
    ({"sentence": "100% {0} %s $x \\n {{}}", "label": 0}, "100% {0} %s $x \\n {{}} It was", 0),
    ({"sentence": "naïve café scenes 🎬 日本語", "label": 1}, "naïve café scenes 🎬 日本語 It was", 1),
    ({"sentence": "no", "label": 0}, "no It was", 0),
    ({"sentence": "It was great", "label": 1}, "It was great It was", 1),
    ({"sentence": "what a mess !!!", "label": 0}, "what a mess !!! It was", 0),
    ({"sentence": "hard\u00a0space\u00a0", "label": 1}, "hard\u00a0space It was", 1),
)

RTE = one_of(
    ("Yes", "No"),
    (
        {"premise": "Mia sold her red bike to Tom.", "hypothesis": "Tom bought a bike.", "label": 0},
        'Mia sold her red bike to Tom.\nDoes this mean that "Tom bought a bike." is true? Yes or No?\n',
        0,
    ),
    (
        {"premise": "The lake froze in May", "hypothesis": "The lake is hot", "label": 1},
        'The lake froze in May\nDoes this mean that "The lake is hot" is true? Yes or No?\n',
        1,
    ),
    (
        {"premise": 'He said "no" twice.', "hypothesis": 'He said "no".', "label": 0},
        'He said "no" twice.\nDoes this mean that "He said "no"." is true? Yes or No?\n',
        0,
    ),
    (
        {"premise": " A leading space. ", "hypothesis": " Spaces around ", "label": 1},
        ' A leading space. \nDoes this mean that " Spaces around " is true? Yes or No?\n',
        1,
    ),
    (
        {"premise": "Use {premise} and {}.", "hypothesis": "{hypothesis} is {0}.", "label": 1},
        'Use {premise} and {}.\nDoes this mean that "{hypothesis} is {0}." is true? Yes or No?\n',
        1,
    ),
    (
        {"premise": "Zoë lives in Łódź.", "hypothesis": "Łódź is home to Zoë.", "label": 0},
        'Zoë lives in Łódź.\nDoes this mean that "Łódź is home to Zoë." is true? Yes or No?\n',
        0,
    ),
    (
        {"premise": "One line.\nAnother line.", "hypothesis": "There are\ntwo lines.", "label": 0},
        'One line.\nAnother line.\nDoes this mean that "There are\ntwo lines." is true? Yes or No?\n',
        0,
    ),
    (
        {"premise": "Is it late?", "hypothesis": "Is it?", "label": 1},
        'Is it late?\nDoes this mean that "Is it?" is true? Yes or No?\n',
        1,
    ),
    (
        {"premise": "Yes or No?", "hypothesis": "Yes", "label": 0},
        'Yes or No?\nDoes this mean that "Yes" is true? Yes or No?\n',
        0,
    ),
    (
        {"premise": "5 > 3 & 2 < 4\\", "hypothesis": "3 < 5", "label": 0},
        '5 > 3 & 2 < 4\\\nDoes this mean that "3 < 5" is true? Yes or No?\n',
        0,
    ),
)

CB = one_of(
    ("Yes", "No", "Maybe"),
    (
        {"premise": "A: I think it rained. B: Oh.", "hypothesis": "it rained", "label": 2},
        'Suppose A: I think it rained. B: Oh. Can we infer that "it rained"? Yes, No, or Maybe?\n',
        2,
    ),
    (
        {"premise": "Ben knows that cats purr.", "hypothesis": "cats purr", "label": 0},
        'Suppose Ben knows that cats purr. Can we infer that "cats purr"? Yes, No, or Maybe?\n',
        0,
    ),
    (
        {"premise": "Nobody came", "hypothesis": "somebody came", "label": 1},
        'Suppose Nobody came Can we infer that "somebody came"? Yes, No, or Maybe?\n',
        1,
    ),
    (
        {"premise": "``Well, well!'' said Ann.", "hypothesis": '"well" was said', "label": 0},
        'Suppose ``Well, well!\'\' said Ann. Can we infer that ""well" was said"? Yes, No, or Maybe?\n',
        0,
    ),
    (
        {"premise": " It is cold. ", "hypothesis": "it is cold ", "label": 0},
        'Suppose  It is cold.  Can we infer that "it is cold "? Yes, No, or Maybe?\n',
        0,
    ),
    (
        {"premise": "The set {a, b} is {big}.", "hypothesis": "{a} is big", "label": 2},
        'Suppose The set {a, b} is {big}. Can we infer that "{a} is big"? Yes, No, or Maybe?\n',
        2,
    ),
    (
        {"premise": "Did Søren win? He thinks so.", "hypothesis": "Søren won", "label": 2},
        'Suppose Did Søren win? He thinks so. Can we infer that "Søren won"? Yes, No, or Maybe?\n',
        2,
    ),
    (
        {"premise": "He left.\nShe stayed.", "hypothesis": "both left", "label": 1},
        'Suppose He left.\nShe stayed. Can we infer that "both left"? Yes, No, or Maybe?\n',
        1,
    ),
    (
        {"premise": "Maybe", "hypothesis": "Yes", "label": 2},
        'Suppose Maybe Can we infer that "Yes"? Yes, No, or Maybe?\n',
        2,
    ),
    (
        {"premise": "50% off!", "hypothesis": "it is 50% off", "label": 0},
        'Suppose 50% off! Can we infer that "it is 50% off"? Yes, No, or Maybe?\n',
        0,
    ),
)

BOOLQ = one_of(
    ("Yes", "No"),
    (
        {"passage": "Owls hunt at night.", "question": "do owls hunt at night", "answer": True},
        "Owls hunt at night. Do owls hunt at night?\n",
        0,
    ),
    (
        {"passage": "Tin is a metal.", "question": "is tin a gas?", "answer": False},
        "Tin is a metal. Is tin a gas?\n",
        1,
    ),
    (
        {"passage": "NASA owns (some) rockets.", "question": "does NASA own a rocket", "answer": True},
        "NASA owns (some) rockets. Does NASA own a rocket?\n",
        0,
    ),
    (
        {"passage": "Élan means verve", "question": "élan is a kind of Deer", "answer": False},
        "Élan means verve Élan is a kind of Deer?\n",
        1,
    ),
    ({"passage": " Spaces. ", "question": "are there spaces", "answer": True}, " Spaces.  Are there spaces?\n", 0),
    (
        {"passage": "The {passage} of {time}.", "question": "is {question} asked", "answer": False},
        "The {passage} of {time}. Is {question} asked?\n",
        1,
    ),
    (
        {"passage": 'A "quoted" town.', "question": '"quoted" is a town', "answer": True},
        'A "quoted" town. "quoted" is a town?\n',
        0,
    ),
    (
        {"passage": "Line one.\nLine two.", "question": "is it one line.", "answer": False},
        "Line one.\nLine two. Is it one line.?\n",
        1,
    ),
    ({"passage": "Seven is odd.", "question": "7 is odd", "answer": True}, "Seven is odd. 7 is odd?\n", 0),
    (
        {"passage": "Why? Because.", "question": "Why ask? just say", "answer": False},
        "Why? Because. Why ask? just say?\n",
        1,
    ),
)

WSC = one_of(
    ("No", "Yes"),
    (
        {"text": "Ann thanked Eve because she had helped.", "span1_text": "Eve", "span2_text": "she", "label": 1},
        "Ann thanked Eve because she had helped.\nIn the previous sentence, does the pronoun "
        '"she" refer to Eve? Yes or No?\n',
        1,
    ),
    (
        {"text": "The cup fell off the tray. It broke.", "span1_text": "the tray", "span2_text": "It", "label": 0},
        "The cup fell off the tray. It broke.\nIn the previous sentence, does the pronoun "
        '"it" refer to the tray? Yes or No?\n',
        0,
    ),
    (
        {"text": " HE ran. ", "span1_text": "Bob ", "span2_text": "HE", "label": 0},
        ' HE ran. \nIn the previous sentence, does the pronoun "he" refer to Bob ? Yes or No?\n',
        0,
    ),
    (
        {"text": 'Tim told Al "you win"', "span1_text": "Al", "span2_text": "you", "label": 1},
        'Tim told Al "you win"\nIn the previous sentence, does the pronoun "you" refer to Al? Yes or No?\n',
        1,
    ),
    (
        {"text": "The {box} held {it}.", "span1_text": "The {box}", "span2_text": "{it}", "label": 0},
        'The {box} held {it}.\nIn the previous sentence, does the pronoun "{it}" refer to The {box}? Yes or No?\n',
        0,
    ),
    (
        {"text": "Chloë met José; he smiled.", "span1_text": "José", "span2_text": "he", "label": 1},
        'Chloë met José; he smiled.\nIn the previous sentence, does the pronoun "he" refer to José? Yes or No?\n',
        1,
    ),
    (
        {"text": "Two lines.\nThey end.", "span1_text": "Two lines", "span2_text": "They", "label": 1},
        'Two lines.\nThey end.\nIn the previous sentence, does the pronoun "they" refer to Two lines? Yes or No?\n',
        1,
    ),
    (
        {"text": "Who is he?", "span1_text": "Who?", "span2_text": "he", "label": 0},
        'Who is he?\nIn the previous sentence, does the pronoun "he" refer to Who?? Yes or No?\n',
        0,
    ),
    (
        {"text": "I gave my dog its bone", "span1_text": "I", "span2_text": "its", "label": 0},
        'I gave my dog its bone\nIn the previous sentence, does the pronoun "its" refer to I? Yes or No?\n',
        0,
    ),
    (
        {"text": "Éa saw ÉA's mother", "span1_text": "Éa", "span2_text": "ÉA's", "label": 1},
        "Éa saw ÉA's mother\nIn the previous sentence, does the pronoun \"éa's\" refer to Éa? Yes or No?\n",
        1,
    ),
)

WIC = one_of(
    ("No", "Yes"),
    (
        {"word": "bank", "sentence1": "The bank of a river.", "sentence2": "A bank lends money.", "label": 0},
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\n'
        "The bank of a river.\nA bank lends money.\n",
        0,
    ),
    (
        {"word": "run", "sentence1": "I run.", "sentence2": "You run.", "label": 1},
        'Does the word "run" have the same meaning in these two sentences? Yes, No?\nI run.\nYou run.\n',
        1,
    ),
    (
        {"word": "air", "sentence1": "Air the room", "sentence2": "Clean air", "label": 0},
        'Does the word "air" have the same meaning in these two sentences? Yes, No?\nAir the room\nClean air\n',
        0,
    ),
    (
        {"word": 'a "big" one', "sentence1": '"Big"', "sentence2": "'big'", "label": 1},
        'Does the word "a "big" one" have the same meaning in these two sentences? Yes, No?\n"Big"\n\'big\'\n',
        1,
    ),
    (
        {"word": " key ", "sentence1": " A key. ", "sentence2": "Key in {0}. ", "label": 0},
        'Does the word " key " have the same meaning in these two sentences? Yes, No?\n A key. \nKey in {0}. \n',
        0,
    ),
    (
        {"word": "{word}", "sentence1": "{sentence2}", "sentence2": "{sentence1}", "label": 1},
        'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence2}\n{sentence1}\n',
        1,
    ),
    (
        {"word": "café", "sentence1": "Ein Café.", "sentence2": "Le café.", "label": 0},
        'Does the word "café" have the same meaning in these two sentences? Yes, No?\nEin Café.\nLe café.\n',
        0,
    ),
    (
        {"word": "go", "sentence1": "Go?", "sentence2": "Go!", "label": 1},
        'Does the word "go" have the same meaning in these two sentences? Yes, No?\nGo?\nGo!\n',
        1,
    ),
    (
        {"word": "in", "sentence1": "In 5% of cases", "sentence2": "in %s", "label": 1},
        'Does the word "in" have the same meaning in these two sentences? Yes, No?\nIn 5% of cases\nin %s\n',
        1,
    ),
    (
        {"word": "x", "sentence1": "x", "sentence2": "x", "label": 1},
        'Does the word "x" have the same meaning in these two sentences? Yes, No?\nx\nx\n',
        1,
    ),
)
