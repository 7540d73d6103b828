"""The server with what its container lets it do: nothing to write to, nothing to reach, no rights."""

import shlex
import shutil
import subprocess
import sys

import pytest
from pictures import ROOT

BOX = shlex.split(
    "bwrap --ro-bind / / --dev /dev --proc /proc --tmpfs /var/tmp --unshare-all --cap-drop ALL --uid 10001 --gid 10001 "
    "--die-with-parent --setenv HOME /var/tmp --setenv MPLCONFIGDIR /var/tmp --setenv PYTHONDONTWRITEBYTECODE 1"
)
INSIDE = """
import asyncio, socket
from pathlib import Path
from bench_load import Visitor, draw
from bench_page import running_server

async def visit(address):
    async with Visitor(address) as visitor:
        shown = await visitor.ask("cat.jpg", draw(0))
        assert shown.verdict and len(shown.pictures) == 3 and not shown.errors, shown

for forbidden in (lambda: Path("written").write_text("x"), lambda: socket.create_connection(("192.0.2.1", 80), 5)):
    try:
        forbidden()
    except OSError:
        continue
    raise SystemExit("the box is open")
with running_server("serve.py") as (address, _):
    asyncio.run(visit(address))
print("answered")
"""


def test_it_needs_no_rights_no_network_and_no_disk() -> None:
    if not shutil.which("bwrap") or subprocess.run([*BOX, "true"], capture_output=True, check=False).returncode:
        pytest.skip("bubblewrap is not installed, or may not make a box here")
    done = subprocess.run([*BOX, sys.executable, "-c", INSIDE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "answered\n", done.stderr
