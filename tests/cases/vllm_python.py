"""In place of a Python of the serving environment: `vllm_python.py SOCKET WORDS...` has vllm_forks.py be
`python WORDS...` with these files, this folder and this environment; hands on signals; ends as it does.
"""

import json
import os
import signal
import socket
import sys
from pathlib import Path

with socket.socket(socket.AF_UNIX) as forks:
    forks.connect(sys.argv[1])
    asked = {"words": sys.argv[2:], "environment": dict(os.environ), "folder": str(Path.cwd())}
    socket.send_fds(forks, [json.dumps(asked).encode()], [0, 1, 2])
    answers = forks.makefile()
    process = int(answers.readline())
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, lambda number, _: os.kill(process, number))
    sys.exit(int(answers.readline()))
