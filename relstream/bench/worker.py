"""`python -m relstream.bench.worker`: one measurement, in a process that has done nothing else.

Reads the job as a line of JSON, writes its figures as one.
"""

from __future__ import annotations

import json

from relstream.bench.measure import Job, end_with_parent, read_line, write_line
from relstream.bench.scenarios import SCENARIOS
from relstream.tasks import run_async


def main() -> None:
    """Does the job."""
    job = Job(**json.loads(read_line()))
    end_with_parent()
    write_line(json.dumps(run_async(SCENARIOS[job.scenario].run(job))))


if __name__ == "__main__":
    main()
