"""All hand-made examples by the name of the task, each with what the task must make of it."""

from task_examples_choices import COPA, MNLI, MULTIRC, RECORD, TREC
from task_examples_labels import BOOLQ, CB, RTE, SST2, WIC, WSC, Case
from task_examples_text import CNN_DAILYMAIL, DROP, SQUAD, SQUAD_V2

CASES: dict[str, list[Case]] = {
    "sst2": SST2,
    "rte": RTE,
    "cb": CB,
    "boolq": BOOLQ,
    "wsc": WSC,
    "wic": WIC,
    "multirc": MULTIRC,
    "copa": COPA,
    "record": RECORD,
    "squad": SQUAD,
    "drop": DROP,
    "trec": TREC,
    "mnli": MNLI,
    "squad_v2": SQUAD_V2,
    "cnn_dailymail": CNN_DAILYMAIL,
}
