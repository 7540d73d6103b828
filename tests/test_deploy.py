"""The server with what its container lets it do: nothing to write to, nothing to reach, no rights."""

import re
import shlex
import shutil
import socket
import subprocess
import sys
from http.client import HTTPConnection
from urllib.parse import urlsplit

import pytest
from pictures import ROOT

from benchmarks.page import running_server

BOX = shlex.split(
    "bwrap --ro-bind / / --dev /dev --proc /proc --tmpfs /var/tmp --unshare-all --cap-drop ALL --uid 10001 --gid 10001 "
    "--die-with-parent --setenv HOME /var/tmp --setenv MPLCONFIGDIR /var/tmp --setenv PYTHONDONTWRITEBYTECODE 1"
)
INSIDE = """
import asyncio, socket, sys
from pathlib import Path
from benchmarks.load import Visitor, draw
from benchmarks.page import running_server

async def visit(address):
    async with Visitor(address) as visitor:
        shown = await visitor.ask("cat.jpg", draw(0))
        assert shown.verdict and len(shown.pictures) == 3 and not shown.errors, shown

outside = ("127.0.0.1", int(sys.argv[1]))
for forbidden in (lambda: Path("written").write_text("x"), lambda: socket.create_connection(outside, 5)):
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
    with socket.create_server(("127.0.0.1", 0)) as outside:
        port = outside.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), 5).close()  # it can be reached, but not from the box
        command = [*BOX, sys.executable, "-c", INSIDE, str(port)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "answered\n", done.stderr


def test_visitors_are_let_in_at_the_sites_own_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    (hosts,) = re.findall("STREAMLIT_SERVER_ALLOWED_HOSTS: (.*)", (ROOT / "deploy" / "compose.yaml").read_text())
    monkeypatch.setenv("STREAMLIT_SERVER_ALLOWED_HOSTS", hosts.replace("${SITE:?see above}", "memes.example.org"))
    with running_server("serve.py") as (address, _):
        server = urlsplit(address)
        for host, status in (("memes.example.org", 101), ("evil.example.org", 403)):
            connection = HTTPConnection(server.hostname or "", server.port or 0, timeout=60)
            key = {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version": "13"}
            upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Origin": f"https://{host}"}
            connection.request("GET", "/_stcore/stream", headers={"Host": host} | key | upgrade)
            assert connection.getresponse().status == status
            connection.close()
