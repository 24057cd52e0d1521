"""The queue of a server: batches, limits, cancelling, draining. The editor is the embedded one."""

import threading
import time
from concurrent.futures import wait

import pytest
from PIL import Image

import npedit
from npedit.errors import UserError
from npedit.serve.queue import Draining, EditQueue, EditRequest, QueueFull, TooLate


@pytest.fixture(scope="module")
def editor():
    return npedit.Editor.open()


class Gate:
    """Opens the editor when it is told to, so that requests pile up before."""

    def __init__(self, editor):
        self.editor, self.event = editor, threading.Event()

    def __call__(self):
        self.event.wait(30)
        return self.editor


def request(seed=0, steps=1, **more):
    return EditRequest(Image.new("RGB", (32, 32), (seed * 9, 80, 90)), "paint it red", seed, steps, **more)


@pytest.fixture
def gate(editor):
    return Gate(editor)


def test_waiting_requests_of_equal_steps_are_one_batch(gate):
    sizes = []
    queue = EditQueue(gate, on_batch=lambda size, seconds: sizes.append(size))
    results = [queue.submit(request(i, steps)) for i, steps in enumerate([1, 2, 1, 1, 2])]
    with_reference = queue.submit(request(5, references=(Image.new("RGB", (32, 32)),)))
    gate.event.set()
    wait([*results, with_reference], 60)
    queue.close()
    assert sizes == [3, 2, 1]
    for i, (result, steps) in enumerate(zip(results, [1, 2, 1, 1, 2])):
        (alone,) = gate.editor.edit(request(i).picture, "paint it red", i, steps)
        assert max(abs(a - b) for a, b in zip(alone.tobytes(), result.result().tobytes())) <= 1


def test_a_full_queue_takes_nothing_more(gate):
    queue = EditQueue(gate, most_waiting=2)
    for i in range(2):
        queue.submit(request(i))
    with pytest.raises(QueueFull):
        queue.submit(request(2))
    gate.event.set()
    queue.close()


def test_a_request_that_waited_too_long_is_not_edited(gate):
    edited = []
    queue = EditQueue(gate, seconds=0.05, on_batch=lambda size, _: edited.append(size))
    late = queue.submit(request())
    time.sleep(0.1)
    gate.event.set()
    with pytest.raises(TooLate):
        late.result(30)
    assert queue.submit(request()).result(30).size == (32, 32)
    queue.close()
    assert edited == [1]


def test_a_cancelled_request_is_not_edited(gate):
    edited = []
    queue = EditQueue(gate, on_batch=lambda size, _: edited.append(size))
    gone, kept = queue.submit(request(0)), queue.submit(request(1))
    assert gone.cancel()
    gate.event.set()
    kept.result(30)
    queue.close()
    assert edited == [1]


def test_closing_edits_those_that_wait_and_refuses_others(gate):
    queue = EditQueue(gate)
    waiting = [queue.submit(request(i, 1 + i % 2)) for i in range(4)]
    closing = threading.Thread(target=queue.close)
    closing.start()
    while not queue.is_draining:
        time.sleep(0.01)
    with pytest.raises(Draining):
        queue.submit(request())
    gate.event.set()
    closing.join(60)
    assert all(one.done() and one.result().size == (32, 32) for one in waiting)


def test_a_bad_request_fails_alone(gate):
    queue = EditQueue(gate)
    good = queue.submit(request(0))
    bad = queue.submit(EditRequest(Image.new("RGB", (6400, 32)), "x", 0, 1))
    also_good = queue.submit(request(1))
    gate.event.set()
    with pytest.raises(UserError, match="sides"):
        bad.result(30)
    assert good.result(30).size == also_good.result(30).size == (32, 32)


def test_an_editor_that_does_not_open_is_told():
    def broken():
        raise UserError("expected an editor; got none")

    with pytest.raises(UserError, match="got none"):
        EditQueue(broken).editor.result(30)
