"""What is asked, and which tokens an answer is made of."""

from __future__ import annotations

from intervale.core.records import Message, Record
from intervale.data.prompt import TEMPLATES
from intervale.evaluate.prompts import answer_tail, letter_continuations, mcq_messages, messages_for, open_continuations

END = 900
TEMPLATE = TEMPLATES["internlm2-chat"]


class Longest:
    """A tokenizer that takes the longest known piece at every place, as BPE would: characters, and the pieces it is told."""

    add_bos = False

    def __init__(self, *pieces: str) -> None:
        self.pieces = {piece: 1000 + n for n, piece in enumerate(pieces)}
        self.texts = {number: piece for piece, number in self.pieces.items()}

    def encode(self, text: str) -> list[int]:
        ids = []
        while text:
            piece = max((p for p in self.pieces if text.startswith(p)), key=len, default=text[0])
            ids.append(self.pieces.get(piece) or 100_000 + ord(piece))
            text = text[len(piece) :]
        return ids

    def decode(self, ids: list[int]) -> str:
        return "".join(self.texts.get(n) or chr(n - 100_000) for n in ids)

    def control(self, token: str) -> int:
        assert token == TEMPLATE.end
        return END

    def eats_space(self, token: str) -> bool:
        return False


def record(
    question: str = "<image>\n图中的菜是什么味道?",
    said: str = "酸，图中的菜是酸辣粉",
    choices: tuple[str, ...] = ("酸", "酸辣"),
    answer: int = 0,
) -> Record:
    return Record("1", (Message("user", question), Message("assistant", said)), ("a.png",), choices, answer)


def texts(item: Record, tokenizer: Longest) -> list[list[str]]:
    return [
        ["END" if n == END else tokenizer.decode([n]) for n in ids]
        for ids in open_continuations(item, tokenizer, TEMPLATE, tokenizer.decode)
    ]


def test_open_asks_exactly_what_was_trained() -> None:
    assert messages_for(record(), "open") == record().messages[:1]


def test_mcq_lists_the_choices_with_letters_after_the_pictures_and_the_question() -> None:
    (message,) = mcq_messages(record())
    assert message.content == "<image>\n图中的菜是什么味道?\nA. 酸\nB. 酸辣\n请直接回答选项字母。"


def test_mcq_instructs_in_the_language_of_the_question() -> None:
    (message,) = mcq_messages(record("<image>\nHow does it taste?", "Sour", (" Sour ", "Hot"), 0))
    assert (
        message.content == "<image>\nHow does it taste?\nA. Sour\nB. Hot\nAnswer with the option's letter from the given choices directly."
    )


def test_mcq_keeps_earlier_turns_and_changes_the_last_one_alone() -> None:
    turns = (Message("user", "<image>\nhi"), Message("assistant", "hello"), Message("user", "taste?"), Message("assistant", "a"))
    asked = mcq_messages(Record("1", turns, ("a.png",), ("a", "b"), 0))
    assert asked[:2] == turns[:2]
    assert asked[2].content.startswith("taste?\nA. a\nB. b\n")


def test_every_choice_ends_as_the_datas_answers_end_so_that_a_prefix_has_no_advantage() -> None:
    assert texts(record(), Longest()) == [["酸", "，"], ["酸", "辣", "，"]]


def test_without_a_tail_the_end_token_ends_a_choice() -> None:
    assert texts(record(said="酸"), Longest()) == [["酸", "END"], ["酸", "辣", "END"]]
    assert texts(record(said="It tastes 酸"), Longest()) == [["酸", "END"], ["酸", "辣", "END"]]


def test_a_seam_that_the_tokenizer_joins_is_scored_as_it_was_trained() -> None:
    # "辣，" is one token in training; scored apart, 酸辣 would be judged by tokens the model never saw there.
    assert texts(record(), Longest("辣，")) == [["酸", "，"], ["酸", "辣，"]]
    # The comma goes together with what follows it: the token that holds it is scored whole, for every choice alike.
    assert texts(record(), Longest("，图中的")) == [["酸", "，图中的"], ["酸", "辣", "，图中的"]]


def test_the_tail_is_what_follows_the_right_choice() -> None:
    assert answer_tail(record()) == "，图中的菜是酸辣粉"
    assert answer_tail(record(choices=("甜", " 酸 "), answer=1)) == "，图中的菜是酸辣粉"
    assert answer_tail(record(choices=("甜", "辣"), answer=1)) == ""


def test_a_letter_stands_alone_after_the_header() -> None:
    tokenizer = Longest()
    assert [tokenizer.decode(ids) for ids in letter_continuations(5, tokenizer)] == ["A", "B", "C", "D", "E"]
