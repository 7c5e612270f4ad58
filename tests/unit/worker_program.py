"""A small worker for tests of the supervisor: it takes its place, and then does what its number is told.

    python -m tests.unit.worker_program 1=serve,2=break CHANNEL LISTENER

``serve``: whoever connects reads its process id; SIGTERM ends it. ``deaf``: the same, and it ignores SIGTERM.
``break``: ends with exit code 70 once all are ready. ``refuse``: says why it cannot begin. ``crash``: ends before it is
ready, without a word.
"""

import os
import signal
import sys
import time

from context_server.workers import EXIT_STORAGE_BROKEN, Assignment


def serve(assignment: Assignment) -> None:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    assignment.ready()
    (assignment.values / f"{assignment.number}-serves").touch()
    while True:
        connection, _ = assignment.listener.accept()
        with connection:
            connection.sendall(f"{os.getpid()}\n".encode())


def main() -> None:
    plan, channel, listener = sys.argv[1:]
    assignment = Assignment(int(channel), int(listener))
    assignment.watch()
    task = dict(each.split("=") for each in plan.split(","))[str(assignment.number)]
    match task:
        case "serve":
            serve(assignment)
        case "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            assignment.ready()
            while True:
                signal.pause()
        case "break":
            assignment.ready()
            while len(list(assignment.values.iterdir())) < plan.count(","):
                time.sleep(0.01)
            os._exit(EXIT_STORAGE_BROKEN)
        case "refuse":
            assignment.failed("There is no\ndatabase.")
        case "crash":
            os._exit(3)


if __name__ == "__main__":
    main()
