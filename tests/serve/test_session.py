"""The edits of one visitor of the page."""

from npedit.serve.session import MOST_TURNS, Result, Session, Turn


def turn(name, count=2):
    return Turn(f"{name}-before", name, tuple(Result(f"{name}-{seed}", seed) for seed in range(count)))


def test_edits_are_shown_chosen_and_undone():
    session = Session()
    assert session.shown is None and session.without_last_turn() == session and session.showing(0, 0) == session
    session = session.with_turn(turn("a")).with_turn(turn("b"))
    assert session.shown[1].file == "b-0"
    assert session.showing(0, 1).shown[1].file == "a-1"
    for number, result in ((2, 0), (-1, 0), (0, 2), (0, -1)):
        assert session.showing(number, result) == session
    undone = session.showing(0, 1).without_last_turn()
    assert undone.shown[1].file == "a-0" and undone.without_last_turn().shown is None


def test_the_oldest_edits_are_forgotten():
    session = Session()
    for i in range(MOST_TURNS + 3):
        session = session.with_turn(turn(str(i), 1))
    assert len(session.turns) == MOST_TURNS and session.turns[0].instruction == "3"
    assert session.shown[0].instruction == str(MOST_TURNS + 2)
