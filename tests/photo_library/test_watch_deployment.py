"""The service and the container run commands that classify.py accepts."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pictures import ROOT

import classify

UNIT = ROOT / "deploy" / "meme-classifier-watch@.service"


def arguments_of(command: list[str], monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(sys, "argv", ["classify.py", *command])
    return classify.parse_arguments()


def test_the_services_command_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unit = UNIT.read_text().replace("\\\n", "").replace("/home/%i/Pictures", str(tmp_path))
    (command,) = re.findall("ExecStart=(.*)", unit)
    _, program, *options = shlex.split(command)
    assert Path(program).name == "classify.py"
    arguments = arguments_of(options, monkeypatch)
    assert vars(arguments).items() >= {"watch": True, "xmp": True, "xmp_only": "meme"}.items()


def test_the_containers_command_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = yaml.safe_load((ROOT / "deploy" / "watch.compose.yaml").read_text())["services"]["watch"]
    options = [part.replace("/photos", str(tmp_path)) for part in service["command"]]
    arguments = arguments_of(options, monkeypatch)
    assert vars(arguments).items() >= {"watch": True, "xmp": True, "xmp_only": "meme"}.items()
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert re.search(rf"^FROM \S+ AS {service['build']['target']}$", dockerfile, re.MULTILINE)


def test_systemd_understands_the_service(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd is not installed")
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/meme-classifier/.venv/bin/python", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
