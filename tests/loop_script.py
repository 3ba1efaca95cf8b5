# SPDX-License-Identifier: Apache-2.0
"""`jft` for tests/test_loop_processes.py: `python loop_script.py PROCESS:STEP:SIGNAL:MARK train --config=...`.

That process gets that signal when it makes that step's batch, once: the file MARK says that it was. Results come to process 0
in small pieces, of which the last of a leaf is not full.
"""

import os
import pathlib
import signal
import sys
from typing import Any

from jft import cli, jobs, transfer


def main(when: str, *arguments: str) -> int:
    process, step, name, mark = when.split(":")
    make, made = jobs.Job.batch, pathlib.Path(mark)

    def batch(job: jobs.Job, number: int) -> Any:
        import jax

        if (jax.process_index(), number + 1) == (int(process), int(step)) and not made.exists():
            made.touch()
            os.kill(os.getpid(), getattr(signal, name))
        return make(job, number)

    jobs.Job.batch, transfer.PIECE_BYTES = batch, 1280
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
