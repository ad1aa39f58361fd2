"""The process edge of every command."""

import os
import signal
import subprocess
import sys

PRINT = """
from mole_mega.errors import report_errors
with report_errors(debug=False) as outcome:
    for _ in range(100_000):
        print("a line")
raise SystemExit(outcome.code)
"""


def test_a_reader_that_has_seen_enough_ends_a_command_without_a_word():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", PRINT], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")
