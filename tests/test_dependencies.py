"""What is imported, and what that may do: no network, no code from elsewhere, no version with known holes."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(file for package in ("trainkit", "recipes", "benchmarks") for file in (ROOT / package).rglob("*.py"))
MODULES = [
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for file in SOURCES
    if file.parts[len(ROOT.parts)] != "benchmarks"
]
WATCHED = """
import sys
reached = []
_NETWORK = ("socket.connect", "socket.bind", "socket.send", "socket.get", "urllib.", "http.", "ftplib.", "smtplib.")
_PROCESSES = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")

def hear(event, arguments):
    # urllib3 asks the system for a port of its own when it is imported, to know whether there is IPv6.
    own = event == "socket.bind" and arguments[1] == ("::1", 0)
    if event.startswith(_NETWORK + _PROCESSES) and event != "socket.gethostname" and not own:
        reached.append(f"{event}({arguments!r:.300})")

sys.addaudithook(hear)
"""
"""The beginning of a program that lists what it does beyond its process."""

TRAINING = """
import torch
from tests.tiny import batch_of, make_module, make_state, make_step
from tests.trainer.tiny import SETTINGS, make_net, make_rows
from trainkit import Trainer, TrainingArguments, run
from trainkit.io.checkpoint import Saver, load_latest

module = make_module()
with Saver("run") as saver:
    for record in run(make_step(module), make_state(module), [batch_of(0), batch_of(1)]):
        saver.save(record.state)
assert load_latest("run", make_state(module)).step == 2
settings = {**SETTINGS, "save_strategy": "steps", "save_steps": 1, "max_steps": 2, "report_to": "tensorboard"}
trainer = Trainer(make_net(), TrainingArguments("out", **settings), train_dataset=make_rows(), eval_dataset=make_rows())
trainer.train()
trainer.evaluate()
trainer.save_model()
trainer.create_model_card()
"""


def reached_by(program: str, folder: Path) -> Any:
    """What a fresh process reaches for, where no environment variable keeps libraries from it."""
    environment = {k: v for k, v in os.environ.items() if "OFFLINE" not in k and "TELEMETRY" not in k}
    result = subprocess.run(
        [sys.executable, "-c", f"{WATCHED}\n{program}\nimport json\nprint('\\n' + json.dumps(reached))"],
        cwd=folder, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_an_import_reaches_no_network_and_starts_no_process(tmp_path: Path) -> None:
    assert len(MODULES) > 150
    program = f"import importlib\nfor name in {sorted(MODULES, reverse=True)}: importlib.import_module(name)"
    assert reached_by(program, tmp_path) == []


@pytest.mark.slow
def test_training_reaches_no_network(tmp_path: Path) -> None:
    assert reached_by(TRAINING, tmp_path) == []


def test_what_is_reached_would_be_seen(tmp_path: Path) -> None:
    calls = {
        "socket.getaddrinfo('localhost', 80)": "socket.getaddrinfo",
        "socket.socket().connect(('127.0.0.1', 9))": "socket.connect",
        "socket.socket().bind(('127.0.0.1', 0))": "socket.bind",
        "subprocess.Popen(['true']).wait()": "subprocess.Popen",
        "os.system('true')": "os.system",
    }
    tried = "".join(f"with contextlib.suppress(OSError): {call}\n" for call in calls)
    found = reached_by(f"import contextlib, os, socket, subprocess\n{tried}", tmp_path)
    # A call may be seen once more under what it calls.
    assert set(calls.values()) <= {event.partition("(")[0] for event in found}


def calls_with(name: str) -> list[tuple[str, ast.expr]]:
    """Where a keyword is given in a call or a dictionary, and its value."""
    found: list[tuple[str, ast.expr]] = []
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            given = [(k.arg, k.value) for k in node.keywords] if isinstance(node, ast.Call) else []
            if isinstance(node, ast.Dict):
                keys = [key.value if isinstance(key, ast.Constant) else None for key in node.keys]
                given = list(zip(keys, node.values, strict=True))  # type: ignore[arg-type]
            found += [(f"{file.relative_to(ROOT)}:{value.lineno}", value) for key, value in given if key == name]
    return found


def test_code_of_models_is_trusted_nowhere() -> None:
    given = calls_with("trust_remote_code")
    assert given
    assert [place for place, value in given if ast.unparse(value) != "False"] == []


def test_nothing_is_unpickled_but_tensors() -> None:
    safe = {place.rpartition(":")[0] for place, value in calls_with("weights_only") if ast.unparse(value) == "True"}
    loading = {
        str(file.relative_to(ROOT)): ast.unparse(node)
        for file in SOURCES
        if file.parts[len(ROOT.parts)] != "benchmarks"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler", "exec", "eval")
    }
    assert set(loading) == {"trainkit/io/checkpoint/interop.py"} == safe
    assert "weights_only=True" in loading["trainkit/io/checkpoint/interop.py"]


def project() -> dict[str, Any]:
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    content: dict[str, Any] = toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return content


def required(lines: list[str]) -> dict[str, Requirement]:
    return {found.name: found for found in map(Requirement, lines)}


def test_no_torch_is_allowed_whose_unpickler_has_known_holes() -> None:
    """Weights-only loading ran code before 2.6 and overwrote memory before 2.10."""
    torch = required(project()["dependencies"])["torch"].specifier
    assert not any(torch.contains(version) for version in ("2.5.1", "2.6.0", "2.9.1"))


def test_the_versions_of_the_tests_are_allowed_ones() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = required([line for line in lines if line and not line.startswith("#")])
    extras = project()["optional-dependencies"]
    wanted = required([*project()["dependencies"], *(line for lines in extras.values() for line in lines)])
    wanted.pop("trainkit")
    assert len(wanted) > 15
    for name, requirement in wanted.items():
        ((operator, version),) = ((one.operator, one.version) for one in pinned[name].specifier)
        assert operator == "==" and requirement.specifier.contains(version), name


def test_the_audit_passes_over_the_explained_advisories_only() -> None:
    printed = subprocess.run(["make", "-n", "audit"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    explained = re.findall(r"^\| (\S*\d{4}-\d+) \|", (ROOT / "docs/advisories.md").read_text(encoding="utf-8"), re.M)
    assert re.findall(r"--ignore-vuln (\S+)", printed) == explained != []


def test_nothing_that_follows_the_paths_of_an_index_is_called() -> None:
    """CVE-2026-69112, for which accelerate has no release."""
    calls = ("load_checkpoint_in_model", "load_checkpoint_and_dispatch")
    assert [file for file in SOURCES if any(call in file.read_text(encoding="utf-8") for call in calls)] == []
