"""Work for the processes of test_jobs.py."""

import os
import signal
import time

from engine import console


def note(name, folder):
    """Write into a file when the work began and ended; models named "fails" and "is killed" do that instead.

    The one named "teacher" waits for that named "alone", and the one named "saves" until it is asked to stop.
    "for ever" prints its process's number and does not end.
    """
    began = time.time()
    if name == "for ever":
        print(os.getpid(), flush=True)
        time.sleep(600)
    if name == "fails":
        raise SystemExit(7)
    if name == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    while name == "teacher" and not os.path.exists(os.path.join(folder, "alone")):
        time.sleep(0.01)
    if name == "rank":
        with open(os.path.join(folder, "rank" + os.environ["LOCAL_RANK"]), "w"):
            time.sleep(1)  # so that the next one goes to the other process
        return
    if name == "saves":
        with console.stop_requests() as stop:
            open(os.path.join(folder, "started"), "w").close()
            while not stop():
                time.sleep(0.01)
    ended = time.time()  # the others see the file from here on
    with open(os.path.join(folder, name), "w") as file:
        file.write(f"{began} {ended}")
