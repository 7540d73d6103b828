"""The server with what its container lets it do: nothing to write to, nothing to reach, no rights."""

import re
import shlex
import shutil
import socket
import subprocess
import sys
from fnmatch import fnmatch
from http.client import HTTPConnection
from pathlib import Path
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


def copy_stage(stage: str, target: Path) -> None:
    """Copy what the Dockerfile copies into a stage, from the first stage that it is built on."""
    admitted = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    stages = re.split(r"^(?=FROM )", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)[1:]
    for lines in stages:
        base, name = re.findall(r"^FROM (\S+)(?: AS (\S+))?", lines)[0]
        if name != stage:
            continue
        copy_stage(base, target)
        for line in re.findall(r"^COPY (.+)$", lines, re.MULTILINE):
            *sources, folder = line.split()
            (target / folder).mkdir(parents=True, exist_ok=True)
            for path in (path for source in sources for path in ROOT.glob(source)):
                if not any(fnmatch(path.relative_to(ROOT).as_posix(), pattern) for pattern in admitted):
                    continue
                if path.is_dir():
                    shutil.copytree(path, target / folder, dirs_exist_ok=True)
                else:
                    shutil.copy(path, target / folder)


PAGE = """
import serve
from streamlit.testing.v1 import AppTest
page = AppTest.from_file("app.py", default_timeout=100).run()
assert not page.exception, page.exception
print(serve.__file__)
"""
WATCH = """
import photo_library.sidecars, photo_library.watch, classify
print(classify.__file__)
"""


@pytest.mark.parametrize(("stage", "program", "file"), [("", PAGE, "serve.py"), ("watch", WATCH, "classify.py")])
def test_an_image_has_every_file_that_its_program_reads(stage: str, program: str, file: str, tmp_path: Path) -> None:
    copy_stage(stage, tmp_path)
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(tmp_path / file), done.stderr
