"""What a client keeps: the two newest rounds, and never anything of a round still to be played."""

import numpy as np

from client.kept import recall, remember


def kept(value: float) -> dict[str, "np.ndarray[tuple[int], np.dtype[np.float32]]"]:
    return {"layers.0.q_proj": np.full(3, value, np.float32)}


def test_nothing_is_there_before_the_first_round() -> None:
    assert recall({}, 7) == {}


def test_the_newest_up_to_a_round_comes_back_bit_by_bit() -> None:
    state: dict[str, bytes] = {}
    for server_round in (1, 3, 4):
        remember(state, server_round, kept(server_round + 0.1))
    assert len(state) == 2
    assert recall(state, 9)["layers.0.q_proj"].tobytes() == kept(4.1)["layers.0.q_proj"].tobytes()
    assert recall(state, 3)["layers.0.q_proj"].tobytes() == kept(3.1)["layers.0.q_proj"].tobytes()
    assert recall(state, 2) == {}


def test_a_round_that_is_played_again_forgets_what_its_first_try_left() -> None:
    state: dict[str, bytes] = {}
    for server_round in (1, 2, 3):
        remember(state, server_round, kept(server_round))
    assert recall(state, 2)["layers.0.q_proj"][0] == 2.0  # round 3 is torn and played again
    remember(state, 3, kept(33.0))
    assert recall(state, 3)["layers.0.q_proj"][0] == 33.0
    remember(state, 2, kept(22.0))  # so is round 2
    assert recall(state, 9)["layers.0.q_proj"][0] == 22.0


def test_rounds_are_ordered_as_numbers() -> None:
    state: dict[str, bytes] = {}
    for server_round in (9, 10, 100):
        remember(state, server_round, kept(server_round))
    assert recall(state, 1000)["layers.0.q_proj"][0] == 100.0
    assert recall(state, 99)["layers.0.q_proj"][0] == 10.0
